"""Greedy generation under an intervention.

In: a model's passes, an edit, prompts with one strength per row, and teacher-forced results. Out: the greedy output of
each row. Greedy decoding is deterministic, so a teacher-forced pass over a guess proves the output for as long as each
guessed token is the argmax. Only rows that depart from their guesses are decoded, from the first different token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from data.encoding import Batch, Encoded, ends_of, join_columns, pad_left, pad_right
from data.rows import Row
from evaluators.splice.interventions import EVERY, Edit, Splice, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, forward, in_slices
from evaluators.splice.slots import Slots, slots_agree
from evaluators.splice.teacher_forcing import Job, Scored, agreed, prepare
from models.bridge import device_of
from models.packed import is_packed, packed

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

PADDED = 8
"""Maximum padding of a row when it starts."""
DRAFTED = 16
"""Tokens that a step may draft ahead, over all its rows: about as many as take no longer than one, since a step reads
every weight anyway."""

RECORDED_ON = "cuda"
"""The type of device on which steps are recorded."""
UNRECORDED_STEPS = 3
"""Steps before one is recorded, since most texts have been guessed to the end or almost."""
PLAIN_STEPS = 6
"""Steps before weights are copied for them (`models.packed`): about as many as the copies cost."""


@dataclass(frozen=True)
class Stop:
    """When a generation ends: at one of the tokens `ends`, such as EOS, or at its limits."""

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    ends: frozenset[int]

    @classmethod
    def of(cls, bridge: TransformerBridge, limits: Limits, row: Row) -> Stop:
        """For answers to rows like this one."""
        model: Any = bridge.original_model
        return cls(bridge.tokenizer, limits, ends_of(model, bridge.tokenizer, row))

    def cut(self, tokens: Sequence[int]) -> list[int] | None:
        """`tokens` up to the end of the generation, or None where it has not ended yet."""
        for position, token in enumerate(tokens):
            if token in self.ends or position + 1 == self.limits.max_new_tokens:
                return list(tokens[: position + 1])
            if self._may_close is None or token in self._may_close:
                output = self.text(tokens[: position + 1])
                if any(text in output for text in self.limits.texts):
                    return list(tokens[: position + 1])
        return None

    def text(self, tokens: Sequence[int]) -> str:
        """`tokens` as text, without BOS, EOS and padding."""
        tokenizer: Any = self.tokenizer
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def _may_close(self) -> frozenset[int] | None:
        """Tokens that contain the last character of a text to stop at: no other token can complete it. None means any
        token may, since vocabularies encode white space and non-ASCII characters differently."""
        last = {text[-1] for text in self.limits.texts}
        if not all("!" <= character <= "~" for character in last):
            return None
        return _tokens_with(self.tokenizer, frozenset(last))


@lru_cache(maxsize=4)
def _tokens_with(tokenizer: PreTrainedTokenizerBase, characters: frozenset[str]) -> frozenset[int]:
    """The tokens that contain one of the characters; cached, since a large vocabulary takes a third of a second."""
    return frozenset(index for token, index in tokenizer.get_vocab().items() if not characters.isdisjoint(token))


def generate(passes: Passes, edit: Edit, jobs: Sequence[Job], scored: Sequence[Scored], stop: Stop) -> list[list[int]]:
    """Greedy output tokens of every row, the same as `decode` gives from the bare prompt.

    `scored` is the teacher-forced pass over the targets and, for rows whose target is not the output, over their
    guesses. Whatever neither proves is decoded from the first different token.
    """
    if not passes.shortcuts.verify:
        bare = [replace(job, encoded=Encoded(job.encoded.prompt, [])) for job in jobs]
        return decode(passes, edit, bare, [[]] * len(jobs), stop)
    proven = [_prove(job, figures, stop) for job, figures in zip(jobs, scored, strict=True)]
    open_rows = [i for i, row in enumerate(proven) if not row.ended]
    starts = [
        replace(
            jobs[i],
            encoded=Encoded(jobs[i].encoded.prompt + proven[i].tokens, []),
            hints=[*jobs[i].encoded.ids, *jobs[i].guess],
            context=scored[i].context,
        )
        for i in open_rows
    ]
    outputs = decode(passes, edit, starts, [proven[i].tokens for i in open_rows], stop)
    decoded = dict(zip(open_rows, outputs, strict=True))
    return [decoded.get(i, row.tokens) for i, row in enumerate(proven)]


class _Proven(NamedTuple):
    """The proven first tokens of a greedy output, and whether they are the whole output."""

    tokens: list[int]
    ended: bool


def _prove(job: Job, scored: Scored, stop: Stop) -> _Proven:
    """What the teacher-forced pass proves of a row's output."""
    tokens = agreed(job.encoded.target, scored.argmax)
    if scored.guessed and stop.cut(tokens) is None:
        tokens = agreed(job.guess, scored.guessed)
    output = stop.cut(tokens)
    return _Proven(tokens, False) if output is None else _Proven(output, True)


@torch.inference_mode()
def decode(
    passes: Passes,
    edit: Edit,
    jobs: Sequence[Job],
    begun: Sequence[Sequence[int]],
    stop: Stop,
    use_cache: bool = True,
) -> list[list[int]]:
    """Greedy decoding token by token: the output tokens of every row, in the order of `jobs`.

    `begun` holds the tokens with which each row's output begins; the job's prompt must end with them. Hints and
    `use_cache` save work and change no token.
    """
    results: dict[int, list[int]] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.prompt), i))
    shortcuts = passes.shortcuts
    on_device = shortcuts.record_steps and use_cache and device_of(passes.bridge).type == RECORDED_ON
    records = on_device and slots_agree(passes.bridge)  # before the edit, since this tries the model as it is
    passes = replace(passes, shortcuts=replace(shortcuts, record_steps=records))
    with spliced(passes.bridge, edit) as splice:

        def run(chosen: Sequence[int]) -> None:
            decoding = _Decoding(passes, splice, [jobs[i] for i in chosen], [begun[i] for i in chosen], stop, use_cache)
            outputs = decoding.outputs_in_slots() if decoding.in_slots else decoding.outputs()
            results.update(zip(chosen, outputs, strict=True))

        for similar in _similar(order, [len(job.encoded.prompt) for job in jobs], stop) if records else [order]:
            in_slices(similar, len(similar), run)
    return [results[i] for i in range(len(jobs))]


class _Running(NamedTuple):
    """Rows that are decoded together: their numbers, the tokens that the model has seen, those that it is fed next, and
    the cache of the seen ones (None without cache)."""

    rows: list[int]
    seen: Batch
    fed: Batch
    cache: Any

    def only(self, places: list[int]) -> _Running:
        """The rows at these places (at least one)."""
        if len(places) == len(self.rows):
            return self
        index = torch.tensor(places, device=self.fed.ids.device)
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        seen, fed = (Batch(*(column[index] for column in batch)) for batch in (self.seen, self.fed))
        return _Running([self.rows[index] for index in places], seen, fed, self.cache)


class _Decoding:
    """Decodes rows, sorted by length, `batch_size` at a time. A row that has ended leaves the batch, since every step
    would go on computing it, and makes room for one that waits."""

    def __init__(
        self,
        passes: Passes,
        splice: Splice,
        jobs: Sequence[Job],
        begun: Sequence[Sequence[int]],
        stop: Stop,
        use_cache: bool,
    ) -> None:
        self.passes, self.splice, self.jobs, self.stop, self.use_cache = passes, splice, jobs, stop, use_cache
        self._outputs = [list(output) for output in begun]
        self._texts = [list(job.encoded.prompt) for job in jobs]
        self._waiting = [row for row in range(len(jobs)) if self._is_open(row)]
        model: Any = passes.bridge.original_model
        self._config, self._pad = model.config, passes.bridge.tokenizer.pad_token_id
        cache = DynamicCache(config=self._config)
        self._window = _window(cache)
        lengths, can_join = [len(self._texts[row]) for row in self._waiting], passes.shortcuts.stop_early
        can_join &= all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        longest, shortest = max(lengths, default=0), min(lengths, default=0)
        self.in_slots = passes.shortcuts.record_steps and can_join and shortest > 1 and self._fits(longest, 0)
        """Whether steps are CUDA graphs; none may start at BOS."""
        self._joins = can_join and (self.in_slots or self._fits(longest, DRAFTED))
        """Whether rows can join others that are running."""
        self._contexts = {
            row: job.context for row, job in enumerate(jobs) if job.context is not None and self._joins and use_cache
        }

    def outputs(self) -> list[list[int]]:
        """The outputs of all rows; without `stop_early` they are decoded up to the budget and then cut."""
        running: _Running | None = None
        model: Any = self.passes.bridge.original_model
        with ExitStack() as stack:
            steps, packs = count(), self.passes.shortcuts.pack_weights
            while self._waiting or running is not None:
                step = next(steps)
                # Earlier passes over many rows, or the first step, may have made all copies.
                if packs and (step == PLAIN_STEPS or (step < 2 and is_packed(model))):
                    stack.enter_context(packed())
                    packs = False
                running = self._advanced(running)
        return [self.stop.cut(output) or output for output in self._outputs]

    def outputs_in_slots(self) -> list[list[int]]:
        """`outputs`, by steps that are recorded once and then replayed."""
        count = min(self.passes.batch_size, len(self._waiting))
        length = max(len(self._texts[row]) for row in self._waiting) + self.stop.limits.max_new_tokens
        some_features = any(job.kept != EVERY for job in self.jobs)
        width = 1 + DRAFTED // count
        slots = Slots(self.passes.bridge, self.splice, count, length, width, some_features, UNRECORDED_STEPS)
        row_of: dict[int, int] = {}
        while self._waiting or row_of:
            free = [slot for slot in range(count) if slot not in row_of]
            if self._waiting and 2 * len(free) >= count:
                row_of |= self._fill(slots, free)
            texts = {slot: self._texts[row] for slot, row in row_of.items()}
            drafts = {
                slot: _draft(texts[slot], self.jobs[row].hints, min(slots.width - 1, self._left(row) - 1))
                for slot, row in row_of.items()
            }
            fed = [[texts[slot][-1], *drafts[slot]] if slot in row_of else [] for slot in range(count)]
            starts = [len(texts[slot]) - 1 if slot in row_of else 0 for slot in range(count)]
            choices = slots.logits(fed, starts).argmax(-1).tolist() if row_of else []
            for slot, row in list(row_of.items()):
                self._extend(row, agreed(drafts[slot], choices[slot]))
                if not self._is_open(row):
                    del row_of[slot]
        return [self.stop.cut(output) or output for output in self._outputs]

    def _fill(self, slots: Slots, free: list[int]) -> dict[int, int]:
        """Lets rows that wait begin in free slots; by slot, those that are still open."""
        started = self._start(len(free))
        if not started.seen.ids.shape[1]:
            started = self._step(started, drafted=False)
        chosen = free[: len(started.rows)]
        lengths = started.seen.mask.sum(1).tolist()
        slots.put(chosen, [self.jobs[row] for row in started.rows], started.cache, lengths)
        return {slot: row for slot, row in zip(chosen, started.rows, strict=True) if self._is_open(row)}

    def _left(self, row: int) -> int:
        """The number of tokens that a row may still write."""
        return self.stop.limits.max_new_tokens - len(self._outputs[row])

    def _extend(self, row: int, tokens: Sequence[int]) -> None:
        """Adds tokens to a row's output, up to its end."""
        for token in tokens:
            if self._is_open(row):
                self._texts[row].append(token)
                self._outputs[row].append(token)

    def _advanced(self, running: _Running | None) -> _Running | None:
        """Lets rows that wait begin, if there is room, or takes a step; the rows that are still open after it."""
        if running is None or self._has_room(running):
            started = self._start(self.passes.batch_size - (0 if running is None else len(running.rows)))
            if not started.seen.ids.shape[1]:
                started = self._step(started, drafted=False)
            running = started if running is None else self._joined(running, started)
        else:
            running = self._step(running)
        still = [index for index, row in enumerate(running.rows) if self._is_open(row)]
        return running.only(still) if still else None

    def _is_open(self, row: int) -> bool:
        output = self._outputs[row]
        if self.passes.shortcuts.stop_early:
            return self.stop.cut(output) is None
        return len(output) < self.stop.limits.max_new_tokens

    def _has_room(self, running: _Running) -> bool:
        """Whether rows that wait can join: half of the places are free, and no sliding window would count padding."""
        if not self._waiting or not self._joins or 2 * len(running.rows) > self.passes.batch_size:
            return False
        longest = max(running.seen.ids.shape[1], len(self._texts[self._waiting[0]]) + PADDED)
        return self._fits(longest, DRAFTED)

    def _fits(self, columns: int, ahead: int) -> bool:
        """Whether every layer attends to all columns until the last token, if each step takes `ahead` more than one.
        The column of a rejected token stays in the cache, masked; a sliding window would count it."""
        return columns + self.stop.limits.max_new_tokens * (1 + ahead) <= self._window

    def _start(self, free_rows: int) -> _Running:
        """At most `free_rows` waiting rows, before their first step: those with all but the last token computed, or
        some of similar length."""
        ready = [row for row in self._waiting if row in self._contexts][:free_rows]
        most = len(self._texts[self._waiting[0]]) + PADDED if self._joins else math.inf
        rows = ready or [row for row in self._waiting[:free_rows] if len(self._texts[row]) <= most]
        self._waiting = [row for row in self._waiting if row not in rows]
        fed = pad_left([self._texts[row] for row in rows], self._pad).to(device_of(self.passes.bridge))
        decoded = fed.ids.shape[1] - 1 if ready else 0
        seen, fed = (Batch(*(column[:, part] for column in fed)) for part in (slice(decoded), slice(decoded, None)))
        cache = DynamicCache(config=self._config) if self.use_cache else None
        if cache is not None and decoded:
            contexts = [self._contexts.pop(row) for row in rows]
            for number in range(len(contexts[0].keys)):
                keys, values = (
                    _stacked((row_keys[number].unsqueeze(0) for row_keys in layer_rows), decoded, 2)
                    for layer_rows in zip(*contexts, strict=True)
                )
                cache.update(keys, values, number)
        return _Running(rows, seen, fed, cache)

    def _step(self, running: _Running, drafted: bool = True) -> _Running:
        """Extends the outputs of the rows by at least one token; with `drafted`, by pieces of their hints that a pass
        proves."""
        rows, seen, fed, cache = running
        most = DRAFTED // len(rows) if drafted else 0
        if not self._fits(seen.ids.shape[1] + fed.ids.shape[1], most):
            most = 0
        drafts = [_draft(self._texts[row], self.jobs[row].hints, min(most, self._left(row) - 1)) for row in rows]
        ahead = max(map(len, drafts))
        last = fed.positions[:, -1:]
        if ahead:
            fed = join_columns(fed, pad_right(drafts, (last[:, 0] + 1).tolist(), self._pad).to(last.device))
        seen = join_columns(seen, fed)
        chunk = seen if cache is None else fed
        prepare(self.splice, chunk, [self.jobs[row] for row in rows])
        choices = forward(self.passes.bridge, chunk, 1 + ahead, cache=cache, mask=seen.mask).argmax(-1)
        accepted = []
        for row, draft, argmax in zip(rows, drafts, choices.tolist(), strict=True):
            tokens = agreed(draft, argmax)
            accepted.append(len(tokens) - 1)
            self._extend(row, tokens)
        n_accepted = torch.tensor(accepted, device=last.device).unsqueeze(1)
        seen.mask[:, seen.mask.shape[1] - ahead :] &= torch.arange(ahead, device=last.device) < n_accepted
        fed = Batch(choices.gather(1, n_accepted), torch.ones_like(n_accepted, dtype=torch.bool), last + n_accepted + 1)
        return _Running(rows, seen, fed, cache)

    def _joined(self, first: _Running, second: _Running) -> _Running:
        """Both as one batch, padded on the left, without columns that no row uses any more."""
        length = max(part.seen.mask.shape[1] - int(part.seen.mask.int().argmax(1).min()) for part in (first, second))

        cache = None
        if first.cache is not None:
            cache = DynamicCache(config=self._config)
            for number, layers in enumerate(zip(first.cache.layers, second.cache.layers, strict=True)):
                if layers[0].is_initialized:  # some share another layer's
                    keys, values = (
                        _stacked((getattr(layer, name) for layer in layers), length, 2) for name in ("keys", "values")
                    )
                    cache.update(keys, values, number)
        seen = Batch(*(_stacked(pair, length, 1) for pair in zip(first.seen, second.seen, strict=True)))
        fed = Batch(*(torch.cat(pair) for pair in zip(first.fed, second.fed, strict=True)))
        return _Running(first.rows + second.rows, seen, fed, cache)


def _similar(order: Sequence[int], lengths: Sequence[int], stop: Stop) -> list[list[int]]:
    """`order`, sorted by length, in groups whose rows need at most twice as many columns as the first: slots have as
    many as the longest row needs."""
    groups: list[list[int]] = []
    for row in order:
        budget = stop.limits.max_new_tokens
        if not groups or lengths[row] + budget > 2 * (lengths[groups[-1][0]] + budget):
            groups.append([])
        groups[-1].append(row)
    return groups


def _stacked(parts: Iterable[Tensor], length: int, axis: int) -> Tensor:
    """The rows of all parts together, with `axis` cut or padded with zeros on the left to `length`."""
    padded = []
    for part in parts:
        used = part.narrow(axis, max(0, part.shape[axis] - length), min(length, part.shape[axis]))
        shape = list(used.shape)
        shape[axis] = length - shape[axis]
        padded.append(torch.cat([used.new_zeros(shape), used], dim=axis))
    return torch.cat(padded)


def _window(cache: Any) -> float:
    """The number of columns that every layer can attend to."""
    return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=math.inf)


def _draft(text: Sequence[int], hints: Sequence[int], most: int) -> list[int]:
    """At most `most` tokens that may follow `text`: those after the last occurrence of its last two tokens in `hints`
    (prompt lookup decoding, Saxena 2023)."""
    for index in range(len(hints) - 1, 1, -1) if most else ():
        if list(hints[index - 2 : index]) == list(text[-2:]):
            return list(hints[index : index + most])
    return []
