"""Scoring and generation against the splice by hand, and the equalities that the shortcuts rest on."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from data.encoding import Encoded, pad_left
from evaluators.conditions import CONDITIONS
from evaluators.splice import decoding, teacher_forcing
from evaluators.splice.decoding import Stop, decode, forward, generate
from evaluators.splice.interventions import Edit, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import ALL, Passes
from evaluators.splice.teacher_forcing import Job, score
from models.bridge import hooked
from models.packed import packed

BUDGET = 7
PLACES = ("patch", "patches")
SPLICED = ("no_delta", "full", "alpha", "zero_ablation")
ALPHAS = (0.0, -0.7, 1.0, 2.5)
EDITS = [name for name, one in CONDITIONS.items() if one.model == "finetuned" and not one.substitute]


def logits(subject, patches, condition, alpha=1.0):
    """Of every token of every row, left-padded into one batch."""
    batch = pad_left([row.ids for row in subject.encoded], subject.tokenizer.pad_token_id)
    with torch.no_grad(), spliced(subject.bridge, Edit(patches, condition)) as splice:
        splice.reset(batch.editable, torch.full((len(batch.ids),), alpha))
        return forward(subject.bridge, batch, batch.ids.shape[1])[batch.mask]


def jobs(subject, alpha=1.0):
    return [Job(row, alpha) for row in subject.encoded]


def bare(subject, alpha=1.0):
    """Prompts alone, and outputs that have not begun."""
    return [Job(Encoded(row.prompt, []), alpha) for row in subject.encoded], [[] for _ in subject.encoded]


@pytest.fixture(scope="module")
def stop(subject):
    return ends(subject.tokenizer, BUDGET)


def ends(tokenizer, budget):
    """As in the presets: at EOS, or at the end of a call."""
    return Stop(tokenizer, Limits(budget, ("</tool_call>",)), frozenset([tokenizer.eos_token_id]))


@pytest.mark.parametrize("place", PLACES)
def test_strength_zero_is_no_delta_and_one_is_full_to_the_last_bit(subject, place):
    patches = getattr(subject, place)
    no_delta, full = logits(subject, patches, "no_delta"), logits(subject, patches, "full")
    assert torch.equal(logits(subject, patches, "alpha", 0.0), no_delta)
    assert torch.equal(logits(subject, patches, "alpha", 1.0), full)
    assert (full - no_delta).abs().max() > 0.01
    assert (no_delta - logits(subject, patches, "raw")).abs().max() > 0.01


@pytest.mark.parametrize("place", PLACES)
def test_the_true_output_put_back_is_raw(subject, place):
    patches = getattr(subject, place)
    raw = logits(subject, patches, "raw")
    assert torch.equal(logits(subject, patches, "true_output"), raw)
    torch.testing.assert_close(logits(subject, patches, "error_term"), raw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_a_zero_decoder_is_no_delta_exactly(subject, place):
    zero = [
        dataclasses.replace(one, delta=dataclasses.replace(one.delta, W_dec=torch.zeros_like(one.delta.W_dec)))
        for one in getattr(subject, place)
    ]
    for condition, alpha in (("full", 1.0), ("alpha", 3.0)):
        assert torch.equal(logits(subject, zero, condition, alpha), logits(subject, zero, "no_delta"))


@pytest.mark.parametrize("condition", ["raw", *EDITS])
@pytest.mark.parametrize("place", PLACES)
def test_scores_are_those_of_the_splice_by_hand(subject, by_hand, place, condition):
    """CE, argmax, activation sums and counts, row by row: padding and BOS are neither edited nor counted."""
    patches, alpha = getattr(subject, place), 1.7
    reference = by_hand(subject.plain, patches, condition, alpha)
    for row, found in zip(
        subject.encoded, score(subject.passes, Edit(patches, condition), jobs(subject, alpha)), strict=True
    ):
        nll, argmax = reference.nll(row)
        _, base_acts, delta_acts = reference.run(row.ids)
        assert found.nll == pytest.approx(nll, rel=1e-4)
        assert found.argmax == argmax.tolist()
        assert (found.n_tokens, found.n_act_tokens) == (len(row.target), len(row.ids) - 1)
        assert found.base_acts == pytest.approx(base_acts, rel=1e-4)
        assert found.delta_acts == pytest.approx(delta_acts, rel=1e-4)
        if condition in ("full", "alpha"):
            assert found.delta_acts > 0


def test_a_batch_of_one_scores_as_a_batch_of_many(subject):
    for condition in ("raw", "full"):
        many = score(subject.passes, Edit(subject.patches, condition), jobs(subject))
        ones = score(Passes(subject.bridge, batch_size=1), Edit(subject.patches, condition), jobs(subject))
        for one, other in zip(many, ones, strict=True):
            assert one.nll == pytest.approx(other.nll, rel=1e-5)
            assert one.base_acts == pytest.approx(other.base_acts, rel=1e-5)
            assert one.argmax == other.argmax


@pytest.mark.parametrize("place", PLACES)
def test_strengths_in_one_batch_are_one_run_each(subject, stop, place):
    patches = getattr(subject, place)
    mixed = [Job(row, alpha) for row in subject.encoded for alpha in ALPHAS]
    scored = score(subject.passes, Edit(patches, "alpha"), mixed)
    outputs = generate(subject.passes, Edit(patches, "alpha"), mixed, scored, stop)
    for place_in_alphas, alpha in enumerate(ALPHAS):
        alone = score(subject.passes, Edit(patches, "alpha"), jobs(subject, alpha))
        mine = scored[place_in_alphas :: len(ALPHAS)]
        assert [one.nll for one in mine] == pytest.approx([one.nll for one in alone], rel=1e-5)
        assert [one.delta_acts for one in mine] == pytest.approx([one.delta_acts for one in alone], rel=1e-5)
        assert [one.argmax for one in mine] == [one.argmax for one in alone]
        output = generate(subject.passes, Edit(patches, "alpha"), jobs(subject, alpha), alone, stop)
        assert outputs[place_in_alphas :: len(ALPHAS)] == output
    assert len({tuple(map(tuple, outputs[n :: len(ALPHAS)])) for n in range(len(ALPHAS))}) > 1


@pytest.mark.parametrize("condition", ["raw", *SPLICED])
@pytest.mark.parametrize("place", PLACES)
def test_every_way_to_generate_gives_the_tokens_of_the_splice_by_hand(subject, stop, by_hand, place, condition):
    """Cached, uncached, one by one, verified from the target and from any guess: generated tokens are edited."""
    patches, alpha = getattr(subject, place), 0.6
    reference = by_hand(subject.plain, patches, condition, alpha)
    expected = [reference.greedy(row.prompt, {subject.tokenizer.eos_token_id}, BUDGET) for row in subject.encoded]
    assert len({tuple(output) for output in expected}) == len(expected)
    prompts, begun = bare(subject, alpha)
    edit = Edit(patches, condition)
    assert decode(subject.passes, edit, prompts, begun, stop) == expected
    assert decode(subject.passes, edit, prompts, begun, stop, use_cache=False) == expected
    assert decode(Passes(subject.bridge, batch_size=1), edit, prompts, begun, stop) == expected
    full = jobs(subject, alpha)
    for guesses in (
        [()] * len(expected),
        expected,
        [one[:3] for one in expected],
        [[*one[:2], 7, 8] for one in expected],
        [[7] * 4 for _ in expected],
        [[], *expected[1:]],
    ):
        guessing = [dataclasses.replace(job, guess=guess) for job, guess in zip(full, guesses, strict=True)]
        scored = score(subject.passes, Edit(patches, condition), guessing)
        assert generate(subject.passes, edit, guessing, scored, stop) == expected


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("condition", ["raw", "full"])
def test_weights_may_be_packed_from_any_step_on(subject, stop, by_hand, condition, steps, monkeypatch):
    """Every edit has its own weights, so the copies made for one are not used for the next."""
    monkeypatch.setattr(decoding, "PLAIN_STEPS", steps)
    entered = []
    monkeypatch.setattr(decoding, "packed", lambda: entered.append(None) or packed())
    for patches in (getattr(subject, place) for place in PLACES):
        reference = by_hand(subject.plain, patches, condition, 1.0)
        expected = [reference.greedy(row.prompt, {subject.tokenizer.eos_token_id}, BUDGET) for row in subject.encoded]
        assert decode(subject.passes, Edit(patches, condition), *bare(subject), stop) == expected
    assert len(entered) == len(PLACES)


def test_raw_output_is_what_transformers_generates(subject, stop):
    prompts, begun = bare(subject)
    found = decode(subject.passes, Edit((), "raw"), prompts, begun, stop)
    for row, output in zip(subject.encoded, found, strict=True):
        ids = torch.tensor([row.prompt])
        made = subject.plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=BUDGET, do_sample=False)
        assert output == made[0, len(row.prompt) :].tolist()


def test_generated_tokens_are_edited(subject, stop):
    """Edit the prompt alone, by hand: the first token is the same, and some later one is not."""
    patches = subject.patch
    prompts, begun = bare(subject)
    expected = decode(subject.passes, Edit(patches, "full"), prompts, begun, stop)
    differs = 0
    for row, output in zip(subject.encoded, expected, strict=True):
        batch = pad_left([row.prompt + output[:-1]], 0)
        prompt_only = batch.editable & (batch.positions < len(row.prompt))
        with torch.no_grad(), spliced(subject.bridge, Edit(patches, "full")) as splice:
            splice.reset(prompt_only, torch.ones(1))
            found = forward(subject.bridge, batch, len(output)).argmax(-1)[0].tolist()
        assert found[0] == output[0]
        differs += found != output
    assert differs > 0


def test_what_a_guess_proves_is_not_decoded(subject, stop, monkeypatch):
    prompts, begun = bare(subject)
    outputs = decode(subject.passes, Edit(subject.patch, "full"), prompts, begun, stop)
    decoded = []
    real = decoding.decode

    def spy(passes, edit, jobs, begun, *rest, **named):
        decoded.append([list(one) for one in begun])
        return real(passes, edit, jobs, begun, *rest, **named)

    monkeypatch.setattr(decoding, "decode", spy)
    wrong = [*outputs[0][:4], (outputs[0][4] + 1) % 200, *outputs[0][5:]]
    for guesses in (outputs, [wrong, *outputs[1:]]):
        guessing = [dataclasses.replace(job, guess=one) for job, one in zip(jobs(subject), guesses, strict=True)]
        scored = score(subject.passes, Edit(subject.patch, "full"), guessing)
        assert generate(subject.passes, Edit(subject.patch, "full"), guessing, scored, stop) == outputs
    assert decoded == [[], [outputs[0][:5]]], "all proven; then one row goes on from the first token that differs"


def test_a_guess_goes_on_where_it_leaves_the_target(subject, stop, monkeypatch):
    """Prompts and what the guess shares with the target are not computed again."""
    prompts, begun = bare(subject)
    outputs = decode(subject.passes, Edit(subject.patches, "full"), prompts, begun, stop)
    targets = [[*output[:3], (output[3] + 1) % 200, 5, 6] for output in outputs]
    guessing = [
        Job(Encoded(row.prompt, target), guess=output)
        for row, target, output in zip(subject.encoded, targets, outputs, strict=True)
    ]
    passes = []
    real = teacher_forcing.resume

    def spy(bridge, batch, *rest, **named):
        passes.append(batch.mask.sum(1).tolist())
        return real(bridge, batch, *rest, **named)

    monkeypatch.setattr(teacher_forcing, "resume", spy)
    scored = score(subject.passes, Edit(subject.patches, "full"), guessing)
    whole, tails = passes
    assert sorted(whole) == sorted(len(job.encoded.ids) for job in guessing)
    assert tails == [BUDGET - 3] * len(guessing)
    assert [one.guessed for one in scored] == outputs
    assert [one.argmax[:4] for one in scored] == [output[:4] for output in outputs]


def test_hints_are_tried_ahead_and_change_no_token(subject, stop, monkeypatch):
    """Right ones spare steps, wrong ones are taken back; beside a sliding window nothing is tried."""
    short = [row for row in subject.encoded if len(row.prompt) < 40]
    prompts, begun = [Job(Encoded(row.prompt, [])) for row in short], [[] for _ in short]
    asked = (subject.passes, Edit(subject.patch, "full"))
    expected = decode(*asked, prompts, begun, stop)
    steps = []
    real = decoding.forward

    def spy(*given, **named):
        steps.append(given)
        return real(*given, **named)

    monkeypatch.setattr(decoding, "forward", spy)
    right = [[*job.encoded.prompt, *output] for job, output in zip(prompts, expected, strict=True)]
    halves = [[*hint[:-3], 7, 8, 9] for hint in right]
    wrong = [[*job.encoded.prompt[-2:], 7, 8, 9] for job in prompts]
    needed = {}
    hints_by_name = {"right": right, "halves": halves, "wrong": wrong, "mixed": [right[0], *wrong[1:]]}
    for name, hints in {**hints_by_name, "none": [[] for _ in prompts]}.items():
        steps.clear()
        hinted = [dataclasses.replace(job, hints=hint) for job, hint in zip(prompts, hints, strict=True)]
        assert decode(*asked, hinted, begun, stop) == expected
        needed[name] = len(steps)
    assert needed["wrong"] == needed["mixed"] == needed["none"]
    assert needed["right"] < needed["halves"] < needed["none"]
    hinted = [dataclasses.replace(job, hints=hint) for job, hint in zip(prompts, right, strict=True)]
    monkeypatch.setattr(decoding, "_window", lambda cache: 20)
    steps.clear()
    assert decode(*asked, hinted, begun, stop) == expected
    assert len(steps) == BUDGET


def test_bos_and_padding_are_never_edited(subject):
    """A base that shouts: the residual after its layer is raw's on BOS and padding, and another one everywhere else."""
    loud = dataclasses.replace(subject.patch[0].base, b_dec=torch.full((subject.d_model,), 1e3))
    patch = dataclasses.replace(subject.patch[0], ground=loud)
    batch = pad_left([row.ids for row in subject.encoded], subject.tokenizer.pad_token_id)
    after = {}

    def note(residual, hook):
        after[condition] = residual

    with torch.no_grad(), hooked(subject.bridge, [("blocks.1.hook_out", note)]):
        for condition in ("raw", "no_delta"):
            with spliced(subject.bridge, Edit([patch], condition)) as splice:
                splice.reset(batch.editable, torch.ones(len(batch.ids)))
                forward(subject.bridge, batch, 1)
    same = (after["raw"] == after["no_delta"]).all(-1)
    assert torch.equal(same, ~batch.editable)
    bos = batch.ids == subject.tokenizer.bos_token_id
    assert bos.sum() == len(batch.ids)
    assert same[bos].all()


def test_rows_that_end_early_leave_the_others_alone(subject):
    """EOS is a token that one row says in its middle and others do not."""
    prompts, begun = bare(subject)
    outputs = decode(subject.passes, Edit(subject.patch, "full"), prompts, begun, ends(subject.tokenizer, BUDGET))
    end = outputs[0][4]
    expected = [one[: one.index(end) + 1] if end in one else one for one in outputs]
    assert len({len(one) for one in expected}) > 1
    early = Stop(subject.tokenizer, Limits(BUDGET), frozenset([end]))
    for use_cache in (True, False):
        assert (
            decode(subject.passes, Edit(subject.patch, "full"), prompts, begun, early, use_cache=use_cache) == expected
        )


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_wait_take_the_places_of_those_that_ended(subject, use_cache, monkeypatch):
    """Three places, rows of all lengths with a strength each, and an end that some say early."""
    several = [
        Job(Encoded(row.prompt[: len(row.prompt) - cut], []), alpha, hints=[*row.ids, *row.ids])
        for cut in (0, 1, 2)
        for row in subject.encoded
        for alpha in (0.0, 0.5, 1.0)
    ]
    begun = [[] for _ in several]
    one_by_one = dataclasses.replace(subject.passes, batch_size=1)
    three = dataclasses.replace(subject.passes, batch_size=3)
    edit = Edit(subject.patch, "alpha")
    outputs = decode(one_by_one, edit, several, begun, ends(subject.tokenizer, BUDGET))
    end = max({token for output in outputs for token in output}, key=lambda token: sum(token in o for o in outputs))
    early = Stop(subject.tokenizer, Limits(BUDGET), frozenset([end]))
    expected = decode(one_by_one, edit, several, begun, early, use_cache=use_cache)
    assert len({len(output) for output in expected}) > 1
    together = []
    real = decoding.forward

    def spy(bridge, batch, *rest, **named):
        together.append(len(batch.ids))
        return real(bridge, batch, *rest, **named)

    joined = []
    real_join = decoding._Decoding._joined
    monkeypatch.setattr(decoding, "forward", spy)
    monkeypatch.setattr(decoding._Decoding, "_joined", lambda *given: joined.append(real_join(*given)) or joined[-1])
    for window in (10_000, 20):
        monkeypatch.setattr(decoding, "_window", lambda cache, window=window: window)
        joined.clear()
        assert decode(three, edit, several, begun, early, use_cache=use_cache) == expected
        assert max(together) == 3
        assert bool(joined) == (window > 20)


def test_decoding_goes_on_from_what_scoring_computed(subject, stop, monkeypatch):
    """Whether the target or a guess proves the first tokens, the prompts are not computed again; beside a sliding
    window, or without memory for it, they are, and nothing changes."""
    passes = dataclasses.replace(subject.passes, shortcuts=dataclasses.replace(ALL, share_prefix=False), batch_size=3)
    edit = Edit(subject.patch, "alpha")
    prompts = [Job(Encoded(row.prompt, []), alpha) for row in subject.encoded for alpha in (0.3, 1.0)]
    expected = decode(passes, edit, prompts, [[] for _ in prompts], stop)
    jobs = []
    for place, (job, output) in enumerate(zip(prompts, expected, strict=True)):
        proven = place % 4
        wrong = [*output[:proven], (output[proven] + 1) % 200, 5, 6]
        encoded = Encoded(job.encoded.prompt, wrong)
        jobs.append(
            dataclasses.replace(job, encoded=encoded, guess=[*output[: proven + 2], 7] if place % 3 else [9, 9])
        )
    fed = []
    real = decoding.forward

    def spy(bridge, batch, *rest, **named):
        fed.append(batch.ids.shape[1])
        return real(bridge, batch, *rest, **named)

    monkeypatch.setattr(decoding, "forward", spy)
    scored = score(passes, edit, jobs)
    assert all(one.context is not None for one in scored)
    assert generate(passes, edit, jobs, scored, stop) == expected
    longest = max(len(job.encoded.prompt) for job in prompts)
    assert longest > 1 + decoding.DRAFTED
    slides = hasattr(subject.plain.config, "sliding_window") and subject.plain.config.sliding_window
    assert max(fed) >= longest if slides else max(fed) <= 1 + decoding.DRAFTED
    monkeypatch.setattr(teacher_forcing, "CONTEXT_BYTES", scored[0].context.nbytes)
    few = score(passes, edit, jobs)
    assert 0 < sum(one.context is not None for one in few) < len(few)
    assert generate(passes, edit, jobs, few, stop) == expected
    assert max(fed) > 1 + decoding.DRAFTED


def test_no_rows_are_no_results(subject, stop):
    assert score(subject.passes, Edit(subject.patch, "full"), []) == []
    assert generate(subject.passes, Edit(subject.patch, "full"), [], [], stop) == []


@pytest.mark.parametrize(
    ("said", "budget", "kept"),
    [
        ("12 + 30", 99, None),
        ("12 + 30", 4, "12 +"),
        ("<tool_call>calculator(1)</tool_call> and more", 99, "<tool_call>calculator(1)</tool_call>"),
        ("a > b </tool_call", 99, None),
        ("a > b </tool_call></tool_call>", 99, "a > b </tool_call>"),
        ("</tool_call>", 99, "</tool_call>"),
        ("", 99, None),
    ],
)
def test_where_a_generation_ends(subject, said, budget, kept):
    tokens = subject.tokenizer(said, add_special_tokens=False)["input_ids"]
    found = ends(subject.tokenizer, budget).cut(tokens)
    assert (found if found is None else subject.tokenizer.decode(found)) == kept


@pytest.mark.parametrize("text", ["\n", " ", "é", "o\n"])
def test_a_text_to_stop_at_may_end_in_any_character(subject, text):
    """Vocabularies write white space and what is not ASCII in ways of their own."""
    said = f"hello{text}and more"
    tokens = subject.tokenizer(said, add_special_tokens=False)["input_ids"]
    found = Stop(subject.tokenizer, Limits(99, (text,)), frozenset()).cut(tokens)
    assert found is not None
    assert subject.tokenizer.decode(found) == said[: said.index(text) + len(text)]


def test_eos_ends_and_is_kept_as_a_token_but_not_as_text(subject):
    eos = subject.tokenizer.eos_token_id
    stop = ends(subject.tokenizer, 99)
    assert stop.cut([50, 60, eos, 70]) == [50, 60, eos]
    several = Stop(subject.tokenizer, Limits(99), frozenset([eos, 70]))
    assert several.cut([50, 70, eos]) == [50, 70], "a chat may have several ends"
    assert stop.text([50, 60, eos]) == subject.tokenizer.decode([50, 60])


def test_a_token_that_closes_the_tag_and_says_more_ends_too():
    """Tokens of real vocabularies hold several characters; two tokenizers in one process do not mix."""
    words = {"<tool_call>": 0, "1": 1, "</tool_call": 2, ">\n": 3, ">": 4}
    names = {index: word for word, index in words.items()}

    class Stub(SimpleNamespace):
        __hash__ = object.__hash__

    def stub(vocabulary):
        return Stub(
            eos_token_id=9, get_vocab=lambda: vocabulary, decode=lambda ids, **_: "".join(names[i] for i in ids)
        )

    assert ends(stub(words), 99).cut([0, 1, 2, 3, 1, 1]) == [0, 1, 2, 3]
    assert ends(stub({"a": 0, "b": 3}), 99).cut([0, 1, 2, 3, 1, 1]) is None
