"""Behaviour cells: each ask's figures are those of a run of its own, and guesses change no output."""

import pytest

from data.encoding import Encoded
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour
from evaluators.splice import decoding
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit
from evaluators.splice.limits import Limits
from evaluators.splice.teacher_forcing import Job, score
from tests.evaluators.conftest import CALCULATOR

SETTINGS = {"limits": Limits(5), "behaviours": read_behaviours(CALCULATOR)}
ASKS = [Ask("no_delta"), Ask("alpha", 0.0), Ask("full"), Ask("alpha", 0.5), Ask("alpha", 1.0)]


@pytest.fixture(scope="module")
def raw(subject):
    ((ask, figures, texts),) = evaluate_behaviour(subject.passes, (), subject.rows, [Ask("raw")], **SETTINGS)
    assert ask == Ask("raw")
    return figures, texts


@pytest.fixture(scope="module")
def cells(subject, raw):
    outputs = [one["tokens"] for one in raw[1]]
    asked = evaluate_behaviour(subject.passes, subject.patch, subject.rows, ASKS, known=Known(outputs), **SETTINGS)
    return {ask: (figures, texts) for ask, figures, texts in asked}


def test_every_ask_is_answered_once(cells):
    assert set(cells) == set(ASKS)
    for figures, texts in cells.values():
        assert [one["index"] for one in figures] == [one["index"] for one in texts] == [0, 1, 2, 3]


@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_an_ask_is_a_run_of_its_own(subject, cells, ask):
    alpha = 1.0 if ask.alpha is None else ask.alpha
    figures, texts = cells[ask]
    scored = score(subject.passes, Edit(subject.patch, ask.condition), [Job(row, alpha) for row in subject.encoded])
    for one, expected in zip(figures, scored, strict=True):
        assert one["nll"] == pytest.approx(expected.nll, rel=1e-5)
        assert one["sum_abs_base_acts"] == pytest.approx(expected.base_acts, rel=1e-5)
        assert one["sum_abs_delta_acts"] == pytest.approx(expected.delta_acts, rel=1e-5)
        assert (one["n_tokens"], one["n_act_tokens"]) == (expected.n_tokens, expected.n_act_tokens)
    stop = Stop.of(subject.bridge, SETTINGS["limits"], subject.rows[0])
    prompts = [Job(Encoded(row.prompt, []), alpha) for row in subject.encoded]
    outputs = decode(subject.passes, Edit(subject.patch, ask.condition), prompts, [[] for _ in prompts], stop)
    assert [one["tokens"] for one in texts] == outputs
    assert [one["generation"] for one in texts] == [stop.text(output) for output in outputs]


def test_outputs_at_a_strength_are_the_guesses_of_other_conditions_at_it(subject, cells, monkeypatch):
    """Right ones leave nothing to decode, wrong ones change no output, and those of another strength are not taken."""
    expected = [one["tokens"] for one in cells[Ask("alpha", 0.5)][1]]
    decoded = []
    real = decoding.decode

    def spy(passes, edit, jobs, *rest):
        decoded.append(len(jobs))
        return real(passes, edit, jobs, *rest)

    monkeypatch.setattr(decoding, "decode", spy)
    for strength, outputs in ((0.5, expected), (0.5, [[7, 7]] * 4), (0.25, expected)):
        known = Known([[9, 9]] * 4, [[9, 9]] * 4, at_strength={strength: outputs})
        ((_, _, texts),) = evaluate_behaviour(
            subject.passes, subject.patch, subject.rows, [Ask("alpha", 0.5)], known=known, **SETTINGS
        )
        assert [one["tokens"] for one in texts] == expected
    right, *others = decoded
    assert right == 0
    assert all(others)


def test_raw_has_no_activations_and_its_own_outputs(subject, raw):
    figures, texts = raw
    assert all(one["sum_abs_base_acts"] == one["sum_abs_delta_acts"] == 0 for one in figures)
    assert [(one["input"], one["target"], one["label"]) for one in texts] == [
        (row.input, row.target, row.label) for row in subject.rows
    ]


def test_generations_are_scored_by_the_subsets_rules(subject, raw):
    """Copy rows have no arithmetic to get right; requests with a value can be wrong."""
    figures, _ = raw
    by_label = {row.label: one for row, one in zip(subject.rows, figures, strict=True)}
    assert by_label["copy"]["behaviours"]["math_correct"] is None
    assert by_label["copy"]["behaviours"]["copy_exact"] is False
    assert by_label["tool"]["behaviours"]["math_correct"] is False
    assert all(not one["behaviours"]["tool_call"] and not one["behaviours"]["valid_tool_format"] for one in figures)


def test_what_the_model_says_is_what_is_scored(subject, monkeypatch):
    """A model that answers every row with its target scores full marks."""

    from evaluators.measures import edited_behaviour

    targets = [row.target[:-1] for row in subject.encoded]
    monkeypatch.setattr(
        edited_behaviour, "generate", lambda passes, edit, jobs, *_: [targets[i % 4] for i in range(len(jobs))]
    )
    ((_, figures, texts),) = evaluate_behaviour(subject.passes, (), subject.rows, [Ask("raw")], **SETTINGS)
    assert [one["generation"] for one in texts] == [row.target for row in subject.rows]
    said = {name: [one["behaviours"][name] for one in figures] for name in CALCULATOR}
    assert said["tool_call"] == said["valid_tool_format"] == [True, False, False, False]
    assert said["math_correct"] == [True, None, None, None]
    assert said["copy_exact"] == [None, True, None, True]


def test_agreeing_with_raw_is_saying_the_same(subject, raw):
    """Asked where raw's outputs are known; splicing the MLP's own output back changes nothing."""
    outputs = [one["tokens"] for one in raw[1]]
    settings = {**SETTINGS, "behaviours": {}}
    for known, expected in ((Known(raw=outputs), {True}), (Known(raw=[[*one, 7] for one in outputs]), {False})):
        asked = evaluate_behaviour(
            subject.passes, subject.patch, subject.rows, [Ask("true_output")], known=known, **settings
        )
        ((_, figures, _),) = asked
        assert {one["behaviours"]["agrees_with_raw"] for one in figures} == expected
    assert all("agrees_with_raw" not in one["behaviours"] for one in raw[0])
