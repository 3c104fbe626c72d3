"""Before any work, a sweep knows what finetuning changed, and says what it leaves out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from jobs.context import fingerprints, keys
from jobs.context.context import Context
from jobs.context.disk import disk_of
from jobs.context.workspace import FINETUNED, VALIDATION_FILE
from jobs.errors import RequestError
from jobs.files import MANIFEST, Damage, finish, keyed_folder, write_json
from jobs.sweep.finetuned import check_models, merge_check
from jobs.sweep.mending import ADDED, find
from jobs.sweep.pair import has_finetuned, note
from jobs.sweep.sweep import start_over
from models.errors import ModelError
from models.weights import open_weights
from search_spaces.load import load as load_settings
from sites import ATTENTION_OUT, MLP, QKV, Kind, Site, mlp_sites

Make = Callable[..., Context]


@pytest.fixture
def sweep(llama_folder: Path, tmp_path: Path) -> Make:
    """A sweep of the random Llama with three layers, whose change deltas alone are asked for."""

    def make(*more: str) -> Context:
        plain = ["deltas.targets=[change]", "deltas.layers=all", "evaluate.controls=[]"]
        root = [f"model.source={llama_folder}", f"storage.root={tmp_path / 'runs'}"]
        context = Context(load_settings("tiny", [*root, *plain, *more]))
        context.space.create()
        return context

    return make


@pytest.fixture
def changed(llama_folder: Path, altered: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the Llama in which some parameters are others."""
    numbers = count()
    return lambda *parts, **more: altered(llama_folder, tmp_path / f"changed{next(numbers)}", *parts, **more)


def adapter_on(load: Any, base: Path, folder: Path, **settings: Any) -> Path:
    model, _ = load(base)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return folder


def said(context: Context, capsys: pytest.CaptureFixture[str]) -> str:
    check_models(context)
    return " ".join(capsys.readouterr().out.split())


def test_unchanged_layers_are_left_out_and_said(
    sweep: Make, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("layers.2.mlp.up", "layers.0.post_attention", "layers.1.self_attn")
    context = sweep(f"model.finetuned={changed(*parts)}", "deltas.sites=[mlp]")
    assert context.sites == mlp_sites([0, 1, 2])
    printed = said(context, capsys)
    assert "the MLP of layer 1 did not change" in printed
    assert "up_proj in layer 2" in printed
    assert "deltas for mlp" in printed
    assert context.sites_of("change") == context.sites == mlp_sites([0, 2])
    assert {group.site for group in context.delta_groups} == {*mlp_sites([0, 2])}
    assert set(disk_of(context).sizes) == {*mlp_sites([0, 2])}
    again = Context(context.settings)
    assert again.layers_of("change") == [0, 2], "which other commands read from disk"


def test_sets_of_layers_leave_out_what_is_unchanged(
    sweep: Make, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned = changed("layers.0.mlp", "layers.2.mlp")
    context = sweep(f"model.finetuned={finetuned}", "evaluate.sets=[all, [1, 2], [1], each]")
    said(context, capsys)
    assert set(context.sets_of("change")) == {tuple(mlp_sites(layers)) for layers in ((0, 2), (2,), (0,))}


@pytest.mark.parametrize(
    ("parts", "sites"),
    [
        (("q_proj", "v_proj"), "[mlp]"),
        (("embed_tokens",), "auto"),
        (("input_layernorm", "o_proj"), "[mlp]"),
        (("model.norm",), "auto"),
        (("up_proj",), "[qkv, o]"),
    ],
)
def test_where_no_site_changed_nothing_is_started(
    sweep: Make, changed: Callable[..., Path], parts: tuple[str], sites: str
) -> None:
    with pytest.raises(RequestError, match="nothing for change deltas to explain") as raised:
        check_models(sweep(f"model.finetuned={changed(*parts)}", f"deltas.sites={sites}"))
    assert parts[0].rpartition(".")[2] in str(raised.value)


@pytest.mark.parametrize(
    ("parts", "kinds", "rest"),
    [
        (("q_proj", "v_proj"), [QKV], []),
        (("input_layernorm", "down_proj"), [QKV, MLP], []),
        (("layers.1.self_attn.o_proj", "model.norm"), [ATTENTION_OUT], ["model.norm.weight"]),
    ],
)
def test_the_kinds_that_changed_get_deltas_and_are_said(
    sweep: Make,
    changed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    parts: tuple[str],
    kinds: list[Kind],
    rest: list[str],
) -> None:
    context = sweep(f"model.finetuned={changed(*parts)}")
    assert f"deltas for {', '.join(kind.name for kind in kinds)}" in said(context, capsys)
    layers = [1] if kinds == [ATTENTION_OUT] else [0, 1, 2]
    assert context.sites == [Site(layer, kind) for layer in layers for kind in kinds]
    assert list(context.rest) == rest
    assert context.is_everything(context.sites)
    assert not context.is_everything(context.sites[1:])


def test_layers_asked_for_by_number_must_hold_a_change(
    sweep: Make, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned = changed("layers.2.mlp")
    said(sweep(f"model.finetuned={finetuned}", "deltas.layers=[2]", "evaluate.sets=[all]"), capsys)
    with pytest.raises(RequestError, match=r"none of .* in layers 0-1"):
        check_models(sweep(f"model.finetuned={finetuned}", "deltas.layers=[0, 1]", "evaluate.sets=[all]"))


def test_a_pair_that_is_equal_is_said_at_once(sweep: Make, changed: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="no change to explain"):
        check_models(sweep(f"model.finetuned={changed()}"))
    with pytest.raises(ModelError, match="rounded to its dtype, so there is no change"):
        check_models(sweep(f"model.finetuned={changed(dtype=torch.bfloat16)}"))


def test_a_coarser_finetuned_model_is_compared_with_a_rounded_base(
    sweep: Make, changed: Callable[..., Path], llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned = changed("layers.1.mlp.down_proj", dtype=torch.bfloat16)
    context = sweep(f"model.finetuned={finetuned}")
    printed = said(context, capsys)
    assert "coarser" in printed
    assert "finetuning changed down_proj in layer 1" in printed
    assert context.sites == mlp_sites([1])
    assert context.source == llama_folder.resolve()
    assert context.model != context.source
    held = load_file(llama_folder / "model.safetensors")
    rounded = open_weights(context.model)
    assert all(torch.equal(one, held[name].bfloat16()) for name, one in rounded.read(held).items())
    shutil.rmtree(context.model)  # it is made again
    said(again := Context(context.settings), capsys)
    assert again.model == context.model
    assert again.model.is_dir()


def test_an_adapter_is_known_by_its_modules_before_it_is_merged(
    sweep: Make, load: Any, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = adapter_on(load, llama_folder, tmp_path / "default")
    with pytest.raises(RequestError, match="q_proj, v_proj in all 3 layers"):
        check_models(sweep(f"model.finetuned={default}", "deltas.sites=[mlp]"))
    context = sweep(f"model.finetuned={default}")
    assert "the adapter adapts q_proj, v_proj in all 3 layers; deltas for qkv" in said(context, capsys)
    assert context.rest == (), "which the merge will tell"
    last = adapter_on(load, llama_folder, tmp_path / "last", target_modules=["up_proj"], layers_to_transform=[2])
    context = sweep(f"model.finetuned={last}")
    assert "the MLP of layers 0-1 did not change" in said(context, capsys)
    assert context.sites == mlp_sites([2])


def test_touched_files_of_a_merged_adapter_change_nothing(
    sweep: Make, load: Any, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's files name a layer that it left untrained, which only the merge can tell."""
    adapter = adapter_on(load, llama_folder, tmp_path / "adapter", target_modules=["up_proj"])
    context = sweep(f"model.finetuned={adapter}")
    said(context, capsys)
    key = keys.finetuned_check(context.settings)
    changed = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2)]
    write_json(keyed_folder(context.space.lora, key) / VALIDATION_FILE, {"key": key, "changed": changed})
    finish(context.space.lora, key, {})
    note(context, changed, exact=True)
    assert context.sites == mlp_sites([0, 2])
    for file in adapter.iterdir():
        os.utime(file)
    again = Context(context.settings)
    assert again.pair is None
    assert "finetuning changed up_proj in layers 0, 2" in said(again, capsys)
    assert again.sites == mlp_sites([0, 2])


@pytest.mark.parametrize(
    ("targets", "reason"),
    [("q_proj,v_proj", "explain"), ("nothing_proj", "cannot be adapted"), ("o_proj", "explain")],
)
def test_what_lora_is_asked_to_adapt_is_checked_before_it_is_trained(sweep: Make, targets: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as raised:
        check_models(sweep(f"lora.space.targets={targets}", "deltas.sites=[mlp]"))
    assert str(raised.value).startswith("lora.space.targets")
    check_models(sweep("lora.space.targets={choice: ['q_proj,v_proj', 'q_proj,up_proj']}"))
    check_models(sweep("lora.space.targets=all-linear"))
    check_models(sweep("lora.space.targets=q_proj,v_proj"))


def test_another_pair_is_looked_at_anew(
    sweep: Make, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = changed("layers.0.mlp"), changed("layers.1.mlp")
    said(first := sweep(f"model.finetuned={one}"), capsys)
    assert first.sites == mlp_sites([0])
    second = sweep(f"model.finetuned={other}")
    assert second.pair is None
    said(second, capsys)
    assert second.sites == mlp_sites([1])
    note(second, ["model.layers.2.mlp.up_proj.weight"], exact=True)
    assert second.sites == mlp_sites([2])


def test_starting_over_keeps_what_is_known_of_an_adopted_pair_alone(
    sweep: Make, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said(adopted := sweep(f"model.finetuned={changed('layers.1.mlp')}"), capsys)
    start_over(adopted)
    assert adopted.sites == Context(adopted.settings).sites == mlp_sites([1])
    trained = sweep("deltas.sites=[mlp]")
    keyed_folder(trained.space.lora, keys.lora_group(trained.settings))
    write_json(trained.space.folder / FINETUNED, {"key": "of an adapter"})
    note(trained, ["model.layers.2.mlp.up_proj.weight"], exact=True)
    assert trained.sites == mlp_sites([2])
    start_over(trained)
    assert trained.sites == mlp_sites([0, 1, 2])


def test_a_damaged_file_about_the_finetuned_model_says_that_nothing_is_known(sweep: Make) -> None:
    """The sweep's own command mends it later; raising would end that command too."""
    context = sweep()
    keyed_folder(context.space.lora, keys.lora_group(context.settings))
    write_json(context.space.folder / FINETUNED, {"key": "of an adapter"})
    note(context, ["model.layers.2.mlp.up_proj.weight"], exact=True)
    finish(context.space.lora, keys.finetuned_check(context.settings), {})
    assert Context(context.settings).pair is not None
    assert has_finetuned(context)
    for damaged in (context.space.folder / FINETUNED, context.space.lora / MANIFEST):
        damaged.write_bytes(damaged.read_bytes()[:20])
    assert Context(context.settings).pair is None
    assert not has_finetuned(context)
    check_models(sweep("lora.space.targets=q_proj", "deltas.sites=auto"), keep=False)


def test_a_stray_file_among_unfinished_cells_is_one_that_was_added(sweep: Make) -> None:
    context = sweep()
    stray = context.space.cells / "raw_tool.json.bak"
    stray.parent.mkdir()
    stray.write_text("{")
    assert [damage for _, damage in find(context)] == [Damage(stray, ADDED)]


def test_each_file_is_read_whole_once(
    sweep: Make, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hashes that keys need are made while the two models are compared."""
    read: list[str] = []
    digest = fingerprints.hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(fingerprints.hashlib, "file_digest", counted)
    monkeypatch.setattr(fingerprints, "_known", {})
    monkeypatch.setattr(fingerprints, "_read_from", set())
    context = sweep(f"model.finetuned={changed('mlp')}")
    _ = context.sites, context.pair
    assert read == [], "nothing is hashed before the pair is looked at"
    said(context, capsys)
    assert sorted(Path(name).name for name in read) == ["model.safetensors"] * 2
    keys.finetuned_check(context.settings)
    assert sum("model.safetensors" in name for name in read) == 2


def test_a_merge_that_changes_what_is_computed_fails() -> None:
    merge = {"rows": 4, "modules": 6, "unchanged": [], "logits_apart": 1e-6, "modules_apart": 2e-6}
    assert merge_check(merge)["passed"]
    assert not merge_check(merge | {"logits_apart": 0.2})["passed"]
    assert not merge_check(merge | {"modules_apart": 0.2})["passed"]
    assert not merge_check(merge | {"logits_apart": float("nan")})["passed"]
    assert not merge_check(merge | {"unchanged": ["a", "b", "c", "d", "e", "f"]})["passed"]
