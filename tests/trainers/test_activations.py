"""Shards on disk and the batches drawn from them: nothing lost, nothing twice, as many as announced."""

import pytest
import torch

from trainers.activations import Pairs, read_index, read_pairs, shard_tokens, write_index, write_shard


def numbered(*lengths: int) -> Pairs:
    """Shards whose rows carry their own number, and twice it."""
    ids = torch.arange(sum(lengths), dtype=torch.float32)
    return Pairs([(part.unsqueeze(1), 2 * part.unsqueeze(1)) for part in ids.split(list(lengths))])


def epoch(pairs: Pairs, size: int, seed: int = 0, window: int = 4) -> list[torch.Tensor]:
    drawn = pairs.batches(size, torch.Generator().manual_seed(seed), window)
    batches = [tuple(column.clone() for column in batch) for batch in drawn]  # their memory is used again
    assert all(torch.equal(2 * x, y) for x, y in batches), "rows of a pair stay together"
    return [x.flatten() for x, _ in batches]


@pytest.mark.parametrize("lengths", [(10,), (7, 7, 7), (33, 5, 18, 2, 40), (1, 1, 1, 1, 1, 1, 30)])
@pytest.mark.parametrize("size", [1, 4, 8, 13])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_an_epoch_is_every_row_at_most_once_in_full_batches(lengths, size, window):
    pairs = numbered(*lengths)
    batches = epoch(pairs, size, window=window)
    rows = torch.cat(batches)
    assert len(batches) == pairs.batch_count(size)
    assert len(rows.unique()) == len(rows)
    assert pairs.tokens - len(rows) < size or pairs.tokens < size
    assert {len(batch) for batch in batches} == {min(size, pairs.tokens)}


def test_batches_are_those_of_shards_joined_in_every_epochs_order():
    pairs, size = numbered(33, 5, 18, 2), 8
    drawn, order = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(3):
        shards = [pairs.shards[i] for i in torch.randperm(4, generator=order)]
        mixed = torch.cat([x for x, _ in shards]).flatten()
        expected = mixed[torch.randperm(len(mixed), generator=order)][: len(mixed) // size * size]
        assert torch.equal(torch.cat([x.flatten().clone() for x, _ in pairs.batches(size, drawn)]), expected)


def test_fewer_rows_than_a_batch_are_one_short_batch():
    (batch,) = epoch(numbered(2, 3), 16)
    assert sorted(batch.tolist()) == [0, 1, 2, 3, 4]


def test_the_order_depends_on_the_seed_alone_and_mixes_shards():
    pairs = numbered(100, 100, 100)
    first, again, other = (torch.cat(epoch(pairs, 10, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    shards_in_first_batch = {int(row) // 100 for row in epoch(pairs, 30)[0]}
    assert shards_in_first_batch == {0, 1, 2}


def test_in_order_is_every_row_in_order():
    rows = [x.flatten() for x, _ in numbered(5, 3).in_order(2)]
    assert torch.cat(rows).tolist() == list(range(8))
    assert max(map(len, rows)) == 2


def test_files_come_back_as_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(n, 3, generator=generator).bfloat16() for n in (4, 2)]
    for number, x in enumerate(shards):
        write_shard(tmp_path / f"s{number}", {"x": x, "y": -x})
    assert shard_tokens(tmp_path / "s0") == 4
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path)  # no index: not finished
    write_index(tmp_path, [{"file": "s0", "tokens": 4}, {"file": "s1", "tokens": 2}], {"layer": 7})
    assert read_index(tmp_path)["tokens"] == 6
    assert read_index(tmp_path)["layer"] == 7
    pairs = read_pairs(tmp_path)
    assert pairs.tokens == 6
    assert all(
        torch.equal(x, want) and torch.equal(y, -want) for (x, y), want in zip(pairs.shards, shards, strict=True)
    )
    (only,) = read_pairs(tmp_path, ("y",)).whole()
    assert torch.equal(only, -torch.cat(shards))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "s0", "s1"]
