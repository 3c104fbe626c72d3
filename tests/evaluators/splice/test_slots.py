"""Steps in slots, as they are recorded on a GPU: here they run as they are, and write what the plain way writes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from data.encoding import Encoded
from evaluators.conditions import CONDITIONS
from evaluators.splice import decoding, slots
from evaluators.splice.decoding import Stop, decode, generate
from evaluators.splice.interventions import Edit, Ranks
from evaluators.splice.limits import Limits
from evaluators.splice.passes import ALL, Passes
from evaluators.splice.slots import Slots, slots_agree
from evaluators.splice.teacher_forcing import Job, score
from tests.models.table import CONFIGS, build

BUDGET = 7
EDITS = ["raw", *(name for name, one in CONDITIONS.items() if one.model == "finetuned" and not one.substitute)]


@pytest.fixture
def in_slots(subject, monkeypatch):
    """Makes a CPU decode in slots; the number of steps of each `Slots`."""
    assert slots_agree(subject.bridge)
    monkeypatch.setattr(decoding, "RECORDED_ON", "cpu")
    steps = []
    begin, step = Slots.__init__, Slots.logits

    def count(self, *given, **named):
        steps.append(0)
        begin(self, *given, **named)

    def note(self, *given):
        steps[-1] += 1
        return step(self, *given)

    monkeypatch.setattr(Slots, "__init__", count)
    monkeypatch.setattr(Slots, "logits", note)
    return steps


@pytest.fixture(scope="module")
def short(subject):
    """Rows that a sliding window of 64 tokens holds."""
    return [row for row in subject.encoded if len(row.prompt) + BUDGET < 60]


def test_the_model_is_tried_before_it_is_edited(subject, short, in_slots, monkeypatch):
    monkeypatch.delitem(subject.bridge.__dict__, slots.TRIED)
    jobs = [Job(Encoded(row.prompt, [])) for row in short]
    decode(subject.passes, Edit(subject.patches, "full"), jobs, [[] for _ in jobs], stop_at(subject))
    assert subject.bridge.__dict__[slots.TRIED] is True
    assert len(in_slots) > 1


def plainly(passes, *rest):
    return decode(dataclasses.replace(passes, shortcuts=dataclasses.replace(ALL, record_steps=False)), *rest)


def stop_at(subject, *tokens):
    return Stop(subject.tokenizer, Limits(BUDGET), frozenset(tokens))


@pytest.mark.parametrize("condition", EDITS)
@pytest.mark.parametrize("place", ["patch", "patches", "path_sites"])
def test_every_edit_writes_the_same(subject, short, path_sites, place, condition, in_slots):
    """Three places for many rows, each with a strength, hints right and wrong, and an end that some say early."""
    patches = path_sites if place == "path_sites" else getattr(subject, place)
    edit, passes = Edit(patches, condition), dataclasses.replace(subject.passes, batch_size=3)
    jobs = [
        Job(Encoded(row.prompt[: len(row.prompt) - cut], []), alpha, hints=[*row.ids, *row.ids])
        for cut in (0, 1, 3)
        for row in short
        for alpha in (0.0, 0.6, 2.0)
    ]
    begun = [[] for _ in jobs]
    outputs = plainly(passes, edit, jobs, begun, stop_at(subject, subject.tokenizer.eos_token_id))
    end = max({token for output in outputs for token in output}, key=lambda token: sum(token in o for o in outputs))
    expected = plainly(passes, edit, jobs, begun, stop_at(subject, end))
    assert in_slots == []
    assert len({len(output) for output in expected}) > 1
    assert decode(passes, edit, jobs, begun, stop_at(subject, end)) == expected
    assert sum(in_slots) >= BUDGET - 1


def test_rows_that_keep_some_features_write_the_same(subject, short, path_sites, in_slots):
    ranked = [
        dataclasses.replace(patch, ranks=torch.arange(len(patch.transcoder.W_dec)) * len(path_sites) + place)
        for place, patch in enumerate(path_sites)
    ]
    kept = [Ranks(0, 0, outside=True), Ranks(0, 4), Ranks(2, 9, outside=True), Ranks(0, 0)]
    jobs = [Job(Encoded(row.prompt, []), 2.0, kept=ranks) for row in short for ranks in kept]
    asked = Edit(ranked, "alpha"), jobs, [[] for _ in jobs], stop_at(subject, subject.tokenizer.eos_token_id)
    expected = plainly(subject.passes, *asked)
    assert len(set(map(tuple, expected))) > len(short)
    assert decode(subject.passes, *asked) == expected
    assert in_slots


def test_what_scoring_computed_is_put_into_the_slots(subject, short, path_sites, in_slots, monkeypatch):
    passes = dataclasses.replace(subject.passes, shortcuts=dataclasses.replace(ALL, share_prefix=False))
    edit, stop = Edit(path_sites, "alpha"), stop_at(subject, subject.tokenizer.eos_token_id)
    prompts = [Job(Encoded(row.prompt, []), alpha) for row in short for alpha in (0.3, 1.0)]
    expected = plainly(passes, edit, prompts, [[] for _ in prompts], stop)
    wrong = [[*output[:1], (output[1] + 1) % 200, 5] for output in expected]
    jobs = [
        dataclasses.replace(job, encoded=Encoded(job.encoded.prompt, target), guess=[9, 9])
        for job, target in zip(prompts, wrong, strict=True)
    ]
    scored = score(passes, edit, jobs)
    monkeypatch.setattr(decoding, "forward", lambda *given, **named: pytest.fail("the prompts are computed again"))
    assert generate(passes, edit, jobs, scored, stop) == expected
    assert set(in_slots) == {BUDGET - 2}


def test_a_row_that_starts_at_bos_or_outgrows_a_window_is_decoded_in_the_plain_way(subject, in_slots):
    edit, stop = Edit(subject.patch, "full"), stop_at(subject, subject.tokenizer.eos_token_id)
    for rows, ways in (([[subject.tokenizer.bos_token_id]], 0), ([subject.encoded[2].prompt], None)):
        in_slots.clear()
        jobs = [Job(Encoded(row, [])) for row in rows]
        assert decode(subject.passes, edit, jobs, [[]], stop) == plainly(subject.passes, edit, jobs, [[]], stop)
        slides = getattr(subject.plain.config, "sliding_window", None)
        assert len(in_slots) == (ways if ways is not None else 0 if slides else 1)


def test_padding_reads_no_position_beyond_the_context(wrapped, tmp_path, in_slots):
    """The budget exceeds the context, the answer does not, and a single row has room for many drafts."""
    bridge = wrapped(build("gpt2", tmp_path))
    context = bridge.original_model.config.n_positions
    jobs = [Job(Encoded([2, *(30 + number % 90 for number in range(context - 9))], []))]
    (output,) = plainly(Passes(bridge), Edit(), jobs, [[]], Stop(bridge.tokenizer, Limits(8), frozenset()))
    stop = Stop(bridge.tokenizer, Limits(32), frozenset([output[5]]))
    expected = plainly(Passes(bridge), Edit(), jobs, [[]], stop)
    assert len(expected[0]) < 8
    assert slots_agree(bridge)
    in_slots.clear()
    assert decode(Passes(bridge), Edit(), jobs, [[]], stop) == expected
    assert in_slots == [len(expected[0]) - 1]


def test_rows_of_other_lengths_have_slots_of_their_own(subject, short, in_slots):
    rows = [[*row.prompt[:length]] for row in short for length in (2, 3, len(row.prompt))]
    jobs, begun = [Job(Encoded(row, [])) for row in rows], [[] for _ in rows]
    stop = Stop(subject.tokenizer, Limits(3), frozenset())
    edit = Edit(subject.patch, "full")
    assert decode(subject.passes, edit, jobs, begun, stop) == plainly(subject.passes, edit, jobs, begun, stop)
    assert len(in_slots) > 1
    assert decoding._similar([0, 1, 2, 3], [5, 13, 14, 60], Stop(subject.tokenizer, Limits(3), frozenset())) == [
        [0, 1],
        [2],
        [3],
    ]


def test_a_window_that_an_architecture_keeps_to_itself_is_noticed(wrapped, tmp_path, monkeypatch):
    """GPT-Neo's local layers count columns from the end of the keys."""
    _, config = CONFIGS["gpt_neo"]
    local = {**config, "attention_types": [[["global", "local", "local"], 1]], "window_size": 64}
    monkeypatch.setitem(CONFIGS, "gpt_neo", ("", local))
    assert not slots_agree(wrapped(build("gpt_neo", tmp_path)))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture_computes_the_same_in_slots(name, wrapped, tmp_path):
    bridge = wrapped(build(name, tmp_path))
    assert slots_agree(bridge)
    assert bridge.__dict__[slots.TRIED] is True


def test_a_model_that_disagrees_is_decoded_in_the_plain_way(subject, short, in_slots, monkeypatch):
    """It is tried once; an error there is a reason too."""
    real = slots._Layer.update

    def shifted(self, keys, values):
        return tuple(states.roll(1, 2) for states in real(self, keys, values))

    def failing(self, keys, values):
        raise RuntimeError("capture")

    for update in (shifted, failing):
        other = SimpleNamespace(original_model=subject.bridge.original_model)
        monkeypatch.setattr(slots._Layer, "update", update)
        assert slots_agree(other) is False
        monkeypatch.setattr(slots._Layer, "update", real)
        assert slots_agree(other) is False
    monkeypatch.setitem(subject.bridge.__dict__, slots.TRIED, False)
    in_slots.clear()
    jobs = [Job(Encoded(row.prompt, [])) for row in short]
    decode(subject.passes, Edit(), jobs, [[] for _ in jobs], stop_at(subject, 1))
    assert in_slots == []
