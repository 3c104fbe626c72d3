"""Windows of layers: all layers once, each window within the budget."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.errors import RequestError
from jobs.study.context import Context
from jobs.study.disk import bytes_needed, drop, layer_bytes, windows
from search_spaces.load import load


def context(root: Path, *settings: str) -> Context:
    return Context(load("tiny", [f"storage.root={root}", *settings]))


def test_windows_hold_every_layer_once_and_fit_the_budget(tmp_path: Path) -> None:
    whole = context(tmp_path)
    sizes = {layer: layer_bytes(whole, layer) for layer in range(4)}
    assert sizes[1] == sizes[2] > sizes[0] == sizes[3], "layers 1 and 2 have bases"
    assert windows(whole) == [[0, 1, 2, 3]]
    assert windows(whole, []) == []
    enough = context(tmp_path, f"storage.budget_gb={sum(sizes.values()) / 1e9!r}")
    assert windows(enough, [2, 0]) == [[0, 2]]
    less = context(tmp_path, f"storage.budget_gb={(sizes[0] + sizes[1]) / 1e9!r}")
    assert windows(less) == [[0, 1], [2, 3]]
    assert windows(less, [3, 0]) == [[0, 3]]
    assert bytes_needed(whole) - bytes_needed(less) == sizes[2] + sizes[3]
    with pytest.raises(RequestError, match=re.escape("storage.budget_gb: got 1e-05, must be at least")):
        windows(context(tmp_path, "storage.budget_gb=1e-5"))


def test_only_what_was_asked_is_dropped(tmp_path: Path) -> None:
    of = context(tmp_path)
    folders = [of.space.activations / f"finetuned/train/layer_0{layer}" for layer in range(2)]
    folders += [of.space.deltas / "layer_00/p0.25/residual/train", of.space.deltas / "layer_00/change/d004"]
    for folder in folders:
        folder.mkdir(parents=True)
    kept = of.space.activations / "finetuned/moments/layer_00.safetensors"
    kept.parent.mkdir()
    kept.touch()
    drop(of, [0])
    assert [folder.is_dir() for folder in folders] == [False, True, False, True]
    assert kept.is_file()
