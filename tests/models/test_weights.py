"""The tensors of a model's folder are those that transformers loads, whatever else lies there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.blocks import part_places, read_paths
from models.comparison import compare, in_words, write_rounded
from models.errors import ModelError
from models.weights import load_config, open_weights
from sites import mlp_sites
from tests.models.table import CONFIGS, build


@pytest.fixture
def copy(llama_folder, tmp_path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def same_as_transformers(folder: Path) -> None:
    weights, expected = open_weights(folder), loaded(folder)
    found = weights.read(expected)
    assert weights.missing == ()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: one.contiguous() for name, one in weights.items()}, path, {"format": "pt"})


def shards(folder: Path, names: list[str], keep_whole: bool = False) -> None:
    """The weights in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    half, rest = dict(list(weights.items())[:7]), dict(list(weights.items())[7:])
    for name, part in zip(names, (half, rest), strict=True):
        save(part, folder / name)
    index = {name: file for file, part in zip(names, (half, rest), strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if not keep_whole:
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_read_as_transformers_reads_it(name, tmp_path):
    same_as_transformers(build(name, tmp_path))


def test_shards_are_read_by_their_index(copy):
    shards(copy, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    same_as_transformers(copy)


def test_a_single_file_wins_over_an_index_of_other_files(copy, llama_folder):
    shards(copy, ["a.safetensors", "b.safetensors"], keep_whole=True)
    for name in ("a.safetensors", "b.safetensors"):
        save({key: one + 1 for key, one in load_file(copy / name).items()}, copy / name)
    same_as_transformers(copy)
    for name in ("a.safetensors", "b.safetensors"):  # an index that names missing files is no error either
        (copy / name).unlink()
    same_as_transformers(copy)
    assert not compare(open_weights(llama_folder), open_weights(copy)).changed


def test_other_files_do_not_matter(copy, llama_folder):
    everything = load_file(copy / "model.safetensors")
    save({name: one * 2 for name, one in everything.items()}, copy / "consolidated.safetensors")
    save({"exp_avg": torch.ones(3)}, copy / "optimizer.safetensors")
    (copy / "damaged.safetensors").write_bytes(b"nothing")
    same_as_transformers(copy)
    assert not compare(open_weights(llama_folder), open_weights(copy)).changed


def test_a_body_saved_on_its_own_and_old_names_are_found(copy, load, tmp_path):
    body = {name.removeprefix("model."): one for name, one in load_file(copy / "model.safetensors").items()}
    save(body, copy / "model.safetensors")
    same_as_transformers(copy)
    gpt2 = build("gpt2", tmp_path / "gpt2")
    old = {name.removeprefix("transformer."): one for name, one in load_file(gpt2 / "model.safetensors").items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(3)}  # as in the hub's first GPT-2
    save(old, gpt2 / "model.safetensors")
    same_as_transformers(gpt2)


def test_one_tensor_under_two_names_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save(weights | {name.removeprefix("model."): weights[name] * 5}, copy / "model.safetensors")
    with pytest.raises(ModelError, match="twice"):
        open_weights(copy)


def test_shards_in_a_subfolder_are_rounded_in_place(copy, llama_folder, tmp_path):
    shards(copy, ["a.safetensors", "b.safetensors"])
    (copy / "sub").mkdir()
    (copy / "b.safetensors").rename(copy / "sub" / "b.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"b.safetensors"', '"sub/b.safetensors"'))
    same_as_transformers(copy)
    found = compare(open_weights(copy), open_weights(in_dtype(llama_folder, tmp_path / "bf16", torch.bfloat16)))
    same_as_transformers(write_rounded(open_weights(copy), found.rounded, tmp_path / "rounded"))


def test_tied_names_share_a_place_and_untied_ones_do_not(gemma_folder, tmp_path):
    weights = open_weights(gemma_folder)
    assert weights.places["lm_head.weight"] == weights.places["model.embed_tokens.weight"]
    untied = Path(shutil.copytree(gemma_folder, tmp_path / "untied"))
    held = load_file(untied / "model.safetensors")
    save(held | {"lm_head.weight": held["model.embed_tokens.weight"] + 1}, untied / "model.safetensors")
    same_as_transformers(untied)
    assert compare(weights, open_weights(untied)).changed == ("lm_head.weight",)


def test_what_is_missing_or_damaged_is_named(copy):
    shards(copy, ["a.safetensors", "b.safetensors"])
    (copy / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"index\.json names b\.safetensors, which is not there"):
        open_weights(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index\.json"):
        open_weights(copy)


def test_the_parts_of_a_path_are_where_a_wrapped_model_has_them(model_folder, wrapped):
    bridge = wrapped(model_folder)
    config = load_config(model_folder)
    for site, path in read_paths(bridge, model_folder, mlp_sites([0, 2])).items():
        places = part_places(config, site)
        expected = loaded(model_folder)
        for name, parameter in path.parameters().items():
            part, _, inner = name.partition(".")
            assert torch.equal(parameter, expected[f"{places[part]}.{inner}"])


def in_dtype(folder: Path, to: Path, dtype: torch.dtype, change: str = "") -> Path:
    shutil.copytree(folder, to)
    weights = load_file(folder / "model.safetensors")
    changed = {name: one * 1.5 if change and change in name else one for name, one in weights.items()}
    save({name: one.to(dtype) for name, one in changed.items()}, to / "model.safetensors")
    return to


def test_a_coarser_dtype_is_told_from_a_change(llama_folder, tmp_path):
    before = open_weights(llama_folder)
    after = open_weights(in_dtype(llama_folder, tmp_path / "bf16", torch.bfloat16, "layers.1.mlp.down_proj"))
    found = compare(before, after)
    assert found.changed == ("model.layers.1.mlp.down_proj.weight",)
    assert set(found.rounded.values()) == {"bfloat16"}
    held = load_file(llama_folder / "model.safetensors")
    rounding = sum((one.bfloat16().double() - one.double()).pow(2).sum() for one in held.values())
    theirs = load_file(after.files[0])
    everything = sum((theirs[name].double() - one.double()).pow(2).sum() for name, one in held.items())
    assert found.rounding_share == pytest.approx((rounding / everything).item(), rel=1e-6)

    rounded = write_rounded(before, found.rounded, tmp_path / "rounded")
    assert compare(open_weights(rounded), after).changed == found.changed
    assert not compare(open_weights(rounded), after).rounded
    assert (rounded / "tokenizer.json").is_file()
    assert all(
        torch.equal(one, held[name].bfloat16()) for name, one in load_file(rounded / "model.safetensors").items()
    )


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)])
def test_a_finer_dtype_needs_no_rounding(llama_folder, tmp_path, pair):
    before, after = (in_dtype(llama_folder, tmp_path / str(one), one) for one in pair)
    found = compare(open_weights(before), open_weights(after))
    assert not found.rounded
    assert found.changed  # the finer one was never rounded
    assert not compare(open_weights(before), open_weights(before)).changed


def test_a_mixture_of_dtypes_is_compared_tensor_by_tensor(llama_folder, tmp_path):
    mixed = Path(shutil.copytree(llama_folder, tmp_path / "mixed"))
    weights = load_file(mixed / "model.safetensors")
    save({name: one if "norm" in name else one.half() for name, one in weights.items()}, mixed / "model.safetensors")
    found = compare(open_weights(llama_folder), open_weights(mixed))
    assert not found.changed
    assert not any("norm" in name for name in found.rounded)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            [f"model.layers.{n}.self_attn.{p}.weight" for n in range(3) for p in ("q_proj", "v_proj")],
            "q_proj, v_proj in all 3 layers",
        ),
        (["model.layers.2.mlp.up_proj.weight"], "up_proj in layer 2"),
        ([f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 5)], "up_proj in layers 0-1, 5"),
        (["model.embed_tokens.weight", "model.norm.weight"], "embed_tokens, norm"),
        ([], ""),
    ],
)
def test_changes_are_listed_as_a_person_would(names, said):
    assert in_words(names, 3 if "all 3" in said else 8) == said
