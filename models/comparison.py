"""Compares the weights of two saved models, before and after finetuning.

In: the weights of both. Out: which parameters changed, which values are NaN or infinite, and what was lost by rounding
if the finetuned model was saved in a coarser dtype; also a copy of the first model, rounded the same way. Each file is
read once, one tensor at a time.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.files import replacing
from models.weights import Weights, places_in

if TYPE_CHECKING:
    from torch import Tensor

JSON_AND_TOKENIZER = (".json", ".jinja", ".model", ".txt")
CHAT_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps a tokenizer's further chat templates."""


class Comparison(NamedTuple):
    """changed: names of parameters that differ; where the finetuned dtype is coarser, after rounding the first model's.
    not_finite: (model, parameter, number of NaN or infinite values), where the model is `before`, `after`, or `rounded`
    (the first one, rounded). rounded: parameters of the first model that rounding changes, and the dtype.
    rounding_share: over these parameters, the mean square of the change due to rounding over that of the whole
    change."""

    changed: tuple[str, ...]
    not_finite: tuple[tuple[str, str, int], ...]
    rounded: dict[str, str]
    rounding_share: float


def compare(before: Weights, after: Weights, on_file: Callable[[Path], object] = lambda file: None) -> Comparison:
    """Compares the tensors of two models of one architecture. `on_file` is called with each file before its first
    tensor is read; a callback that reads the whole file (to hash it) leaves it in the system's cache. Raises ModelError
    for a file that cannot be read.
    """
    import torch

    changed, not_finite, rounded = [], [], {}
    rounding_sum = total = 0.0
    shared = sorted(before.places.keys() & after.places.keys(), key=lambda name: (after.places[name].file, name))
    files: set[Path] = set()
    with before.reader() as read_before, after.reader() as read_after:
        for name in shared:
            for file in {before.places[name].file, after.places[name].file} - files:
                files.add(file)
                on_file(file)
            old, new = read_before(name), read_after(name)
            rounded_old = old.to(new.dtype)
            equal = torch.equal(rounded_old, new)
            for side, tensor in (("after", new),) if equal else (("before", old), ("after", new)):
                if not _all_finite(tensor):
                    not_finite.append((side, name, int((~torch.isfinite(tensor)).sum())))
            if old.dtype != new.dtype and not torch.equal(rounded_old.to(old.dtype), old):
                rounded[name] = str(new.dtype).removeprefix("torch.")
                if _all_finite(old) and not _all_finite(rounded_old):
                    not_finite.append(("rounded", name, int((~torch.isfinite(rounded_old)).sum())))
                rounding_sum += _squared(rounded_old, old)
                total += _squared(new, old)
            if not equal:
                changed.append(name)
    return Comparison(tuple(sorted(changed)), tuple(not_finite), rounded, rounding_sum / total if total else 0.0)


def _all_finite(tensor: Tensor) -> bool:
    """One pass without a copy: the minimum or maximum is NaN or infinite if any value is."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(map(math.isfinite, map(float, torch.aminmax(tensor))))


def _squared(a: Tensor, b: Tensor) -> float:
    import torch

    return (a.float() - b.float()).square_().sum(dtype=torch.float64).item()


def write_rounded(before: Weights, rounded: Mapping[str, str], folder: Path) -> Path:
    """Writes a copy of the model to `folder`, with the parameters in `rounded` cast to the dtypes given there. It is
    written under a temporary name and then renamed; an existing `folder` is returned unchanged."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    if folder.is_dir():
        return folder
    dtypes = {
        (before.places[name].file, before.places[name].name): getattr(torch, dtype) for name, dtype in rounded.items()
    }
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        for path in before.folder.iterdir():
            if path.is_file() and path.suffix in JSON_AND_TOKENIZER:
                shutil.copyfile(path, temporary / path.name)
        if (templates := before.folder / CHAT_TEMPLATES).is_dir():
            shutil.copytree(templates, temporary / CHAT_TEMPLATES)
        for file in before.files:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in places_in(file)}
            tensors = {name: tensor.to(dtypes.get((file, name), tensor.dtype)) for name, tensor in tensors.items()}
            place = temporary / file.relative_to(before.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, place, metadata or {"format": "pt"})
    return folder


def in_words(names: Iterable[str], n_layers: int) -> str:
    """A short list of parameters for people: `q_proj, v_proj in all 30 layers; embed_tokens`."""
    layers: dict[str, set[int]] = {}
    for name in names:
        module = re.sub(r"\.(weight|bias)$", "", name)
        number = re.search(r"\.(\d+)\.", module)
        layers.setdefault(module.rpartition(".")[2], set()).update([int(number[1])] if number else [])
    by_layers: dict[frozenset[int], list[str]] = {}
    for module, numbers in layers.items():
        by_layers.setdefault(frozenset(numbers), []).append(module)
    parts = []
    for in_layers, modules in sorted(by_layers.items(), key=lambda pair: -len(pair[0])):
        place = ""
        if in_layers:
            place = f" in all {n_layers} layers" if len(in_layers) == n_layers else f" in {layer_list(in_layers)}"
        parts.append(", ".join(sorted(modules)) + place)
    return "; ".join(parts)


def layer_list(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 0-5, 9`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {shown}" if runs else "no layer"


def config_differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Settings in which two transformers configs differ and which affect what the model computes."""
    old, new = before.to_dict(), after.to_dict()
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _BOOKKEEPING and not name.endswith("_token_id")
    }


_BOOKKEEPING = {
    *("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache", "auto_map"),
    *("id2label", "label2id", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict"),
    *("_attn_implementation", "attn_implementation", "chunk_size_feed_forward", "problem_type", "unsloth_version"),
    *("unsloth_fixed", "pretraining_tp", "initializer_range", "model_type", "_attn_implementation_autoset"),
    *("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "transformers_weights"),
}
"""Settings without effect on what a model computes: records of its origin, and those that only training reads."""
