"""Passes of the model: whole, up to a block, onwards from there, and the projection of chosen tokens.

In: a TransformerBridge, rows of token ids, residual streams. Out: logits at chosen positions, and what the unedited
model computes up to a block, which is shared by every condition and strength spliced in there. Nothing here depends on
the architecture: a pass from a layer on is the model's own, in which the blocks below pass the residual stream through.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from data.encoding import Batch, pad_left
from models.blocks import hooks_at
from models.bridge import Hook, as_block_output, device_of, hooked
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PROJECTED = 256
"""Tokens projected to the vocabulary at once: fewer would read the projection's weights too often, more fill memory."""
HELD_BYTES = 1 << 30
"""Memory for cached prefixes."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shortcuts:
    """The exact shortcuts of an evaluation. They save work; figures change only by rounding, and tokens not at all."""

    raw_once: bool = True
    """One raw pass serves every layer, condition and strength."""
    share_prefix: bool = True
    """Rows of one prompt share the computation below the first splice; else every row runs through the whole model."""
    capture_once: bool = True
    """One raw pass reads every layer; else each layer has its own."""
    target_logits: bool = True
    """Only the requested positions are projected to the vocabulary."""
    verify: bool = True
    """A teacher-forced pass over a guess proves greedy output; else every output is decoded from its prompt."""
    rows_for_strengths: bool = True
    """Strengths of a condition are rows of the same batches; else each is a separate run."""
    start_above: bool = True
    """If the first splice is at an MLP, rows that share the computation below it start above its block, since the edit
    of the residual stream is a difference of two outputs; else (and for other kinds) the whole block runs for every
    strength."""
    stop_early: bool = True
    """Decoding a row ends with EOS or a closed call, and another row takes its place; else every row is decoded to the
    budget and cut afterwards."""
    record_steps: bool = True
    """On a GPU, a step of decoding is one CUDA graph (`evaluators.splice.slots`)."""
    pack_weights: bool = True
    """On a CPU, steps of decoding read the weights from copies in a faster order, as passes over many rows do anyway
    (`models.packed`)."""

    @classmethod
    def none(cls) -> Shortcuts:
        """No shortcuts: the plain way, for comparison."""
        return cls(**{field.name: False for field in fields(cls)})


ALL = Shortcuts()


class Prefix(NamedTuple):
    """What the unedited model computes for one row at a site: x (length, d_in), y (length, d_out), and the residual
    stream that leaves the block (length, d_model), without padding."""

    x: Tensor
    y: Tensor
    output: Tensor


class Prefixes:
    """The prefixes of rows at some sites, computed on first use and cached as long as memory allows."""

    def __init__(
        self,
        bridge: TransformerBridge,
        sites: Sequence[Site],
        *,
        together: bool = True,
        batch_size: int = 32,
    ) -> None:
        self.bridge, self.sites, self.batch_size = bridge, sorted(set(sites)), batch_size
        self.together = together
        self._held: OrderedDict[tuple[Any, tuple[int, ...]], Any] = OrderedDict()
        self._bytes = 0

    def get(self, site: Site, rows: Sequence[Sequence[int]]) -> list[Prefix]:
        """The prefixes at `site` of rows of token ids, in their order."""
        later_sites = [later for later in self.sites if later >= site and later.kind == site.kind]
        read_sites = later_sites if self.together else [site]
        return self._get(site, rows, lambda batch: read_prefixes(self.bridge, batch, read_sites))

    def entering(self, layer: int, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The residual streams (length, d_model) that enter block `layer`, which must not be the first, for rows of
        token ids, in their order.

        This layer alone, whatever other sites there are: it is asked for while an edit at `layer` is active, and a pass
        through that block would be edited.
        """
        return self._get(layer, rows, lambda batch: read_entering(self.bridge, batch, [layer]))

    def _get(
        self, place: Any, rows: Sequence[Sequence[int]], compute: Callable[[list[tuple[int, ...]]], Mapping[Any, list]]
    ) -> list[Any]:
        missing = [row for row in dict.fromkeys(map(tuple, rows)) if (place, row) not in self._held]
        missing.sort(key=len)
        computed = {}
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            for read_at, row_prefixes in compute(batch).items():
                computed.update({(read_at, row): prefix for row, prefix in zip(batch, row_prefixes, strict=True)})
        for row in rows:
            if (place, tuple(row)) in self._held:
                self._held.move_to_end((place, tuple(row)))
                computed[place, tuple(row)] = self._held[place, tuple(row)]
        for key, prefix in computed.items():
            self._keep(key, prefix)
        return [computed[place, tuple(row)] for row in rows]

    def _keep(self, key: tuple[Any, tuple[int, ...]], prefix: Prefix | Tensor) -> None:
        if key not in self._held:
            self._held[key] = prefix
            self._bytes += _nbytes(prefix)
        while self._bytes > HELD_BYTES:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= _nbytes(dropped)


class Inputs:
    """What many sites read in the unedited model: x (tokens, d_in) of all rows, without BOS.

    Read when a site is first asked for, with as many later sites in the same pass as memory allows; so ask in order.
    `widths` gives d_in of each site.
    """

    def __init__(
        self, bridge: TransformerBridge, widths: Mapping[Site, int], rows: Sequence[Sequence[int]], batch_size: int = 32
    ) -> None:
        self.bridge, self.widths, self.rows, self.batch_size = bridge, widths, [tuple(row) for row in rows], batch_size
        self._held: dict[Site, Tensor] = {}

    @torch.inference_mode()
    def at(self, site: Site) -> Tensor:
        if site not in self._held:
            self._held = {}  # before the next ones take memory
            self._held = self._read(self._that_fit(site))
        return self._held[site]

    def _that_fit(self, first: Site) -> list[Site]:
        tokens = sum(map(len, self.rows))
        sites = sorted(site for site in self.widths if site >= first)
        sizes = accumulate(4 * tokens * self.widths[site] for site in sites)
        return [site for site, size in zip(sites, sizes, strict=True) if size <= HELD_BYTES] or [first]

    def _read(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        texts = sorted(dict.fromkeys(self.rows), key=len)
        of_text: dict[Site, dict[tuple[int, ...], Tensor]] = {site: {} for site in sites}
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            for site, inputs in read_inputs(self.bridge, batch, sites).items():
                of_text[site].update(zip(batch, inputs, strict=True))
        joined = {}
        for site in sites:
            inputs_of = of_text.pop(site)  # so that only one site is in memory twice
            joined[site] = torch.cat([inputs_of[row][1:] for row in self.rows])
        return joined


def _nbytes(prefix: Prefix | Tensor) -> int:
    return prefix.nbytes if isinstance(prefix, Tensor) else sum(tensor.nbytes for tensor in prefix)


@dataclass(frozen=True)
class Passes:
    """A model, and how its passes are run: rows at once, shortcuts, and cached prefixes."""

    bridge: TransformerBridge
    batch_size: int = 32
    shortcuts: Shortcuts = ALL
    prefixes: Prefixes | None = None

    def with_prefixes(self, site: Site) -> Prefixes:
        """The cached prefixes, or new ones for `site`."""
        return self.prefixes or Prefixes(self.bridge, [site], batch_size=self.batch_size)


def forward(
    bridge: TransformerBridge, batch: Batch, keep: int, cache: Any = None, mask: Tensor | None = None
) -> Tensor:
    """fp32 logits (batch, keep, vocabulary) at the last `keep` positions; nothing else is projected.

    With a `cache`, `batch` is the chunk that is not cached yet, and `mask` covers cache and chunk.
    """
    model: Any = bridge.original_model
    length = batch.ids.shape[1]
    output = model(
        **(batch if mask is None else batch._replace(mask=mask)).inputs,
        past_key_values=cache,
        use_cache=cache is not None,
        # Indices, not a count: a count slices, and a sliced input makes the projection copy its weight for each row.
        logits_to_keep=torch.arange(length - keep, length, device=batch.ids.device),
    )
    return output.logits.float()


def read_prefixes(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], sites: Sequence[Site]
) -> dict[Site, list[Prefix]]:
    """The prefixes of `rows` at each of `sites`, from one pass that ends after the last site."""
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    captured: dict[Site, list[Tensor]] = {site: [] for site in sites}
    hooks: list[Hook] = []
    for site, columns in captured.items():  # x, then y, then what leaves the block
        hooks += [
            *hooks_at(bridge, site, columns.append, see=columns.append),
            (f"blocks.{site.layer}.hook_out", _noting(columns)),
        ]
    _last_output(bridge, batch, max(site.layer for site in sites), hooks)
    return {  # clones, since a slice would keep its whole batch in memory
        site: [Prefix(*(column[i, -len(row) :].clone() for column in columns)) for i, row in enumerate(rows)]
        for site, columns in captured.items()
    }


def read_inputs(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], sites: Sequence[Site]
) -> dict[Site, list[Tensor]]:
    """x (length, d_in) at each of `sites` for each of `rows`, from one pass that ends after the last site."""
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    captured: dict[Site, list[Tensor]] = {site: [] for site in sites}
    hooks = [hook for site, column in captured.items() for hook in hooks_at(bridge, site, column.append)]
    _last_output(bridge, batch, max(site.layer for site in sites), hooks)
    return {
        site: [column[0][i, -len(row) :].clone() for i, row in enumerate(rows)] for site, column in captured.items()
    }


def read_entering(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, list[Tensor]]:
    """The streams (length, d_model) that enter each of `layers` (not 0), for each row, from one pass that ends below
    the highest."""
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    captured: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    hooks: list[Hook] = [
        (f"blocks.{layer - 1}.hook_out", _noting(activations)) for layer, activations in captured.items()
    ]
    _last_output(bridge, batch, max(layers) - 1, hooks)
    return {
        layer: [activations[0][i, -len(row) :].clone() for i, row in enumerate(rows)]
        for layer, activations in captured.items()
    }


def _noting(activations: list[Tensor]) -> Callable[[Tensor, object], None]:
    return lambda activation, hook: activations.append(activation)


def run_up_to(
    bridge: TransformerBridge,
    batch: Batch,
    layer: int,
    hooks: Sequence[Hook],
    after: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Runs a pass that ends with block `layer`, for its `hooks`. Returns the stream (batch, position, d_model) there.

    With `residual`, the stream that leaves block `after`, which is below `layer`, only the blocks above it run.
    """
    if residual is None or after is None:
        return _last_output(bridge, batch, layer, hooks)
    with _handed_through(bridge, after, residual):
        return _last_output(bridge, batch, layer, hooks)


def resume(
    bridge: TransformerBridge,
    batch: Batch,
    after: int | None = None,
    residual: Tensor | None = None,
    cache: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The residual stream (batch, position, d_model) that leaves the last block.

    With `residual`, the stream that leaves block `after`, only the blocks above it run, and fill the `cache`. If the
    cache is not empty, `batch` is what follows it and `mask` covers both.
    """
    last = bridge.cfg.n_layers - 1
    if residual is None or after is None:
        return _last_output(bridge, batch, last, cache=cache, mask=mask)
    if after == last:
        return residual
    with _handed_through(bridge, after, residual):
        return _last_output(bridge, batch, last, cache=cache, mask=mask)


def first_tokens(cache: Any, batch: Batch, rows: Sequence[int], counts: Sequence[int]) -> tuple[Any, Tensor]:
    """The first `counts[i]` tokens of `rows[i]` in a `cache` filled by a pass over `batch`: left-padded, with its mask
    (row, position)."""
    from transformers import DynamicCache  # here: the command line imports this file, and transformers takes seconds

    chosen, lengths = (torch.tensor(listed, device=batch.ids.device).unsqueeze(1) for listed in (rows, counts))
    positions = torch.arange(max(counts), device=batch.ids.device) - (max(counts) - lengths)
    bos = batch.mask.int().argmax(1)[chosen]
    columns = bos + positions.clamp(min=0)
    part = DynamicCache()
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            keys, values = (states[chosen, :, columns].transpose(1, 2) for states in (layer.keys, layer.values))
        else:  # below the first block that ran; transformers takes a cache's length from its first layer
            keys = values = torch.zeros(len(rows), 1, max(counts), 1, device=batch.ids.device)
        part.update(keys, values, number)
    return part, positions >= 0


class Context(NamedTuple):
    """What the model has computed of one row's first tokens: keys and values (head, token, width) of every layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def context_of(cache: Any, row: int, columns: Tensor) -> Context | None:
    """The context of a row of a `cache`: what it holds at `columns` (token,). None if some layers hold nothing, such as
    those below the first block that ran."""
    if not all(layer.is_initialized for layer in cache.layers):
        return None
    return Context(*([getattr(layer, name)[row][:, columns] for layer in cache.layers] for name in ("keys", "values")))


def project(bridge: TransformerBridge, residual: Tensor) -> Iterator[Tensor]:
    """fp32 logits (at most PROJECTED tokens, vocabulary) of `residual` (tokens, d_model), what leaves the last block.

    The model itself applies its final norm, projection and soft-capping, whatever they are.
    """
    model: Any = bridge.original_model
    for chunk in residual.split(PROJECTED):
        nothing = torch.zeros(1, len(chunk), dtype=torch.long, device=chunk.device)
        with _handed_through(bridge, bridge.cfg.n_layers - 1, chunk.unsqueeze(0)):
            yield model(input_ids=nothing, use_cache=False).logits[0].float()


class _Reached(Exception):
    """Ends a pass early: nothing above this layer is needed."""


def _last_output(
    bridge: TransformerBridge,
    batch: Batch,
    layer: int,
    hooks: Sequence[Hook] = (),
    cache: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What leaves block `layer`; the pass ends there."""
    model: Any = bridge.original_model
    reached: list[Tensor] = []

    def stop(activation: Tensor, hook: object) -> None:
        reached.append(activation)
        raise _Reached

    try:
        with hooked(bridge, [*hooks, (f"blocks.{layer}.hook_out", stop)]):
            model.base_model(
                **(batch if mask is None else batch._replace(mask=mask)).inputs,
                past_key_values=cache,
                use_cache=cache is not None,
            )
    except _Reached:
        pass
    return reached[0]


@contextmanager
def _handed_through(bridge: TransformerBridge, after: int, residual: Tensor) -> Iterator[None]:
    """Inside the `with`, block `after` returns `residual`, and the blocks below it do nothing."""
    blocks: Any = bridge.blocks
    skipped = [blocks[layer] for layer in range(after + 1)]
    try:
        # Set in the instance's __dict__: assigning an attribute of a bridge's part would reach the wrapped module.
        for block in skipped[:-1]:
            block.__dict__["forward"] = lambda hidden_states, *_, **__: as_block_output(bridge, hidden_states)
        skipped[-1].__dict__["forward"] = lambda *_, **__: as_block_output(bridge, residual)
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def in_slices(items: Sequence[Item], size: int, run: Callable[[Sequence[Item]], None]) -> None:
    """Calls `run` on consecutive slices of at most `size` items.

    If memory runs out, the same items are retried in halves, so `run` must be idempotent. Re-raises `run`'s error if a
    single item does not fit, and every error that is not about memory.
    """
    start = 0
    while start < len(items):
        chosen = items[start : start + size]
        try:
            run(chosen)
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not _out_of_memory(error):
                raise
            size = len(chosen) // 2
        else:
            start += len(chosen)
            continue
        # Outside the handler, where the failed slice's tensors have been freed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (whose allocator raises a plain RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
