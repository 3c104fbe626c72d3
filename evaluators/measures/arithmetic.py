"""The value of an arithmetic expression, by a parser with limits; nothing is ever handed to Python to run.

In: text such as `(3+4)*-2.5`. Out: its value, exact or as a float, or None for anything that is not plain arithmetic.
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 500
MAX_DEPTH = 50
MAX_BITS = 4096
"""No numerator or denominator may grow beyond this on the way: it bounds the work, not the result."""

Ratio = tuple[int, int]
"""Numerator and positive denominator, not reduced: exact like a Fraction, and several times faster to work with."""

_TOKEN = re.compile(r"[ \t\r\n]*(?:((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)|([-+*/()]))")
_TWO_INTEGERS = re.compile(r"([0-9]{1,15})([-+*/])([0-9]{1,15})")


class _NoValue(Exception):
    """The expression has no value; caught by `ratio`, never seen outside."""


def evaluate(expression: str) -> float | None:
    """Value of an expression over numbers with `+ - * /`, unary minus and parentheses, or None if it has none.

    None, never an exception, for division by zero, overflow, any other operator, name or digit than ASCII ones,
    more than 500 characters or 50 nested levels. The time taken is bounded whatever the text.

    >>> evaluate("(3 + 4) * -2.5"), evaluate("1/0"), evaluate("9**9")
    (-17.5, None, None)
    """
    value = ratio(expression)
    return None if value is None else value[0] / value[1]


def ratio(expression: str) -> Ratio | None:
    """As `evaluate`, without rounding: whole numbers too large to differ as floats stay apart."""
    if simple := _TWO_INTEGERS.fullmatch(expression):
        left, operator, right = simple.groups()
        try:
            return _OPERATIONS[operator]((int(left), 1), (int(right), 1))
        except _NoValue:
            return None
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        value = _Parser(expression).whole()
        value[0] / value[1]  # what no float can hold is an overflow
    except (_NoValue, OverflowError):
        return None
    return value


def equal(left: Ratio, right: Ratio) -> bool:
    """Whether two values are within 1e-6 of each other."""
    return abs(left[0] * right[1] - right[0] * left[1]) * 10**6 <= left[1] * right[1]


class _Parser:
    """Recursive descent: sum -> product -> factor; depth is counted, so recursion is bounded."""

    def __init__(self, expression: str) -> None:
        self.tokens = _tokens(expression)
        self.at = 0
        self.depth = 0

    def whole(self) -> Ratio:
        value = self.sum()
        if self.tokens[self.at] != "":
            raise _NoValue
        return value

    def sum(self) -> Ratio:
        value = self.product()
        while (operator := self.tokens[self.at]) in ("+", "-"):
            self.at += 1
            value = _bounded(_OPERATIONS[operator](value, self.product()))
        return value

    def product(self) -> Ratio:
        value = self.factor()
        while (operator := self.tokens[self.at]) in ("*", "/"):
            self.at += 1
            value = _bounded(_OPERATIONS[operator](value, self.factor()))
        return value

    def factor(self) -> Ratio:
        token = self.tokens[self.at]
        self.at += 1
        if token not in ("-", "("):
            return _number(token)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NoValue
        if token == "-":
            numerator, denominator = self.factor()
            value = -numerator, denominator
        else:
            value = self.sum()
            if self.tokens[self.at] != ")":
                raise _NoValue
            self.at += 1
        self.depth -= 1
        return value


def _divide(a: Ratio, b: Ratio) -> Ratio:
    if b[0] == 0:
        raise _NoValue
    return (a[0] * b[1], a[1] * b[0]) if b[0] > 0 else (-a[0] * b[1], -a[1] * b[0])


_OPERATIONS = {
    "+": lambda a, b: (a[0] * b[1] + b[0] * a[1], a[1] * b[1]),
    "-": lambda a, b: (a[0] * b[1] - b[0] * a[1], a[1] * b[1]),
    "*": lambda a, b: (a[0] * b[0], a[1] * b[1]),
    "/": _divide,
}


def _tokens(expression: str) -> list[str]:
    """Numbers and symbols in order, then `""` for the end."""
    tokens = []
    text = expression.rstrip(" \t\r\n")
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _NoValue
        tokens.append(match[1] or match[2])
        at = match.end()
    tokens.append("")
    return tokens


def _number(token: str) -> Ratio:
    if token.isdigit():
        return int(token), 1
    if not token or token in "+*/)":
        raise _NoValue
    digits, _, exponent = token.lower().partition("e")
    whole, _, decimals = digits.partition(".")
    power = int(exponent or 0) - len(decimals)
    number = int(whole + decimals)
    return _bounded((number * 10**power, 1) if power >= 0 else (number, 10**-power))


def _bounded(value: Ratio) -> Ratio:
    if value[0].bit_length() > MAX_BITS or value[1].bit_length() > MAX_BITS:
        raise _NoValue
    return value
