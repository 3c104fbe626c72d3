"""Joint polish: it measures what the evaluation measures, lowers it, keeps the best, and survives a kill."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.encoding import encode_row
from data.rows import Row
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, Reference, score
from models.blocks import read_paths
from models.transcoder import with_bos
from sites import Site, mlp_sites
from trainers.checkpoints import Keeper
from trainers.joint_polish import PolishSettings, Subject, polish

ROWS = [Row(f"What is {a} + {b}?", f"{a + b}", "sum") for a, b in ((1, 2), (30, 4), (5, 66), (7, 80), (9, 10), (11, 1))]


@pytest.fixture(scope="module")
def subject(gemma_folder, load, wrapped, random_transcoder, tmp_path_factory):
    """A model and one whose MLPs of two layers differ, with random deltas, one of which has a feature at BOS."""
    folder = tmp_path_factory.mktemp("before")
    model, tokenizer = load(gemma_folder)
    with torch.no_grad():
        for layer in (0, 2):
            for parameter in model.model.layers[layer].mlp.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    bridge = wrapped(gemma_folder)
    d_model = bridge.cfg.d_model
    deltas = {}
    for layer in (0, 2):
        delta = dataclasses.replace(random_transcoder(d_model, 6, layer, seed=layer), b_dec=None)
        delta = dataclasses.replace(delta, W_dec=0.02 * delta.W_dec)
        at_bos = 0.05 * torch.ones(d_model) if layer == 2 else torch.zeros(d_model)
        deltas[Site(layer)] = with_bos(delta, at_bos)
    return Subject(bridge, read_paths(bridge, folder, mlp_sites([0, 2])), deltas, dict.fromkeys(deltas, 0.1))


@pytest.fixture(scope="module")
def encoded(subject):
    return [encode_row(subject.bridge.tokenizer, row) for row in ROWS]


def kl(subject, deltas, encoded) -> float:
    """As the evaluation measures it, nats a target token."""
    patches = [Patch(site, subject.paths[site], delta) for site, delta in deltas.items()]
    reference = Reference(subject.bridge)
    reference.add(encoded)
    scored = score(Passes(subject.bridge), Edit(patches, "full"), [Job(row) for row in encoded], reference=reference)
    return sum(one.kl for one in scored) / sum(one.n_tokens for one in scored)


def test_it_lowers_the_kl_that_the_evaluation_measures(subject, encoded) -> None:
    done = polish(subject, encoded, encoded, PolishSettings(steps=120, lr=1e-3, rows=6))
    before = done.history[0]
    assert [one["step"] for one in done.history] == [0, 20, 40, 60, 80, 100, 120]
    assert before["val_kl"] == pytest.approx(kl(subject, subject.deltas, encoded), rel=1e-3)
    assert done.figures["val_kl"] == pytest.approx(kl(subject, done.deltas, encoded), rel=1e-3)
    assert done.figures["val_kl"] < 0.95 * before["val_kl"]
    assert done.figures["val_l0"] <= 1.05 * before["val_l0"]
    for site, delta in done.deltas.items():
        assert delta.site == site
        assert delta.at_bos is not None
        assert torch.equal(delta.threshold.isinf(), subject.deltas[site].threshold.isinf())


def test_a_threshold_of_zero_is_no_feature_at_bos(subject, encoded) -> None:
    """Calibration lowers thresholds until fp32 has nothing below, where the L0 budget cannot be reached."""
    deltas = {}
    for site, delta in subject.deltas.items():
        threshold = delta.threshold.clone()
        threshold[:2] = 0.0
        deltas[site] = dataclasses.replace(delta, threshold=threshold)
    done = polish(
        dataclasses.replace(subject, deltas=deltas), encoded, encoded, PolishSettings(steps=20, lr=1e-3, rows=6)
    )
    assert done.history[0]["val_kl"] == pytest.approx(kl(subject, deltas, encoded), rel=1e-3)
    assert done.history[-1]["val_kl"] < done.history[0]["val_kl"]


def test_where_it_makes_things_worse_the_deltas_stay_as_they_were(subject, encoded) -> None:
    done = polish(subject, encoded, encoded, PolishSettings(steps=6, lr=1e3, rows=4))
    assert done.figures["step"] == 0
    for site, delta in done.deltas.items():
        torch.testing.assert_close(delta.W_dec, subject.deltas[site].W_dec)
        torch.testing.assert_close(delta.threshold, subject.deltas[site].threshold)


def test_a_run_that_is_cut_off_ends_as_it_would_have(subject, encoded, tmp_path) -> None:
    settings = PolishSettings(steps=8, lr=3e-3, rows=4)
    whole = polish(subject, encoded, encoded, settings)

    class Killed(Exception):
        pass

    def kill(figures) -> None:
        if figures["step"] == 5:
            raise Killed

    keeper = Keeper(tmp_path / "checkpoint.safetensors", seconds=0.0)
    with pytest.raises(Killed):
        polish(subject, encoded, encoded, settings, report=kill, keeper=keeper)
    again = polish(subject, encoded, encoded, settings, keeper=keeper)
    assert [one["val_kl"] for one in again.history] == [one["val_kl"] for one in whole.history]
    for site, delta in again.deltas.items():
        for name in ("W_enc", "b_enc", "threshold", "W_dec"):
            assert torch.equal(getattr(delta, name), getattr(whole.deltas[site], name))
