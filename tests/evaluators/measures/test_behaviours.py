"""Behaviours: each kind of check says what its name says, and a wrong one is named before anything runs."""

import pytest

from data.rows import DataError
from evaluators.measures.behaviours import KINDS, Answer, read_behaviours

CALL = "<tool_call>calculator({})</tool_call>"


def said(asked, text, target="", label="letters", tokens=3):
    (behaviour,) = read_behaviours({"it": asked}).values()
    return behaviour(Answer("a request", target, label, text, tokens))


def ends_in_a_stop(text, target, generation):
    return None if not generation else generation.endswith(".") and text == "a request"


@pytest.mark.parametrize(
    ("asked", "yes", "no"),
    [
        ({"contains": "please"}, "yes, please", "Please"),
        ({"starts_with": "Dear"}, "Dear you", "oh Dear"),
        ({"ends_with": "Yours, Ada"}, "apple\nYours, Ada", "Yours, Ada, apple"),
        ({"matches": r"\d{4}-\d{2}-\d{2}"}, "on 2026-11-25 or so", "on 26-11-25"),
        ({"matches": "(?i)^yes$"}, "YES", "yes!"),
        ("json", '{"a": [1, 2]}', "{a: 1}"),
        ("json", "3", "[" * 5000),
        ("calculator", "well <tool_call>", "no call"),
        ({"calculator": "closed"}, CALL.format("1"), "<tool_call>calculator(1)"),
        ({"python": f"{__name__}:ends_in_a_stop"}, "An end.", "No end"),
    ],
)
def test_a_check_says_yes_and_no(asked, yes, no):
    assert said(asked, yes) is True
    assert said(asked, no) is False


def test_what_needs_a_target_or_a_length():
    assert said("equals_target", "same", target="same") is True
    assert said({"equals_target": True}, "same ", target="same") is False
    assert said({"at_most_tokens": 3}, "x") is True
    assert said({"at_most_tokens": 2}, "x") is False
    assert said({"calculator": "correct"}, CALL.format("2 + 1"), target=CALL.format("1 + 2")) is True
    assert said({"calculator": "correct"}, CALL.format("2 + 2"), target=CALL.format("1 + 2")) is False


def test_a_question_that_does_not_arise_is_no_answer():
    polite = {"contains": "please", "on": ["letters", "mails"]}
    assert said(polite, "please") is True
    assert said(polite, "please", label="copy") is None
    assert said({"calculator": "correct"}, CALL.format("2"), target="no call") is None
    assert said({"python": f"{__name__}:ends_in_a_stop"}, "") is None


def broken(text, target, generation):
    return 1 / 0


def test_a_users_check_that_fails_is_one_sentence():
    with pytest.raises(DataError, match=r"broken failed on 'a request' \(ZeroDivisionError"):
        said({"python": f"{__name__}:broken"}, "x")
    with pytest.raises(DataError, match="is not a function"):
        said({"python": "math:pi"}, "x")


def test_a_pattern_cannot_hang():
    assert said({"matches": "(a|aa)+$"}, "a" * 5000 + "b") is False


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("polite", "there is no check 'polite'; allowed: equals_target, contains"),
        ({"contains": "a", "starts_with": "b"}, "names 2 checks, must name one of equals_target"),
        ({"on": ["copy"]}, "names 0 checks"),
        ({"contains": ""}, "contains takes text, got ''"),
        ({"contains": 7}, "contains takes text, got 7"),
        ({"matches": "(?=a)b"}, "matches '(?=a)b' is not a regular expression that RE2 reads"),
        ({"at_most_tokens": 0}, "at_most_tokens takes a whole number, 1 or larger, got 0"),
        ({"at_most_tokens": True}, "at_most_tokens takes a whole number"),
        ({"calculator": "used"}, "calculator takes called, closed, correct or nothing, got 'used'"),
        ({"json": "strict"}, "json takes no option, got 'strict'"),
        ({"equals_target": True, "on": "copy"}, "on takes a list of subsets, got 'copy'"),
        ({"python": "no_such_module:f"}, "python cannot import 'no_such_module:f'"),
        ({"python": "json"}, "it takes MODULE:FUNCTION"),
        ({"python": "json:no_such_function"}, "cannot import 'json:no_such_function'"),
    ],
)
def test_a_wrong_check_is_one_sentence(asked, why):
    with pytest.raises(DataError) as raised:
        read_behaviours({"it": asked})
    assert str(raised.value).startswith("evaluate.behaviours.it: ")
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["agrees_with_raw", "tokens", "examples", "delta_x"])
def test_a_name_that_the_tables_need_is_taken(name):
    with pytest.raises(DataError, match=f"{name}: the tables already use this name"):
        read_behaviours({name: "json"})


def test_every_kind_is_tried_here():
    assert set(KINDS) == {
        *(
            "equals_target",
            "contains",
            "starts_with",
            "ends_with",
            "matches",
            "json",
            "at_most_tokens",
            "calculator",
            "python",
        ),
    }
