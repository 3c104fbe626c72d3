"""The state of delta-transcoder runs in stacked tensors: batches, steps, validations, checkpoints.

In: pairs of x and what is to be explained, and the settings of runs that differ only in learning rate and sparsity.
Out: the outcome of each run. `delta_transcoder` drives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from models.cuda_graphs import Graphed
from models.transcoder import Transcoder
from trainers import checkpoints
from trainers.activations import Pairs
from trainers.checkpoints import Keeper
from trainers.delta_data import DeltaData, validate
from trainers.distributed import processes
from trainers.errors import DivergedError
from trainers.settings import DeltaSettings
from trainers.stacked_deltas import Losses, StackedDeltas, Start
from trainers.stacked_optimiser import StackedAdamW, clip_each, filled

WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec")
CALIBRATED = 0.95
"""Fraction of the L0 budget that calibrated thresholds aim for, so that validation tokens stay within it."""
DIVERGED = 10.0
"""A run ends if its validation error is this many times the error without a delta."""


class TrainedDelta(NamedTuple):
    """One transcoder per seed, and the figures of the best validation (means over seeds; lists as `*_replicas`)."""

    deltas: list[Transcoder]
    figures: dict[str, Any]


_starts: WeakKeyDictionary[Pairs, dict[tuple[str, int], Start]] = WeakKeyDictionary()


def start_of(train: Pairs, device: str, tokens: int = 4096) -> Start:
    """What features of every seed and width start from, on `device`; kept for as long as the pairs are."""
    starts = _starts.setdefault(train, {})
    if (device, tokens) not in starts:
        sample = next(train.batches(min(tokens, train.tokens), torch.Generator().manual_seed(0), device=device))
        starts[device, tokens] = Start(*(column.to(torch.float32) for column in sample))
    return starts[device, tokens]


@dataclass
class Run:
    """The state of one run of a stack."""

    settings: DeltaSettings
    waited: int = 0
    reported: list[dict[str, Any]] = field(default_factory=list)
    best: TrainedDelta | None = None
    error: DivergedError | None = None

    @property
    def is_over(self) -> bool:
        return self.error is not None or self.waited >= self.settings.patience

    def note(self, deltas: list[Transcoder], figures: dict[str, Any]) -> None:
        """Records a validation's figures, and the deltas if they are the best so far."""
        self.waited += 1
        if self.best is None or figures["val_loss"] < self.best.figures["val_loss"]:
            self.best, self.waited = TrainedDelta(deltas, figures), 0
        self.reported.append(figures)

    def outcome(self) -> TrainedDelta | DivergedError:
        outcome = self.error or self.best
        assert outcome is not None  # the last step validates
        return outcome


class Stack:
    """The state of runs that train side by side."""

    def __init__(self, data: DeltaData, settings: Sequence[DeltaSettings], device: str) -> None:
        data = data._replace(train=data.train.near(device), validation=data.validation.near(device))
        self.data, self.device, self.shared = data, device, settings[0]
        self.runs, self.processes = [Run(run_settings) for run_settings in settings], processes(device)
        self.deviation = math.sqrt(data.unit)
        self.model = StackedDeltas(
            start_of(data.train, device),
            replicas=self.shared.replicas,
            d_new=self.shared.d_new,
            l0_budget=self.shared.l0_budget,
            seed=self.shared.seed,
            times=len(settings),
        )
        self.optimiser = StackedAdamW(self.model, len(settings), self.shared.weight_decay)
        on_gpu = device.startswith("cuda")
        self.sparsity = [torch.zeros((), device=device) if on_gpu else 0.0 for _ in settings]
        # Recording an exchange between processes is untested.
        self.update = Graphed(self._update) if self.processes.count == 1 else self._update
        per_epoch = data.train.batch_count(self.shared.batch_size)
        self.steps = per_epoch * self.shared.epochs
        tokens = min(self.shared.batch_size, data.train.tokens)
        self.wanted = self.model.W_dec.new_full((self.model.count,), CALIBRATED * self.shared.l0_budget * tokens)
        self.every = max(1, per_epoch // self.shared.evals_per_epoch)
        self.at = self.tokens = 0
        self.casts: dict[str, Tensor] = {}

    @property
    def validates(self) -> bool:
        """Whether the step just made is followed by a validation."""
        return self.at % self.every == 0 or self.at == self.steps

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The remaining batches, or fewer if all runs end; their order does not depend on the seed."""
        order = torch.Generator().manual_seed(0)
        size, skip = self.shared.batch_size, self.at
        for _ in range(self.shared.epochs):
            for batch in self.data.train.batches(size, order, skip=skip, device=self.device):
                if all(run.is_over for run in self.runs):
                    return
                yield batch
            skip = max(0, skip - self.data.train.batch_count(size))

    def cast(self, name: str, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """`batch` as `dtype`, in a buffer that the next batch reuses: on a CPU, touching that much fresh memory in
        every step takes longer than the conversion."""
        if batch.dtype == dtype:
            return batch
        if name not in self.casts or self.casts[name].shape != batch.shape:
            self.casts[name] = torch.empty_like(batch, dtype=dtype)
        return self.casts[name].copy_(batch)

    def step(self, x: Tensor, residual: Tensor) -> Losses:
        """One optimiser step; the losses are valid until the next one."""
        shared, at, steps = self.shared, self.at, self.steps
        ramp, decay = _ramp(at, shared.lr_warmup_fraction * steps), _decay(at, steps)
        self.optimiser.set_rates([run.settings.lr * ramp * decay for run in self.runs])
        ramp = _ramp(at, shared.sparsity_warmup_fraction * steps)
        values = [run.settings.sparsity * ramp for run in self.runs]
        self.sparsity = [filled(current, value) for current, value in zip(self.sparsity, values, strict=True)]
        losses = self.update(x, residual)
        self.at += 1
        self.tokens += len(x)
        return losses

    def _update(self, x: Tensor, residual: Tensor) -> Losses:
        shared, share = self.shared, self.processes.share
        learned = shared.threshold == "learned"
        losses = self.model.backward(share(x), share(residual), self._sparsity(), self.deviation, len(x), learned)
        self.processes.add_up([*self.model.raw_gradients(), losses.on])
        clip_each(self.model.gradients(), shared.grad_clip)
        self.optimiser.step()
        if not learned:
            self.model.steer(losses.on, self.wanted)
        return losses

    def _sparsity(self) -> float | Tensor:
        """The sparsity of a single run; for several, one value per feature."""
        if len(self.runs) == 1:
            return self.sparsity[0]
        per_run = torch.stack([torch.as_tensor(sparsity, dtype=torch.float32) for sparsity in self.sparsity])
        return per_run.repeat_interleave(self.shared.replicas * self.shared.d_new)

    def check(self, losses: Losses) -> None:
        """Checks that the losses are finite, which waits for the device."""
        sums = (losses.error + losses.penalty).view(len(self.runs), -1).sum(1)
        self.processes.add_up([sums])
        for run, loss in zip(self.runs, sums.tolist(), strict=True):
            if not run.is_over and not math.isfinite(loss):
                run.error = DivergedError(f"the loss is {loss} by step {self.at} (lr {run.settings.lr:.2g})")

    def validate(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Validates the runs that are not over, and yields the number and figures of those that continue."""
        deltas = self.model.transcoders(self.deviation, self.data.site)
        for number, run in enumerate(self.runs):
            if run.is_over:
                continue
            deltas_of_run = deltas[number * self.shared.replicas :][: self.shared.replicas]
            figures = {
                **validate(deltas_of_run, self.data, self.shared.l0_budget),
                "step": self.at,
                "tokens": self.tokens,
            }
            run.error = _divergence(figures, self.data, run.settings)
            if run.error is None:
                run.note(deltas_of_run, figures)
                yield number, figures

    def keep(self, keeper: Keeper) -> None:
        saved = {
            f"best/{number}/{i}/{name}": getattr(delta, name)
            for number, run in enumerate(self.runs)
            for i, delta in enumerate(run.best.deltas if run.best else [])
            for name in WEIGHTS
        }
        keeper.write(
            {**self.model.tensors(), **checkpoints.optimiser_tensors(self.optimiser.adamw), **saved},
            {
                "run": self._identity(),
                "at": self.at,
                "tokens": self.tokens,
                "runs": [
                    {
                        "waited": run.waited,
                        "reported": run.reported,
                        "best": run.best and run.best.figures,
                        "error": run.error and str(run.error),
                    }
                    for run in self.runs
                ],
            },
        )

    def restore(self, keeper: Keeper) -> None:
        """Restores the last checkpoint of these runs, if there is one."""
        checkpoint = keeper.read(self._identity())
        if checkpoint is None:
            return
        tensors, state = checkpoint
        for name, tensor in self.model.tensors().items():
            tensor.copy_(tensors[name])
        self.optimiser.read_weights()
        checkpoints.load_optimiser(self.optimiser.adamw, tensors)
        self.at, self.tokens = state["at"], state["tokens"]
        for number, (run, saved) in enumerate(zip(self.runs, state["runs"], strict=True)):
            run.waited, run.reported = saved["waited"], saved["reported"]
            run.error = saved["error"] and DivergedError(saved["error"])
            if saved["best"]:
                best = [
                    Transcoder(
                        **{name: tensors[f"best/{number}/{i}/{name}"] for name in WEIGHTS},
                        b_dec=None,
                        site=self.data.site,
                    ).to(self.device)
                    for i in range(self.shared.replicas)
                ]
                run.best = TrainedDelta(best, saved["best"])

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must match to belong to these runs."""
        settings = [asdict(run.settings) for run in self.runs]
        return {"runs": settings, "layer": self.data.site.layer, "tokens": self.data.train.tokens}


def _divergence(figures: dict[str, Any], data: DeltaData, settings: DeltaSettings) -> DivergedError | None:
    name = data.error_name
    if figures[name] <= DIVERGED * data.alone:  # not true of NaN
        return None
    return DivergedError(
        f"{name} is {figures[name]:.3g} at step {figures['step']}, against {data.alone:.3g} without a delta "
        f"(lr {settings.lr:.2g}, sparsity {settings.sparsity:.2g})"
    )


def _ramp(step: int, length: float) -> float:
    return min(1.0, (step + 1) / length) if length >= 1 else 1.0


def _decay(step: int, steps: int) -> float:
    """Constant, then linear to zero over the last third."""
    return min(1.0, 3 * (steps - step) / steps)
