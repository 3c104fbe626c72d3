"""Packed batches: tokens, positions, places and labels of every row, and batches that are epochs."""

import itertools

import pytest
import torch

from trainers.packing import Example, pack, shuffled_batches

ROWS = [Example([2, 11, 12, 13, 1], 2), Example([2, 21, 1], 1), Example([2, 31, 32, 1], 3)]


def test_rows_lie_one_after_the_other_less_their_last_tokens_and_positions_start_at_each_bos():
    batch = pack(ROWS)
    assert batch.ids.tolist() == [2, 11, 12, 13, 2, 21, 2, 31, 32]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_labels_are_the_last_tokens_of_each_row_and_are_asked_of_the_tokens_before_them():
    batch = pack(ROWS)
    assert batch.labels.tolist() == [13, 1, 1, 31, 32, 1]
    assert batch.ids[batch.scored].tolist() == [12, 13, 21, 2, 31, 32]


def test_the_padded_view_holds_every_token_at_its_place():
    batch = pack(ROWS)
    padded = batch.ids[batch.rows]
    assert padded.tolist() == [[2, 11, 12, 13], [2, 21, 21, 21], [2, 31, 32, 32]]
    assert torch.equal(padded.flatten()[batch.places], batch.ids)


@pytest.mark.parametrize("rows", [[], [*ROWS, Example([2], 0)]])
def test_nothing_to_predict_is_no_batch(rows):
    with pytest.raises(ValueError, match="at least"):
        pack(rows)


def test_an_epoch_is_every_row_once_in_shuffled_batches():
    rows = [Example([2] * (1 + n % 7), n) for n in range(50)]
    batches = shuffled_batches(rows, 4, seed=1)
    epochs = [[row.labelled for batch in itertools.islice(batches, 13) for row in batch] for _ in range(2)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_mixes_short_and_long_rows():
    rows = [Example([2] * (5 if n % 2 else 50), n) for n in range(512)]
    batches = itertools.islice(shuffled_batches(rows, 8, seed=1), 64)
    assert sum(len({len(row.ids) for row in batch}) == 2 for batch in batches) > 60
