"""A finetuned model that was made elsewhere: a pair is accepted, and what is no pair is refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from models.adopted import check_ends, check_pair, check_tokenizers, is_adapter
from models.errors import ModelError


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory) -> Path:
    """A LoRA adapter of the random Llama, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "q_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a folder that a test may damage."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(base: Path, finetuned: Path) -> str:
    with pytest.raises(ModelError) as raised:
        check_pair(base, finetuned, "some-base")
    assert str(raised.value).startswith("model.finetuned: ")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_model_and_itself_are_a_pair(model_folder):
    assert check_pair(model_folder, model_folder, "some-base") == []
    assert not is_adapter(model_folder)


def test_an_adapter_fits_its_base(llama_folder, adapter):
    assert is_adapter(adapter)
    assert check_pair(llama_folder, adapter, str(llama_folder)) == []


def test_an_adapter_made_for_another_name_is_noted(llama_folder, adapter, copy_of):
    folder = copy_of(adapter)
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/else")
    (note,) = check_pair(llama_folder, folder, "some-base")
    assert "was made for someone/else" in note


def test_another_architecture_is_refused(gemma_folder, llama_folder):
    assert "has architecture llama, model.source some-base has gemma2" in refused(gemma_folder, llama_folder)


def test_an_adapter_for_another_architecture_or_shape_is_refused(gemma_folder, llama_folder, adapter, copy_of):
    assert "is for another model" in refused(gemma_folder, adapter)
    folder = copy_of(adapter)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "up_proj.lora_A" in name)
    weights["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = weights.pop(name)
    save_file(weights, folder / "adapter_model.safetensors")
    assert "adapts model.layers.7.mlp.up_proj, which some-base does not have" in refused(llama_folder, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda weights: weights | {"extra": torch.zeros(1)},
            "model.source lacks extra, which the other model has; in all 1 such weights",
        ),
        (
            lambda weights: {name: one for name, one in weights.items() if "layers.2.mlp" not in name},
            "lacks model.layers.2.mlp.down_proj.weight, which the other model has; in all 3 such weights",
        ),
        (
            lambda weights: weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:-1].clone()},
            "the embeddings in",
        ),
    ],
)
def test_weights_of_another_shape_are_refused(llama_folder, copy_of, change, said):
    folder = copy_of(llama_folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    assert said in refused(llama_folder, folder)


def test_pickle_is_refused(llama_folder, adapter, copy_of, tmp_path):
    folder = copy_of(llama_folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pytorch_model.bin, and pickled weights are not read" in refused(llama_folder, folder)
    other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    assert "pickled weights are not read" in refused(llama_folder, other)


def test_damaged_and_unknown_files_are_sentences(llama_folder, adapter, copy_of, tmp_path):
    folder = copy_of(llama_folder)
    (folder / "model.safetensors").write_bytes(b"{" * 100)
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        check_pair(llama_folder, folder, "some-base")
    (folder / "config.json").unlink()
    assert "neither a config.json nor an adapter_config.json" in refused(llama_folder, folder)
    other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit(other / "adapter_config.json", peft_type="PROMPT_TUNING")
    assert "of PEFT type PROMPT_TUNING, which cannot be merged" in refused(llama_folder, other)
    (other / "adapter_config.json").write_text("[]")
    assert "holds no JSON object" in refused(llama_folder, other)


def test_a_damaged_index_is_one_sentence(llama_folder, tmp_path):
    copy = Path(shutil.copytree(llama_folder, tmp_path / "copy"))
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json cannot be read"):
        check_pair(llama_folder, copy, "the base")


def test_tokenizers_must_encode_alike(llama_folder, tmp_path):
    one, other = (AutoTokenizer.from_pretrained(llama_folder) for _ in range(2))
    check_tokenizers(one, other, ["some text"], tmp_path)
    other.add_tokens(["some text"])
    with pytest.raises(ModelError, match="encodes 'some text' differently"):
        check_tokenizers(one, other, ["other", "some text"], tmp_path)
    other.eos_token_id = 7
    with pytest.raises(ModelError, match="eos_token_id 7"):
        check_ends(one, other, tmp_path)
