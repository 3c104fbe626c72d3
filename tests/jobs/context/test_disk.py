"""Windows of layers: all layers once, each window within the budget."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.context.context import Context
from jobs.context.disk import Disk, bytes_needed, disk_of, drop, site_bytes
from jobs.errors import RequestError
from search_spaces.load import load
from sites import mlp_sites

SITES = mlp_sites(range(4))


def context(root: Path, *settings: str) -> Context:
    return Context(load("tiny", [f"storage.root={root}", "deltas.sites=[mlp]", *settings]))


def test_windows_hold_every_layer_once_and_fit_the_budget(tmp_path: Path) -> None:
    whole = context(tmp_path)
    sizes = [site_bytes(whole, site) for site in SITES]
    assert sizes[1] == sizes[2] > sizes[0] == sizes[3], "layers 1 and 2 have bases"
    assert disk_of(whole).windows(SITES) == [SITES]
    assert disk_of(whole).windows([]) == []
    assert disk_of(context(tmp_path, f"storage.budget_gb={sum(sizes) / 1e9!r}")).windows([SITES[2], SITES[0]]) == [
        [SITES[0], SITES[2]]
    ]
    less = context(tmp_path, f"storage.budget_gb={(sizes[0] + sizes[1]) / 1e9!r}")
    assert disk_of(less).windows(SITES) == [SITES[:2], SITES[2:]]
    assert disk_of(less).windows([SITES[3], SITES[0]]) == [[SITES[0], SITES[3]]]
    assert disk_of(less).needs_windows
    assert bytes_needed(whole) - bytes_needed(less) == sizes[2] + sizes[3]
    with pytest.raises(RequestError, match=re.escape("storage.budget_gb: got 1e-05, must be at least")):
        disk_of(context(tmp_path, "storage.budget_gb=1e-5"))


def test_without_a_budget_what_is_there_stays_however_full_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that are on disk do not count against what is free."""
    of = context(tmp_path)
    sizes = [site_bytes(of, site) for site in SITES]
    monkeypatch.setattr("jobs.context.disk._free", lambda context: sizes[0])
    assert disk_of(of).needs_windows
    folder = of.space.activations / "finetuned/train/layer_00"
    folder.mkdir(parents=True)
    (folder / "shard_0000.safetensors").write_bytes(bytes(sum(sizes)))
    assert not disk_of(of).needs_windows


def test_recomputed_base_errors_take_no_disk(tmp_path: Path) -> None:
    kept, not_kept = (context(tmp_path, f"storage.base_errors={how}") for how in ("kept", "recomputed"))
    tokens, d_model, bases = 3600, 32, 2
    assert site_bytes(kept, SITES[1]) - site_bytes(not_kept, SITES[1]) == 2 * tokens * d_model * bases
    assert site_bytes(kept, SITES[0]) == site_bytes(not_kept, SITES[0])
    assert Disk(dict.fromkeys(SITES, 1), 1.0).windows([SITES[1], SITES[0]]) == [[SITES[0]], [SITES[1]]]


def test_only_what_was_asked_is_dropped(tmp_path: Path) -> None:
    of = context(tmp_path)
    folders = [of.space.activations / f"finetuned/train/layer_0{layer}" for layer in range(2)]
    folders += [of.space.deltas / "layer_00/p0.25/residual/train", of.space.deltas / "layer_00/change/d004"]
    for folder in folders:
        folder.mkdir(parents=True)
    kept = of.space.activations / "finetuned/moments/layer_00.safetensors"
    kept.parent.mkdir()
    kept.touch()
    drop(of, keep=SITES[1:2])
    assert [folder.is_dir() for folder in folders] == [False, True, False, True]
    drop(of)
    assert [folder.is_dir() for folder in folders] == [False, False, False, True]
    assert kept.is_file()
