"""Interventions: the hooks come and go, and what does not belong together is refused before anything runs."""

import dataclasses
from contextlib import suppress

import pytest
import torch

from data.encoding import pad_left
from evaluators.conditions import CONDITIONS
from evaluators.splice.interventions import Edit, Patch, spliced
from evaluators.splice.passes import forward
from models.errors import ModelError
from sites import MLP, Site


def test_every_condition_says_what_it_answers():
    assert {"no_delta", "full", "alpha", "error_term", "true_output"} <= set(CONDITIONS)
    assert all(name == one.name and one.answers for name, one in CONDITIONS.items())
    assert "raw" not in CONDITIONS


def test_nothing_stays_behind_even_after_an_error(subject):
    batch = pad_left([row.ids for row in subject.encoded], 0)
    with torch.no_grad():
        before = forward(subject.bridge, batch, 1)
        with suppress(ZeroDivisionError), spliced(subject.bridge, Edit(subject.patch, "full")) as splice:
            splice.reset(batch.editable, torch.ones(len(batch.ids)))
            changed = forward(subject.bridge, batch, 1)
            raise ZeroDivisionError
        assert torch.equal(forward(subject.bridge, batch, 1), before)
    assert not torch.equal(changed, before)


def test_raw_edits_nothing_whatever_the_sites(subject):
    batch = pad_left([row.ids for row in subject.encoded], 0)
    with torch.no_grad():
        before = forward(subject.bridge, batch, 1)
        for patches in ((), subject.patches):
            with spliced(subject.bridge, Edit(patches, "raw"), record=True) as splice:
                splice.reset(batch.editable, torch.ones(len(batch.ids)))
                assert torch.equal(forward(subject.bridge, batch, 1), before)
                assert splice.base_acts.tolist() == [0.0] * len(batch.ids)


def test_an_unknown_condition_and_missing_parts_are_named(subject):
    without = [Patch(Site(1), subject.patch[0].base)]
    for patches, condition, said in (
        (subject.patch, "fulll", "no condition 'fulll'; there are raw, no_delta, full, alpha"),
        ([], "full", "condition full needs one patch for each of one or more layers, got layers none"),
        ([*subject.patch, *subject.patch], "no_delta", "got layers 1, 1"),
        (without, "full", "condition full needs a delta transcoder, and layer 1 has none"),
    ):
        with pytest.raises(ValueError) as raised, spliced(subject.bridge, Edit(patches, condition)):  # noqa: PT011
            pass
        assert said in str(raised.value)
    with spliced(subject.bridge, Edit(without, "no_delta")):
        pass


def test_a_site_is_of_one_layer_and_one_kind(random_transcoder):
    base = random_transcoder(6, 8, layer=1, seed=0)
    delta = random_transcoder(6, 4, layer=1, seed=1, bias=False)
    assert Patch(Site(1), base, delta).delta is delta
    other_kind = dataclasses.replace(delta, site=Site(1, dataclasses.replace(MLP, reads="ln2.hook_out")))
    for arguments, said in (
        ((Site(2), base, delta), "layer 2: the ground under its delta is of layer 1"),
        (
            (Site(1), base, dataclasses.replace(delta, site=Site(0))),
            "layer 1: delta: made for layer 0, not for layer 1",
        ),
        ((Site(1), base, dataclasses.replace(delta, site=Site(2))), "layer 1: delta: made for layer 2"),
        ((Site(1), base, random_transcoder(7, 4, layer=1, seed=1, bias=False)), "layer 1: delta: reads 7 dimensions"),
        ((Site(1), base, other_kind), "layer 1: delta: reads ln2.hook_out"),
    ):
        with pytest.raises(ModelError) as raised:
            Patch(*arguments)
        assert str(raised.value).startswith(said)


def test_a_transcoder_of_another_model_is_refused(subject, random_transcoder):
    n_layers, d_model = subject.bridge.cfg.n_layers, subject.d_model
    wrong_tap = dataclasses.replace(
        random_transcoder(d_model, 8, layer=1, seed=0),
        site=Site(1, dataclasses.replace(MLP, reads="ln9.hook_normalized")),
    )
    for base, said in (
        (random_transcoder(d_model + 1, 8, layer=1, seed=0), f"the MLP of layer 1 of the model reads {d_model}"),
        (
            random_transcoder(d_model, 8, layer=n_layers, seed=0),
            f"this model has no blocks.{n_layers}.ln2.hook_normalized",
        ),
        (wrong_tap, "this model has no blocks.1.ln9.hook_normalized"),
    ):
        patch = Patch(base.site, base)
        with pytest.raises(ModelError) as raised, spliced(subject.bridge, Edit([patch], "no_delta")):
            pass
        assert said in str(raised.value)


def test_half_precision_models_keep_their_dtype_and_the_transcoders_theirs(gemma_folder, wrapped, random_transcoder):
    bridge = wrapped(gemma_folder, torch.bfloat16)
    patch = Patch(Site(1), random_transcoder(32, 96, 1, seed=0), random_transcoder(32, 8, 1, seed=1, bias=False))
    batch = pad_left([[2, 50, 60, 70], [2, 50]], 0)
    with torch.no_grad():
        raw = forward(bridge, batch, 1)
        with spliced(bridge, Edit([patch], "true_output")) as splice:
            splice.reset(batch.editable, torch.ones(2))
            assert torch.equal(forward(bridge, batch, 1), raw)
        with spliced(bridge, Edit([patch], "full")) as splice:
            splice.reset(batch.editable, torch.ones(2))
            full = forward(bridge, batch, 1)
    assert full.isfinite().all()
    assert not torch.equal(full, raw)
