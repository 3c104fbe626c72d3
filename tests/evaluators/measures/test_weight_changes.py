"""What changed in the weights: ranks against full decompositions, sizes and rows against plain arithmetic."""

import pytest
import torch

from evaluators.measures.weight_changes import HIGHEST_RANK, numerical_rank, rounding_of, row_changes, weight_changes


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 60), (300, 200), (200, 700)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_a_low_rank_change_has_the_rank_of_a_full_decomposition(shape, rank):
    weights = normal(*shape, seed=1)
    changed = weights + 0.01 * normal(shape[0], rank, seed=2) @ normal(rank, shape[1], seed=3)
    difference = changed - weights
    assert numerical_rank(difference, rounding_of(changed)) == rank
    largest = torch.linalg.matrix_rank(difference.double(), rtol=1e-3)
    assert largest == rank


@pytest.mark.parametrize("shape", [(100, 90), (300, 400)])
def test_a_change_of_high_rank_is_not_given_a_number(shape):
    weights = normal(*shape, seed=1)
    assert numerical_rank(0.01 * normal(*shape, seed=2), rounding_of(weights)) is None
    for rank, expected in ((HIGHEST_RANK, HIGHEST_RANK), (HIGHEST_RANK + 1, None)):
        difference = 0.01 * normal(shape[0], rank, seed=3) @ normal(rank, shape[1], seed=4)
        assert numerical_rank(difference, rounding_of(weights)) == expected


def test_rounding_to_bf16_hides_what_is_below_it():
    weights = normal(300, 400, seed=1).bfloat16()
    strong = normal(300, 2, seed=2) @ normal(2, 400, seed=3)
    changed = (weights.float() + strong + 1e-5 * normal(300, 1, seed=4) @ normal(1, 400, seed=5)).bfloat16()
    assert numerical_rank(changed.float() - weights.float(), rounding_of(changed)) == 2


def test_only_what_differs_is_listed_with_its_size_layer_and_module():
    before = {
        "model.layers.3.mlp.up_proj.weight": normal(8, 6),
        "model.layers.3.mlp.up_proj.bias": normal(8),
        "model.layers.4.mlp.up_proj.weight": normal(8, 6, seed=1),
        "lm_head.weight": normal(9, 6, seed=2),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["model.layers.3.mlp.up_proj.weight"] *= 1.1
    after["model.layers.3.mlp.up_proj.bias"][0] += 1
    after["lm_head.weight"][4] += 0.5 * before["lm_head.weight"][4]
    found = weight_changes(before, before.__getitem__, after.__getitem__)
    assert [(change.module, change.layer) for change in found] == [
        ("up_proj", 3),
        ("up_proj (bias)", 3),
        ("lm_head", None),
    ]
    assert found[0].relative == pytest.approx(0.1, rel=1e-5)
    assert found[1].relative == pytest.approx((1 / before["model.layers.3.mlp.up_proj.bias"].norm()).item(), rel=1e-5)
    assert [change.rank_in_words for change in found] == ["6", "-", "1"]
    assert row_changes(before["lm_head.weight"], after["lm_head.weight"]) == (1, [(4, pytest.approx(0.5, rel=1e-5))])


def test_a_coarser_save_alone_is_no_change():
    before = {"weight": normal(8, 6)}
    assert weight_changes(before, before.__getitem__, lambda name: before[name].bfloat16()) == []
