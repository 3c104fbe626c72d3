"""Interventions: what is spliced in at sites, and the hooks that do it.

In: a TransformerBridge and an `Edit`: patches (site, ground, delta) and a condition's name. Out: a context in which
every forward pass of the model is edited, on prompt and generated tokens alike; never on padding, and at BOS only by a
delta's BOS feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from evaluators.conditions import CONDITIONS, Condition
from evaluators.splice.passes import Prefix
from models.blocks import BlockPath, check_hooks, exchanged, hooks_at
from models.bridge import Hook, hooked
from models.errors import ModelError
from models.transcoder import HasSite, Transcoder, check_fits
from sites import MLP, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Delta(HasSite, Protocol):
    """What a splice needs from a delta, or from its substitute."""

    @property
    def at_bos(self) -> Tensor | None:
        """The activations (d_new,) at BOS; None without a feature for it."""

    def encode(self, x: Tensor) -> Tensor:
        """Activations (tokens, d_new) of x (tokens, d_in)."""

    def decode(self, acts: Tensor) -> Tensor:
        """Output (tokens, d_out) of activations (tokens, d_new)."""


@dataclass(frozen=True)
class Patch:
    """What is spliced in at one site. Raises ModelError if its parts belong to another site or differ in width.

    `ground` is what lies under the delta: a base transcoder, under a delta trained on its residual, or the un-finetuned
    block's own path, under a delta trained on what finetuning changed. `pool` (tokens, d_out) holds delta outputs in
    shuffled order, for the condition that reads them by token number. `ranks` (d_new,) are the features' ranks among
    those of all sites, the most effective first, for rows that keep only some of them; a negative one is always on.
    """

    site: Site
    ground: Transcoder | BlockPath
    delta: Delta | None = None
    pool: Tensor | None = None
    ranks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ground.site != self.site:
            raise ModelError(
                f"layer {self.site.label}: the ground under its delta is of layer {self.ground.site.label}"
            )
        if self.delta is not None:
            widths = {"d_in": self.ground.d_in, "d_out": self.ground.d_out}
            check_fits(self.delta, self.site, **widths, origin=f"layer {self.site.label}: delta")

    @property
    def base(self) -> Transcoder | None:
        """The base transcoder, if that is the ground."""
        return self.ground if isinstance(self.ground, Transcoder) else None

    @property
    def path(self) -> BlockPath | None:
        """The un-finetuned path, if that is the ground."""
        return self.ground if isinstance(self.ground, BlockPath) else None

    @property
    def transcoder(self) -> Transcoder:
        """The delta as a transcoder; raises ValueError if there is no delta, or it has no features."""
        if not isinstance(self.delta, Transcoder):
            raise ValueError(f"layer {self.site.label} has no delta transcoder, whose features are needed here")
        return self.delta

    def to(self, device: str | torch.device) -> Patch:
        delta = self.delta.to(device) if isinstance(self.delta, Transcoder) else self.delta
        return replace(self, ground=self.ground.to(device), delta=delta)


@dataclass(frozen=True)
class Edit:
    """What is spliced in: patches, and the condition by which they replace their sites' outputs; `raw` edits nothing,
    whatever the patches."""

    patches: Sequence[Patch] = ()
    condition: str = "raw"


class Outputs(NamedTuple):
    """A patch's results for some tokens: outputs of ground and delta (tokens, d_out), the sums of a base transcoder's
    activations (tokens,), if they are recorded, and the delta's activations (tokens, d_new). `delta` is None until it
    is known which features are on."""

    ground: Tensor
    delta: Tensor | None
    base_acts: Tensor | None
    features: Tensor

    def take(self, tokens: Tensor) -> Outputs:
        return Outputs(*(None if column is None else column[tokens] for column in self))  # type: ignore[arg-type]


class _Tokens(NamedTuple):
    """The tokens of a chunk (batch, position) for which a patch is evaluated: those that are replaced, or all.

    `where`: their rows and positions, or None for all, in which case `edited` (tokens, 1) is False for those that stay
    as they are. `lines`, `bos` and `numbers` (tokens,), `alpha` (tokens, 1): each token's row, whether it is BOS, its
    number in the text, and its strength.
    """

    where: tuple[Tensor, ...] | None
    edited: Tensor | None
    lines: Tensor
    bos: Tensor
    numbers: Tensor
    alpha: Tensor

    def of(self, activation: Tensor) -> Tensor:
        """(tokens, width) of an activation (batch, position, width)."""
        return activation.flatten(0, 1) if self.where is None else activation[self.where]

    def put(self, activation: Tensor, edited: Tensor) -> Tensor:
        """The activation with these tokens replaced by `edited` (tokens, width)."""
        if self.where is None:
            return edited.to(activation.dtype).view(activation.shape)
        replaced = activation.clone()
        replaced[self.where] = edited.to(activation.dtype)
        return replaced


class Ranks(NamedTuple):
    """Which delta features are on, by their ranks among those of all sites: from `first` up to `end` (exclusive), or,
    with `outside`, all others."""

    first: int
    end: int
    outside: bool = False


EVERY = Ranks(0, 0, outside=True)


TAKE_ALL = 0.8
"""Share of tokens to be replaced from which all are taken, since choosing and putting back costs more than padding."""


class RowEdits(NamedTuple):
    """What differs between the rows of a batch, apart from their strength.

    `numbers` (batch, chunk): the tokens' numbers in the text, for patches with a pool (0 if not given). `kept`
    (batch, 3): the `Ranks` that are on in each row. `bos` (batch, chunk): True at BOS, for deltas with a BOS feature.
    """

    numbers: Tensor | None = None
    kept: Tensor | None = None
    bos: Tensor | None = None


NO_ROW_EDITS = RowEdits()


class Splice:
    """The state of an edit while it is active.

    Before each forward pass, call `reset` to set which tokens are replaced and the strength of each row's delta. With
    `record`, `base_acts` and `delta_acts` (batch,) are then the sums of |activation| over those tokens and all sites.
    `gates` by site (d_new,) multiply the activations of a delta's features, so that gradients can be taken for them.
    """

    def __init__(self, bridge: TransformerBridge, patches: Sequence[Patch], condition: Condition, record: bool) -> None:
        self.bridge = bridge
        self.patches, self.condition, self.record = sorted(patches, key=attrgetter("site")), condition, record
        self.gates: dict[Site, Tensor] = {}
        # Base transcoders are not applied at BOS; the un-finetuned path needs no edit there.
        on_paths = condition.uses_delta and all(patch.path is not None for patch in patches)
        self._at_bos = on_paths and any(patch.delta is not None and patch.delta.at_bos is not None for patch in patches)
        # A delta whose features are off adds nothing, so that it may be evaluated for all tokens.
        self._may_take_all = on_paths and all(
            isinstance(patch.delta, Transcoder) and patch.delta.b_dec is None and patch.pool is None
            for patch in patches
        )
        self._inputs: dict[Site, Tensor] = {}
        self._held: dict[Site, Outputs] = {}

    def reset(self, editable: Tensor, alpha: Tensor, rows: RowEdits = NO_ROW_EDITS) -> None:
        """Prepares for a forward pass over a chunk: `editable` (batch, chunk) is True where a token is replaced,
        `alpha` (batch,) is the strength of each row, and `rows` is what else differs between rows."""
        bos = rows.bos if self._at_bos else None
        self._with_bos = bos is not None and bool(bos.any())
        replaced = editable if bos is None else editable | bos
        lines = torch.arange(len(editable), device=editable.device).unsqueeze(1).expand(editable.shape)
        at_bos = torch.zeros_like(editable) if bos is None else bos
        numbers = torch.zeros_like(lines) if rows.numbers is None else rows.numbers
        alphas = alpha.unsqueeze(1).expand(editable.shape)
        index = replaced.nonzero(as_tuple=True)
        self._replaced_tokens = self._tokens = _Tokens(
            index, None, lines[index], at_bos[index], numbers[index], alphas[index].unsqueeze(1)
        )
        if self._may_take_all and len(index[0]) >= TAKE_ALL * editable.numel():
            edited = None if len(index[0]) == editable.numel() else replaced.flatten().unsqueeze(1)
            all_tokens = (lines.flatten(), at_bos.flatten(), numbers.flatten(), alphas.flatten().unsqueeze(1))
            self._tokens = _Tokens(None, edited, *all_tokens)
        every_feature = rows.kept is None or (rows.kept == rows.kept.new_tensor(EVERY)).all()
        self._kept = None if every_feature else rows.kept
        self.base_acts = torch.zeros(len(editable), device=editable.device)
        self.delta_acts = torch.zeros(len(editable), device=editable.device)

    def reset_generated(self, alpha: Tensor, rows: RowEdits) -> None:
        """`reset` for a chunk in which every token is replaced and none is BOS; it never waits for the device. `rows`
        must have the tokens' numbers, and nothing can be recorded."""
        assert rows.numbers is not None
        numbers, self._with_bos, self._kept = rows.numbers, False, rows.kept
        lines = torch.arange(len(numbers), device=numbers.device).unsqueeze(1).expand(numbers.shape).flatten()
        bos, alphas = torch.zeros_like(lines, dtype=torch.bool), alpha[lines].unsqueeze(1)
        self._replaced_tokens = self._tokens = _Tokens(None, None, lines, bos, numbers.flatten(), alphas)
        assert not self.record

    def start(self, prefixes: Sequence[Prefix], rows: Sequence[int], length: int) -> Tensor:
        """The residual streams (batch, length, d_model), left-padded, that leave the first patch's block: the shortcut
        `start_above`, only for an MLP. `passes.Prefixes.entering` is the general way.

        Row i of the batch given to `reset` is the text of `prefixes[rows[i]]`: the patch is evaluated once per text,
        however many strengths there are.
        """
        patch, edited = self.patches[0], self._replaced_tokens
        device = edited.lines.device
        lengths = [len(prefix.x) for prefix in prefixes]
        x, y = (torch.cat([prefix[column] for prefix in prefixes]) for column in (0, 1))
        streams = [prefix.output for prefix in prefixes]
        if patch.path is not None and self.condition.uses_ground:
            ground = patch.path(x)
            # The block adds the MLP's output to the stream, so an edit adds the difference of two outputs.
            moved = torch.cat(streams).float() + (ground.float() - y.float())
            streams, y = list(moved.to(y.dtype).split(lengths)), ground
        residual = padded(streams, rows, length)
        first = 0 if self._with_bos else 1
        places = torch.cat([torch.arange(first, count) for count in lengths]).to(device)
        chosen = torch.cat([torch.arange(first, count) + sum(lengths[:i]) for i, count in enumerate(lengths)])
        x, y = x[chosen.to(device)], y[chosen.to(device)]
        numbers = torch.arange(len(x)).split([count - first for count in lengths])
        tokens = torch.cat([numbers[row] for row in rows]).to(device)
        outputs = self._of_row(patch, self._outputs(patch, x, y, places == 0).take(tokens), edited)
        y = y[tokens]
        self._note(outputs, edited)
        change = self._replaced(y, outputs, edited) - y.float()
        return edited.put(residual, edited.of(residual).float() + change)

    def hooks(self, patches: Sequence[Patch]) -> list[Hook]:
        """The hooks that make the edit at `patches`; none if the exchanged weights alone make it."""
        hooks: list[Hook] = []
        for patch in patches:
            if self.condition.model in ("swapped", "scaled"):
                continue  # the caller has exchanged the weights: nothing is left to edit
            if patch.path is not None and self.condition.uses_ground and not self.condition.uses_delta:
                continue
            hooks += hooks_at(self.bridge, patch.site, self._reader(patch), self._writer(patch))
        return hooks

    def _reader(self, patch: Patch) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            self._inputs[patch.site] = x

        return read

    def _writer(self, patch: Patch) -> Callable[[Tensor, slice], Tensor]:
        def write(y: Tensor, part: slice) -> Tensor:
            tokens = self._tokens
            y_here = tokens.of(y)
            if part.start == 0:
                x = tokens.of(self._inputs.pop(patch.site))
                outputs = self._of_row(patch, self._outputs(patch, x, y_here, tokens.bos, tokens.edited), tokens)
                self._note(outputs, tokens)
                assert outputs.delta is not None
                if outputs.delta.shape[1] > part.stop:  # the first of several parts
                    self._held[patch.site] = outputs
            else:
                outputs = self._held[patch.site]
            assert outputs.delta is not None
            # If y comes in parts, the ground is a path, and y is already its output.
            ground = outputs.ground if part.start == 0 else y_here.float()
            outputs = outputs._replace(ground=ground, delta=outputs.delta[:, part])
            return tokens.put(y, self._replaced(y_here, outputs, tokens))

        return write

    def _outputs(self, patch: Patch, x: Tensor, y: Tensor, bos: Tensor, edited: Tensor | None = None) -> Outputs:
        """A patch's outputs for x (tokens, d_in) and y (tokens, d_out), with all its features on at tokens that are
        `edited` (all if None); `bos` (tokens,) marks BOS. If the ground is a path, `y` is already its output."""
        if patch.base is None:
            ground, base_acts = y.float(), None
        else:
            acts = patch.base.encode(x)
            ground, base_acts = patch.base.decode(acts), acts.abs().sum(1) if self.record else None
        if patch.delta is None or not self.condition.uses_delta:
            nothing = ground.new_zeros(len(y), patch.ground.d_out)
            return Outputs(ground, nothing, base_acts, nothing[:, :0])
        delta_acts = patch.delta.encode(x)
        if self._with_bos:
            at_bos = patch.delta.at_bos
            delta_acts = torch.where(
                bos.unsqueeze(1), delta_acts.new_zeros(()) if at_bos is None else at_bos, delta_acts
            )
        if patch.site in self.gates:
            delta_acts = delta_acts * self.gates[patch.site]
        if edited is not None:
            delta_acts = delta_acts * edited
        if self._kept is not None and patch.pool is None:
            return Outputs(ground, None, base_acts, delta_acts)
        return Outputs(ground, patch.delta.decode(delta_acts), base_acts, delta_acts)

    def _of_row(self, patch: Patch, outputs: Outputs, tokens: _Tokens) -> Outputs:
        """`outputs` with the rows' own edits: the delta's output taken from the patch's pool, or of some features."""
        if not self.condition.uses_delta:
            return outputs
        if patch.pool is not None:
            shuffled = patch.pool[tokens.numbers % len(patch.pool)]
            return outputs._replace(delta=torch.where(tokens.bos.unsqueeze(1), outputs.delta, shuffled))  # type: ignore[arg-type]
        if patch.delta is None or self._kept is None:
            return outputs
        assert patch.ranks is not None
        first, end, outside = self._kept.unsqueeze(2).unbind(1)
        on = ((patch.ranks >= first) & (patch.ranks < end)) != outside.bool()
        acts = outputs.features * (on | (patch.ranks < 0))[tokens.lines]
        return outputs._replace(delta=patch.delta.decode(acts), features=acts)

    def _note(self, outputs: Outputs, tokens: _Tokens) -> None:
        """Adds up the activations at tokens after BOS."""
        if self.record:
            if outputs.base_acts is not None:
                self.base_acts.index_add_(0, tokens.lines, outputs.base_acts * ~tokens.bos)
            self.delta_acts.index_add_(0, tokens.lines, outputs.features.abs().sum(1) * ~tokens.bos)

    def _replaced(self, y: Tensor, outputs: Outputs, tokens: _Tokens) -> Tensor:
        """What replaces `y`, (tokens, width of y) fp32, at these tokens."""
        assert outputs.delta is not None
        return self.condition.combine(y.float(), outputs.ground, outputs.delta, tokens.alpha)


def starts_above(site: Site) -> bool:
    """Whether a pass can start from the output of the site's block: the MLP is the last thing a block adds to the
    stream, so nothing else in the block reads what an edit changes."""
    return site.kind.name == MLP.name


def padded(streams: Sequence[Tensor], rows: Sequence[int], length: int) -> Tensor:
    """(len(rows), length, d_model), padded on the left: row i is `streams[rows[i]]`."""
    batch = streams[0].new_zeros(len(rows), length, streams[0].shape[1])
    for index, row in enumerate(rows):
        batch[index, length - len(streams[row]) :] = streams[row]
    return batch


@contextmanager
def spliced(
    bridge: TransformerBridge, edit: Edit, *, record: bool = False, above_first: bool = False
) -> Iterator[Splice]:
    """Makes the edit in every forward pass of `bridge.original_model` inside the `with`.

    If the ground is the un-finetuned path, the model runs with that path's weights, and the delta is added.
    With `above_first`, the first patch's edit is left to `Splice.start`, for passes that begin above its block.

    Raises ModelError if a transcoder does not fit the model, ValueError if the condition is unknown or lacks what it
    needs.
    """
    if edit.condition == "raw":
        yield Splice(bridge, (), CONDITIONS["no_delta"], record)
        return
    _check(bridge, edit)
    splice = Splice(bridge, edit.patches, CONDITIONS[edit.condition], record)
    edited = splice.patches[above_first:]
    paths = [patch.path for patch in edited if patch.path is not None and splice.condition.uses_ground]
    with exchanged(bridge, paths), hooked(bridge, splice.hooks(edited)):
        yield splice


def _check(bridge: TransformerBridge, edit: Edit) -> None:
    condition = edit.condition
    if condition not in CONDITIONS:
        raise ValueError(f"no condition {condition!r}; there are raw, {', '.join(CONDITIONS)}")
    sites = [patch.site for patch in edit.patches]
    if not sites or len(set(sites)) != len(sites):
        labels = ", ".join(site.label for site in sites) or "none"
        raise ValueError(f"condition {condition} needs one patch for each of one or more layers, got layers {labels}")
    for patch in edit.patches:
        if patch.delta is None and CONDITIONS[condition].uses_delta:
            raise ValueError(f"condition {condition} needs a delta transcoder, and layer {patch.site.label} has none")
        if condition == "shuffled_delta" and patch.pool is None:
            raise ValueError(f"condition {condition} needs a pool of outputs, and layer {patch.site.label} has none")
        if patch.base is not None:
            d_model = bridge.cfg.d_model
            check_fits(patch.base, patch.site, d_in=d_model, d_out=d_model, origin=f"layer {patch.site.label}: base")
        check_hooks(bridge, patch.site)
