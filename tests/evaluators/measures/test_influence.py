"""Influence is the sum over all paths, and pruning keeps the fewest nodes and edges that make up most of it."""

import pytest
import torch

from evaluators.measures.influence import Incoming, most_of, prune


def diamond():
    """Four features, of which the last two are expanded: 0 and 1 feed 2, 1 and 2 feed 3, and 2 and 3 the output."""
    incoming = Incoming(4)
    incoming.add(incoming.output, 1.0, torch.tensor([0.0, 0.0, 1.0, -2.0]))  # so that rest is 2
    incoming.add(3, 6.0, torch.tensor([0.0, -3.0, 6.0, 0.0]))  # rest is 3
    incoming.add(2, 1.0, torch.tensor([1.0, -0.5, 0.0, 0.0]))  # rest is 0.5
    return incoming


def test_rest_is_what_no_feature_explains():
    incoming = diamond()
    assert [incoming.effects[target][incoming.rest].item() for target in (incoming.output, 3, 2)] == [2.0, 3.0, 0.5]
    assert [incoming.value(target) for target in (incoming.output, 3, 2)] == [1.0, 6.0, 1.0]


def test_influence_sums_over_paths():
    """Against the matrix formula, (I - A)^-1 for normalised |effects| A."""
    incoming, n = diamond(), 6
    A = torch.zeros(n, n, dtype=torch.float64)
    for target, effects in incoming.effects.items():
        A[target, : n - 1] = effects.abs() / effects.abs().sum()
    expected = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - A)[incoming.output]
    torch.testing.assert_close(incoming.influence(), expected)
    # What has no causes in the graph is where all of it comes from.
    assert incoming.influence()[[0, 1, incoming.rest]].sum().item() == pytest.approx(1.0)


def test_nodes_that_are_not_expanded_pass_nothing_on():
    incoming = Incoming(2)
    incoming.add(incoming.output, 4.0, torch.tensor([1.0, 3.0]))
    assert incoming.influence().tolist() == [0.25, 0.75, 0.0, 1.0]


def test_the_fewest_that_make_up_most():
    scores = torch.tensor([0.1, 0.5, 0.0, 0.4])
    assert most_of(scores, 0.49).tolist() == [False, True, False, False]
    assert most_of(scores, 0.51).tolist() == [False, True, False, True]
    assert most_of(scores, 1.0).tolist() == [True, True, False, True]
    assert most_of(scores, 0.0).tolist() == [False] * 4


def test_everything_stays_at_thresholds_of_one():
    incoming = diamond()
    kept, links = prune(incoming, 1.0, 1.0)
    assert kept == [0, 1, 2, 3]
    assert {(link.source, link.target): link.weight for link in links} == {
        (2, 5): 1.0,
        (3, 5): -2.0,
        (4, 5): 2.0,
        (1, 3): -3.0,
        (2, 3): 6.0,
        (4, 3): 3.0,
        (0, 2): 1.0,
        (1, 2): -0.5,
        (4, 2): 0.5,
    }
    influence = incoming.influence()
    assert all(
        link.score == pytest.approx(float(influence[link.target] * incoming.shares(link.target)[link.source]))
        for link in links
    )


def test_pruning_drops_weak_nodes_and_what_only_feeds_them():
    incoming = Incoming(3)
    incoming.add(incoming.output, 10.0, torch.tensor([0.0, 0.1, 9.9]))
    incoming.add(1, 1.0, torch.tensor([1.0, 0.0, 0.0]))
    assert prune(incoming, 0.9, 1.0)[0] == [2]
    kept, links = prune(incoming, 1.0, 0.9)  # nodes 0 and 1 stay, their edges go
    assert kept == [2]
    assert [(link.source, link.target) for link in links] == [(2, incoming.output)]


def test_rest_and_output_stay_without_any_feature():
    incoming = Incoming(0)
    incoming.add(incoming.output, -2.0, torch.zeros(0))
    assert incoming.influence().tolist() == [1.0, 1.0]
    kept, links = prune(incoming, 0.8, 0.98)
    assert kept == []
    assert [(link.source, link.target, link.weight) for link in links] == [(0, 1, -2.0)]
