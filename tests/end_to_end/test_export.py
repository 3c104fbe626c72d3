"""`export` on a finished study: each file computes what the sweep's own transcoders do, at the strength asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from jobs.commands.export import FORMATS, SUPPORTED, export
from jobs.commands.feature_choice import FeatureChoice
from jobs.commands.load import DeltaChoice, combination, load_deltas, load_patches
from jobs.context.context import Context
from jobs.errors import RequestError
from models.gemma_scope import read_npz
from search_spaces.load import load
from sites import Site, mlp_sites, sites_label


@pytest.fixture(scope="module")
def context(finished) -> Context:
    return Context(load("tiny", [f"storage.root={finished[0]}"]))


def held(context: Context, kind: str) -> list[Site]:
    """The sites of the change deltas that a format can hold."""
    return [site for site in context.sites_of("change") if site.kind.name in SUPPORTED[kind]]


def by_layer(files: list[Path]) -> dict[int, Path]:
    return {int(path.relative_to(path.parents[3]).parts[0].removeprefix("layer_")): path for path in files}


@pytest.mark.parametrize("onto_bases", [False, True])
def test_change_deltas_alone_and_on_their_layers_bases(context: Context, tmp_path: Path, onto_bases: bool) -> None:
    files = by_layer(export(context, "gemma-scope", tmp_path / "out", DeltaChoice("change"), 0.5, onto_bases))
    assert sorted(files) == ([1, 2] if onto_bases else [0, 1, 2, 3])
    deltas = load_deltas(context, mlp_sites(files), combination(context, DeltaChoice("change")))
    bases = {
        patch.site.layer: patch.base
        for patch in load_patches(context, None, combination(context, DeltaChoice("residual")))
    }
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for layer, path in files.items():
        expected = 0.5 * deltas[Site(layer)](x) + (bases[layer](x) if onto_bases else 0)
        torch.testing.assert_close(read_npz(path, Site(layer))(x), expected, rtol=1e-4, atol=1e-5)
    assert any("error(x)" in path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_features_that_are_left_out_do_nothing_and_the_card_has_no_figures_of_them(
    context: Context, tmp_path: Path
) -> None:
    choice = FeatureChoice(without=["L1F000", "L1F002"])
    files = by_layer(export(context, "gemma-scope", tmp_path / "out", DeltaChoice("change"), 1.0, features=choice))
    deltas = load_deltas(context, mlp_sites(files), combination(context, DeltaChoice("change")))
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    for layer, path in files.items():
        delta = deltas[Site(layer)]
        acts = delta.encode(x)
        if layer == 1:
            acts[:, [0, 2]] = 0
        torch.testing.assert_close(read_npz(path, Site(layer))(x), delta.decode(acts), rtol=1e-4, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without L1F000, without L1F002" in card
    assert "The sweep has measured no behaviour of exactly these features." in card


def test_a_sweep_without_bases_says_so(context: Context, tmp_path: Path) -> None:
    change = ["deltas.targets=[change]", "evaluate.controls=[random_delta]"]
    without = Context(load("tiny", [f"storage.root={context.space.root}", *change]))
    with pytest.raises(RequestError, match="--onto-bases: the sweep tiny has no base transcoders"):
        export(without, "saelens", tmp_path / "out", DeltaChoice("change"), 1.0, True)
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_a_sentence(context: Context, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--format: got 'onnx', allowed are gemma-scope, saelens, circuit-tracer"):
        export(context, "onnx", tmp_path / "out", DeltaChoice("change"), 1.0)


def test_a_saved_delta_is_plain_safetensors(context: Context) -> None:
    """Its tensors and the formula of docs/formats.md are all there is to it."""
    for target in ("change", "residual"):
        (ground, d_new), sites = combination(context, DeltaChoice(target)), context.sites_of(target)
        for site, delta in load_deltas(context, sites, (ground, d_new)).items():
            x = torch.randn(40, delta.d_in, generator=torch.Generator().manual_seed(0))
            group = context.space.deltas / f"{site.folder}/{ground.label}/d{d_new:03d}"
            trial = json.loads((group / "best.json").read_text())["trial"]
            weights = load_file(group / f"trial_{trial:04d}/delta.safetensors")
            assert sorted(weights) == ["W_dec", "W_enc", "b_enc", "threshold"]
            pre = x @ weights["W_enc"] + weights["b_enc"]
            torch.testing.assert_close((pre * (pre > 0) * (pre > weights["threshold"])) @ weights["W_dec"], delta(x))


class TestModelCard:
    @pytest.fixture(scope="class", params=FORMATS)
    def exported(self, request, context: Context, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("cards") / request.param
        export(context, request.param, folder, DeltaChoice("change"), 0.5)
        return folder

    def test_the_hub_reads_its_metadata(self, exported: Path) -> None:
        data = ModelCard.load(exported / "README.md").data.to_dict()
        assert {"transcoder", "deltascope"} <= set(data["tags"])
        assert not {"license", "base_model"} & data.keys(), "the tiny model is not on the hub"
        assert data.get("library_name") == ("saelens" if exported.name == "saelens" else None)

    def test_its_lines_load_the_deltas(self, exported: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first block, run as it stands; the second one is of libraries that are not installed here."""
        by_hand, theirs = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(exported)
        names: dict[str, Any] = {}
        exec(by_hand, names)
        compile(theirs, "README.md", "exec")
        first = min(held(context, exported.name))
        delta = load_deltas(context, [first], combination(context, DeltaChoice("change")))[first]
        x = torch.randn(40, delta.d_in, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(names["transcoder"](x), 0.5 * delta(x), rtol=1e-4, atol=1e-5)

    def test_its_figures_are_those_of_the_tables(self, exported: Path, context: Context) -> None:
        card = (exported / "README.md").read_text()
        label = sites_label(held(context, exported.name))
        gaps, recovered = (
            pd.read_csv(context.space.report / f"{name}.csv", dtype={"layer": str}) for name in ("gaps", "recovered")
        )
        recovered = recovered[(recovered["condition"] == "alpha") & (recovered["alpha"] == 0.5)]
        for subset in ("tool", "copy", "tool_ood"):
            here = [
                table[(table["target"] == "change") & (table["layer"] == label) & (table["subset"] == subset)]
                for table in (gaps, recovered)
            ]
            if label != "0-3":
                assert here[0].empty
                assert "has measured no behaviour of exactly these layers" in card
                continue
            gap, ce = (table[table["metric"] == "mean_ce"].iloc[0] for table in here)
            (line,) = [line for line in card.splitlines() if line.startswith(f"| `{subset}` |")]
            assert f"{gap['gap']:.3f} [{gap['gap_low']:.3f}, {gap['gap_high']:.3f}]" in line
            assert ("nothing to recover" if pd.isna(ce["recovered"]) else f"{ce['recovered']:.3f} [") in line
            assert line.endswith("| 4 |")
        d_new = combination(context, DeltaChoice("change"))[1]
        best = json.loads((context.space.deltas / f"layer_02/change/d{d_new:03d}/best.json").read_text())
        assert f"| 2 | {best['figures']['val_l0_delta']:.1f} | {best['figures']['val_unexplained']:.3f} |" in card

    def test_it_names_no_place_on_this_machine(self, exported: Path, context: Context) -> None:
        card = (exported / "README.md").read_text()
        assert str(context.space.root) not in card
        assert str(exported.parent) not in card
        assert "/" not in re.findall(r"^\| finetuned model \| (.*) \|$", card, re.MULTILINE)[0]


def test_what_was_not_measured_is_not_claimed(context: Context, tmp_path: Path) -> None:
    export(context, "saelens", tmp_path / "out", DeltaChoice("change"), 0.3, onto_bases=True)
    card = (tmp_path / "out/README.md").read_text()
    assert "has measured no behaviour of exactly these layers, width and alpha" in card
    assert "error(x) = y_unfinetuned(x) - base(x)" in card


def test_a_card_names_models_of_the_hub(context: Context) -> None:
    from jobs.commands.model_card import Exported, model_card

    ground, d_new = combination(context, DeltaChoice("residual"))
    settings = context.settings.model_copy(
        update={"model": context.settings.model.model_copy(update={"source": "smollm2-135m"})}
    )
    known = Context(settings)
    known.__dict__["source"] = context.source
    card = ModelCard(model_card(known, Exported("saelens", ground, d_new, mlp_sites([1, 2]), 1.0, False)))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "layers 1+2" in card.text
