"""Sets of layers: what their names stand for, and labels that read back."""

import pytest

from evaluators.layer_sets import is_set, layer_label, layer_order, layers_in, layers_of


def test_names_stand_for_sets():
    layers = list(range(7))
    assert layers_of("all", layers) == [tuple(layers)]
    assert layers_of("each", [3, 5]) == [(3,), (5,)]
    assert layers_of("thirds", layers) == [(0, 1), (2, 3, 4), (5, 6)]
    assert sorted(sum(layers_of("thirds", list(range(30))), ())) == list(range(30))
    assert layers_of("thirds", [1, 2]) == []
    assert layers_of([5, 2], layers) == [(2, 5)]
    assert layers_of([5, 9], layers) == [], "a set that the deltas do not cover"
    assert layers_of("all", []) == []


@pytest.mark.parametrize(
    ("layers", "label"),
    [([8], "8"), ([16, 8], "8+16"), ([0, 1, 2, 3, 7], "0-3+7"), ([1, 2], "1+2"), (range(100), "0-99"), ([], "none")],
)
def test_labels_read_back(layers, label):
    assert layer_label(layers) == label
    assert layers_in(label) == sorted(layers)
    assert is_set(label) == (len(list(layers)) > 1)


def test_order_and_digits():
    assert layer_label([3, 4, 5], digits=2) == "03-05"
    assert sorted(["0-29", "8+16", "20", "none", "8"], key=layer_order) == ["none", "8", "20", "8+16", "0-29"]
