"""Joint polish: the change deltas of all layers, trained together where each was trained alone.

In: a TransformerBridge of the finetuned model, the un-finetuned blocks' paths, deltas trained layer by layer, and rows.
Out: the same deltas, moved to lower KL(finetuned || spliced) at the rows' targets. Layer by layer a delta's squared
error weighs every direction alike and knows nothing of the layers above; here what counts is what the model says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data.encoding import Encoded, by_length, pad_right
from models.blocks import BlockPath, exchanged
from models.bridge import device_of, hooked, read_input, tap_names
from models.transcoder import Transcoder
from trainers import checkpoints
from trainers.checkpoints import Keeper
from trainers.errors import DivergedError
from trainers.precision import dtype_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec")
VALIDATIONS = 6
SIMILAR = 8
"""A batch is one of so many of similar length, drawn together."""
STEER = 0.1
"""How fast thresholds follow the number of active features: the share of the way in a step."""
SPARSE = 1.05
"""Deltas that are this much less sparse than before, on the validation rows, are not kept."""
VALIDATION_TOKENS = 1024


@dataclass(frozen=True)
class PolishSettings:
    steps: int
    lr: float
    """Of Adam, with decoders in units of the size of each layer's change, as in training alone."""
    rows: int = 8
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"


class Polished(NamedTuple):
    """The deltas of the best validation, which may be the one before the first step, and its figures; `history` has
    those of every validation."""

    deltas: dict[int, Transcoder]
    figures: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """What is polished: deltas by layer, on the un-finetuned paths, in the finetuned model. `scales` by layer are the
    root mean squares of the changes that the deltas were trained on."""

    bridge: TransformerBridge
    paths: Mapping[int, BlockPath]
    deltas: Mapping[int, Transcoder]
    scales: Mapping[int, float]


def polish(
    subject: Subject,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: PolishSettings,
    *,
    report: Callable[[dict[str, Any]], None] = lambda figures: None,
    keeper: Keeper | None = None,
) -> Polished:
    """Adam on KL(finetuned || spliced), nats a target token; thresholds are steered to each layer's own L0 on the
    validation rows, and only deltas that are about as sparse as before are kept.

    With a `keeper`, an interrupted run goes on from its last checkpoint. Raises DivergedError if a loss is not finite.
    """
    run = _Run(subject, train, settings)
    keeper = keeper or Keeper()
    if not run.restore(keeper):
        run.validate(validation, report)
    every = max(1, settings.steps // VALIDATIONS)
    while run.at < settings.steps:
        run.step()
        if run.at % every == 0 or run.at == settings.steps:
            run.validate(validation, report)
        if keeper.is_due:
            run.keep(keeper)
    assert run.best is not None
    return Polished(run.best, run.best_figures, run.history)


class _Run:
    """The state of a run between its steps. Weights of all layers are stacked: W_enc (layers, d_model, n), b_enc and
    log_threshold (layers, n), W_dec (layers, n, d_model)."""

    def __init__(self, subject: Subject, train: Sequence[Encoded], settings: PolishSettings) -> None:
        self.subject, self.train, self.settings = subject, train, settings
        self.bridge, self.layers = subject.bridge, sorted(subject.deltas)
        self.device = device_of(self.bridge)
        self.scales = torch.tensor([subject.scales[one] for one in self.layers], device=self.device).view(-1, 1, 1)

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(subject.deltas[one], name) for one in self.layers]).to(self.device)

        self.log_threshold = stacked("threshold").log()
        self.bos = torch.isinf(self.log_threshold)
        weights = {"W_enc": stacked("W_enc"), "b_enc": stacked("b_enc"), "W_dec": stacked("W_dec") / self.scales}
        self.weights = {name: one.clone().requires_grad_() for name, one in weights.items()}
        self.optimiser = torch.optim.Adam(self.weights.values(), lr=settings.lr)
        self.at, self.started, self.before = 0, time.monotonic(), 0.0
        self.wanted_l0: Tensor | None = None
        self.history: list[dict[str, Any]] = []
        self.best: dict[int, Transcoder] | None = None
        self.best_figures: dict[str, Any] = {}
        self.last_kl = math.nan

    def step(self) -> None:
        """One optimiser step on rows of similar length; which ones depends on the seed and the step alone."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.at)
        drawn = torch.randperm(len(self.train), generator=generator)[: SIMILAR * settings.rows].tolist()
        drawn.sort(key=lambda row: len(self.train[row].ids))
        first = int(torch.randint(SIMILAR, (1,), generator=generator)) * settings.rows
        rows = [self.train[row] for row in drawn[first : first + settings.rows] or drawn]
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * min(1.0, 3 * (settings.steps - self.at) / settings.steps)
        self.optimiser.zero_grad()
        kl, tokens, active = self._divergence(rows, backward=True)
        self.last_kl = kl / tokens
        if not math.isfinite(self.last_kl):
            raise DivergedError(f"joint polish: KL is {self.last_kl} at step {self.at} (lr {settings.lr:.2g})")
        torch.nn.utils.clip_grad_norm_(self.weights.values(), settings.grad_clip)
        self.optimiser.step()
        assert self.wanted_l0 is not None
        off = (active / self.wanted_l0.clamp(min=1e-3) - 1).clamp(-1, 1)
        self.log_threshold += STEER * off.unsqueeze(1)
        self.at += 1

    def validate(self, rows: Sequence[Encoded], report: Callable[[dict[str, Any]], None]) -> None:
        """KL and L0 on the validation rows; keeps the deltas if they are the best so far."""
        kl, tokens, active, places = 0.0, 0, torch.zeros(len(self.layers), device=self.device), 0
        for chosen in by_length([len(row.ids) for row in rows], VALIDATION_TOKENS):
            batch = [rows[row] for row in chosen]
            found = self._divergence(batch)
            edited = sum(len(row.ids) - 1 for row in batch)
            kl, tokens, places = kl + found[0], tokens + found[1], places + edited
            active += found[2] * edited
        l0 = active / places
        if self.wanted_l0 is None:
            self.wanted_l0 = l0
        seconds = self.before + time.monotonic() - self.started
        figures = {"step": self.at, "val_kl": kl / tokens, "val_l0": l0.mean().item(), "seconds": seconds}
        if self.at:
            figures["train_kl"] = self.last_kl
        sparse = figures["val_l0"] <= SPARSE * self.wanted_l0.mean().item()
        if self.best is None or (sparse and figures["val_kl"] < self.best_figures["val_kl"]):
            self.best, self.best_figures = self._deltas(), figures
        self.history.append(figures)
        report(figures)

    def _divergence(self, rows: Sequence[Encoded], backward: bool = False) -> tuple[float, int, Tensor]:
        """KL(finetuned || spliced) summed over the rows' targets, their number, and the features active per token in
        each layer (layers,); with `backward`, the gradient of the mean goes to the weights."""
        # Padding comes last, where no token of a text attends to it, so no mask is needed.
        batch = pad_right([row.ids for row in rows], [0] * len(rows), self.bridge.tokenizer.pad_token_id)
        batch = batch.to(self.device)
        first = min(len(row.prompt) for row in rows) - 1
        starts, counts = (
            torch.tensor(one, device=self.device).unsqueeze(1)
            for one in ([len(row.prompt) - 1 for row in rows], [len(row.target) for row in rows])
        )
        places = torch.arange(first, batch.ids.shape[1] - 1, device=self.device)
        wanted = (places >= starts) & (places < starts + counts)
        model: Any = self.bridge.original_model

        def predictions() -> Tensor:
            """Of every target token, (token, vocabulary)."""
            with torch.autocast(
                self.device.type, dtype_of(self.settings.precision), enabled=self.settings.precision == "bf16"
            ):
                output = model(
                    input_ids=batch.ids, position_ids=batch.positions, use_cache=False, logits_to_keep=places
                )
            return output.logits[wanted].float().log_softmax(-1)

        with torch.no_grad():
            finetuned = predictions()
        active: list[Tensor] = []
        hooks = self._hooks(batch.editable, batch.bos, active)
        # The gradient reads the weights that the pass ran with, so it too is taken while they are exchanged.
        with exchanged(self.bridge, [self.subject.paths[layer] for layer in self.layers]):
            with hooked(self.bridge, hooks), torch.set_grad_enabled(backward):
                spliced = predictions()
            kl = (finetuned.exp() * (finetuned - spliced)).sum()
            if backward:
                (kl / len(finetuned)).backward()
        return kl.item(), len(finetuned), torch.stack(active)

    def _hooks(self, editable: Tensor, bos: Tensor, active: list[Tensor]) -> list[tuple[str, Callable]]:
        """Adds every layer's delta to what its un-finetuned block writes; counts the active features into `active`."""
        inputs: dict[int, Tensor] = {}

        def reader(place: int, taps: Any) -> Callable:
            def read(x: Tensor, hook: object) -> None:
                inputs[place] = read_input(taps, x)

            return read

        def writer(place: int) -> Callable:
            def write(y: Tensor, hook: object) -> Tensor:
                x = inputs.pop(place)
                pre = x @ self.weights["W_enc"][place].to(x.dtype) + self.weights["b_enc"][place]
                on = (pre > 0) & (pre > self.log_threshold[place].exp()) & editable.unsqueeze(-1)
                active.append(on.sum() / editable.sum())
                acts = torch.where(bos.unsqueeze(-1), self.bos[place].to(pre.dtype), pre * on)
                added = acts @ (self.weights["W_dec"][place] * self.scales[place]).to(acts.dtype)
                return (y + added).to(y.dtype)

            return write

        found = []
        for place, layer in enumerate(self.layers):
            taps = self.subject.deltas[layer].taps
            read, write = tap_names(taps, layer)
            found += [(read, reader(place, taps)), (write, writer(place))]
        return found

    @torch.no_grad()
    def _deltas(self) -> dict[int, Transcoder]:
        threshold, W_dec = self.log_threshold.exp(), self.weights["W_dec"] * self.scales
        found = {}
        for place, layer in enumerate(self.layers):
            made = {
                "W_enc": self.weights["W_enc"],
                "b_enc": self.weights["b_enc"],
                "threshold": threshold,
                "W_dec": W_dec,
            }
            own: dict[str, Any] = {name: tensor[place].detach().clone() for name, tensor in made.items()}
            found[layer] = replace(self.subject.deltas[layer], **own)
        return found

    def keep(self, keeper: Keeper) -> None:
        assert self.best is not None
        assert self.wanted_l0 is not None
        best = {f"best/{layer}/{name}": getattr(delta, name) for layer, delta in self.best.items() for name in WEIGHTS}
        now = {**self.weights, "log_threshold": self.log_threshold, "wanted_l0": self.wanted_l0}
        state = {"run": self._identity(), "at": self.at, "history": self.history, "best": self.best_figures}
        state |= {"seconds": self.before + time.monotonic() - self.started, "last_kl": self.last_kl}
        keeper.write({**now, **checkpoints.optimiser_tensors(self.optimiser), **best}, state)

    def restore(self, keeper: Keeper) -> bool:
        """Whether there was a checkpoint of this run, which goes on from it."""
        found = keeper.read(self._identity())
        if found is None:
            return False
        tensors, state = found
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(tensors[name])
        self.log_threshold.copy_(tensors["log_threshold"])
        self.wanted_l0 = tensors["wanted_l0"].to(self.device)
        checkpoints.load_optimiser(self.optimiser, tensors)
        self.at, self.history, self.best_figures = state["at"], state["history"], state["best"]
        self.before, self.last_kl = state["seconds"], state["last_kl"]
        self.best = {}
        for layer, delta in self.subject.deltas.items():
            own: dict[str, Any] = {name: tensors[f"best/{layer}/{name}"] for name in WEIGHTS}
            self.best[layer] = replace(delta, **own)
        return True

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must match to belong to this run."""
        return {**asdict(self.settings), "layers": self.layers, "rows": len(self.train)}
