"""Direct effects between delta features in one text: the spliced model with all deltas' activations held constant.

In: a bridge, patches of change deltas, a text, and what is to be predicted at its last token. Out: for a target (a
feature's pre-activation, or the output) its value, its slope in the activation of every feature below it, and what it
becomes without one of them. Because all deltas are held constant, effects run through un-finetuned parts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data.encoding import Batch, pad_left
from evaluators.measures.single_features import activations
from evaluators.splice.interventions import Edit, Patch, RowEdits, spliced
from evaluators.splice.passes import forward, project, read_prefixes, run_up_to
from models.blocks import exchanged, hooks_at
from models.bridge import Hook, device_of, hooked
from models.frozen import Frozen, frozen
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Output(NamedTuple):
    """What is explained: the logit of the token `plus` after the text `ids`, minus that of `minus`, if there is one."""

    ids: Sequence[int]
    plus: int
    minus: int | None = None

    def of(self, logits: Tensor) -> Tensor:
        """The value in logits (..., vocabulary)."""
        value = logits[..., self.plus]
        return value if self.minus is None else value - logits[..., self.minus]


class Place(NamedTuple):
    """A feature at a position of the text."""

    site: Site
    position: int
    feature: int


Target = Place | None
"""A feature at a position, or, as None, the output."""


class Effects(NamedTuple):
    """For some targets: their values (target,), and slopes by site (target, position, d_sae); no slopes for a site
    that is above all of them."""

    values: Tensor
    slopes: dict[Site, Tensor]


def spliced_activations(bridge: TransformerBridge, patches: Sequence[Patch], ids: Sequence[int]) -> dict[Site, Tensor]:
    """By site, the deltas' activations (position, d_sae) on a text at full strength."""
    with torch.no_grad(), spliced(bridge, Edit(patches, "full")) as splice:
        batch = _rows(bridge, ids, 1)
        splice.reset(batch.editable, torch.ones(1, device=batch.ids.device), RowEdits(bos=batch.bos))
        prefixes = read_prefixes(bridge, [list(ids)], [patch.site for patch in patches])
        return {patch.site: activations(patch, prefixes[patch.site][0].x) for patch in patches}


class _FullRun(NamedTuple):
    """The model with no feature removed: streams (1, position, d_model) that enter blocks after the first, by layer;
    pre-activations by site (position, d_sae); the output (1,)."""

    entering: dict[int, Tensor]
    pre: dict[Site, Tensor]
    output: Tensor


class HeldModel:
    """The model with un-finetuned parts at the patches' sites, and with held activations of their deltas. Make it with
    `held_model`: outside that context its graph would belong to other weights."""

    def __init__(
        self, bridge: TransformerBridge, patches: Sequence[Patch], output: Output, acts: Mapping[Site, Tensor]
    ) -> None:
        self.bridge, self.output, self.acts = bridge, output, acts
        self.patches = {patch.site: patch for patch in sorted(patches, key=lambda patch: patch.site)}
        self._pre: dict[Site, Tensor] = {}
        self._added: dict[Site, Tensor] = {}
        self._held: Mapping[Site, Tensor] = {}
        self._graph: tuple[dict[Site, Tensor], dict[Site, Tensor], Tensor] | None = None
        self._full: _FullRun | None = None
        self.logits = torch.empty(0)
        """The logits (vocabulary,) after the text; empty before `effects` ran."""

    def hooks(self) -> list[Hook]:
        return [
            hook
            for patch in self.patches.values()
            for hook in hooks_at(self.bridge, patch.site, self._reader(patch), self._writer(patch))
        ]

    def _reader(self, patch: Patch) -> Callable[[Tensor], None]:
        delta = patch.transcoder

        def read(x: Tensor) -> None:
            self._pre[patch.site] = x.to(delta.W_enc.dtype) @ delta.W_enc + delta.b_enc

        return read

    def _writer(self, patch: Patch) -> Callable[[Tensor, slice], Tensor]:
        def write(y: Tensor, part: slice) -> Tensor:
            if part.start == 0:
                self._added[patch.site] = patch.transcoder.decode(self._held[patch.site])
            return (y.float() + self._added[patch.site][..., part]).to(y.dtype)

        return write

    def effects(self, targets: Sequence[Target], constants: Frozen) -> Effects:
        """Values and slopes of `targets`. The text runs once; the backward passes of all targets are one batch, which
        ends at the highest of them. `constants` must be the same in every call."""
        if self._graph is None:
            self._graph = self._with_gradients(constants)
        leaves, pre, output = self._graph
        values = torch.stack([output if at is None else pre[at.site][0, at.position, at.feature] for at in targets])
        highest = None if None in targets else max(at.site for at in targets if at is not None)
        below = [site for site in leaves if highest is None or site < highest]
        if not below or not values.requires_grad:
            return Effects(values.detach(), {})
        seeds = torch.eye(len(targets), dtype=values.dtype, device=values.device)
        slopes = torch.autograd.grad(
            values,
            [leaves[site] for site in below],
            seeds,
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        slopes_below = zip(below, slopes, strict=True)
        return Effects(values.detach(), {site: slope[:, 0] for site, slope in slopes_below if slope is not None})

    def _with_gradients(self, constants: Frozen) -> tuple[dict[Site, Tensor], dict[Site, Tensor], Tensor]:
        leaves = {site: acts.detach().unsqueeze(0).requires_grad_() for site, acts in self.acts.items()}
        with torch.enable_grad(), frozen(self.bridge, constants):
            logits = self._logits(leaves)
            output = self.output.of(logits)[0]
        self.logits = logits[0].detach()
        pre, self._pre = self._pre, {}
        return leaves, pre, output

    @torch.no_grad()
    def falls(self, targets: Sequence[Target], sources: Sequence[Place]) -> Tensor:
        """(source, target): by how much the targets' values fall if one source is off and all other features are held.
        Nothing is frozen. Only the blocks from the lowest source to the highest target run."""
        full = self._full = self._full or self._run_in_full()
        rows, last = len(sources), self.bridge.cfg.n_layers - 1
        self._held = {site: acts.unsqueeze(0).expand(rows, *acts.shape).clone() for site, acts in self.acts.items()}
        for row, (site, position, feature) in enumerate(sources):
            self._held[site][row, position, feature] = 0.0
        highest = max(last if at is None else at.site.layer for at in targets)
        first = min(source.site.layer for source in sources)
        stream = self._run_blocks(rows, highest, first, full.entering.get(first))
        output = self._output_of(stream) if None in targets else None
        pre, self._pre = self._pre, {}

        def values(at: Target) -> Tensor:
            if at is None:
                assert output is not None
                return full.output - output
            if at.site not in pre:  # below all sources
                return full.output.new_zeros(rows)
            return full.pre[at.site][at.position, at.feature] - pre[at.site][:, at.position, at.feature]

        return torch.stack([values(at) for at in targets], dim=1)

    @torch.no_grad()
    def value_without_deltas(self) -> float:
        """The output with all deltas off."""
        nothing = {site: torch.zeros_like(acts).unsqueeze(0) for site, acts in self.acts.items()}
        return self.output.of(self._logits(nothing)).item()

    def _run_in_full(self) -> _FullRun:
        """What the model computes with every feature held at its activation."""
        self._held = {site: acts.unsqueeze(0) for site, acts in self.acts.items()}
        last, entering = self.bridge.cfg.n_layers - 1, {}

        def noting(layer: int) -> Callable[[Tensor, object], None]:
            def note(stream: Tensor, hook: object) -> None:
                entering[layer] = stream

            return note

        hooks: list[Hook] = [(f"blocks.{layer}.hook_out", noting(layer + 1)) for layer in range(last)]
        output = self._output_of(self._run_blocks(1, last, 0, None, hooks))
        pre, self._pre = self._pre, {}
        return _FullRun(entering, {site: site_acts[0] for site, site_acts in pre.items()}, output)

    def _run_blocks(
        self, rows: int, highest: int, first: int, entering: Tensor | None, hooks: Sequence[Hook] = ()
    ) -> Tensor:
        """The stream that leaves block `highest`, from what enters block `first`, or from the text."""
        batch = _rows(self.bridge, self.output.ids, rows)
        if entering is None:
            return run_up_to(self.bridge, batch, highest, hooks)
        residual = entering.expand(rows, *entering.shape[1:])
        return run_up_to(self.bridge, batch, highest, hooks, first - 1, residual)

    def _output_of(self, stream: Tensor) -> Tensor:
        """The output (row,) of what leaves the last block."""
        return torch.cat([self.output.of(logits) for logits in project(self.bridge, stream[:, -1])])

    def _logits(self, acts: Mapping[Site, Tensor]) -> Tensor:
        """Logits (row, vocabulary) after the text, with these activations (row, position, d_sae) held."""
        self._held = acts
        batch = _rows(self.bridge, self.output.ids, len(next(iter(acts.values()))))
        return forward(self.bridge, batch, 1)[:, 0]


@contextmanager
def held_model(
    bridge: TransformerBridge, patches: Sequence[Patch], output: Output, acts: Mapping[Site, Tensor] | None = None
) -> Iterator[HeldModel]:
    """The `HeldModel` of a text, with the activations of the spliced model on it unless `acts` are given."""
    model = HeldModel(bridge, patches, output, acts or spliced_activations(bridge, patches, output.ids))
    paths: list[Any] = [patch.path for patch in model.patches.values()]
    # Backward passes too must run in here: they use the weights that a parameter holds at that time.
    with exchanged(bridge, paths), hooked(bridge, model.hooks()):
        yield model


def _rows(bridge: TransformerBridge, ids: Sequence[int], rows: int) -> Batch:
    return pad_left([list(ids)] * rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
