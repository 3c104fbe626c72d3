"""A finetuned model that was made elsewhere: a pair is accepted, and what is no pair is refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from models.adapters import is_adapter
from models.adopted import check_base, check_ends, check_pair, check_tokenizers
from models.architectures import check_architecture
from models.errors import ModelError
from models.sources import check_source, load_tokenizer


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


def test_a_model_and_itself_differ_in_nothing(model_folder):
    assert "every weight of" in (said := refused(model_folder, model_folder))
    assert "no change to explain" in said
    assert not is_adapter(model_folder)


def test_what_changed_is_named(llama_folder, altered, tmp_path):
    after = altered(llama_folder, tmp_path, "layers.1.mlp.up_proj", "embed_tokens")
    pair = check_pair(llama_folder, after, "some-base")
    assert pair.changed == ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")
    assert pair.notes == ()
    assert pair.rounded == {}


@pytest.mark.parametrize(("part", "source", "noted"), [
    ("embed_tokens", "smollm2-135m", True),
    ("embed_tokens", "some-base", False),
    ("layers.1.mlp.up_proj", "smollm2-135m", False),
])  # fmt: skip
def test_a_dequantised_model_that_differs_everywhere_is_noted(llama_folder, altered, tmp_path, part, source, noted):
    after = altered(llama_folder, tmp_path, part)
    assert ["what quantisation lost" in note for note in check_pair(llama_folder, after, source).notes] == [
        True
    ] * noted
    named = {"finetuned_source": "model-Q4_K_M.gguf" if source == "smollm2-135m" else ""}
    notes = check_pair(llama_folder, after, "some-base", **named).notes
    assert ["model-Q4_K_M.gguf had been quantised" in note for note in notes] == [True] * noted


def test_an_adapter_fits_its_base(llama_folder, adapter):
    assert is_adapter(adapter)
    pair = check_pair(llama_folder, adapter, str(llama_folder))
    assert pair.notes == ()
    wanted = {f"model.layers.{layer}.{name}" for layer in range(3) for name in ("mlp.up_proj", "self_attn.q_proj")}
    assert set(pair.changed) == wanted


def test_an_adapter_made_for_another_name_is_noted(llama_folder, adapter, copy_of):
    folder = copy_of(adapter)
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/else")
    (note,) = check_pair(llama_folder, folder, "some-base").notes
    assert "was made for someone/else" in note


def test_another_architecture_is_refused(gemma_folder, llama_folder):
    assert "has architecture llama, model.source some-base has gemma2" in refused(gemma_folder, llama_folder)


def test_an_adapter_for_another_architecture_or_shape_is_refused(gemma_folder, llama_folder, adapter, copy_of):
    assert "it is for another model" in refused(gemma_folder, adapter)
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
            lambda weights: {name: one for name, one in weights.items() if "layers.2.mlp" not in name},
            "lack 3 tensors, such as model.layers.2.mlp",
        ),
        (
            lambda weights: weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:-1].clone()},
            "model.embed_tokens.weight in",
        ),
    ],
)
def test_weights_of_another_shape_are_refused(llama_folder, copy_of, change, said):
    folder = copy_of(llama_folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    assert said in refused(llama_folder, folder)


@pytest.mark.parametrize("of_the_finetuned", [True, False])
def test_biases_of_one_model_alone_are_refused(llama_folder, copy_of, of_the_finetuned):
    """They would belong to no site, and stay when everything else is un-finetuned."""
    folder = copy_of(llama_folder)
    edit(folder / "config.json", mlp_bias=True)
    weights = load_file(folder / "model.safetensors")
    of_mlps = [name for name in weights if ".mlp." in name]
    biases = {name.replace(".weight", ".bias"): torch.ones(len(weights[name])) for name in of_mlps}
    save_file(weights | biases, folder / "model.safetensors")
    said = refused(*((llama_folder, folder) if of_the_finetuned else (folder, llama_folder)))
    assert "model.layers.0.mlp.down_proj.bias" in said
    assert "only models of one shape can be compared" in said


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
    edit(other / "adapter_config.json", peft_type="SOMETHING_NEW")
    assert "PEFT cannot read" in refused(llama_folder, other)
    (other / "adapter_config.json").write_text("[]")
    assert "is not a JSON object" in refused(llama_folder, other)


def test_values_that_are_no_numbers_are_refused(llama_folder, copy_of):
    folder = copy_of(llama_folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    weights["model.layers.2.mlp.up_proj.weight"][0, :2] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = refused(llama_folder, folder)
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert "1 values that are NaN or infinite, and 1 more tensors" in said
    with pytest.raises(ModelError, match=r"^model\.source: model\.layers\.1\.mlp\.up_proj\.weight"):
        check_pair(folder, llama_folder, "some-base")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_in_a_quantised_dtype_are_refused_without_a_word_in_the_config(llama_folder, copy_of, dtype):
    folder = copy_of(llama_folder)
    weights = load_file(folder / "model.safetensors")
    stored = {name: (one * 10).to(dtype) if "mlp" in name else one for name, one in weights.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert "is stored as" in refused(llama_folder, folder)
    with pytest.raises(ModelError, match=r"^model\.source: .* is stored as"):
        check_base(folder)


@pytest.mark.parametrize(
    "edits",
    [
        {"vocab_size": 300},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 12},
        {"head_dim": 8},
        {"intermediate_size": 63},
    ],
)
def test_a_config_that_does_not_describe_the_files_is_refused(llama_folder, altered, tmp_path, edits):
    after = altered(llama_folder, tmp_path, "mlp")
    edit(after / "config.json", **edits)
    assert "describes" in refused(llama_folder, after)


def test_a_config_with_a_field_of_the_wrong_type_is_one_sentence(llama_folder, altered, tmp_path):
    after = altered(llama_folder, tmp_path, "mlp")
    edit(after / "config.json", tie_word_embeddings="false")
    assert "cannot be read as a model's config" in refused(llama_folder, after)


def test_another_activation_function_is_refused(llama_folder, altered, tmp_path):
    after = altered(llama_folder, tmp_path, "mlp")
    edit(after / "config.json", hidden_act="gelu")
    assert "differ in hidden_act" in refused(llama_folder, after)


def test_a_base_that_the_coarser_dtype_cannot_hold_is_refused(llama_folder, copy_of, altered, tmp_path):
    base = copy_of(llama_folder)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    after = altered(llama_folder, tmp_path / "after", "mlp", dtype=torch.float16)
    assert "1 values of model.source are too large" in refused(base, after)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def own_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})


def shorter(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-500])


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_tokenizer, "the tokenizer in"),
        (own_tokenizer, "needs code of its own"),
        (shorter, "cannot be read as safetensors"),
        (with_nan, "1 values that are NaN"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has none"),
        (lambda folder: edit(folder / "config.json", model_type="mything"), "cannot be read as a model's config"),
    ],
)
def test_a_base_on_its_own_is_looked_at_too(llama_folder, copy_of, damage, said):
    check_base(llama_folder)
    folder = copy_of(llama_folder)
    damage(folder)
    with pytest.raises(ModelError, match=said):
        check_base(folder)


def test_settings_that_change_what_is_computed_are_noted(llama_folder, altered, tmp_path):
    after = altered(llama_folder, tmp_path, "mlp")
    edit(after / "config.json", rms_norm_eps=1e-3, use_cache=False, eos_token_id=5)
    (note,) = check_pair(llama_folder, after, "some-base").notes
    assert "rms_norm_eps" in note
    assert "0.001" in note


def test_tensors_without_a_place_are_noted(llama_folder, altered, tmp_path):
    after = altered(llama_folder, tmp_path, "mlp")
    weights = load_file(after / "model.safetensors") | {"score.weight": torch.zeros(2, 24)}
    save_file(weights, after / "model.safetensors", {"format": "pt"})
    (note,) = check_pair(llama_folder, after, "some-base").notes
    assert "score.weight" in note


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"vision_config": {"hidden_size": 8}}, "several parts (vision_config"),
        ({"text_config": {"hidden_size": 24}, "audio_config": {"a": 1}}, "several parts (audio_config, text_config"),
        ({"thinker_config": {"text_config": {}}}, "several parts (thinker_config"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "remove quantization_config"),
        ({"model_type": "never_heard_of", "auto_map": {"AutoConfig": "a.B"}}, "needs code of its own"),
    ],
)
def test_what_cannot_be_looked_at_is_said_of_the_config_alone(llama_folder, copy_of, edits, said):
    folder = copy_of(llama_folder)
    edit(folder / "config.json", **edits)
    (folder / "model.safetensors").unlink()
    assert said in refused(llama_folder, folder)
    with pytest.raises(ModelError, match=r"^model\.source: "):
        check_architecture(folder, "some-base")


def test_an_adapter_in_a_subfolder_is_named(llama_folder, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-60")
    assert f"{tmp_path / 'run' / 'checkpoint-60'}" in refused(llama_folder, tmp_path / "run")


def test_an_adapter_is_no_base_model(adapter):
    with pytest.raises(ModelError, match="holds a PEFT adapter"):
        check_source(str(adapter))


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(llama_folder, copy_of, monkeypatch):
    folder = copy_of(llama_folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(ModelError, match=r"model\.finetuned: the tokenizer in .* needs code of its own"):
        load_tokenizer(folder, "model.finetuned")


def test_tokenizers_must_encode_alike(llama_folder, tmp_path):
    one, other = (AutoTokenizer.from_pretrained(llama_folder) for _ in range(2))
    check_tokenizers(one, other, ["some text"], tmp_path)
    other.add_tokens(["some text"])
    with pytest.raises(ModelError, match="encodes 'some text' differently"):
        check_tokenizers(one, other, ["other", "some text"], tmp_path)
    other.eos_token_id = 7
    with pytest.raises(ModelError, match="eos_token_id 7"):
        check_ends(one, other, tmp_path)
