"""PEFT adapters that were made elsewhere: checks whether PEFT can merge one into a model's weights, and merges it.

In: a transformers model, with or without values, and an adapter's folder. Out: the model with the adapter attached or
merged, or a one-sentence ModelError with PEFT's own reason if it cannot be merged exactly. PEFT itself decides what an
adapter is and what can be done with it, by trying on a model without values, which takes a second.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.rows import one_line
from models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

KEY = "model.finetuned"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAME = "default"
PROBES = 4
"""Random inputs on which each adapted module is compared before and after the merge."""
_NOISE = ("is_gradient_checkpointing", "CUDA extension", "Sparse invariant checks")
"""Warnings that say nothing about the adapter."""


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter instead of a whole model."""
    return (folder / ADAPTER).is_file()


@dataclass
class Attached:
    """A model with an adapter that is not merged yet.

    model: PEFT's, around the transformers model `base`. body: the name of the submodule that the adapter was made for,
    or empty for the whole model. warned: PEFT's warnings.
    """

    model: Any
    base: PreTrainedModel
    body: str
    warned: list[str]

    def modules(self) -> dict[str, nn.Module]:
        """The modules that the adapter changes, by their names in the transformers model."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        modules: dict[str, Any] = {}
        for name, module in self.model.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                inside = any(name.startswith(f"{found_name}.") for found_name in modules)
                if not inside:
                    modules[f"{self.body}.{name}" if self.body else name] = module
        return modules

    def fold_in(self) -> PreTrainedModel:
        """Merges the adapter and returns the transformers model."""
        from models.packed import forget

        self.model.merge_and_unload()
        forget()  # PEFT writes to weights behind torch's back
        if self.body:
            return self.base
        return self.model.get_base_model()


def check_adapter(folder: Path, skeleton: PreTrainedModel, source: str) -> tuple[list[str], list[str]]:
    """The modules that an adapter changes in the model `skeleton` (which has no values, and must not be used
    afterwards), and PEFT's warnings; `source` is the model's name in the settings.

    Raises ModelError if the adapter is damaged, belongs to another model, or cannot be merged exactly.
    """
    config = _config(folder)
    before = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    # Some methods cannot be tried without values; the merge itself, and the check after it, will tell.
    try:
        attached = attach(skeleton, folder, source)
    except Exception as error:
        if not _needs_values(error):
            raise
        return _named_modules(folder), []
    modules = sorted({*attached.modules(), *_replaced(folder, before)})
    _check_ties(attached, folder)
    try:
        attached.model.to("meta")
        folded = attached.fold_in()
    except Exception as error:
        if not _needs_values(error):
            kind = str(config.get("peft_type", "unknown"))
            raise ModelError(
                f"{KEY}: the adapter in {folder} (PEFT type {kind}) cannot be merged into the weights: "
                f"{_reason(error, kind)}"
            ) from None
        return modules, attached.warned
    after = {name: tuple(tensor.shape) for name, tensor in folded.state_dict().items()}
    if before != after:
        differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise ModelError(
            f"{KEY}: with the adapter in {folder} the model has other tensors than {source}, such as {differing[0]}; "
            "only models of one shape can be compared"
        )
    return modules, attached.warned


def attach(model: PreTrainedModel, folder: Path, source: str = "model.source") -> Attached:
    """`model` with the adapter saved in `folder`, loaded by PEFT; an adapter made for the model's body, without its
    head, is attached to the body.

    Load `model` in fp32: rounding a weight to bf16 loses small changes. Raises ModelError if PEFT cannot load the
    adapter, or if its tensors are missing or match no module.
    """
    check_values(folder)
    body_name = model.base_model_prefix
    is_body = _is_of_body(folder, model, body_name)
    root: Any = getattr(model, body_name) if is_body else model
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        adapted = _load(root, folder, source)
    _check_loaded(adapted, root, folder, source)
    messages = [" ".join(str(item.message).split()) for item in records if issubclass(item.category, UserWarning)]
    if str(adapted.peft_config[NAME].__dict__.get("init_lora_weights", "")).startswith("pissa_niter"):
        note = "it draws a new random decomposition at each loading, so no merge is exactly the model as trained"
        messages.append(note)
    warned = [text[:300] for text in dict.fromkeys(messages) if not any(noise in text for noise in _NOISE)]
    return Attached(adapted, model, body_name if is_body else "", warned)


def _load(root: Any, folder: Path, source: str) -> Any:
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT may raise anything for a config that it does not know
        raise ModelError(f"{KEY}: PEFT cannot read {folder / ADAPTER} ({one_line(error, 250)})") from None
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise ModelError(
            f"{KEY}: the adapter in {folder} (PEFT type {config.peft_type.value}) cannot be merged into the weights: "
            "it adds tokens or states to the input instead of changing weights"
        )
    try:
        return PeftModel.from_pretrained(root, str(folder), torch_device="cpu", low_cpu_mem_usage=_is_empty(root))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{KEY}: the adapter in {folder} cannot be read ({one_line(error, 250)})") from None
    except Exception as error:  # each PEFT method raises errors of its own
        if _is_empty(root) and _needs_values(error):
            raise
        raise ModelError(
            f"{KEY}: PEFT cannot load the adapter in {folder} into {source}, so it is for another model, or damaged "
            f"({one_line(error, 250)})"
        ) from None


def _check_loaded(adapted: Any, root: Any, folder: Path, source: str) -> None:
    """Raises ModelError for missing or unexpected tensors: PEFT warns of missing ones and drops others silently."""
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    key_mapping = getattr(root, "_checkpoint_conversion_mapping", {})
    tensors = load_peft_weights(str(folder), device="cpu", key_mapping=key_mapping)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
        loaded: Any = set_peft_model_state_dict(adapted, tensors, adapter_name=NAME, low_cpu_mem_usage=_is_empty(root))
    if loaded.unexpected_keys:
        raise ModelError(
            f"{KEY}: the adapter in {folder} adapts {_module(loaded.unexpected_keys[0])}, which {source} does not have "
            f"(PEFT finds no place for {len(loaded.unexpected_keys)} of its {len(tensors)} tensors)"
        )
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ModelError(
            f"{KEY}: the adapter in {folder} lacks {len(missing)} of the {len(expected)} tensors that its {ADAPTER} "
            f"asks for, such as that of {_module(missing[0])}"
        )


def check_values(folder: Path) -> None:
    """Raises ModelError if the adapter's file is missing or damaged, or has empty tensors, NaN or infinities."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ModelError(f"{KEY}: {folder} has no {ADAPTER_WEIGHTS}; pickled weights are not read")
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            if not names:
                raise ModelError(f"{KEY}: {path} holds no tensors")
            for name in names:
                tensor = opened.get_tensor(name)
                if tensor.numel() == 0:
                    raise ModelError(
                        f"{KEY}: {name} in {path} has no values (shape {' x '.join(map(str, tensor.shape))}), as when "
                        "an adapter is saved by a process that holds only a part of it; save it again"
                    )
                if tensor.is_floating_point() and (count := int((~torch.isfinite(tensor.float())).sum())):
                    raise ModelError(f"{KEY}: {name} in {path} has {count} values that are NaN or infinite")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({one_line(error, 250)})") from None


def _check_ties(attached: Attached, folder: Path) -> None:
    """Raises ModelError if the adapter changes one of two tied tensors, since the weights have only one for both."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = attached.base
    if not getattr(base.config, "tie_word_embeddings", False):
        return
    ends = {"the embeddings": base.get_input_embeddings(), "the unembedding": base.get_output_embeddings()}
    for end, module in ends.items():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            tied_end = next(name for name in ends if name != end)
            raise ModelError(
                f"{KEY}: the adapter in {folder} changes {end}, which this model ties to {tied_end}: merging it would "
                "change both of them, which training with it did not"
            )


def probe(module: nn.Module, seed: int) -> Tensor | None:
    """A module's outputs on a few random inputs, deterministic for a seed; None for a module without a weight."""
    import torch

    base: Any = module
    while hasattr(base, "base_layer") or hasattr(base, "original_module"):
        base = base.base_layer if hasattr(base, "base_layer") else base.original_module
    weight = getattr(base, "weight", None)
    if weight is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    inputs: Tensor
    if isinstance(base, torch.nn.Embedding):
        inputs = torch.randint(0, base.num_embeddings, (1, 64), generator=generator)
    else:  # GPT-2 keeps its weights transposed
        width = weight.shape[0] if type(base).__name__ == "Conv1D" else weight.shape[-1]
        inputs = torch.randn(1, PROBES, width, generator=generator).to(weight.dtype)
    with torch.inference_mode():
        return module(inputs.to(weight.device)).float().cpu()


def apart(before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> float:
    """The largest difference between outputs, relative to each output's largest value; infinite if any is NaN."""
    differences = [
        ((old - new).abs().max() / old.abs().max().clamp(min=1e-12)).item()
        for old, new in zip(before, after, strict=True)
        if old is not None and new is not None
    ]
    return math.inf if any(map(math.isnan, differences)) else max(differences, default=0.0)


def _is_of_body(folder: Path, model: PreTrainedModel, body: str) -> bool:
    """Whether all tensors of the adapter fit the model's body, and not the whole model."""
    from models.weights import places_in

    if not body or not hasattr(model, body):
        return False
    names = [name.removeprefix("base_model.model.") for name in places_in(folder / ADAPTER_WEIGHTS)]
    model_names, body_names = ({name for name, _ in root.named_modules()} for root in (model, getattr(model, body)))
    return not all(_fits(name, model_names) for name in names) and all(_fits(name, body_names) for name in names)


def _fits(name: str, modules: set[str]) -> bool:
    """Whether a tensor's name begins with that of a module with a parent; what all modules share fits anywhere."""
    parts = name.split(".")
    return name.startswith("base_model.") or any(
        ".".join(parts[:length]) in modules for length in range(len(parts) - 1, 0, -1)
    )


def _replaced(folder: Path, names: Collection[str]) -> set[str]:
    """Modules with a parameter that the adapter stores whole, such as every bias if it trains all biases."""
    from models.weights import places_in

    stored = {name.removeprefix("base_model.model.") for name in places_in(folder / ADAPTER_WEIGHTS)}
    return {name.rpartition(".")[0] for name in stored if name in names}


def _named_modules(folder: Path) -> list[str]:
    from models.weights import places_in

    names = {name.removeprefix("base_model.model.").rpartition(".")[0] for name in places_in(folder / ADAPTER_WEIGHTS)}
    return sorted(names)


def _is_empty(model: Any) -> bool:
    return next(model.parameters()).device.type == "meta"


def _needs_values(error: Exception) -> bool:
    """Whether an error occurred only because the model has no values."""
    return isinstance(error, RuntimeError | ValueError) and "meta" in str(error)


def _reason(error: Exception, kind: str) -> str:
    if isinstance(error, AttributeError) and "merge" in str(error):
        return "PEFT has no way to merge this type"
    return one_line(error, 250) if str(error) else f"PEFT does not merge {kind}"


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{KEY}: {folder / ADAPTER} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{KEY}: {folder / ADAPTER} is not a JSON object")
    return config


def _module(name: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` as the model calls the module."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]
