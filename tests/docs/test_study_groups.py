"""Groups that come back in another model are found by what they fire on, and tested by what they promote."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.study_groups import agreement, pair_up, tokens


def model(order: list[int], promoted: list[int]) -> pd.DataFrame:
    """Groups in this order: the i-th fires on the three words of its number and promotes those of `promoted[i]`."""

    def words(stem: str, number: int) -> str:
        return " ".join(repr(f"{stem}{number}{letter}") for letter in "abc")

    return pd.DataFrame(
        {
            "group": np.arange(1, len(order) + 1),
            "fires_on": [words("on", number) for number in order],
            "promoted": [words("to", number) for number in promoted],
        }
    )


def test_groups_in_another_order_are_found() -> None:
    first, second = model([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]), model([5, 3, 1, 0, 2, 4], [5, 3, 1, 0, 2, 4])
    pairs = pair_up(first, second)
    assert dict(zip(pairs["group"], pairs["other"], strict=True)) == {1: 4, 2: 3, 3: 5, 4: 2, 5: 6, 6: 1}
    found = agreement(first, second)
    assert (found.pairs, found.alike, found.fires, found.promotes) == (6, 6, 1.0, 1.0)
    assert found.p < 0.01
    assert found.chance < 0.4


def test_groups_that_promote_something_else_are_not_the_same() -> None:
    first, second = model([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]), model([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0])
    found = agreement(first, second)
    assert (found.alike, found.promotes) == (6, 0.0)
    assert found.p == 1.0


def test_groups_that_promote_nothing_are_compared_by_firing_alone() -> None:
    first = model([0, 1, 2], [0, 1, 2])
    found = agreement(first, model([2, 0, 1], [0, 1, 2]).assign(promoted=np.nan))
    assert (found.pairs, found.alike, found.fires) == (3, 3, 1.0)
    assert np.isnan([found.promotes, found.chance, found.p]).all()


def test_a_model_with_fewer_groups_leaves_some_without_a_partner() -> None:
    assert len(pair_up(model([0, 1, 2], [0, 1, 2]), model([2, 0], [2, 0]))) == 2


def test_tokens_of_two_vocabularies_compare() -> None:
    assert tokens("""' call' 'Call' "it's" '\\n' "'s" """) == {"call", "it's", "'s"}
