"""Arithmetic: right values, and no value for anything that is not plain arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.measures.arithmetic import MAX_CHARACTERS, equal, evaluate, exactly


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("62/404", 62 / 404),
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("2-3-4", -5),
        ("24/4/2", 3),
        ("-3", -3),
        ("--3", 3),
        ("5--3", 8),
        ("5-(-3)", 8),
        ("2*-3", -6),
        ("-(2+3)*2", -10),
        ("0.1+0.2", 0.3),
        (".5+1.", 1.5),
        ("1.5e3", 1500),
        ("15.E-1", 1.5),
        ("1e-999", 0),
        ("1e308*10/10", 1e308),
        (" ( 3 +\n4 )\t* 2 ", 14),
        ("007", 7),
        ("0/5", 0),
    ],
)
def test_values(expression: str, value: float) -> None:
    assert evaluate(expression) == pytest.approx(value, abs=1e-12)


NO_VALUE = [
    "",
    " ",
    "1/0",
    "1/(2-2)",
    "9**9**9",
    "2^3",
    "7//2",
    "7%2",
    "0x10",
    "0b1",
    "1_000",
    "1,000",
    "1e400",
    "-1e400",
    "1e999*1e999",
    "1e",
    "e1",
    "inf",
    "nan",
    "1 2",
    "1+",
    "+1",
    "*1",
    "()",
    "(1",
    "1)",
    "(1)(2)",
    "2(3)",
    "1..2",
    ".",
    "-",
    "abc",
    "__import__('os').system('true')",
    "(1).real",
    "a.b",
    "1+x",
    "[1]",
    "1;2",
    "1 if 1 else 2",
    "lambda: 1",
    "True",
    "10j",
    "'1'",
    "٣+٤",
    "３+４",
    "²",
    "½",
    "1−2",
    "2×3",
    "6÷2",
    "1\u00a0+1",
    "1\u20282",
    "1\x00",
    "calculator(1+1)",
]


@pytest.mark.parametrize("expression", NO_VALUE)
def test_no_value(expression: str) -> None:
    assert evaluate(expression) is None


def test_limits() -> None:
    assert evaluate("(" * 50 + "1" + ")" * 50) == 1
    assert evaluate("-" * 50 + "1") == 1
    for nested in ("(" * 249 + "1" + ")" * 249, "-" * 499 + "1", "(-" * 160 + "1" + ")" * 160):
        assert evaluate(nested) in (None, 1, -1)
    assert evaluate("1e9999999999") is None
    assert evaluate("1e999/" * 80 + "3") is None
    assert evaluate("1" + "+1" * (MAX_CHARACTERS // 2 - 1)) == MAX_CHARACTERS // 2
    assert evaluate("(" * 10_000) is None
    assert evaluate("(" * 10_000 + "1" + ")" * 10_000) is None
    assert evaluate("9" * 1_000_000) is None
    assert evaluate("9" * 308) == pytest.approx(1e308)
    assert evaluate("9" * 310) is None
    assert evaluate("9" * 200 + "*" + "9" * 200) is None
    assert evaluate("1e308*10") is None


def test_whole_numbers_that_share_a_float_stay_apart() -> None:
    one, other = exactly("9007199254740993"), exactly("9007199254740992")
    assert one is not None
    assert other is not None
    assert not equal(one, other)
    assert equal(one, one)


@pytest.mark.parametrize(
    ("other", "close"),
    [("1.5000010", True), ("1.5000011", False), ("1.4999990", True), ("-3/-2", True), ("-1.5", False)],
)
def test_equal_means_within_a_millionth(other: str, close: bool) -> None:
    assert equal(exactly("3/2") or Fraction(), exactly(other) or Fraction()) is close


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction | None]:
    """An expression in text, and its value computed beside the parser; None where it divides by zero."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.one_of(st.integers(0, 10**6).map(str), st.decimals(0, 1000, places=2).map(str)))
        return number, Fraction(number)
    (left, a), (right, b) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    operator = draw(st.sampled_from("+-*/"))
    space = draw(st.sampled_from(["", " ", "\n"]))
    text = f"({left}){space}{operator}{space}({right})"
    if draw(st.booleans()):
        text, a = f"-{text}", None if a is None else -a if operator in "*/" else a
        if operator in "+-":
            text = text[1:]
    if a is None or b is None or (operator == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]


@settings(deadline=None)
@given(expressions())
def test_agrees_with_fractions(pair: tuple[str, Fraction | None]) -> None:
    expression, value = pair
    assert exactly(expression) == value


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="0123456789+-*/(). e\n", max_size=60))
def test_never_raises_and_is_finite(text: str) -> None:
    value = evaluate(text)
    assert value is None or math.isfinite(value)
