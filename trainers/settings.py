"""Settings of each trainer, with defaults.

In: values. Out: frozen settings. Each is defined once, here: the sections of a sweep's settings inherit the `Training`
classes, so that a field added to one of them can be set in a settings file and reaches the trainer. No heavy imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class LoraTraining:
    """Settings of a LoRA run that are fixed for a whole search."""

    steps: Count = 400
    epochs: Count | None = None
    """Passes over the training rows, instead of `steps`."""
    eval_every: Count = 50
    """Optimiser steps between validations; ASHA may stop a trial at each."""
    patience: Count | None = None
    """End a run after this many validations without a better loss; null means never."""
    accumulate: Count = 1
    """Number of pieces that a batch is split into: less memory, same steps."""
    gradient_checkpointing: bool = False
    """Less memory, more time, same steps."""
    warmup_fraction: Fraction = 0.05
    grad_clip: Positive = 1.0
    loss_on: Literal["target", "everything"] = "target"
    """Tokens that the loss covers: `target`, or `everything`, which for copy rows means all tokens after BOS (requests
    always use the target)."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(LoraTraining):
    """All settings of one run; the fields below are searched, or differ from run to run."""

    r: int = 16
    alpha_over_r: float = 2.0
    """Scale of the adapter; PEFT's `lora_alpha` is `alpha_over_r * r`."""
    lr: float = 5e-4
    dropout: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 8
    """Rows per optimiser step."""
    targets: str = "all-linear"
    """`all-linear`, or names of modules separated by commas."""
    schedule: str = "linear"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """Settings of the base transcoders that a sweep can set."""

    epochs: Count = 4
    batch_size: Count = 2048
    lr: Positive = 1e-3


@dataclass(frozen=True)
class BaseSettings(BaseTraining):
    """All settings of the transcoders of one layer."""

    target_l0: Sequence[float]
    """Mean active features per token; one transcoder is trained for each value."""
    width: int = 16384
    lr_decay_fraction: float = 0.3
    """Fraction of the steps, at the end, over which the learning rate falls to zero."""
    grad_clip: float = 1.0
    """Largest gradient norm of each transcoder."""
    seed: int = 0
    precision: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class DeltaTraining:
    """Settings of a delta run that are fixed for a whole search."""

    replicas: Count = 1
    """Number of seeds trained side by side in every trial; the trial's value is their mean."""
    epochs: Count = 4
    batch_size: Count = 2048
    l0_budget: Positive = 16.0
    """Active delta features per token above which `val_loss` is penalised."""
    threshold: Literal["learned", "calibrated"] = "calibrated"
    """`calibrated` thresholds are adjusted at every step to use nearly all of the L0 budget, which makes deltas
    comparable at equal L0; `learned` ones follow a straight-through gradient, and `sparsity` decides how much of the
    budget they use."""
    sparsity_warmup_fraction: Fraction = 0.2
    lr_warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    grad_clip: Positive = 1.0
    """Largest gradient norm of each replica."""
    patience: Count = 4
    """End a run after this many validations without a lower `val_loss`."""


@dataclass(frozen=True, kw_only=True)
class DeltaSettings(DeltaTraining):
    """All settings of one run.

    Replica i starts from seed `seed + i`; the order of the batches does not depend on the seed, so runs differ only in
    their settings and initialisation.
    """

    d_new: int = 32
    lr: float = 3e-3
    sparsity: float = 1e-3
    evals_per_epoch: int = 1
    seed: int = 0
    precision: str = "fp32"


Settings = TypeVar("Settings", LoraSettings, BaseSettings, DeltaSettings)


def settings_of(kind: type[Settings], section: LoraTraining | BaseTraining | DeltaTraining, **others: Any) -> Settings:
    """A run's settings: those that `section` inherits from the trainer, plus `others`."""
    return kind(**{field.name: getattr(section, field.name) for field in fields(section)}, **others)
