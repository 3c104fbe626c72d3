"""A finetuned model that was made elsewhere: what it is, and whether it belongs to the un-finetuned one.

In: the folder of the un-finetuned model, and a folder with a full causal LM or a PEFT adapter. Out: a ModelError of one
sentence where they are no pair, or notes on what is unusual. Only JSON files and the heads of safetensors files are
read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelError
from models.sources import model_facts
from models.tensors import Shapes, shapes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "model.finetuned"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGEABLE = (
    "LORA",
    "LOHA",
    "LOKR",
    "OFT",
    "BOFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "ADALORA",
    "VERA",
    "FOURIERFT",
    "RANDLORA",
)
"""PEFT types whose adapters can be folded into the weights."""
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")


SHARED_PROJECTIONS = ("base_model.vera_", "base_model.randlora_")
"""Tensors of an adapter that are of no single module."""
BUFFERS = (".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Tensors in some old checkpoints that are no weights."""


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter instead of a whole model."""
    return (folder / ADAPTER).is_file()


def check_pair(base: Path, finetuned: Path, source: str) -> list[str]:
    """Notes on a pair that can be compared; `source` is the un-finetuned model's name in the settings.

    Raises ModelError for another architecture or shape, weights that are not safetensors, or a folder that holds
    neither a model nor an adapter.
    """
    if is_adapter(finetuned):
        return _check_adapter(base, finetuned, source)
    if not (finetuned / "config.json").is_file():
        raise ModelError(f"{KEY}: {finetuned} has neither a config.json nor an {ADAPTER}, so it is not a saved model")
    ours, theirs = (model_facts(folder) for folder in (base, finetuned))
    for name, what in (("architecture", "architecture"), ("n_layers", "number of layers"), ("d_model", "width")):
        if ours[name] != theirs[name]:
            raise ModelError(
                f"{KEY}: {finetuned} has {what} {theirs[name]}, model.source {source} has {ours[name]}; "
                "only models of one architecture and shape can be compared"
            )
    _compare(_weights(base, "model.source"), _weights(finetuned, KEY), finetuned)
    return []


def check_tokenizers(
    base: PreTrainedTokenizerBase, finetuned: PreTrainedTokenizerBase, texts: Sequence[str], where: Path
) -> None:
    """Raises ModelError for the first text that the two tokenizers encode differently."""
    for text in texts:
        one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (base, finetuned))
        if one != other:
            raise ModelError(
                f"{KEY}: the tokenizer in {where} encodes {text[:60]!r} differently from that of model.source; "
                "both models must read the same tokens"
            )


def check_ends(base: PreTrainedTokenizerBase, finetuned: PreTrainedTokenizerBase, where: Path) -> None:
    """Raises ModelError where BOS or EOS differ. In a chat neither matters: the template has its own."""
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(base, name), getattr(finetuned, name)
        if ours != theirs:
            raise ModelError(
                f"{KEY}: the tokenizer in {where} has {name} {theirs}, that of model.source has {ours}; "
                "both models must read the same tokens"
            )


def _check_adapter(base: Path, folder: Path, source: str) -> list[str]:
    config = _config(folder)
    kind = str(config.get("peft_type", "")).upper()
    if kind not in MERGEABLE:
        raise ModelError(
            f"{KEY}: the adapter in {folder} is of PEFT type {kind or 'unknown'}, which cannot be merged into the "
            f"weights; allowed: {', '.join(MERGEABLE)}"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{KEY}: {folder} has no {ADAPTER_WEIGHTS}; pickled weights are not read")
    weights = _weights(base, "model.source")
    for name, shape in shapes_of(folder / ADAPTER_WEIGHTS).items():
        found = _adapted(name, weights)
        if name.startswith(SHARED_PROJECTIONS):
            continue
        if found is None:
            raise ModelError(f"{KEY}: the adapter in {folder} adapts {_module(name)}, which {source} does not have")
        # GPT-2 keeps its weights transposed.
        fits = {"lora_A": shape[-1] in found, "lora_B": shape[0] in found, "": shape == found}
        if len(shape) == len(found) and not fits.get(_part(name), True):
            raise ModelError(
                f"{KEY}: the adapter in {folder} is for another model: {_module(name)} has shape {_shown(found)} in "
                f"{source}, which does not fit {_part(name) or 'the new weight'} of shape {_shown(shape)}"
            )
    made_for = config.get("base_model_name_or_path")
    if made_for and made_for not in (source, str(base)) and Path(made_for).name != base.name:
        return [f"the adapter in {folder} was made for {made_for}, and is merged into {source}"]
    return []


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{KEY}: {folder / ADAPTER} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{KEY}: {folder / ADAPTER} holds no JSON object")
    return config


def _module(name: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` as the model calls the module."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _part(name: str) -> str:
    """`lora_A`, `lora_B` or another piece of an adapter."""
    return next((piece for piece in name.split(".") if piece.startswith("lora_")), "")


def _adapted(name: str, weights: Shapes) -> tuple[int, ...] | None:
    """The shape of the weight that a tensor of an adapter belongs to; None where the model has none."""
    module = name.removeprefix("base_model.model.")
    while module:
        for prefix in ("", "model."):  # an adapter on the body alone leaves the prefix out
            if (found := weights.get(f"{prefix}{module}.weight", weights.get(f"{prefix}{module}"))) is not None:
                return found
        module = module.rpartition(".")[0]
    return None


def _weights(folder: Path, key: str) -> Shapes:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{key}: {index} cannot be read ({type(error).__name__})") from None
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        found = f"only {pickled[0].name}, and pickled weights are not read" if pickled else "none"
        raise ModelError(f"{key}: {folder} needs weights as safetensors; it has {found}")
    return {name: shape for file in files for name, shape in shapes_of(file).items() if not name.endswith(BUFFERS)}


def _compare(ours: Shapes, theirs: Shapes, folder: Path) -> None:
    """Raises ModelError for the first weight whose shape differs; a head that is tied may be left out of either."""
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            what = "the embeddings" if name in EMBEDDINGS else name
            raise ModelError(
                f"{KEY}: {what} in {folder}: shape {_shown(theirs[name])}, and {_shown(ours[name])} in model.source; "
                "only models of one shape can be compared"
            )
    for one, other, where in ((ours, theirs, f"{folder} lacks"), (theirs, ours, "model.source lacks")):
        if missing := sorted(one.keys() - other.keys() - {"lm_head.weight"}):
            raise ModelError(
                f"{KEY}: {where} {missing[0]}, which the other model has; in all {len(missing)} such weights"
            )


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
