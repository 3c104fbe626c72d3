"""Steps of greedy decoding that are one CUDA graph: hundreds of kernels, which Python takes longer to launch than a GPU
to run, start with one call.

In: a model under an edit, and rows that have begun. Out: the greedy choices of every row, step after step. A row has a
slot until it ends; its token at position p is in column p of the slot, so all shapes stay the same, rows come and go
alone, and a rejected draft is overwritten by the next token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from data.encoding import Encoded, pad_left
from evaluators.splice.interventions import Edit, RowEdits, Splice, spliced
from evaluators.splice.teacher_forcing import Job
from models.bridge import ROUNDING, device_of
from models.cuda_graphs import Graphed

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BF16_ROUNDING = 0.02
"""Tolerance in bf16, relative to the largest logit, as for the checks of a sweep."""
TRIED_COLUMNS = 1024
"""Columns of the slots in which a model is tried: more than the windows that some architectures keep to themselves."""
TRIED = "slots agree"
"""Where a bridge keeps what `slots_agree` found."""


class _Layer(CacheLayerMixin):
    """A layer's keys and values (slot, head, column, width), in one piece of memory; `columns` (slot, chunk), common to
    all layers, is where the next ones go."""

    is_sliding = False

    def __init__(self, length: int, columns: Tensor) -> None:
        super().__init__()
        self.length, self.columns = length, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(len(self.columns), states.shape[1], self.length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held.scatter_(2, self.columns[:, None, :, None].expand_as(states), states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.length


class _Step:
    """What a step reads and writes: the slots' keys and values, strengths and the like. It does not know its graph, so
    that both are freed as soon as nothing uses them."""

    def __init__(self, bridge: TransformerBridge, splice: Splice, count: int, length: int, width: int) -> None:
        self.bridge, self.splice, self.length = bridge, splice, length
        model: Any = bridge.original_model
        device = device_of(bridge)
        self.ahead, self.all_columns = torch.arange(width, device=device), torch.arange(length, device=device)
        self.columns = torch.zeros(count, width, dtype=torch.long, device=device)
        self.layers = [_Layer(length, self.columns) for _ in DynamicCache(config=model.config).layers]
        self.cache = Cache(layers=list(self.layers))
        self.alpha = torch.zeros(count, device=device)
        self.first = torch.zeros(count, 1, dtype=torch.long, device=device)
        self.kept: Tensor | None = None

    def __call__(self, fed: Tensor) -> Tensor:
        """Logits (slot, width, vocabulary) for `fed`, (slot, 2 + width): the positions of the first and last token, and
        the tokens, padded on the right."""
        columns = fed[:, :1] + self.ahead
        self.columns.copy_(columns.clamp(max=self.length - 1))
        positions = columns.minimum(fed[:, 1:2])  # those of padding must not exceed what the model can read
        model: Any = self.bridge.original_model
        hidden = (self.all_columns > positions.unsqueeze(2)).unsqueeze(1)
        self.splice.reset_generated(self.alpha, RowEdits(self.first + positions - 1, self.kept))
        return model(
            input_ids=fed[:, 2:],
            attention_mask=(hidden * torch.finfo(model.dtype).min).to(model.dtype),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits


class Slots:
    """`count` slots of `length` columns, and steps of at most `width` tokens a row. `some_features`: whether some row
    keeps only some of the delta features. The `first` steps run as they are; then one is recorded."""

    def __init__(
        self,
        bridge: TransformerBridge,
        splice: Splice,
        count: int,
        length: int,
        width: int,
        some_features: bool = False,
        first: int = 1,
    ) -> None:
        self.width, self._held = width, _Step(bridge, splice, count, length, width)
        self._device = self._held.alpha.device
        if some_features:
            self._held.kept = torch.zeros(count, 3, dtype=torch.long, device=self._device)
        self._step = Graphed(self._held, first)

    @property
    def refused(self) -> bool:
        """Whether a step could not be recorded."""
        return self._step.refused

    def put(self, slots: Sequence[int], jobs: Sequence[Job], cache: Any, lengths: Sequence[int]) -> None:
        """Rows into slots: `cache` holds the first `lengths[i]` tokens of row i, padded on the left."""
        device, held = self._device, self._held
        places, counts = (torch.tensor(listed, device=device).unsqueeze(1) for listed in (slots, lengths))
        columns = held.all_columns[: max(lengths)]
        rows = torch.arange(len(slots), device=device).unsqueeze(1)
        for layer, given in zip(held.layers, cache.layers, strict=True):
            if given.is_initialized:  # some share another layer's
                used = (given.keys.shape[2] - counts + columns).clamp(max=given.keys.shape[2] - 1)
                if not layer.is_initialized:
                    layer.lazy_initialization(given.keys, given.values)
                for mine, states in ((layer.keys, given.keys), (layer.values, given.values)):
                    assert mine is not None
                    mine[places, :, columns] = states[rows, :, used]
        held.alpha[places[:, 0]] = torch.tensor([job.alpha for job in jobs], dtype=torch.float32, device=device)
        held.first[places[:, 0], 0] = torch.tensor([job.first for job in jobs], device=device)
        if held.kept is not None:
            held.kept[places[:, 0]] = torch.tensor([job.kept for job in jobs], device=device)

    def logits(self, tokens: Sequence[Sequence[int]], positions: Sequence[int]) -> Tensor:
        """Logits (slot, width, vocabulary), valid until the next call, after each of the `tokens` of every slot (at
        most `width`; none if it is empty), the first of which is at its position. Attention sees what the slot holds
        below it, and the tokens themselves."""
        fed = [
            [start, start + max(0, len(row) - 1), *row, *[0] * (self.width - len(row))]
            for start, row in zip(positions, tokens, strict=True)
        ]
        return self._step(torch.tensor(fed).to(self._device))


@torch.inference_mode()
def slots_agree(bridge: TransformerBridge) -> bool:
    """Whether this model computes the same in slots as otherwise, within rounding: tried once, on a few tokens, because
    an architecture may read the cache or the mask in its own way, or wait for the device."""
    found = bridge.__dict__.get(TRIED)
    if found is None:
        try:
            found = _apart(bridge) <= (ROUNDING if bridge.original_model.dtype == torch.float32 else BF16_ROUNDING)
        except torch.OutOfMemoryError:  # may pass
            return False
        except Exception as error:  # whatever a model does not support here, it is decoded in the plain way
            logging.getLogger(__name__).warning("steps of decoding run as they are: %s", error)
            found = False
        bridge.__dict__[TRIED] = found
    return found


def _apart(bridge: TransformerBridge) -> float:
    """The largest difference of logits, over the largest logit, of two rows of different lengths: from a pass over the
    whole text, and from steps of two tokens in slots, where the next step overwrites what one has drafted."""
    model: Any = bridge.original_model
    device, vocabulary = device_of(bridge), model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(vocabulary // 8, vocabulary - 2, 8).long().tolist()
    lengths = [3, 2]
    expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
    cache = DynamicCache(config=model.config)
    model(**pad_left([ids[:length] for length in lengths], 0).to(device).inputs, past_key_values=cache, use_cache=True)
    apart = []
    with spliced(bridge, Edit()) as splice:
        context = getattr(model.config, "max_position_embeddings", None) or TRIED_COLUMNS
        slots = Slots(bridge, splice, count=2, length=min(TRIED_COLUMNS, context), width=2)
        slots.put([1, 0], [Job(Encoded([], []))] * 2, cache, lengths)
        for step in range(4):  # as it is, recorded, replayed
            starts = [length + step for length in reversed(lengths)]
            drafts = [ids[start + 1] if step % 2 else 0 for start in starts]
            found = slots.logits([[ids[at], draft] for at, draft in zip(starts, drafts, strict=True)], starts).float()
            for row, start in zip(found, starts, strict=True):
                apart.append((row[: 1 + step % 2] - expected[start : start + 1 + step % 2]).abs().max())
    return math.inf if slots.refused else (torch.stack(apart).max() / expected.abs().max()).item()
