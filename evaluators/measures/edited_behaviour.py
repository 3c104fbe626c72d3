"""Behaviour cells: cross-entropy, behaviours and activations of one subset under one condition.

In: a model's passes, patches, rows and the conditions to measure. Out: cell dictionaries (one per condition, strength
and subset) with one entry per row, and the generated texts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

from data.encoding import encode_row, target_text
from data.rows import Row
from evaluators.measures.behaviours import AGREES, Answer, Behaviour
from evaluators.splice.decoding import Stop, generate
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, Reference, Scored, score


@dataclass(frozen=True)
class Ask:
    """A condition to measure, and its strength if it has one."""

    condition: str
    alpha: float | None = None


class Known(NamedTuple):
    """Earlier results: likely outputs, row by row, of the finetuned and of the un-finetuned model (empty: unknown), and
    the finetuned model's predictions (None: no KL). `raw` are outputs that are certainly the finetuned model's (empty:
    unknown). `at_strength` are outputs of other conditions, by their strength."""

    finetuned: Sequence[Sequence[int]] = ()
    unfinetuned: Sequence[Sequence[int]] = ()
    reference: Reference | None = None
    raw: Sequence[Sequence[int]] = ()
    at_strength: Mapping[float | None, Sequence[Sequence[int]]] = MappingProxyType({})

    def guesses(self, ask: Ask) -> Sequence[Sequence[int]]:
        """The likelier outputs: another condition's at the same strength, or the un-finetuned model's if little of the
        change is applied."""
        if ask.alpha in self.at_strength:
            return self.at_strength[ask.alpha]
        little = ask.condition in ("no_delta", "random_delta", "shuffled_delta")
        little = little or (ask.alpha is not None and ask.alpha < 0.5)
        return self.unfinetuned if self.unfinetuned and little else self.finetuned


NOTHING_KNOWN = Known()


def evaluate_behaviour(
    passes: Passes,
    patches: Sequence[Patch],
    rows: Sequence[Row],
    asks: Sequence[Ask],
    *,
    limits: Limits,
    behaviours: Mapping[str, Behaviour],
    known: Known = NOTHING_KNOWN,
) -> Iterator[tuple[Ask, list[dict[str, Any]], list[dict[str, Any]]]]:
    """For each ask its per-row figures and its generations (with token ids, which serve later asks as guesses).

    Strengths of one condition are rows of the same batches. Known outputs save decoding if they are right, and never
    change an output. The figures include the result of each of the `behaviours`, with a reference also `kl` (raw's pass
    fills the reference), and for raw `text_nll`, nats summed over the `n_act_tokens` tokens after BOS.
    """
    tokenizer = passes.bridge.tokenizer
    encoded = [encode_row(tokenizer, row) for row in rows]
    targets = [target_text(tokenizer, row) for row in rows]
    first = [0, *accumulate(len(row.ids) - 1 for row in encoded[:-1])]
    stop = Stop.of(passes.bridge, limits, rows[0])
    for group in _together(asks) if passes.shortcuts.rows_for_strengths else [[ask] for ask in asks]:
        edit = Edit(patches, group[0].condition)
        started = time.perf_counter()
        strengths = [1.0 if ask.alpha is None else ask.alpha for ask in group]
        jobs = [
            Job(row, alpha, place, guess=guess)
            for ask, alpha in zip(group, strengths, strict=True)
            for row, place, guess in zip(encoded, first, known.guesses(ask) or [()] * len(encoded), strict=True)
        ]
        scored = score(passes, edit, jobs, whole_text=edit.condition == "raw", reference=known.reference)
        outputs = generate(passes, edit, jobs, scored, stop)
        seconds = (time.perf_counter() - started) / len(group)
        for number, ask in enumerate(group):
            places = slice(number * len(rows), (number + 1) * len(rows))
            texts = [stop.text(tokens) for tokens in outputs[places]]
            answers = [
                Answer(row.input, target, row.label, text, len(tokens))
                for row, target, text, tokens in zip(rows, targets, texts, outputs[places], strict=True)
            ]
            verdicts = [{name: check(answer) for name, check in behaviours.items()} for answer in answers]
            for index, raw in enumerate(known.raw):
                verdicts[index][AGREES] = list(raw) == outputs[places][index]
            yield ask, _figures(scored[places], verdicts), _texts(answers, outputs[places], seconds)


def _together(asks: Sequence[Ask]) -> list[list[Ask]]:
    """The asks grouped by condition."""
    return [[ask for ask in asks if ask.condition == name] for name in dict.fromkeys(ask.condition for ask in asks)]


def _figures(scored: Sequence[Scored], verdicts: Sequence[dict[str, bool | None]]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "nll": row.nll,
            "n_tokens": row.n_tokens,
            "sum_abs_base_acts": row.base_acts,
            "sum_abs_delta_acts": row.delta_acts,
            "n_act_tokens": row.n_act_tokens,
            **({} if row.text_nll is None else {"text_nll": row.text_nll}),
            **({} if row.kl is None else {"kl": row.kl}),
            "behaviours": behaviours,
        }
        for index, (row, behaviours) in enumerate(zip(scored, verdicts, strict=True))
    ]


def _texts(answers: Sequence[Answer], outputs: Sequence[list[int]], seconds: float) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "input": answer.input,
            "target": answer.target,
            "label": answer.label,
            "generation": answer.text,
            "tokens": tokens,
            "seconds": seconds,
        }
        for index, (answer, tokens) in enumerate(zip(answers, outputs, strict=True))
    ]
