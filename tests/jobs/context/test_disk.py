"""Windows of layers: all layers once, each window within the budget."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.context.context import Context
from jobs.context.disk import Disk, bytes_needed, disk_of, drop, layer_bytes
from jobs.errors import RequestError
from search_spaces.load import load


def context(root: Path, *settings: str) -> Context:
    return Context(load("tiny", [f"storage.root={root}", *settings]))


def test_windows_hold_every_layer_once_and_fit_the_budget(tmp_path: Path) -> None:
    whole = context(tmp_path)
    sizes = {layer: layer_bytes(whole, layer) for layer in range(4)}
    assert sizes[1] == sizes[2] > sizes[0] == sizes[3], "layers 1 and 2 have bases"
    assert disk_of(whole).windows(range(4)) == [[0, 1, 2, 3]]
    assert disk_of(whole).windows([]) == []
    assert disk_of(context(tmp_path, f"storage.budget_gb={sum(sizes.values()) / 1e9!r}")).windows([2, 0]) == [[0, 2]]
    less = context(tmp_path, f"storage.budget_gb={(sizes[0] + sizes[1]) / 1e9!r}")
    assert disk_of(less).windows(range(4)) == [[0, 1], [2, 3]]
    assert disk_of(less).windows([3, 0]) == [[0, 3]]
    assert disk_of(less).apart
    assert bytes_needed(whole) - bytes_needed(less) == sizes[2] + sizes[3]
    with pytest.raises(RequestError, match=re.escape("storage.budget_gb: got 1e-05, must be at least")):
        disk_of(context(tmp_path, "storage.budget_gb=1e-5"))


def test_without_a_budget_what_is_there_stays_however_full_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that are on disk do not count against what is free."""
    of = context(tmp_path)
    sizes = {layer: layer_bytes(of, layer) for layer in range(4)}
    monkeypatch.setattr("jobs.context.disk._free", lambda context: sizes[0])
    assert disk_of(of).apart
    folder = of.space.activations / "finetuned/train/layer_00"
    folder.mkdir(parents=True)
    (folder / "shard_0000.safetensors").write_bytes(bytes(sum(sizes.values())))
    assert not disk_of(of).apart


def test_recomputed_base_errors_take_no_disk(tmp_path: Path) -> None:
    kept, not_kept = (context(tmp_path, f"storage.base_errors={how}") for how in ("kept", "recomputed"))
    tokens, d_model, bases = 3600, 32, 2
    assert layer_bytes(kept, 1) - layer_bytes(not_kept, 1) == 2 * tokens * d_model * bases
    assert layer_bytes(kept, 0) == layer_bytes(not_kept, 0)
    assert Disk({0: 1, 1: 1}, 1.0).windows([1, 0]) == [[0], [1]]


def test_only_what_was_asked_is_dropped(tmp_path: Path) -> None:
    of = context(tmp_path)
    folders = [of.space.activations / f"finetuned/train/layer_0{layer}" for layer in range(2)]
    folders += [of.space.deltas / "layer_00/p0.25/residual/train", of.space.deltas / "layer_00/change/d004"]
    for folder in folders:
        folder.mkdir(parents=True)
    kept = of.space.activations / "finetuned/moments/layer_00.safetensors"
    kept.parent.mkdir()
    kept.touch()
    drop(of, keep=[1])
    assert [folder.is_dir() for folder in folders] == [False, True, False, True]
    drop(of)
    assert [folder.is_dir() for folder in folders] == [False, False, False, True]
    assert kept.is_file()
