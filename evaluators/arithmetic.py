"""The value of an arithmetic expression, by a parser with limits; nothing is ever handed to Python to run.

In: text such as `(3+4)*-2.5`. Out: its value, exact or as a float, or None for anything that is not plain arithmetic.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 500
MAX_DEPTH = 50
MAX_BITS = 1024
"""Numerators and denominators beyond this many bits, about the largest float, have no value."""

Exact = int | Fraction

_TOKEN = re.compile(r"[ \t\r\n]*(?:((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)|([-+*/()]))")
_TWO_INTEGERS = re.compile(r"([0-9]{1,15})([-+*/])([0-9]{1,15})")


class _NoValue(Exception):
    """The expression has no value; caught by `exact_value`, never seen outside."""


def evaluate(expression: str) -> float | None:
    """Value of an expression over numbers with `+ - * /`, unary minus and parentheses, or None if it has none.

    None, never an exception, for division by zero, overflow, any other operator, name or digit than ASCII ones,
    more than 500 characters or 50 nested levels. The time taken is bounded whatever the text.

    >>> evaluate("(3 + 4) * -2.5"), evaluate("1/0"), evaluate("9**9")
    (-17.5, None, None)
    """
    value = exact_value(expression)
    return None if value is None else float(value)


def exact_value(expression: str) -> Exact | None:
    """As `evaluate`, without rounding: large whole numbers that share a float stay apart."""
    if simple := _TWO_INTEGERS.fullmatch(expression):
        left, operator, right = simple.groups()
        if operator == "*":
            return int(left) * int(right)
        if operator == "+":
            return int(left) + int(right)
        if operator == "-":
            return int(left) - int(right)
        return Fraction(int(left), divisor) if (divisor := int(right)) else None
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        return _Parser(expression).whole()
    except (_NoValue, ZeroDivisionError, OverflowError):
        return None


class _Parser:
    """Recursive descent: sum -> product -> factor; depth is counted, so recursion is bounded."""

    def __init__(self, expression: str) -> None:
        self.tokens = _tokens(expression)
        self.at = 0
        self.depth = 0

    def whole(self) -> Exact:
        value = self.sum()
        if self.tokens[self.at] != "":
            raise _NoValue
        float(value)  # a value that no float can hold is an overflow
        return value

    def sum(self) -> Exact:
        value = self.product()
        while (operator := self.tokens[self.at]) in ("+", "-"):
            self.at += 1
            term = self.product()
            value = _bounded(value + term if operator == "+" else value - term)
        return value

    def product(self) -> Exact:
        value = self.factor()
        while (operator := self.tokens[self.at]) in ("*", "/"):
            self.at += 1
            factor = self.factor()
            value = _bounded(value * factor if operator == "*" else Fraction(value) / factor)
        return value

    def factor(self) -> Exact:
        token = self.tokens[self.at]
        self.at += 1
        if token not in ("-", "("):
            return _number(token)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NoValue
        if token == "-":
            value = -self.factor()
        else:
            value = self.sum()
            if self.tokens[self.at] != ")":
                raise _NoValue
            self.at += 1
        self.depth -= 1
        return value


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


def _number(token: str) -> Exact:
    if not token or token in "+*/)":
        raise _NoValue
    return _bounded(int(token) if token.isdigit() else Fraction(token))


def _bounded(value: Exact) -> Exact:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise _NoValue
    return value
