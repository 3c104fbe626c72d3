"""Delta transcoders: a few new sparse features that explain what finetuning changed at one site.

In: pairs of x and what is to be explained, computed once for a layer (and base), and settings. Out: for each
seed, one JumpReLU transcoder without decoder bias, and its validation figures. Several seeds (`replicas`) train side by
side on the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trainers.checkpoints import Keeper
from trainers.delta_data import DeltaData
from trainers.delta_stack import DeltaSettings, Stack, TrainedDelta
from trainers.errors import DivergedError
from trainers.precision import number_format
from trainers.stacked_deltas import Losses

CHECK_EVERY = 20
"""Steps between loss checks, each of which waits for the device."""


def train_delta(
    data: DeltaData,
    settings: DeltaSettings,
    *,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] = lambda figures: None,
    on_step: Callable[[Losses], None] = lambda losses: None,
    keeper: Keeper | None = None,
) -> TrainedDelta:
    """Trains `settings.replicas` deltas; reports figures after each validation; returns the best validation's.

    The loss of a replica is `mean((delta(x) - r)^2) / unit + sparsity * mean_tokens(sum_i acts_i |W_dec_i|)`, r being
    the residual or the change and W_dec in units of `sqrt(unit)`, so that `lr` and `sparsity` mean the same on every
    layer. A replica trains as it would alone: only early stopping and the choice of the best validation look at the
    replicas' mean.

    With a `keeper`, an interrupted run continues from its last checkpoint: it repeats its earlier reports, and ends as
    it would have without the interruption. In a process group, such as that of `accelerate launch`, each process trains
    on its share of every batch, and all return the same. `on_step` gets the losses of every step after the checkpoint;
    in a process group those of its own share.
    Raises DivergedError if a loss is not finite or the deltas make the reconstruction far worse.
    """
    (outcome,) = train_deltas(
        data,
        [settings],
        device=device,
        report=lambda _, figures: report(figures),
        on_step=on_step,
        keeper=keeper,
    )
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome


def train_deltas(
    data: DeltaData,
    settings: Sequence[DeltaSettings],
    *,
    device: str = "cpu",
    report: Callable[[int, dict[str, Any]], None] = lambda run, figures: None,
    on_step: Callable[[Losses], None] = lambda losses: None,
    keeper: Keeper | None = None,
) -> list[TrainedDelta | DivergedError]:
    """Several runs that differ only in `lr` and `sparsity`, side by side, so that each batch is read once for all.

    Each trains as it would with `train_delta`, which documents the arguments; `report` also gets the run's number.
    Returns each run's best validation, or why it diverged. Raises ValueError if they differ in anything else.
    """
    if len({replace(run_settings, lr=0.0, sparsity=0.0) for run_settings in settings}) != 1:
        raise ValueError("runs that train side by side may differ in lr and sparsity alone")
    stack = Stack(data, settings, device)
    keeper = keeper or Keeper()
    stack.restore(keeper)
    for number, run in enumerate(stack.runs):
        for figures in run.reported:
            report(number, figures)
    with number_format(device, settings[0].precision) as dtype:
        for x, residual in stack.batches():
            losses = stack.step(stack.cast("x", x, dtype), stack.cast("residual", residual, dtype))
            on_step(losses)
            if stack.at == stack.steps or stack.at % CHECK_EVERY == 0 or stack.validates:
                stack.check(losses)
            if stack.validates:
                for number, figures in stack.validate():
                    report(number, figures)
                if keeper.is_due and stack.processes.index == 0:
                    stack.keep(keeper)
    return [run.outcome() for run in stack.runs]
