"""Joint polish: trains the change deltas of all sites together, after each was trained alone.

In: a TransformerBridge of the finetuned model, the un-finetuned blocks' paths, deltas trained site by site, and rows.
Out: the same deltas, adjusted to lower KL(finetuned || spliced) at the rows' targets. The squared error of a delta
trained alone weighs all directions equally and ignores the layers above; joint polish optimises the model's output.
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
from models.blocks import BlockPath, exchanged, hooks_at
from models.bridge import Hook, device_of, hooked
from models.transcoder import Transcoder
from sites import Site
from trainers import checkpoints
from trainers.checkpoints import Keeper
from trainers.errors import DivergedError
from trainers.precision import dtype_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec")
VALIDATIONS = 6
SIMILAR = 8
"""Rows are drawn this many batches at a time and sorted by length, so that a batch holds rows of similar length."""
STEER = 0.1
"""How fast thresholds follow the number of active features: change of log threshold per unit of relative error."""
SPARSE = 1.05
"""Deltas whose mean L0 on the validation rows exceeds this multiple of the initial one are not kept."""
VALIDATION_TOKENS = 1024


@dataclass(frozen=True)
class PolishSettings:
    steps: int
    lr: float
    """Adam's learning rate, with decoders in units of the size of each layer's change, as in training alone."""
    rows: int = 8
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"


class Polished(NamedTuple):
    """The deltas and figures of the best validation, which may be the one before the first step; `history` has the
    figures of every validation."""

    deltas: dict[Site, Transcoder]
    figures: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """What to polish: deltas by site, on the un-finetuned paths, in the finetuned model. `scales` are the root mean
    squares of the changes that the deltas were trained on."""

    bridge: TransformerBridge
    paths: Mapping[Site, BlockPath]
    deltas: Mapping[Site, Transcoder]
    scales: Mapping[Site, float]


def polish(
    subject: Subject,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: PolishSettings,
    *,
    report: Callable[[dict[str, Any]], None] = lambda figures: None,
    keeper: Keeper | None = None,
) -> Polished:
    """Runs Adam on KL(finetuned || spliced), in nats per target token. Thresholds are steered to each site's initial L0
    on the validation rows, and only deltas about as sparse as before are kept.

    With a `keeper`, an interrupted run continues from its last checkpoint. Raises DivergedError if a KL is not finite.
    """
    run = _Run(subject, train, settings)
    keeper = keeper or Keeper()
    if not run.restore(keeper):
        run.validate(validation, report)
    period = max(1, settings.steps // VALIDATIONS)
    while run.at < settings.steps:
        run.step()
        if run.at % period == 0 or run.at == settings.steps:
            run.validate(validation, report)
        if keeper.is_due:
            run.keep(keeper)
    assert run.best is not None
    return Polished(run.best, run.best_figures, run.history)


class _Run:
    """The state of a run: for each site W_enc (d_in, n) and W_dec (n, d_out), in units of the site's change; stacked
    for all sites, b_enc and log_threshold (sites, n)."""

    def __init__(self, subject: Subject, train: Sequence[Encoded], settings: PolishSettings) -> None:
        self.subject, self.train, self.settings = subject, train, settings
        self.bridge, self.sites = subject.bridge, sorted(subject.deltas)
        self.device = device_of(self.bridge)
        deltas = [subject.deltas[site].to(self.device) for site in self.sites]
        self.scales = [subject.scales[site] for site in self.sites]
        self.log_threshold = torch.stack([delta.threshold for delta in deltas]).log()
        self.bos = torch.isinf(self.log_threshold) & (self.log_threshold > 0)  # a threshold of 0 is no such feature
        self.W_enc = [delta.W_enc.clone().requires_grad_() for delta in deltas]
        self.b_enc = torch.stack([delta.b_enc for delta in deltas]).requires_grad_()
        scaled = zip(deltas, self.scales, strict=True)
        self.W_dec = [(delta.W_dec / scale).requires_grad_() for delta, scale in scaled]
        self.optimiser = torch.optim.Adam([*self.W_enc, self.b_enc, *self.W_dec], lr=settings.lr)
        self.at, self.started, self.before = 0, time.monotonic(), 0.0
        self.wanted_l0: Tensor | None = None
        self.history: list[dict[str, Any]] = []
        self.best: dict[Site, Transcoder] | None = None
        self.best_figures: dict[str, Any] = {}
        self.last_kl = math.nan

    def step(self) -> None:
        """One optimiser step on rows of similar length; the choice of rows depends only on the seed and the step."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.at)
        drawn = torch.randperm(len(self.train), generator=generator)[: SIMILAR * settings.rows].tolist()
        drawn.sort(key=lambda row: len(self.train[row].ids))
        first = int(torch.randint(SIMILAR, (1,), generator=generator)) * settings.rows
        first = min(first, max(0, len(drawn) - settings.rows))  # where there are few rows
        rows = [self.train[row] for row in drawn[first : first + settings.rows]]
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * min(1.0, 3 * (settings.steps - self.at) / settings.steps)
        self.optimiser.zero_grad()
        kl, tokens, active = self._divergence(rows, backward=True)
        self.last_kl = kl / tokens
        if not math.isfinite(self.last_kl):
            raise DivergedError(f"joint polish: KL is {self.last_kl} at step {self.at} (lr {settings.lr:.2g})")
        torch.nn.utils.clip_grad_norm_([*self.W_enc, self.b_enc, *self.W_dec], settings.grad_clip)
        self.optimiser.step()
        assert self.wanted_l0 is not None
        off = (active / self.wanted_l0.clamp(min=1e-3) - 1).clamp(-1, 1)
        self.log_threshold += STEER * off.unsqueeze(1)
        self.at += 1

    def validate(self, rows: Sequence[Encoded], report: Callable[[dict[str, Any]], None]) -> None:
        """KL and L0 on the validation rows; keeps the deltas if they are the best so far."""
        kl, tokens, active, places = 0.0, 0, torch.zeros(len(self.sites), device=self.device), 0
        for chosen in by_length([len(row.ids) for row in rows], VALIDATION_TOKENS):
            batch = [rows[row] for row in chosen]
            batch_kl, batch_tokens, batch_active = self._divergence(batch)
            edited = sum(len(row.ids) - 1 for row in batch)
            kl, tokens, places = kl + batch_kl, tokens + batch_tokens, places + edited
            active += batch_active * edited
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
        """KL(finetuned || spliced) summed over the rows' target tokens, the number of these, and the features active
        per token at each site (sites,); with `backward`, also backpropagates the mean KL to the weights."""
        # Rows are padded on the right, where no token attends to the padding, so no mask is needed.
        batch = pad_right([row.ids for row in rows], [0] * len(rows), self.bridge.tokenizer.pad_token_id)
        batch = batch.to(self.device)
        first = min(len(row.prompt) for row in rows) - 1
        starts, counts = (
            torch.tensor(lengths, device=self.device).unsqueeze(1)
            for lengths in ([len(row.prompt) - 1 for row in rows], [len(row.target) for row in rows])
        )
        places = torch.arange(first, batch.ids.shape[1] - 1, device=self.device)
        is_target = (places >= starts) & (places < starts + counts)
        model: Any = self.bridge.original_model

        def predictions() -> Tensor:
            """Log-probabilities at every target token, (token, vocabulary)."""
            with torch.autocast(
                self.device.type, dtype_of(self.settings.precision), enabled=self.settings.precision == "bf16"
            ):
                output = model(
                    input_ids=batch.ids, position_ids=batch.positions, use_cache=False, logits_to_keep=places
                )
            return output.logits[is_target].float().log_softmax(-1)

        with torch.no_grad():
            finetuned = predictions()
        active: list[Tensor] = []
        hooks = self._hooks(batch.editable, batch.bos, active)
        # The backward pass reads the weights that the forward pass used, so it too runs while they are exchanged.
        with exchanged(self.bridge, [self.subject.paths[site] for site in self.sites]):
            with hooked(self.bridge, hooks), torch.set_grad_enabled(backward):
                spliced = predictions()
            kl = (finetuned.exp() * (finetuned - spliced)).sum()
            if backward:
                (kl / len(finetuned)).backward()
        return kl.item(), len(finetuned), torch.stack(active)

    def _hooks(self, editable: Tensor, bos: Tensor, active: list[Tensor]) -> list[Hook]:
        """Adds every site's delta to the output of its un-finetuned path; appends the active counts to `active`."""
        added: dict[int, Tensor] = {}

        def reader(place: int) -> Callable[[Tensor], None]:
            def read(x: Tensor) -> None:
                pre = x @ self.W_enc[place].to(x.dtype) + self.b_enc[place]
                on = (pre > 0) & (pre > self.log_threshold[place].exp()) & editable.unsqueeze(-1)
                active.append(on.sum() / editable.sum())
                acts = torch.where(bos.unsqueeze(-1), self.bos[place].to(pre.dtype), pre * on)
                added[place] = acts @ (self.W_dec[place] * self.scales[place]).to(acts.dtype)

            return read

        def writer(place: int) -> Callable[[Tensor, slice], Tensor]:
            def write(y: Tensor, part: slice) -> Tensor:
                return (y + added[place][..., part]).to(y.dtype)

            return write

        hooks: list[Hook] = []
        for index, site in enumerate(self.sites):
            hooks += hooks_at(self.bridge, site, reader(index), writer(index))
        return hooks

    @torch.no_grad()
    def _deltas(self) -> dict[Site, Transcoder]:
        return {
            site: replace(
                self.subject.deltas[site],
                W_enc=self.W_enc[index].detach().clone(),
                b_enc=self.b_enc[index].detach().clone(),
                threshold=self.log_threshold[index].exp(),
                W_dec=self.W_dec[index].detach() * self.scales[index],
            )
            for index, site in enumerate(self.sites)
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name."""
        tensors = {"b_enc": self.b_enc, "log_threshold": self.log_threshold}
        for index, site in enumerate(self.sites):
            tensors |= {f"W_enc/{site.label}": self.W_enc[index], f"W_dec/{site.label}": self.W_dec[index]}
        return tensors

    def keep(self, keeper: Keeper) -> None:
        assert self.best is not None
        assert self.wanted_l0 is not None
        best = {
            f"best/{site.label}/{name}": getattr(delta, name) for site, delta in self.best.items() for name in WEIGHTS
        }
        now = {**self._tensors(), "wanted_l0": self.wanted_l0}
        state = {"run": self._identity(), "at": self.at, "history": self.history, "best": self.best_figures}
        state |= {"seconds": self.before + time.monotonic() - self.started, "last_kl": self.last_kl}
        keeper.write({**now, **checkpoints.optimiser_tensors(self.optimiser), **best}, state)

    def restore(self, keeper: Keeper) -> bool:
        """Restores this run's last checkpoint; returns False if there is none."""
        checkpoint = keeper.read(self._identity())
        if checkpoint is None:
            return False
        tensors, state = checkpoint
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(tensors[name])
        self.wanted_l0 = tensors["wanted_l0"].to(self.device)
        checkpoints.load_optimiser(self.optimiser, tensors)
        self.at, self.history, self.best_figures = state["at"], state["history"], state["best"]
        self.before, self.last_kl = state["seconds"], state["last_kl"]
        self.best = {}
        for site, delta in self.subject.deltas.items():
            weights: dict[str, Any] = {name: tensors[f"best/{site.label}/{name}"] for name in WEIGHTS}
            self.best[site] = replace(delta, **weights)
        return True

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must match to belong to this run."""
        return {**asdict(self.settings), "sites": [site.label for site in self.sites], "rows": len(self.train)}
