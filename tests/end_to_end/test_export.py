"""`export` on a finished study: each file computes what the sweep's own transcoders do, at the strength asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.commands.finished import Asked, combination, export, load_deltas, load_sites
from jobs.errors import RequestError
from jobs.study.context import Context
from models.gemma_scope import read_npz
from search_spaces.load import load


@pytest.fixture(scope="module")
def context(finished) -> Context:
    return Context(load("tiny", [f"storage.root={finished[0]}"]))


def by_layer(files: list[Path]) -> dict[int, Path]:
    return {int(path.relative_to(path.parents[3]).parts[0].removeprefix("layer_")): path for path in files}


@pytest.mark.parametrize("onto_bases", [False, True])
def test_change_deltas_alone_and_on_their_layers_bases(context: Context, tmp_path: Path, onto_bases: bool) -> None:
    files = by_layer(export(context, "gemma-scope", tmp_path / "out", Asked("change"), 0.5, onto_bases))
    assert sorted(files) == ([1, 2] if onto_bases else [0, 1, 2, 3])
    deltas = load_deltas(context, list(files), combination(context, Asked("change")))
    bases = {site.layer: site.base for site in load_sites(context, None, combination(context, Asked("residual")))}
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for layer, path in files.items():
        expected = 0.5 * deltas[layer](x) + (bases[layer](x) if onto_bases else 0)
        torch.testing.assert_close(read_npz(path, layer)(x), expected, rtol=1e-4, atol=1e-5)
    assert any("error(x)" in path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_a_sweep_without_bases_says_so(context: Context, tmp_path: Path) -> None:
    without = Context(load("tiny", [f"storage.root={context.space.root}", "deltas.targets=[change]"]))
    with pytest.raises(RequestError, match="--onto-bases: the sweep tiny has no base transcoders"):
        export(without, "saelens", tmp_path / "out", Asked("change"), 1.0, True)
    assert not (tmp_path / "out").exists()
