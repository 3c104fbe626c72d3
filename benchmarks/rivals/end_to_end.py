"""Transcoder Adapters, trained as described in arXiv 2602.20904: all layers together, through the whole model.

In: a finetuned model, a second one that runs with un-finetuned MLPs, batches of tokens, a learning rate and steps. Out:
adapters of every layer, as deltas that can be spliced in. Written from the description of the method and its published
settings, not from its code: next to each un-finetuned MLP of the finetuned model runs `relu(x W_enc + b_enc) W_dec +
b_dec`, at BOS too. Decoders start at zero, and Adam minimises, for all layers at once, the sum of

- KL(finetuned || adapted) of the next token, over all tokens;
- the squared error of the residual stream after each layer, as a share of the finetuned one's square at that token;
- bridging: the same KL with the finetuned model up to a random layer and the adapted one above it, and the reverse;
- a weight times sum_i acts_i |W_dec_i|.

Each KL and the error have weight 1 (the settings give bridging 2, and it has two directions; how its error of states is
normalised is our reading). Simplified: the weight of the last term is steered during training, and the initial biases
are set, to reach the requested number of active features, where the authors compare fixed weights; they see each text
once, far more of it, with a larger model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.encoding import Batch, pad_left
from evaluators.splice.interventions import Patch
from evaluators.splice.passes import project, resume
from models.blocks import hooks_at
from models.bridge import Hook, device_of, hooked
from models.transcoder import Transcoder, with_bos
from sites import Site

WARM_UP = 0.05
FIRST_WEIGHT, STEER = 1e-3, 0.15
"""Sparsity weight: its initial value, and the change of its log per step and unit of relative L0 error."""
Hooks = list[Hook]


class Pair(NamedTuple):
    """The finetuned model, and a second one that runs with un-finetuned MLPs in the layers of `patches`; weights and
    residual stream are fp32, products inside the blocks in `dtype`."""

    finetuned: Any
    adapted: Any
    patches: Sequence[Patch]
    dtype: torch.dtype

    def blocks(self) -> AbstractContextManager:
        """The context for the passes through the blocks."""
        return torch.autocast(device_of(self.finetuned).type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, sequences: Sequence[Sequence[int]]) -> Batch:
        return pad_left(sequences, self.finetuned.tokenizer.pad_token_id).to(device_of(self.finetuned))


class Adapters(torch.nn.Module):
    """One adapter for each patch, stacked; `acts` (batch, position, width) by layer are those of the last pass."""

    def __init__(self, patches: Sequence[Patch], width: int, seed: int) -> None:
        super().__init__()
        self.patches, d_model = patches, patches[0].ground.d_in
        bound = d_model**-0.5
        drawn = torch.rand(len(patches), d_model, width, generator=torch.Generator().manual_seed(seed))
        self.W_enc = torch.nn.Parameter((2 * drawn - 1) * bound)
        self.b_enc = torch.nn.Parameter(torch.zeros(len(patches), width))
        self.W_dec = torch.nn.Parameter(torch.zeros(len(patches), width, d_model))
        self.b_dec = torch.nn.Parameter(torch.zeros(len(patches), d_model))
        self.acts: dict[Site, Tensor] = {}

    @torch.no_grad()
    def start(self, inputs: Mapping[Site, Tensor], active: float) -> None:
        """Sets the biases so that each feature is active on an equal share of `inputs` (tokens, d_model) by layer."""
        for index, patch in enumerate(self.patches):
            pre = inputs[patch.site][:4096].to(self.W_enc) @ self.W_enc[index]
            self.b_enc[index] = -pre.quantile(1 - active / pre.shape[1], dim=0)

    def hooks(self, bridge: Any) -> Hooks:
        """Hooks that add the adapters to the model's MLPs."""
        inputs: dict[Site, Tensor] = {}

        def reader(site: Site) -> Callable[[Tensor], None]:
            def read(x: Tensor) -> None:
                inputs[site] = x

            return read

        def writer(place: int, site: Site) -> Callable[[Tensor, slice], Tensor]:
            def write(y: Tensor, part: slice) -> Tensor:
                acts = torch.relu(inputs.pop(site) @ self.W_enc[place] + self.b_enc[place])
                self.acts[site] = acts
                return (y + acts @ self.W_dec[place] + self.b_dec[place]).to(y.dtype)

            return write

        pairs: Hooks = []
        for index, patch in enumerate(self.patches):
            pairs += hooks_at(bridge, patch.site, reader(patch.site), writer(index, patch.site))
        return pairs

    @torch.no_grad()
    def spliced(self, pair: Pair, first: int) -> list[Patch]:
        """The adapters as deltas; their output at BOS, the token `first`, is one vector and becomes a feature."""
        with hooked(pair.adapted, self.hooks(pair.adapted)):
            streams(pair.adapted, pair.batch([[first]]))
        patches = []
        for index, patch in enumerate(self.patches):
            W_enc, b_enc, W_dec, b_dec = (
                tensor[index].clone() for tensor in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
            )
            delta = Transcoder(W_enc, b_enc, torch.zeros_like(b_enc), W_dec, b_dec, patch.site)
            patches.append(replace(patch, delta=with_bos(delta, self.acts[patch.site][0, 0] @ W_dec)))
        return patches


class Losses(NamedTuple):
    """`active` is the mean number of active features per token and layer."""

    kl: Tensor
    states: Tensor
    bridged: Tensor
    penalty: Tensor
    active: float


def streams(bridge: Any, batch: Batch) -> list[Tensor]:
    """The residual stream after each layer, (batch, position, d_model)."""
    earlier: list[Tensor] = []

    def note(stream: Tensor, hook: object) -> None:
        earlier.append(stream)

    with hooked(bridge, [(f"blocks.{layer}.hook_out", note) for layer in range(bridge.cfg.n_layers - 1)]):
        last = resume(bridge, batch)
    return [*earlier, last]


def divergence(pair: Pair, targets: Sequence[Tensor], stream: Tensor) -> Tensor:
    """KL per token between log-probabilities in chunks and the predictions from the last layer's residual stream."""
    chunks = zip(project(pair.finetuned, stream), targets, strict=True)
    sums = [(log_p.exp() * (log_p - logits.log_softmax(-1))).sum() for logits, log_p in chunks]
    return torch.stack(sums).sum() / len(stream)


def predictions(pair: Pair, stream: Tensor) -> list[Tensor]:
    return [logits.log_softmax(-1) for logits in project(pair.finetuned, stream)]


def losses(pair: Pair, adapters: Adapters, batch: Batch, cutoff: int | None = None) -> Losses:
    """`cutoff` is the last layer below the bridge; None for no bridging."""
    mask = batch.mask
    with torch.no_grad():
        with pair.blocks():
            target_streams = streams(pair.finetuned, batch)
        predicted = predictions(pair, target_streams[-1][mask])
    with pair.blocks(), hooked(pair.adapted, adapters.hooks(pair.adapted)):
        adapted_streams = streams(pair.adapted, batch)
        acts = {site: acts[mask] for site, acts in adapters.acts.items()}
        upper = [] if cutoff is None else [resume(pair.adapted, batch, cutoff, target_streams[cutoff])]
    with pair.blocks():
        lower = [] if cutoff is None else [resume(pair.finetuned, batch, cutoff, adapted_streams[cutoff])]
    bridged = [divergence(pair, predicted, stream[mask]) for stream in (*upper, *lower)]
    apart = [
        ((ours - theirs)[mask].pow(2).sum(1) / theirs[mask].pow(2).sum(1)).mean()
        for ours, theirs in zip(adapted_streams, target_streams, strict=True)
    ]
    costs = [
        (acts[patch.site] @ adapters.W_dec[index].norm(dim=1)).mean() for index, patch in enumerate(adapters.patches)
    ]
    return Losses(
        divergence(pair, predicted, adapted_streams[-1][mask]),
        torch.stack(apart).mean(),
        torch.stack(bridged).sum() if bridged else torch.zeros(()),
        torch.stack(costs).mean(),
        sum((acts > 0).sum(1).float().mean().item() for acts in acts.values()) / len(acts),
    )


class Trained(NamedTuple):
    """Adapters, their KL on held-out text, and the CPU and wall-clock seconds of training."""

    adapters: Adapters
    held_out: float
    cpu_seconds: float
    seconds: float


class TrainingInputs(NamedTuple):
    """Inputs of a run: training and held-out batches, the inputs from which initial biases are computed, L0, and by how
    much all biases move per step and unit of relative L0 error, which also moves features that no penalty reaches any
    more."""

    batches: list[Batch]
    held_out: list[Batch]
    inputs: Mapping[Site, Tensor]
    width: int
    active: float
    seed: int
    nudge: float


def train(
    pair: Pair, material: TrainingInputs, lr: float, steps: int, report: Callable[[int, Losses], None] = lambda *_: None
) -> Trained:
    """Trains one batch per step, reshuffled each epoch; the learning rate warms up, then falls linearly to zero. Calls
    `report` with the number of each finished step and its losses."""
    begun, started = time.process_time(), time.perf_counter()
    adapters = Adapters(pair.patches, material.width, material.seed).to(device_of(pair.finetuned))
    adapters.start(material.inputs, material.active)
    optimiser = torch.optim.Adam(adapters.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(material.seed)
    count = len(material.batches)
    order = [int(i) for _ in range(-(-steps // count)) for i in torch.randperm(count, generator=generator)][:steps]
    weight = FIRST_WEIGHT
    for step, chosen in enumerate(order):
        cutoff = int(torch.randint(len(pair.finetuned.blocks) - 1, (1,), generator=generator))
        step_losses = losses(pair, adapters, material.batches[chosen], cutoff)
        optimiser.param_groups[0]["lr"] = lr * min((step + 1) / (WARM_UP * steps), 1 - step / steps)
        optimiser.zero_grad()
        (step_losses.kl + step_losses.states + step_losses.bridged + weight * step_losses.penalty).backward()
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
        optimiser.step()
        off = max(-1.0, min(1.0, step_losses.active / material.active - 1))
        weight *= math.exp(STEER * off)
        with torch.no_grad():
            adapters.b_enc.sub_(material.nudge * off)
        report(step + 1, step_losses)
    spent = time.process_time() - begun, time.perf_counter() - started
    with torch.no_grad():
        parts = [(losses(pair, adapters, batch), int(batch.mask.sum())) for batch in material.held_out]
    kl = sum(part.kl.item() * count for part, count in parts) / sum(count for _, count in parts)
    return Trained(adapters, kl, *spent)
