"""Every shortcut on, every shortcut off, and each off alone: the same figures and the same tokens."""

import dataclasses

import pytest
import torch

from data.encoding import pad_left
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour
from evaluators.measures.reconstruction import evaluate_reconstruction, text_cross_entropy
from evaluators.splice import decoding, passes, teacher_forcing
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import (
    Inputs,
    Passes,
    Prefixes,
    Shortcuts,
    forward,
    in_slices,
    project,
    read_inputs,
    read_prefixes,
    resume,
)
from evaluators.splice.teacher_forcing import Job, score
from models.blocks import read_paths
from models.bridge import hooked
from models.transcoder import Transcoder
from sites import KINDS, Site, mlp_sites
from tests.evaluators.conftest import CALCULATOR

PLACES = ("patch", "patches")
ASKS = [Ask("no_delta"), Ask("full"), *(Ask("alpha", alpha) for alpha in (0.0, 0.5, 2.0))]
NAMES = [one.name for one in dataclasses.fields(Shortcuts)]


def cells(subject, place, shortcuts):
    passes = Passes(subject.bridge, 3, shortcuts)
    settings = {
        "limits": Limits(6),
        "known": Known([[7, 7]] * len(subject.rows), [[9, 9]] * len(subject.rows)),
        "behaviours": read_behaviours(CALCULATOR),
    }
    asked = evaluate_behaviour(passes, getattr(subject, place), subject.rows, ASKS, **settings)
    return {ask: (figures, texts) for ask, figures, texts in asked}


@pytest.fixture(scope="module")
def plain(subject):
    return {place: cells(subject, place, Shortcuts.none()) for place in PLACES}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("off", [None, *NAMES])
def test_no_shortcut_changes_a_figure_or_a_token(subject, plain, place, off):
    shortcuts = Shortcuts() if off is None else dataclasses.replace(Shortcuts(), **{off: False})
    found = cells(subject, place, shortcuts)
    for ask, (figures, texts) in plain[place].items():
        assert [one["tokens"] for one in found[ask][1]] == [one["tokens"] for one in texts]
        for one, expected in zip(found[ask][0], figures, strict=True):
            assert one["nll"] / one["n_tokens"] == pytest.approx(expected["nll"] / expected["n_tokens"], abs=1e-4)
            for name in ("sum_abs_base_acts", "sum_abs_delta_acts"):
                assert one[name] == pytest.approx(expected[name], rel=1e-4)
            for name in ("index", "n_tokens", "n_act_tokens", "behaviours"):
                assert one[name] == expected[name]


def test_reconstruction_is_the_same_without_shortcuts(subject):
    fast, slow = (
        list(evaluate_reconstruction(Passes(subject.bridge, shortcuts=shortcuts), subject.patch, subject.rows, 1.0))
        for shortcuts in (Shortcuts(), Shortcuts.none())
    )
    for one, expected in zip(fast, slow, strict=True):
        expected.pop("seconds")
        assert {name: one[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_a_shortcut_that_is_off_is_not_taken(subject, monkeypatch):
    """With everything off nothing is shared, projected apart, proven or stopped."""

    def forbidden(*_, **__):
        raise AssertionError("a shortcut was taken")

    taken = ((teacher_forcing, "project"), (teacher_forcing, "resume"), (decoding, "_prove"), (passes, "read_prefixes"))
    for module, name in taken:
        monkeypatch.setattr(module, name, forbidden)
    stepped = []
    real = decoding.forward

    def counted(bridge, batch, keep, **named):
        stepped.append(keep)
        return real(bridge, batch, keep, **named)

    for module in (decoding, teacher_forcing):
        monkeypatch.setattr(module, "forward", counted)
    cells(subject, "patch", Shortcuts.none())
    batches = 2 * len(ASKS)  # four rows in threes
    assert sum(keep == 1 for keep in stepped) == 6 * batches, "every row is decoded to the budget"


@pytest.mark.parametrize("place", PLACES)
def test_the_model_goes_on_from_any_layer(subject, place):
    """A residual stream put back after its layer gives the whole pass; then the model is as it was."""
    batch = pad_left([row.ids for row in subject.encoded], subject.tokenizer.pad_token_id)
    with torch.inference_mode():
        whole = forward(subject.bridge, batch, batch.ids.shape[1])
        last = resume(subject.bridge, batch)
        n_layers = subject.bridge.cfg.n_layers
        for layer in range(n_layers):
            seen = {}
            note = [(f"blocks.{layer}.hook_out", lambda out, hook: seen.update(out=out.clone()))]  # noqa: B023
            with hooked(subject.bridge, note):
                forward(subject.bridge, batch, 1)
            found = resume(subject.bridge, batch, layer, seen["out"])
            torch.testing.assert_close(found[batch.mask], last[batch.mask], rtol=1e-4, atol=1e-4)
        projected = torch.cat(list(project(subject.bridge, last[batch.mask])))
        torch.testing.assert_close(projected, whole[batch.mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(forward(subject.bridge, batch, batch.ids.shape[1]), whole, rtol=0, atol=0)


def test_after_an_error_the_model_runs_all_its_layers(subject):
    batch = pad_left([row.ids for row in subject.encoded], subject.tokenizer.pad_token_id)
    with torch.inference_mode():
        before = forward(subject.bridge, batch, 1)
        with pytest.raises((RuntimeError, ValueError)):
            resume(subject.bridge, batch, 0, torch.zeros(1, 1, 3))
        assert torch.equal(forward(subject.bridge, batch, 1), before)


def test_layers_captured_together_are_those_captured_alone(subject):
    rows = [row.ids for row in subject.encoded]
    sites = mlp_sites([0, 1, 2])
    together = read_prefixes(subject.bridge, rows, sites)
    for site in sites:
        alone = read_prefixes(subject.bridge, rows, [site])[site]
        for one, other, row in zip(together[site], alone, rows, strict=True):
            assert all(torch.equal(a, b) and len(a) == len(row) for a, b in zip(one, other, strict=True))


def test_prefixes_are_read_once_and_forgotten_when_memory_is_short(subject, monkeypatch):
    asked = []
    real = passes.read_prefixes

    def spy(bridge, rows, sites):
        asked.append((len(rows), tuple(site.layer for site in sites)))
        return real(bridge, rows, sites)

    monkeypatch.setattr(passes, "read_prefixes", spy)
    rows, sites = [row.ids for row in subject.encoded], mlp_sites([0, 2])
    held = Prefixes(subject.bridge, sites, batch_size=3)
    held.get(Site(0), rows)
    held.get(Site(2), rows)
    held.get(Site(0), rows[:1])
    assert asked == [(3, (0, 2)), (1, (0, 2))], "one capture serves both layers"
    apart = Prefixes(subject.bridge, sites, together=False)
    apart.get(Site(0), rows)
    apart.get(Site(2), rows)
    assert asked[2:] == [(4, (0,)), (4, (2,))]
    monkeypatch.setattr(passes, "HELD_BYTES", 1)
    short = Prefixes(subject.bridge, sites[:1])
    for _ in range(2):
        assert len(short.get(Site(0), rows)) == len(rows)
    assert len(asked) == 6


def some_delta(site, d_in, d_out):
    generator = torch.Generator().manual_seed(site.layer)
    W_enc, W_dec = (torch.randn(*shape, generator=generator) for shape in ((d_in, 6), (6, d_out)))
    return Transcoder(W_enc / d_in**0.5, torch.zeros(6), torch.full((6,), 0.4), W_dec, None, site)


def test_prefixes_of_several_sites_are_those_of_the_unedited_model(subject, base_folder):
    """Also of a site above the one that is edited while they are read."""
    sites = [Site(layer, kind) for layer in (1, 2) for kind in KINDS.values()]
    paths = read_paths(subject.bridge, base_folder, sites)
    patches = [Patch(site, path, some_delta(site, path.d_in, path.d_out)) for site, path in paths.items()]
    shared = dataclasses.replace(subject.passes, prefixes=Prefixes(subject.bridge, sites))
    jobs = [Job(row) for row in subject.encoded]
    for patch in patches:
        ours, plain = (
            [one.nll for one in score(used, Edit([patch], "full"), jobs)]
            for used in (shared, Passes(subject.bridge, shortcuts=Shortcuts.none()))
        )
        assert ours == pytest.approx(plain, rel=1e-5), patch.site.label


def test_the_whole_text_holds_the_target(subject):
    jobs = [Job(row) for row in subject.encoded]
    whole = score(subject.passes, Edit(subject.patch, "full"), jobs, whole_text=True)
    target = score(subject.passes, Edit(subject.patch, "full"), jobs)
    for one, other in zip(whole, target, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
        assert one.argmax == other.argmax
        assert one.text_nll > one.nll
        assert other.text_nll is None
    ce, tokens = text_cross_entropy(subject.passes, Edit(subject.patch, "full"), subject.rows)
    assert ce == pytest.approx(sum(one.text_nll for one in whole) / tokens)


def test_a_slice_that_does_not_fit_is_halved():
    done, tried = [], []

    def run(items):
        tried.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(items)

    in_slices(range(11), 8, run)
    assert done == list(range(11))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError("not enough memory: you tried to allocate 9 bytes"), MemoryError()])
def test_one_item_that_does_not_fit_is_an_error(error):
    def run(items):
        raise error

    with pytest.raises(type(error)):
        in_slices([1, 2], 2, run)


def test_other_errors_are_not_retried():
    tried = []

    def run(items):
        tried.append(items)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        in_slices([1, 2], 2, run)
    assert len(tried) == 1


def test_memory_that_runs_out_in_the_model_changes_no_figure(subject, monkeypatch):
    expected = score(subject.passes, Edit(subject.patches, "full"), [Job(row) for row in subject.encoded])
    real = teacher_forcing.resume

    def cramped(bridge, batch, *rest, **named):
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(bridge, batch, *rest, **named)

    monkeypatch.setattr(teacher_forcing, "resume", cramped)
    found = score(subject.passes, Edit(subject.patches, "full"), [Job(row) for row in subject.encoded])
    for one, other in zip(found, expected, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
        assert one.base_acts == pytest.approx(other.base_acts, rel=1e-5)
        assert one.argmax == other.argmax


@pytest.mark.parametrize("share", [1.1, 0.4, 0.0], ids=["all sites", "some", "one by one"])
def test_what_sites_read_is_the_same_in_few_passes(subject, monkeypatch, share):
    sites = [Site(layer, kind) for layer in range(subject.plain.config.num_hidden_layers) for kind in KINDS.values()]
    rows = [row.ids for row in [*subject.encoded, subject.encoded[0]]]
    expected = {
        site: torch.cat([prefix.x[1:] for prefix in Prefixes(subject.bridge, [site]).get(site, rows)]) for site in sites
    }
    widths = {site: expected[site].shape[1] for site in sites}
    read = []
    monkeypatch.setattr(passes, "HELD_BYTES", share * 4 * sum(map(len, rows)) * sum(widths.values()))
    monkeypatch.setattr(passes, "read_inputs", lambda *told: read.append(told[2]) or read_inputs(*told))
    inputs = Inputs(subject.bridge, widths, rows)
    assert all(torch.equal(inputs.at(site), expected[site]) for site in sorted(sites))
    assert [site for together in read for site in together] == sorted(sites)
    assert len(read) in {1.1: [1], 0.4: range(2, len(sites)), 0.0: [len(sites)]}[share]
