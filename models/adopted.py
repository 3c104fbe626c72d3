"""A finetuned model that was made elsewhere: what it is, whether it belongs to the un-finetuned one, what it changed.

In: the folder of the un-finetuned model, and a folder with a full causal LM or a PEFT adapter. Out: which weights
differ, and what is unusual, before any work starts; or a one-sentence ModelError if the two are not a pair. Reads every
weight of a whole model once, or an adapter's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from models.adapters import ADAPTER, KEY, check_adapter, is_adapter
from models.architectures import check_architecture
from models.comparison import Comparison, compare, config_differences
from models.errors import ModelError
from models.gguf_files import PACKAGED, is_gguf
from models.sources import load_tokenizer, model_facts
from models.weights import Weights, build_skeleton, load_config, open_weights, shape_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""Names in configs for the activation function of an MLP."""
MOST_SHOWN = 6
"""Names in a note."""


class NothingChanged(ModelError):
    """The two models have the same weights."""


class Pair(NamedTuple):
    """notes: what is unusual, one sentence each. changed: the parameters that differ; for an adapter the modules that
    it changes, as values are known only after the merge. rounded: parameters of the un-finetuned model that must be
    rounded to the finetuned model's coarser dtype before the two are compared."""

    notes: tuple[str, ...]
    changed: tuple[str, ...]
    rounded: dict[str, str]


def check_pair(
    base: Path,
    finetuned: Path,
    source: str,
    on_file: Callable[[Path], object] = lambda file: None,
    *,
    finetuned_source: str = "",
) -> Pair:
    """How two models differ; `source` and `finetuned_source` are their names in the settings. `on_file` is called with
    each weight file just before its tensors are read.

    Raises ModelError for a different architecture or shape, weights that are not safetensors or contain NaN or
    infinities, an adapter that cannot be merged, a folder with neither a model nor an adapter, or identical models.
    """
    if is_adapter(finetuned):
        modules, warned = check_adapter(finetuned, build_skeleton(base), source)
        notes = [*_other_base(base, finetuned, source), *(f"PEFT warns of {finetuned}: {line}" for line in warned)]
        if (finetuned / "config.json").is_file() and any(finetuned.glob("model*.safetensors")):
            notes.append(f"{finetuned} holds a whole model too, which is not used: its adapter is merged into {source}")
        return Pair(tuple(notes), tuple(modules), {})
    if not (finetuned / "config.json").is_file():
        raise ModelError(f"{KEY}: {finetuned} has neither a config.json nor an {ADAPTER}{_inside(finetuned)}")
    check_architecture(finetuned, str(finetuned), KEY)
    base_facts, finetuned_facts = model_facts(base), model_facts(finetuned, KEY)
    for name, words in (("architecture", "architecture"), ("n_layers", "number of layers"), ("d_model", "width")):
        if base_facts[name] != finetuned_facts[name]:
            raise ModelError(
                f"{KEY}: {finetuned} has {words} {finetuned_facts[name]}, model.source {source} has "
                f"{base_facts[name]}; only models of one architecture and shape can be compared"
            )
    before, after = open_weights(base), open_weights(finetuned, KEY)
    _check_shapes(before, after)
    comparison = compare(before, after, on_file)
    _check_values(comparison, before, after)
    if not comparison.changed:
        raise NothingChanged(
            f"{KEY}: every weight of {finetuned} equals that of model.source {source}"
            + (", rounded to its dtype" if comparison.rounded else "")
            + ", so there is no change to explain"
        )
    notes = [*_notes(before, after, comparison, source), *_quantised(comparison, source, finetuned_source)]
    return Pair(tuple(notes), comparison.changed, comparison.rounded)


def check_base(folder: Path, on_file: Callable[[Path], object] = lambda file: None) -> None:
    """Raises ModelError if a model on its own cannot be finetuned and analysed: its weights are missing, damaged,
    quantised or contain NaN or infinities, or it has no tokenizer. `on_file` is called as by `check_pair`."""
    weights = open_weights(folder)
    _check_shapes(weights, weights)
    _check_values(compare(weights, weights, on_file), weights, weights)
    load_tokenizer(folder)


def check_tokenizers(
    base: PreTrainedTokenizerBase, finetuned: PreTrainedTokenizerBase, texts: Sequence[str], folder: Path
) -> None:
    """Raises ModelError for the first text that the two tokenizers encode differently."""
    for text in texts:
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (base, finetuned))
        if before != after:
            raise ModelError(
                f"{KEY}: the tokenizer in {folder} encodes {text[:60]!r} differently from that of model.source; "
                "both models must read the same tokens"
            )


def check_ends(base: PreTrainedTokenizerBase, finetuned: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ModelError if BOS or EOS differ. In a chat neither matters, as the template has its own."""
    for name in ("bos_token_id", "eos_token_id"):
        base_token, finetuned_token = getattr(base, name), getattr(finetuned, name)
        if base_token != finetuned_token:
            raise ModelError(
                f"{KEY}: the tokenizer in {folder} has {name} {finetuned_token}, that of model.source has "
                f"{base_token}; both models must read the same tokens"
            )


def _notes(before: Weights, after: Weights, comparison: Comparison, source: str) -> list[str]:
    notes = []
    for weights, model in ((before, f"model.source {source}"), (after, str(after.folder))):
        if weights.unused:
            shown = ", ".join(weights.unused[:MOST_SHOWN])
            notes.append(f"{model} holds tensors that its architecture has no place for, which are ignored: {shown}")
    for name, (old, new) in config_differences(load_config(before.folder), load_config(after.folder, KEY)).items():
        if name in ACTIVATIONS:
            raise ModelError(
                f"{KEY}: the two config.json differ in {name}: {old!r} in {source}, {new!r} in "
                f"{after.folder}; MLPs with different activation functions cannot take each other's place"
            )
        notes.append(
            f"the two config.json differ in {name}: {old!r} in {source}, {new!r} in "
            f"{after.folder}; each model runs with its own, the un-finetuned MLPs inside the finetuned model"
        )
    if comparison.rounded:
        dtypes = ", ".join(sorted(set(comparison.rounded.values())))
        notes.append(
            f"the weights in {after.folder} are {dtypes}, coarser than those of {source}: the latter are rounded the "
            f"same way before they are compared (by itself, this rounding would be {comparison.rounding_share:.2%} of "
            f"the squared difference, in {len(comparison.rounded)} tensors)"
        )
    return notes


def _quantised(comparison: Comparison, *sources: str) -> list[str]:
    """A note if a model was dequantised and the embeddings differ, as they do if the other one was not made from it."""
    names = [name for name in sources if name in PACKAGED or is_gguf(name)]
    if not names or not set(EMBEDDINGS) & set(comparison.changed):
        return []
    return [
        f"{' and '.join(names)} had been quantised, and even the embeddings of the two models differ: unless the "
        "finetuned model was trained from the dequantised weights themselves, what quantisation lost counts as "
        "finetuning; give both models as they were before quantisation"
    ]


def _check_values(comparison: Comparison, before: Weights, after: Weights) -> None:
    for side, name, count in comparison.not_finite:
        if side == "rounded":
            raise ModelError(
                f"{KEY}: {name} in {after.folder} is {comparison.rounded[name]}, in which {count} values of "
                "model.source are too large, so the two cannot be compared; save the finetuned model in the dtype "
                "of model.source"
            )
        key, folder = ("model.source", before.folder) if side == "before" else (KEY, after.folder)
        other_tensors = len({name for _, name, _ in comparison.not_finite}) - 1
        also = f", and {other_tensors} more tensors hold such values" if other_tensors else ""
        raise ModelError(f"{key}: {name} in {folder} has {count} values that are NaN or infinite{also}")


def _check_shapes(before: Weights, after: Weights) -> None:
    """Raises ModelError for a weight that is missing, or the first whose shape differs."""
    for weights, key in ((before, "model.source"), (after, KEY)):
        if weights.missing:
            raise ModelError(
                f"{key}: the weights in {weights.folder} lack {len(weights.missing)} tensors, such as "
                f"{weights.missing[0]}"
            )
    for name in sorted(before.places.keys() ^ after.places.keys()):
        if name.endswith(".bias"):
            has, lacks = (after.folder, "model.source") if name in after.places else ("model.source", after.folder)
            raise ModelError(f"{KEY}: {has} has {name}, which {lacks} lacks; only models of one shape can be compared")
    for name in sorted(before.places.keys() & after.places.keys()):
        base_shape, finetuned_shape = before.places[name].shape, after.places[name].shape
        if base_shape != finetuned_shape:
            words = "the embeddings" if name in EMBEDDINGS else name
            raise ModelError(
                f"{KEY}: the shape of {words} is {shape_text(finetuned_shape)} in {after.folder}, but "
                f"{shape_text(base_shape)} in model.source; only models of one shape can be compared"
            )


def _other_base(base: Path, folder: Path, source: str) -> list[str]:
    """A note if the adapter's config names another base model."""
    from peft import PeftConfig

    made_for = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if made_for and made_for not in (source, str(base)) and Path(made_for).name != base.name:
        return [f"the adapter in {folder} was made for {made_for}, and is merged into {source}"]
    return []


def _inside(folder: Path) -> str:
    """The end of an error message for a folder: whether its subfolders have what it lacks."""
    subfolders = sorted({path.parent.name for name in (ADAPTER, "config.json") for path in folder.glob(f"*/{name}")})
    if not subfolders:
        return ", so it is not a saved model"
    return f"; there are some in its subfolders: give one of {', '.join(str(folder / name) for name in subfolders[:4])}"
