"""Settings for everything that is trained: the LoRA study, activation capture, base transcoders, deltas.

In: plain values of these sections. Out: frozen sections, or a pydantic error that names the key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from search_spaces.dimensions import Choice, Dimension, Range, real, text, whole
from search_spaces.sections import Distinct, Layers, Name, Sampler, Section
from trainers.settings import BaseTraining, Count, DeltaTraining, Fraction, LoraTraining, Positive


class LoraSpace(Section):
    """The LoRA study's dimensions. `alpha_over_r` scales the adapter: alpha = alpha_over_r * r."""

    r: Annotated[Dimension, whole(1)] = Choice(choice=[8, 16, 32])
    alpha_over_r: Annotated[Dimension, real(above=0)] = Choice(choice=[1.0, 2.0])
    lr: Annotated[Dimension, real(above=0)] = Range(low=1e-4, high=1e-3, log=True)
    dropout: Annotated[Dimension, real(below=1)] = 0.0
    weight_decay: Annotated[Dimension, real()] = 0.0
    batch_size: Annotated[Dimension, whole(1)] = 8
    targets: Annotated[Dimension, text()] = "all-linear"
    """PEFT target modules: `all-linear`, or names separated by commas."""
    schedule: Annotated[Dimension, text("linear", "cosine", "constant", "constant_with_warmup")] = "linear"


class Lora(Section, LoraTraining):  # type: ignore[misc]  # mypy does not see that sections are frozen
    FIRST = ("trials",)

    trials: Count = 16
    workers_per_trial: Count = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs that a whole trial would otherwise."""
    asha: bool = True
    grace_evals: Count = 1
    """Validations every trial gets before ASHA may stop it."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    warm_start: Name | None = None
    """An earlier sweep in the same Optuna storage; the best values of its study are tried first."""
    space: LoraSpace = LoraSpace()


class Activations(Section):
    train_tokens: Count = 1_000_000
    validation_tokens: Count = 50_000
    batch_tokens: Count = 4096
    """Padded tokens in one forward pass of the capture."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Captured texts are cut after this many tokens."""


class Transcoders(Section, BaseTraining):  # type: ignore[misc]
    FIRST = ("source", "convention", "layers", "width", "target_l0")

    source: Name = "train"
    """`train`, a local folder, or a hub repository in Gemma Scope's layout."""
    convention: Literal["ln2.hook_normalized", "resid_mid/sqrt(d_model)"] = "ln2.hook_normalized"
    """What the transcoders read: the residual stream in the middle of the block divided by its rms, as Gemma Scope's
    do, or by a constant, for checkpoints trained that way. A file that names its own taps must agree."""
    layers: Layers = "all"
    """Layers that get base transcoders, and residual deltas on them."""
    width: str | Count = 16384
    """Features of a trained base transcoder, or the width label of a published one (such as 16k)."""
    target_l0: Annotated[list[Positive], Field(min_length=1), Distinct] = [16.0, 32.0, 64.0]
    """Mean active features per token of the trained bases; one base for each value."""
    workers_per_layer: Count = 1
    """Processes that share each batch of a layer's bases; each takes what a whole layer would otherwise."""


class DeltaSpace(Section):
    lr: Annotated[Dimension, real(above=0)] = Range(low=1e-3, high=1e-2, log=True)
    sparsity: Annotated[Dimension, real()] = Range(low=1e-4, high=1e-2, log=True)


class Deltas(Section, DeltaTraining):  # type: ignore[misc]
    FIRST = (
        *("targets", "layers", "percentiles", "target_l0", "d_new", "trials", "replicas", "side_by_side"),
        "workers_per_trial",
    )

    targets: Annotated[list[Literal["change", "residual"]], Field(min_length=1), Distinct] = ["change"]
    """What deltas are trained on: `change`, what finetuning changed in the MLP, or `residual`, what a base transcoder
    leaves of the finetuned MLP (the reference study's way, which needs base transcoders)."""
    layers: Layers = "all"
    """Layers of the change deltas; residual deltas have those of the base transcoders."""
    percentiles: Annotated[list[Fraction], Distinct] = [0.25, 0.5, 0.75]
    """Which base of each layer to use: index min(n - 1, int(n * p)) among its n candidates by ascending L0."""
    target_l0: Positive | None = None
    """Also use the base with the nearest L0: unlike a percentile, this means the same sparsity on every layer. Its rows
    have no percentile."""
    d_new: Annotated[list[Count], Field(min_length=1), Distinct] = [32, 64, 128]
    trials: Count = 8
    """Trials of each group: layer, target, d_new, and base where there is one."""
    side_by_side: Literal["auto"] | Count = "auto"
    """Trials of a group trained side by side, so that every batch is read once for all of them: its first, random ones,
    and any of the samplers `random` and `grid`. With `auto`, 4 on a GPU; on a CPU 1, which repeats earlier results to
    the last digit."""
    workers_per_trial: Count = 1
    """Processes that share each batch of a trial; each takes the CPUs and GPUs that a whole trial would otherwise."""
    asha: bool = True
    grace_evals: Count = 2
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    sampler: Sampler = "tpe"
    objectives: Literal["val_loss", "val_error, val_l0_delta"] = "val_loss"
    """What a study minimises; `val_error` is `val_unexplained` of change deltas, `val_fvu` of residual ones. With two
    objectives no trial is stopped early, the report marks the Pareto front, and the delta that is kept is still the one
    of lowest val_loss."""
    warm_start: Name | None = None
    """An earlier sweep in the same Optuna storage; the best values of its studies are tried first."""
    polish_steps: Annotated[int, Field(ge=0)] = 0
    """After the search: so many steps in which the kept change deltas of all layers, width by width, are trained
    together on the KL to the finetuned model at the training rows' targets. What is best on the validation rows is
    spliced in, and the report says so."""
    polish_lr: Positive = 3e-4
    space: DeltaSpace = DeltaSpace()

    @property
    def selections(self) -> list[float | None]:
        """The percentiles, plus None if a base is also chosen by target L0."""
        return [*self.percentiles, *([None] if self.target_l0 is not None else [])]

    @field_validator("percentiles")
    @classmethod
    def _two_decimals(cls, percentiles: list[float]) -> list[float]:
        if any(round(percentile, 2) != percentile for percentile in percentiles):
            raise ValueError(f"must have at most two decimals, got {percentiles}")
        return percentiles
