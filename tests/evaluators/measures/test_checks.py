"""The checks that every sweep runs: they pass on a right splice and name what is wrong with a broken one."""

import dataclasses

import pytest
import torch

from evaluators.measures.checks import exactness_checks
from evaluators.splice import interventions
from evaluators.splice.limits import Limits


def failed(checks):
    return [check["name"] for check in checks if not check["passed"]]


@pytest.mark.parametrize("place", ["patch", "patches"])
def test_a_right_splice_passes(subject, place):
    checks = exactness_checks(subject.bridge, subject.rows, getattr(subject, place), Limits(4))
    assert len(checks) >= 6
    assert not failed(checks)
    assert all(check["detail"] for check in checks)


@pytest.fixture(scope="module")
def half(subject, wrapped):
    """The same model in bf16."""
    return wrapped(subject.folder, torch.bfloat16)


def test_a_right_splice_passes_in_bf16_and_a_broken_one_does_not(subject, half, monkeypatch):
    bridge, patch = half, subject.patch
    assert not failed(exactness_checks(bridge, subject.rows, patch, Limits(4)))
    registry = interventions.CONDITIONS
    broken = dataclasses.replace(registry["true_output"], combine=lambda y, base, delta, alpha: y + 0.01)
    monkeypatch.setitem(registry, "true_output", broken)
    assert any("own output back" in name for name in failed(exactness_checks(bridge, subject.rows, patch, Limits(4))))


@pytest.mark.parametrize(
    ("condition", "broken", "named"),
    [
        ("true_output", lambda y, base, delta, alpha: base + (y - base), "own output back"),
        ("alpha", lambda y, base, delta, alpha: base + (alpha + 1e-3) * delta, "alpha = 0"),
        ("full", lambda y, base, delta, alpha: y, "does change the logits"),
    ],
)
def test_a_broken_splice_is_named(subject, monkeypatch, condition, broken, named):
    registry = interventions.CONDITIONS
    monkeypatch.setitem(registry, condition, dataclasses.replace(registry[condition], combine=broken))
    assert any(
        named in name for name in failed(exactness_checks(subject.bridge, subject.rows, subject.patch, Limits(4)))
    )


def test_a_splice_that_spares_a_chunks_first_token_is_named(subject, monkeypatch):
    """The bug that a KV cache invites: each generated token is the first of its chunk."""
    real = interventions.Splice.reset

    def sparing(self, editable, alpha, *numbers):
        editable = editable.clone()
        editable[:, 0] = False
        real(self, editable, alpha, *numbers)

    monkeypatch.setattr(interventions.Splice, "reset", sparing)
    checks = exactness_checks(subject.bridge, subject.rows, subject.patch, Limits(8))
    assert any("cached and uncached" in name for name in failed(checks))
