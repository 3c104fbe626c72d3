"""Delta transcoders: a few new sparse features that explain what finetuning changed in one layer's MLP.

In: pairs of x and what is to be explained, computed once for a layer (and base), and settings. Out: for each seed one
JumpReLU transcoder without decoder bias, and its validation figures. Several seeds (`replicas`) train side by side on
the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from models.transcoder import Transcoder
from trainers import checkpoints
from trainers.activations import Pairs
from trainers.checkpoints import Keeper
from trainers.clipping import clip_each
from trainers.delta_data import DeltaData, validate
from trainers.errors import DivergedError
from trainers.graphs import Graphed
from trainers.precision import number_format
from trainers.stacked_deltas import Losses, StackedDeltas

CHECK_EVERY = 20
"""Steps between loss checks, each of which waits for the device."""
WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec")
CALIBRATED = 0.95
"""Fraction of the L0 budget that calibrated thresholds aim for, so that validation tokens stay within it."""
DIVERGED = 10.0
"""A validation error this many times that without a delta ends the run."""


@dataclass(frozen=True)
class DeltaSettings:
    """Hyperparameters of one run.

    Replica i starts from seed `seed + i`; the order of the batches does not depend on the seed, so that runs differ
    only in their settings and starting points.
    """

    d_new: int = 32
    lr: float = 3e-3
    sparsity: float = 1e-3
    replicas: int = 1
    epochs: int = 4
    batch_size: int = 2048
    l0_budget: float = 16.0
    """Active features per token above which `val_loss` is penalised."""
    sparsity_warmup_fraction: float = 0.2
    lr_warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm of each replica."""
    patience: int = 4
    """Validations without a lower `val_loss` after which the run ends."""
    evals_per_epoch: int = 1
    seed: int = 0
    precision: str = "fp32"
    threshold: Literal["learned", "calibrated"] = "calibrated"
    """Learned with a straight-through gradient, or adjusted so that the fraction `CALIBRATED` of the L0 budget is
    used."""


class TrainedDelta(NamedTuple):
    """One transcoder per seed, and the figures of the best validation (means over seeds; lists as `*_replicas`)."""

    deltas: list[Transcoder]
    figures: dict[str, Any]


def starting_sample(train: Pairs, device: str, tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """x and residual (tokens, d_model), fp32 on `device`: what the features start from, the same for every seed."""
    x, residual = next(train.batches(min(tokens, train.tokens), torch.Generator().manual_seed(0), device=device))
    return x.to(torch.float32), residual.to(torch.float32)


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
    layer. A replica
    trains as it would alone: only early stopping and the choice of the best validation look at the replicas' mean.

    With a `keeper`, an interrupted run continues from its last checkpoint: it repeats its earlier reports, and ends as
    it would have without the interruption. `on_step` gets the losses of every step from there on.
    Raises DivergedError if a loss is not finite or the deltas make the reconstruction far worse.
    """
    run = _Run(data, settings, device)
    keeper = keeper or Keeper()
    for figures in run.restore(keeper):
        report(figures)
    with number_format(device, settings.precision) as dtype:
        for x, residual in run.batches():
            losses = run.step(run.cast("x", x, dtype), run.cast("residual", residual, dtype))
            on_step(losses)
            if run.at == run.steps or run.at % CHECK_EVERY == 0 or run.validates:
                run.check(losses)
            if run.validates:
                report(run.validate())
                if keeper.is_due:
                    run.keep(keeper)
    assert run.best is not None  # the last step validates
    return run.best


class _Run:
    """The state of one training run between its steps."""

    def __init__(self, data: DeltaData, settings: DeltaSettings, device: str) -> None:
        data = data._replace(train=data.train.near(device), validation=data.validation.near(device))
        self.data, self.settings, self.device = data, settings, device
        self.deviation = math.sqrt(data.unit)
        self.model = StackedDeltas(
            *starting_sample(data.train, device),
            replicas=settings.replicas,
            d_new=settings.d_new,
            l0_budget=settings.l0_budget,
            seed=settings.seed,
        )
        groups = [
            {"params": self.model.weights, "weight_decay": settings.weight_decay},
            {"params": self.model.offsets, "weight_decay": 0.0},
        ]
        on_gpu = device.startswith("cuda")
        # Numbers would be recorded with a graph as they are; tensors are read at each replay.
        self.rate, self.sparsity = (torch.zeros((), device=device) if on_gpu else 0.0 for _ in range(2))
        self.optimiser = torch.optim.AdamW(groups, lr=self.rate, fused=True, capturable=on_gpu)
        self.update = Graphed(self._update)
        per_epoch = data.train.batch_count(settings.batch_size)
        self.steps = per_epoch * settings.epochs
        self.every = max(1, per_epoch // settings.evals_per_epoch)
        self.at = self.tokens = self.waited = 0
        self.casts: dict[str, Tensor] = {}
        self.reported: list[dict[str, Any]] = []
        self.best: TrainedDelta | None = None

    @property
    def validates(self) -> bool:
        """Whether a validation follows the step just made."""
        return self.at % self.every == 0 or self.at == self.steps

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The remaining batches, or fewer if validation stops improving; their order does not depend on the seed."""
        order = torch.Generator().manual_seed(0)
        size, skip = self.settings.batch_size, self.at
        for _ in range(self.settings.epochs):
            for batch in self.data.train.batches(size, order, skip=skip, device=self.device):
                if self.waited >= self.settings.patience:
                    return
                yield batch
            skip = max(0, skip - self.data.train.batch_count(size))

    def cast(self, name: str, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """`batch` in that dtype, in memory that the next batch reuses: on a CPU, touching that much fresh memory in
        every step takes longer than the conversion."""
        if batch.dtype == dtype:
            return batch
        if name not in self.casts or self.casts[name].shape != batch.shape:
            self.casts[name] = torch.empty_like(batch, dtype=dtype)
        return self.casts[name].copy_(batch)

    def step(self, x: Tensor, residual: Tensor) -> Losses:
        """One optimiser step; the losses are valid until the next one."""
        settings, at, steps = self.settings, self.at, self.steps
        rate = settings.lr * _ramp(at, settings.lr_warmup_fraction * steps) * _decay(at, steps)
        sparsity = settings.sparsity * _ramp(at, settings.sparsity_warmup_fraction * steps)
        self.rate, self.sparsity = _set(self.rate, rate), _set(self.sparsity, sparsity)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        losses = self.update(x, residual)
        self.at += 1
        self.tokens += len(x)
        return losses

    def _update(self, x: Tensor, residual: Tensor) -> Losses:
        settings = self.settings
        losses = self.model.backward(x, residual, self.sparsity, self.deviation)
        if calibrated := settings.threshold == "calibrated":
            self.model.log_threshold.grad = torch.zeros_like(self.model.log_threshold)
        clip_each(self.model.gradients(), settings.grad_clip)
        self.optimiser.step()
        if calibrated:
            self.model.steer(losses.active, CALIBRATED * settings.l0_budget)
        return losses

    def check(self, losses: Losses) -> None:
        """Checks that the loss is finite, which waits for the device."""
        whole = (losses.error + losses.penalty).sum().item()
        if not math.isfinite(whole):
            raise DivergedError(f"the loss is {whole} by step {self.at} (lr {self.settings.lr:.2g})")

    def validate(self) -> dict[str, Any]:
        """The figures of a validation; keeps the deltas if they are the best so far."""
        deltas = self.model.transcoders(self.deviation, self.data.layer, self.data.taps)
        figures = {
            **validate(deltas, self.data, self.settings.l0_budget),
            "step": self.at,
            "tokens": self.tokens,
        }
        _check_sane(figures, self.data, self.settings)
        self.waited += 1
        if self.best is None or figures["val_loss"] < self.best.figures["val_loss"]:
            self.best, self.waited = TrainedDelta(deltas, figures), 0
        self.reported.append(figures)
        return figures

    def keep(self, keeper: Keeper) -> None:
        assert self.best is not None
        kept = {
            f"best/{i}/{name}": getattr(delta, name) for i, delta in enumerate(self.best.deltas) for name in WEIGHTS
        }
        keeper.write(
            {**self.model.tensors(), **checkpoints.optimiser_tensors(self.optimiser), **kept},
            {
                "run": self._identity(),
                "at": self.at,
                "tokens": self.tokens,
                "waited": self.waited,
                "reported": self.reported,
                "best": self.best.figures,
            },
        )

    def restore(self, keeper: Keeper) -> list[dict[str, Any]]:
        """Restores this run's last checkpoint, if there is one; returns what had been reported before it."""
        found = keeper.read(self._identity())
        if found is None:
            return []
        tensors, state = found
        for name, tensor in self.model.tensors().items():
            tensor.copy_(tensors[name])
        checkpoints.load_optimiser(self.optimiser, tensors)
        self.at, self.tokens, self.waited = state["at"], state["tokens"], state["waited"]
        self.reported = state["reported"]
        best = [{name: tensors[f"best/{i}/{name}"] for name in WEIGHTS} for i in range(self.settings.replicas)]
        deltas = [Transcoder(**weights, b_dec=None, layer=self.data.layer, taps=self.data.taps) for weights in best]
        self.best = TrainedDelta([delta.to(self.device) for delta in deltas], state["best"])
        return self.reported

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must match to belong to this run."""
        return {**asdict(self.settings), "layer": self.data.layer, "tokens": self.data.train.tokens}


def _check_sane(figures: dict[str, Any], data: DeltaData, settings: DeltaSettings) -> None:
    name = data.error_name
    if not figures[name] <= DIVERGED * data.alone:  # also true of NaN
        raise DivergedError(
            f"{name} is {figures[name]:.3g} at step {figures['step']}, against {data.alone:.3g} without a delta "
            f"(lr {settings.lr:.2g}, sparsity {settings.sparsity:.2g})"
        )


def _set(held: float | Tensor, value: float) -> float | Tensor:
    """`value`, in the tensor that holds it, if there is one."""
    return held.fill_(value) if isinstance(held, Tensor) else value


def _ramp(step: int, length: float) -> float:
    return min(1.0, (step + 1) / length) if length >= 1 else 1.0


def _decay(step: int, steps: int) -> float:
    """Constant, then linear to zero over the last third."""
    return min(1.0, 3 * (steps - step) / steps)
