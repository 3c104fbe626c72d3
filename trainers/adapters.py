"""PEFT adapters: adding one to a model, and the forward pass that trains it.

In: a transformers model. Out: a PeftModel; `forward_of` picks the fastest forward pass that gives the same logits.
`models.adapters` merges adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.rows import one_line
from trainers.errors import TrainingError
from trainers.lora_forward import FusedForward, can_fuse
from trainers.packing import Packed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Forward = Callable[[Packed], Tensor]
"""Logits (scored, vocabulary) of a packed batch, in the model's dtype; see `Packed.scored`."""


def add_adapter(
    model: PreTrainedModel, targets: str = "all-linear", r: int = 16, alpha: float = 32.0, dropout: float = 0.0
) -> PeftModel:
    """`model` with a new LoRA adapter on `targets`: `all-linear`, or names of modules separated by commas.

    Raises TrainingError if they match nothing that LoRA can adapt, or are embeddings that the model ties.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    names = [name.strip() for name in targets.split(",")]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in ends} & set(names)
    if tied and model.config.tie_word_embeddings:
        raise TrainingError(
            f"lora.space.targets {targets!r} names {', '.join(sorted(tied))}: the model ties its embeddings, "
            "so merging this adapter would change both of them; name linear layers of the blocks instead"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules="all-linear" if targets == "all-linear" else names,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except ValueError as error:
        modules = model.named_modules()
        linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear)}
        raise TrainingError(
            f"lora.space.targets {targets!r} cannot be adapted ({one_line(error, 160)}); "
            f"allowed: all-linear, or some of {', '.join(sorted(linear))}"
        ) from None


def forward_of(adapted: Any, longest: int, checkpointing: bool = False) -> Forward:
    """The forward pass for training `adapted` on rows of up to `longest` tokens.

    With `checkpointing`, only each block's input is kept and the rest is recomputed in the backward pass.
    """
    if can_fuse(adapted, longest):
        return FusedForward(adapted, checkpointing)
    if checkpointing:
        adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return PlainForward(adapted)


class PlainForward:
    """Runs any causal LM's own forward pass on rows padded to the longest."""

    def __init__(self, adapted: Any) -> None:
        self.adapted = adapted

    def __call__(self, batch: Packed) -> Tensor:
        count, longest = batch.rows.shape
        row, place = batch.places // longest, batch.places % longest
        # Left-padded, so that the targets of short and long rows share the same few columns.
        column = place + longest - torch.bincount(row)[row]
        ids, mask, positions = torch.zeros(3, count, longest, dtype=torch.long, device=batch.ids.device)
        ids[row, column], mask[row, column], positions[row, column] = batch.ids, 1, batch.positions
        columns, places = column[batch.scored].unique(return_inverse=True)
        output = self.adapted(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            # Indices, not a count: a count slices, and with a sliced input the projection copies its weight per row.
            logits_to_keep=columns,
            use_cache=False,
        )
        return output.logits[row[batch.scored], places]
