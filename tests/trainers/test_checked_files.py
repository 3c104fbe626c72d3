"""A file that was damaged anywhere is told from one that holds what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import checked_files, checkpoints
from trainers.activations import captured_columns, damaged_files, write_index, write_shard

TENSORS = {"x": torch.arange(12.0).reshape(3, 4).bfloat16(), "sum": torch.tensor([1.5], dtype=torch.float64)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "one.safetensors"
    checked_files.save(path, TENSORS, {"state": "{}"})
    assert checked_files.is_intact(path)
    return path.read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_byte_shows(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    # JSON may be written in other ways: a header that says the same is not damaged.
    if checked_files.is_intact(path):
        from safetensors.torch import load_file

        assert {name: one.tolist() for name, one in load_file(path).items()} == {
            name: one.tolist() for name, one in TENSORS.items()
        }


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_cut_file_shows(whole: bytes, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:length])
    assert not checked_files.is_intact(path)


def test_a_missing_file_and_one_of_another_maker_are_not_intact(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert not checked_files.is_intact(tmp_path / "none")
    save_file(TENSORS, tmp_path / "other")
    assert not checked_files.is_intact(tmp_path / "other")


def test_a_damaged_checkpoint_is_none(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoints.write(path, TENSORS, {"run": {"seed": 1}})
    assert checkpoints.read(path, {"seed": 1}) is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoints.read(path, {"seed": 1}) is None


def test_damaged_shards_and_lists_are_named(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"shard_{number}.safetensors", {"x": torch.zeros(4, 2)})
    assert damaged_files(tmp_path) == []
    shards = [{"file": f"shard_{number}.safetensors", "tokens": 4} for number in range(3)]
    write_index(tmp_path, shards, {})
    assert damaged_files(tmp_path) == []
    assert captured_columns(tmp_path) == {"x"}
    (tmp_path / "shard_1.safetensors").unlink()
    data = bytearray((tmp_path / "shard_2.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "shard_2.safetensors").write_bytes(data)
    assert [path.name for path in damaged_files(tmp_path)] == ["shard_2.safetensors", "shard_1.safetensors"]
    (tmp_path / "index.json").write_text('{"shards": 3}')
    assert tmp_path / "index.json" in damaged_files(tmp_path)
    assert captured_columns(tmp_path) == set()
    write_index(tmp_path, [{"file": "shard_0.safetensors", "tokens": 5}], {})
    assert tmp_path / "index.json" in damaged_files(tmp_path)
