"""Calculator calls in a text: whether there is one, whether it is closed, and the value of its expression.

In: texts. Out: plain answers for the check `calculator`.
"""

from __future__ import annotations

from data.requests.generator import CALL_CLOSE, CALL_OPEN
from evaluators.measures.arithmetic import equal, evaluate, exactly


def called(text: str) -> bool:
    return CALL_OPEN in text


def closed(text: str) -> bool:
    opening = text.find(CALL_OPEN)
    return opening >= 0 and text.find(CALL_CLOSE, opening) >= 0


def correct(target: str, generation: str) -> bool | None:
    """Whether the generation's first expression has the same value as the target's; None if the target has no value.
    Never raises, whatever the texts are."""
    gold_expression = first_expression(target)
    gold = None if gold_expression is None else exactly(gold_expression)
    if gold is None:
        return None
    if generation == target:
        return True
    expression = first_expression(generation)
    if expression is None:
        return False
    if expression == gold_expression:
        return True
    value = exactly(expression)
    return value is not None and equal(value, gold)


def value(text: str) -> str | None:
    """`EXPR = VALUE` for the call in a text; None if there is no call."""
    if not called(text):
        return None
    expression = first_expression(text)
    if expression is None:
        return "the calculator call is not closed"
    result = evaluate(expression)
    return f"{expression} = {'no value' if result is None else _plain(result)}"


def _plain(value: float) -> str:
    """Whole numbers without a decimal point."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.10g}"


def first_expression(text: str) -> str | None:
    """The expression of the first closed `<tool_call>calculator(EXPR)</tool_call>` in `text`, or None.

    White space around `calculator`, its parentheses and EXPR is ignored. A closing tag closes the nearest opening
    tag before it, so an expression never contains a tag. Linear in the length of `text`.
    """
    start = 0
    while (end := text.find(CALL_CLOSE, start)) >= 0:
        opening = text.rfind(CALL_OPEN, start, end)
        if opening >= 0:
            call = text[opening + len(CALL_OPEN) : end].strip()
            if call.startswith("calculator") and call.endswith(")"):
                arguments = call[len("calculator") : -1].lstrip()
                if arguments.startswith("("):
                    return arguments[1:].strip()
        start = end + len(CALL_CLOSE)
    return None
