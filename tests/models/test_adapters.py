"""PEFT decides what an adapter is: what it merges exactly is merged, and what it cannot is refused with its reason."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from models.adapters import apart, attach, check_adapter, probe
from models.blocks import sites_with
from models.errors import ModelError
from models.weights import build_skeleton
from sites import KINDS, Site
from tests.models.table import build
from trainers.adapters import add_adapter
from trainers.errors import TrainingError

IDS = torch.arange(10, 130, 5).reshape(2, 12)
MLP = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
MERGED = {
    "lora": ("LoraConfig", {"r": 4, **MLP}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, **MLP}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True, **MLP}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa", **MLP}),
    "lora on embeddings": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora with a new head": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head"], **MLP}),
    "lora with new tokens": ("LoraConfig", {"r": 4, "trainable_token_indices": [3, 4], **MLP}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [10, 15]}),
    "loha": ("LoHaConfig", {"r": 4, **MLP}),
    "lokr": ("LoKrConfig", {"r": 4, **MLP}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "r": 0, **MLP}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **MLP}),
    "hra": ("HRAConfig", {"r": 4, **MLP}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 100, **MLP}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["gate_proj", "up_proj"]}),
    "randlora": ("RandLoraConfig", {"r": 4, **MLP}),
    "miss": ("MissConfig", {"r": 4, **MLP}),
    "shira": ("ShiraConfig", {"r": 4, **MLP}),
    "c3a": ("C3AConfig", {"block_size": 8, **MLP}),
    "vblora": ("VBLoRAConfig", {"r": 4, "vector_length": 8, "num_vectors": 8, **MLP}),
    "road": ("RoadConfig", {"variant": "road_1", "group_size": 8, **MLP}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50, **MLP}),
    "norms": ("LNTuningConfig", {"target_modules": ["post_attention_layernorm"]}),
}
REFUSED = {
    "alora": ("LoraConfig", {"r": 4, "alora_invocation_tokens": [3], **MLP}, "aLoRA does not support merging"),
    "lora_bias": ("LoraConfig", {"r": 4, "lora_bias": True, **MLP}, "base layer has no bias"),
    "lily": ("LilyConfig", {**MLP}, "not supported for Lily"),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}, "adds tokens or states"),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}, "adds tokens or states"),
    "repeated layers": ("LoraConfig", {"r": 4, "layer_replication": [[0, 3], [1, 3]], **MLP}, "has other tensors than"),
}


def shaken(model, std: float = 0.1):
    """Random values for all that an adapter trains, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def adapter_on(base: Path, folder: Path, kind: str, settings: dict) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
        shaken(get_peft_model(plain(base), config)).save_pretrained(folder)
    return folder


def plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def refusal(base: Path, folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        check_adapter(folder, build_skeleton(base), "some-base")
    assert str(raised.value).startswith("model.finetuned: ")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Llama whose sizes every method can divide; its embeddings are not tied."""
    return build("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MERGED)
def test_what_peft_merges_is_merged_exactly(name, base, tmp_path):
    folder = adapter_on(base, tmp_path / "adapter", *MERGED[name])
    modules, _ = check_adapter(folder, build_skeleton(base), "some-base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = logits(PeftModel.from_pretrained(plain(base), str(folder)))
    attached = attach(plain(base), folder)
    adapted = attached.modules()
    assert sorted(adapted) == modules
    before = [probe(one, seed) for seed, one in enumerate(adapted.values())]
    merged = attached.fold_in()
    after = [probe(merged.get_submodule(one), seed) for seed, one in enumerate(adapted)]
    assert apart(before, after) < 1e-4
    assert (logits(merged) - reference).abs().max() < 1e-4 * reference.abs().max()
    assert (reference - logits(plain(base))).abs().max() > 1e-3 * reference.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_merge_is_refused_with_its_reason(name, base, tmp_path):
    kind, settings, reason = REFUSED[name]
    assert reason in refusal(base, adapter_on(base, tmp_path, kind, settings))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adding_to_one_of_two_tied_tensors_is_refused(target, tied, base, tmp_path):
    settings = {"r": 4, "target_modules": [*MLP["target_modules"], target]}
    said = refusal(tied, adapter_on(tied, tmp_path / "tied", "LoraConfig", settings))
    assert "ties" in said
    assert "both" in said
    check_adapter(adapter_on(base, tmp_path / "apart", "LoraConfig", settings), build_skeleton(base), "some-base")
    with pytest.raises(TrainingError, match="ties"):  # one that is trained here
        add_adapter(build_skeleton(tied), target)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_what_replaces_a_tied_tensor_is_merged_exactly(settings, tied, tmp_path):
    folder = adapter_on(tied, tmp_path / "adapter", "LoraConfig", {"r": 4, **MLP, **settings})
    check_adapter(folder, build_skeleton(tied), "some-base")
    attached = attach(plain(tied), folder)
    reference = logits(attached.model)
    attached.fold_in().save_pretrained(tmp_path / "merged")
    assert (logits(plain(tmp_path / "merged")) - reference).abs().max() < 1e-4 * reference.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_an_adapter_of_the_body_is_put_on_the_body(name, tmp_path):
    base = build(name, tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = AutoModel.from_pretrained(base, dtype=torch.float32)
        shaken(get_peft_model(body, config)).save_pretrained(tmp_path / "adapter")
        model = plain(base)
        inner = getattr(model, model.base_model_prefix)
        PeftModel.from_pretrained(inner, str(tmp_path / "adapter")).merge_and_unload()  # in place
    modules, _ = check_adapter(tmp_path / "adapter", build_skeleton(base), "some-base")
    sites, rest = sites_with(model.config, modules)
    assert sites == [Site(layer, kind) for layer in range(3) for kind in KINDS.values()]
    assert rest == []
    merged = attach(plain(base), tmp_path / "adapter").fold_in()
    assert torch.equal(logits(merged), logits(model))
    assert (logits(merged) - logits(plain(base))).abs().max() > 1e-2


def test_tensors_that_are_missing_too_many_or_without_values_are_named(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter", "LoraConfig", {"r": 4, "modules_to_save": ["lm_head"], **MLP})
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def changed(*drop: str, **more: torch.Tensor) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / f"copy{len(list(tmp_path.iterdir()))}"))
        kept = {key: one for key, one in weights.items() if key not in drop}
        save_file(kept | more, folder / "adapter_model.safetensors")
        return folder

    assert "lacks 1 of the" in (said := refusal(base, changed(name)))
    assert "model.layers.1.mlp.up_proj" in said
    assert "lm_head" in refusal(base, changed("base_model.model.lm_head.weight"))
    extra = "base_model.model.model.layers.1.mlp.other_proj.lora_B.weight"
    assert "adapts model.layers.1.mlp.other_proj" in refusal(base, changed(**{extra: torch.ones(4, 4)}))
    assert "has no values (shape 0)" in refusal(base, changed(**{name: torch.zeros(0)}))
    assert "NaN or infinite" in refusal(base, changed(**{name: torch.full_like(weights[name], torch.nan)}))
    assert "for another model, or damaged" in refusal(base, changed(**{name: torch.zeros(5, 4)}))
    save_file({}, (empty := changed()) / "adapter_model.safetensors")
    assert "holds no tensors" in refusal(base, empty)


@pytest.mark.parametrize(("name", "target"), [("gpt_neox", "query_key_value"), ("gpt2", "c_attn")])
def test_biases_that_are_trained_too_count_as_changed(name, target, tmp_path):
    base = build(name, tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", "LoraConfig", {"r": 4, "target_modules": [target], "bias": "all"})
    modules, _ = check_adapter(adapter, build_skeleton(base), "some-base")
    sites, _ = sites_with(plain(base).config, modules)
    assert sites == [Site(layer, kind) for layer in range(3) for kind in KINDS.values()], "biases in all of them"


def test_what_peft_warns_of_is_kept(tied, tmp_path):
    adapter = adapter_on(tied, tmp_path, "LoraConfig", {"r": 4, "modules_to_save": ["lm_head"], **MLP})
    _, warned = check_adapter(adapter, build_skeleton(tied), "some-base")
    assert any("tie_word_embeddings" in one for one in warned)
