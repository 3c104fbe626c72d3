"""Calculator calls: what counts as one, what it is worth, hostile generations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.requests.generator import CALL_CLOSE, CALL_OPEN
from evaluators.measures.arithmetic import evaluate
from evaluators.measures.calculator import called, closed, correct, first_expression, value


def call(expression: str) -> str:
    return f"{CALL_OPEN}calculator({expression}){CALL_CLOSE}"


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (call("1+1"), "1+1"),
        (f"Sure: {call('1+1')} done.", "1+1"),
        (call("1+1") + call("2+2"), "1+1"),
        (call("(1+2)*3"), "(1+2)*3"),
        (f"{CALL_OPEN}\n calculator ( 1 + 1 )\n{CALL_CLOSE}", "1 + 1"),
        (f"{CALL_OPEN}weather(Paris){CALL_CLOSE}{call('3')}", "3"),
        (f"{CALL_OPEN}{call('1+1')}{CALL_CLOSE}", "1+1"),
        (f"{CALL_OPEN}calculator(9 {call('1+1')}", "1+1"),
        (call("x") + call("1"), "x"),
        (call(""), ""),
        (f"{CALL_CLOSE}{CALL_OPEN}calculator(1)", None),
        (f"{CALL_OPEN}calculator(1)", None),
        (f"calculator(1){CALL_CLOSE}", None),
        (f"{CALL_OPEN}calculator 1{CALL_CLOSE}", None),
        (f"{CALL_OPEN}calculator(1) and more{CALL_CLOSE}", None),
        (f"{CALL_OPEN}1+1{CALL_CLOSE}", None),
        ("<TOOL_CALL>calculator(1)</TOOL_CALL>", None),
        ("", None),
    ],
)
def test_first_expression(text: str, expression: str | None) -> None:
    assert first_expression(text) == expression


@pytest.mark.parametrize(
    ("generation", "score"),
    [
        (call("6/4"), (True, True, True)),
        (call("3/2"), (True, True, True)),
        (call("1.5000001"), (True, True, True)),
        (call("1.50001"), (True, True, False)),
        (call("4/6"), (True, True, False)),
        (f"Let me see. {call('6/4')} There.", (True, True, True)),
        (call("6/5") + call("6/4"), (True, True, False)),
        (f"{CALL_OPEN}calculator(6/4)", (True, False, False)),
        (f"{CALL_OPEN}6/4{CALL_CLOSE}", (True, True, False)),
        (f"{CALL_CLOSE}{CALL_OPEN}calculator(6/4)", (True, False, False)),
        ("calculator(6/4)", (False, False, False)),
        ("1.5", (False, False, False)),
        ("", (False, False, False)),
        (call("6/0"), (True, True, False)),
        (call("__import__('os')"), (True, True, False)),
        (call("9**9**9"), (True, True, False)),
        (call("0x6/4"), (True, True, False)),
        (call("٦/4"), (True, True, False)),
        (call("1e400"), (True, True, False)),
        (call("(" * 10_000 + "1.5" + ")" * 10_000), (True, True, False)),
        (call("9" * 1_000_000), (True, True, False)),
    ],
)
def test_what_is_said_of_a_call(generation: str, score: tuple[bool, bool, bool]) -> None:
    assert judged(call("6/4"), generation) == score


def judged(target: str, generation: str) -> tuple[bool, bool, bool | None]:
    return called(generation), closed(generation), correct(target, generation)


@pytest.mark.parametrize("target", ["no call", call("1/0"), call("9" * 600), f"{CALL_OPEN}calculator(1+1)"])
def test_without_a_gold_value_arithmetic_is_undefined(target: str) -> None:
    assert correct(target, target) is None


def test_whole_numbers_that_share_a_float_are_not_equal() -> None:
    assert correct(call("9007199254740993"), call("9007199254740992")) is False


@pytest.mark.parametrize(
    "unit", [CALL_OPEN, CALL_CLOSE, f"{CALL_OPEN}calculator(", f"{CALL_OPEN}calculator(){CALL_CLOSE}"]
)
def test_a_megabyte_of_tags_is_scored_in_one_pass(unit: str) -> None:
    """Quadratic matching would take hours here."""
    assert correct(call("1+1"), unit * (1_000_000 // len(unit))) is False


hostile_text = st.lists(
    st.sampled_from(
        [
            CALL_OPEN,
            CALL_CLOSE,
            "calculator",
            "(",
            ")",
            "1",
            "+",
            "-",
            "*",
            "/",
            ".",
            " ",
            "\n",
            "e9",
            "x",
            "٣",
            "\ud800",
            "2",
        ]
    )
    | st.text(max_size=5),
    max_size=30,
).map("".join)


@settings(deadline=None)
@given(hostile_text, hostile_text)
def test_judging_never_raises_and_correct_means_equal_values(target: str, generation: str) -> None:
    there, ended, right = judged(target, generation)
    assert not ended or there
    assert (value(generation) is not None) == there
    if right:
        gold, found = (evaluate(first_expression(text) or "") for text in (target, generation))
        assert gold is not None
        assert found is not None
        assert found == pytest.approx(gold, rel=1e-12, abs=1.0001e-6)


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_text_around_a_call_does_not_matter(before: str, after: str) -> None:
    if CALL_OPEN not in before and CALL_CLOSE not in before:
        assert judged(call("1+1"), before + call("2") + after) == (True, True, True)


def test_what_a_chat_remarks() -> None:
    assert value("In 1987.") is None
    assert value(call("6/4")) == "6/4 = 1.5"
    assert value(call("6*7")) == "6*7 = 42"
    assert value(call("1/0")) == "1/0 = no value"
    assert value(CALL_OPEN) == "the calculator call is not closed"
