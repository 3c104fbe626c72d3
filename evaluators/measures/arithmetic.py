"""The value of an arithmetic expression: parsed by Python's parser, never run.

In: text such as `(3+4)*-2.5`. Out: its value, exact or as a float, or None for anything that is not plain arithmetic.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 500
MAX_BITS = 4096
"""Bound on every intermediate numerator and denominator: it limits the work, not the result."""

_PLAIN = re.compile(r"[0-9eE.+\-*/() \t\r\n]+")
_LARGE_EXPONENT = re.compile(r"[eE][+-]?[0-9]{4}")
_LEADING_ZEROS = re.compile(r"(?<![0-9eE.])0+(?=[0-9])")
_SPACES = str.maketrans("\t\r\n", "   ")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str) -> float | None:
    """Value of an expression over numbers with `+ - * /`, unary minus and parentheses, or None if it has none.

    None, never an exception, for division by zero, overflow, any other operator, name or digit than ASCII ones, more
    than 500 characters, or nesting that Python's parser refuses. The time taken is bounded whatever the text.

    >>> evaluate("(3 + 4) * -2.5"), evaluate("1/0"), evaluate("9**9")
    (-17.5, None, None)
    """
    value = exactly(expression)
    return None if value is None else float(value)


def exactly(expression: str) -> Fraction | None:
    """Like `evaluate`, without rounding, so that integers too large to differ as floats still differ."""
    if len(expression) > MAX_CHARACTERS or not _PLAIN.fullmatch(expression) or _LARGE_EXPONENT.search(expression):
        return None
    text = _LEADING_ZEROS.sub("", expression.translate(_SPACES).strip())
    try:
        value = _value(ast.parse(text, mode="eval").body, text)
        float(value)  # what no float can hold is an overflow
    except (SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None
    return value


def equal(left: Fraction, right: Fraction) -> bool:
    """Whether two values are within 1e-6 of each other."""
    return abs(left - right) * 10**6 <= 1


def _value(node: ast.expr, text: str) -> Fraction:
    """Raises ValueError if `node` is not plain arithmetic, ArithmeticError if it has no value."""
    match node:
        case ast.Constant():
            value = Fraction(text[node.col_offset : node.end_col_offset])  # as written: a float would round it
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](_value(left, text), _value(right, text))
        case _:
            raise ValueError
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise OverflowError
    return value
