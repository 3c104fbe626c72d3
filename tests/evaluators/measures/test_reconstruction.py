"""Reconstruction figures against plain loops over the splice by hand."""

import dataclasses

import pytest
import torch

from data.encoding import pad_left
from evaluators.measures import reconstruction
from evaluators.measures.reconstruction import evaluate_reconstruction, site_activations, text_cross_entropy
from evaluators.splice.interventions import Edit, Patch
from sites import Site


def run(subject, patches):
    return list(evaluate_reconstruction(subject.passes, patches, subject.rows, 1.0))


def loop_cross_entropy(reference, encoded):
    """Mean nats of every token after BOS."""
    total = count = 0
    for row in encoded:
        steps = reference.run(row.ids)[0][:-1].log_softmax(-1)
        total -= sum(step[token].item() for step, token in zip(steps, row.ids[1:], strict=True))
        count += len(row.ids) - 1
    return total / count, count


@pytest.mark.parametrize("condition", ["raw", "no_delta", "full", "zero_ablation"])
def test_cross_entropy_is_that_of_a_loop(subject, by_hand, condition):
    for patches in (subject.patch, subject.patches):
        found, tokens = text_cross_entropy(subject.passes, Edit(patches, condition), subject.rows)
        expected, count = loop_cross_entropy(by_hand(subject.plain, patches, condition), subject.encoded)
        assert tokens == count
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_site_is_read_on_every_token_but_bos_and_padding(subject, plain_taps):
    x, y = site_activations(subject.passes, subject.patch[0], subject.rows)
    assert len(x) == len(y) == sum(len(row.ids) - 1 for row in subject.encoded)
    wanted = []
    for row in subject.encoded:
        wanted.append([one[0, 1:] for one in plain_taps(subject.plain, pad_left([row.ids], 0), 1)[:2]])
    torch.testing.assert_close(x, torch.cat([one for one, _ in wanted]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, torch.cat([one for _, one in wanted]), rtol=1e-4, atol=1e-4)


def test_figures_of_two_deltas_on_one_base(subject, by_hand, random_transcoder):
    (first,) = subject.patch
    second = dataclasses.replace(first, delta=random_transcoder(subject.d_model, 5, 1, seed=9, bias=False))
    ce_raw, tokens = loop_cross_entropy(by_hand(subject.plain, [first], "raw"), subject.encoded)
    cells = list(evaluate_reconstruction(subject.passes, [first, second], subject.rows, ce_raw))
    x, y = site_activations(subject.passes, first, subject.rows)
    ce_zero, _ = loop_cross_entropy(by_hand(subject.plain, [first], "zero_ablation"), subject.encoded)
    for patch, cell in zip((first, second), cells, strict=True):
        assert cell["n_tokens"] == tokens
        assert cell["ce_raw"] == ce_raw
        for name, made, condition in (
            ("base", patch.base(x), "no_delta"),
            ("full", patch.base(x) + patch.delta(x), "full"),
        ):
            error = made - y
            cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(made, y, strict=True)]
            ratios = [(e.norm() / b.norm()).item() for e, b in zip(error, y, strict=True)]
            assert cell[f"mean_cos_{name}"] == pytest.approx(sum(cosines) / len(y), abs=1e-5)
            assert cell[f"mean_l2_{name}"] == pytest.approx(sum(ratios) / len(y), rel=1e-5)
            variance = ((y - y.mean(0)) ** 2).sum().item()
            assert cell[f"fvu_{name}"] == pytest.approx((error**2).sum().item() / variance, rel=1e-5)
            ce, _ = loop_cross_entropy(by_hand(subject.plain, [patch], condition), subject.encoded)
            assert cell[f"ce_{name}"] == pytest.approx(ce, rel=1e-5)
            assert cell[f"dce_{name}"] == pytest.approx(ce - ce_raw, abs=1e-4)
            recovered = 1 - (ce - ce_raw) / (ce_zero - ce_raw)
            assert cell[f"ce_recovered_{name}"] == pytest.approx(recovered, abs=0.01)
        assert cell["l0_base"] == pytest.approx((patch.base.encode(x) > 0).sum(1).float().mean().item())
        assert cell["l0_delta"] == pytest.approx((patch.delta.encode(x) > 0).sum(1).float().mean().item())
    assert cells[0]["fvu_base"] == cells[1]["fvu_base"]
    assert cells[0]["fvu_full"] != cells[1]["fvu_full"]


def test_bases_of_one_layer_share_the_layers_zero_ablation(subject, random_transcoder, monkeypatch):
    """Two percentiles: each base once, each delta once, the zeroed MLP once, and what each gives alone."""
    (first,) = subject.patch
    other = dataclasses.replace(first, ground=random_transcoder(subject.d_model, 96, 1, seed=77))
    third = dataclasses.replace(first, delta=random_transcoder(subject.d_model, 5, 1, seed=9, bias=False))
    alone = [one for patch in (first, third, other) for one in run(subject, [patch])]
    asked = []
    real = reconstruction.score

    def spy(passes, edit, jobs, **named):
        asked.append(edit.condition)
        return real(passes, edit, jobs, **named)

    monkeypatch.setattr(reconstruction, "score", spy)
    together = run(subject, [first, third, other])
    assert sorted(asked) == ["full", "full", "full", "no_delta", "no_delta", "zero_ablation"]
    for one, two in zip(alone, together, strict=True):
        assert {**one, "seconds": 0.0} == {**two, "seconds": 0.0}


def test_sites_must_be_of_one_layer(subject):
    with pytest.raises(ValueError, match=r"the patches must be of one layer, got 0, 2"):
        run(subject, subject.patches)
    with pytest.raises(ValueError, match="needs a delta transcoder"):
        run(subject, [Patch(Site(1), subject.patch[0].base)])
