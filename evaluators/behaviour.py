"""Behaviour cells: cross-entropy, tool calls and activations of one subset under one condition.

In: a TransformerBridge, rows, sites and the conditions asked for. Out: cell dictionaries (one a condition, strength and
subset) with one entry a row, and the generated texts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.encoding import encode_row
from data.rows import Row
from evaluators.decoding import Job, Stop, generate, score
from evaluators.interventions import Site
from evaluators.scoring import score_row

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Ask:
    """A condition, and its strength where it has one."""

    condition: str
    alpha: float | None = None


def evaluate_behaviour(
    bridge: TransformerBridge,
    rows: Sequence[Row],
    sites: Sequence[Site],
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    batch_size: int,
    raw_outputs: Sequence[Sequence[int]] = (),
) -> Iterator[tuple[Ask, list[dict[str, Any]], list[dict[str, Any]]]]:
    """For each ask its per-row figures and its generations (with token ids, which later asks take as guesses).

    Strengths of one condition are rows of the same batches. `raw_outputs` are raw's generated tokens, row by row.
    """
    stop = Stop(bridge.tokenizer, max_new_tokens)
    encoded = [encode_row(bridge.tokenizer, row.input, row.target) for row in rows]
    for condition in dict.fromkeys(ask.condition for ask in asks):
        group = [ask for ask in asks if ask.condition == condition]
        started = time.perf_counter()
        jobs = [Job(row, 1.0 if ask.alpha is None else ask.alpha) for ask in group for row in encoded]
        scored = score(bridge, jobs, sites, condition, batch_size)
        guesses = list(raw_outputs) * len(group)
        outputs = generate(bridge, jobs, sites, condition, stop, scored, guesses, batch_size)
        seconds = (time.perf_counter() - started) / len(group)
        for number, ask in enumerate(group):
            figures, texts = [], []
            for index, row in enumerate(rows):
                place = number * len(rows) + index
                text = stop.text(outputs[place])
                judged = score_row(row.target, text, row.label)
                one = scored[place]
                figures.append(
                    {
                        "index": index,
                        "nll": one.nll,
                        "n_tokens": one.n_tokens,
                        "sum_abs_base_acts": one.base_acts,
                        "sum_abs_delta_acts": one.delta_acts,
                        "n_act_tokens": one.n_act_tokens,
                        **judged._asdict(),
                    }
                )
                texts.append(
                    {
                        "index": index,
                        "input": row.input,
                        "target": row.target,
                        "label": row.label,
                        "generation": text,
                        "tokens": outputs[place],
                        "seconds": seconds,
                    }
                )
            yield ask, figures, texts
