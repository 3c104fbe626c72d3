"""Calculator requests: targets that say what the words say, evaluation phrasings that training never has."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from data.requests import generator as requests
from data.requests.generator import RequestOptions, tool_ood_rows, tool_rows
from data.rows import DataError, Row
from evaluators.measures.arithmetic import evaluate
from evaluators.measures.calculator import first_expression

NUMBER = re.compile(r"\d+(?:\.\d+)?")

OPTIONS = [
    RequestOptions(),
    RequestOptions(decimals=True, negatives=True, parentheses=True),
    RequestOptions(operators="/", operand_min=0, operand_max=3, ood_operand_min=4, ood_operand_max=9, parentheses=True),
    RequestOptions(operators="-", negatives=True),
]


def drawn(source, options: RequestOptions, count: int = 800) -> list[Row]:
    return list(islice(source(random.Random("test"), options), count))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("source", [tool_rows, tool_ood_rows])
def test_every_target_is_one_call_with_a_value_and_the_numbers_of_the_request(source, options: RequestOptions) -> None:
    for row in drawn(source, options):
        expression = first_expression(row.target)
        assert expression is not None
        assert row.target == f"<tool_call>calculator({expression})</tool_call>"
        assert " " not in expression
        assert evaluate(expression) is not None, row
        assert sorted(NUMBER.findall(row.input)) == sorted(NUMBER.findall(expression)), row
        assert row.label == ("tool" if source is tool_rows else "tool_ood")


@pytest.mark.parametrize(
    ("table", "text", "expression"),
    [
        (requests.WORD_REQUESTS, "Subtract 2 from 9.", "9-2"),
        (requests.WORD_REQUESTS, "What do I get if I take 2 away from 9?", "9-2"),
        (requests.WORD_REQUESTS, "How many times does 2 go into 9?", "9/2"),
        (requests.WORD_REQUESTS, "We share 9 dollars between 2 people. How much does each one get?", "9/2"),
        (requests.WORD_REQUESTS, "A ticket costs 2 dollars and we need 9 of them. What will we pay?", "9*2"),
        (requests.OOD_WORD_REQUESTS, "Knock 2 off 9 and report the remainder.", "9-2"),
        (requests.OOD_WORD_REQUESTS, "2 equal slices out of 9: state the size of a slice.", "9/2"),
    ],
)
def test_words_that_turn_the_operands_round(table, text: str, expression: str) -> None:
    operator = expression[1]
    assert text in [request.format(a=9, b=2) for request in table[operator]]


def test_both_operands_in_every_word_request() -> None:
    for table in (requests.WORD_REQUESTS, requests.OOD_WORD_REQUESTS):
        assert set(table) == set("+-*/")
        for request in (text for texts in table.values() for text in texts):
            assert request.count("{a}") == request.count("{b}") == 1


def frame(text: str) -> str:
    return NUMBER.sub("#", text)


def test_ood_phrasings_are_no_training_phrasings() -> None:
    trained = {row.template for row in drawn(tool_rows, RequestOptions(), 5000)}
    assert not trained & {row.template for row in drawn(tool_ood_rows, RequestOptions(), 5000)}
    words = [set(re.findall(r"[a-z]{4,}", text.lower())) for text in requests.SYMBOL_REQUESTS]
    words += [
        set(re.findall(r"[a-z]{4,}", text.lower())) for texts in requests.WORD_REQUESTS.values() for text in texts
    ]
    for text in [*requests.OOD_SYMBOL_REQUESTS, *sum(requests.OOD_WORD_REQUESTS.values(), ())]:
        own = set(re.findall(r"[a-z]{4,}", text.lower()))
        assert not own or max(len(own & other) / len(own | other) for other in words) <= 0.34, text


def test_second_ood_family_has_unseen_operands_or_lengths() -> None:
    options = RequestOptions()
    rows = drawn(tool_ood_rows, options)
    numbers = [[int(number) for number in NUMBER.findall(row.input)] for row in rows]
    assert all(max(values) <= 999 and len(values) == 2 for values in numbers[::2])
    assert all(min(values) >= 1000 or len(values) == 3 for values in numbers[1::2])
    assert {len(values) for values in numbers[1::2]} == {2, 3}


def test_options_show_in_the_requests() -> None:
    plain = [row.target for row in drawn(tool_rows, RequestOptions())]
    assert not any(re.search(r"\.|\(-|\(\(|calculator\(-", target) for target in plain)
    rich = [row.target for row in drawn(tool_rows, RequestOptions(decimals=True, negatives=True, parentheses=True))]
    for pattern in (r"\d\.\d", r"calculator\(-", r"[-+*/]\(-", r"calculator\(\(", r"\)[-+*/]\("):
        assert any(re.search(pattern, target) for target in rich), pattern
    only_times = [row.target for row in drawn(tool_rows, RequestOptions(operators="*"))]
    assert not any(re.search(r"\d[-+/]\d", target) for target in only_times)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": "+^"}, r"operators is '\+\^'; allowed"),
        ({"operators": ""}, "operators is ''"),
        ({"operand_min": 5, "operand_max": 5}, "operand_min 5 and operand_max 5"),
        ({"operand_min": -5}, "operand_min -5"),
        ({"ood_operand_min": 500}, "ood_operand_min 500 .* unseen"),
    ],
)
def test_contradictory_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RequestOptions(**options)
