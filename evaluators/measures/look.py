"""A first look at a pair of models, without any training: what changed, where, and what the models say.

In: the finetuned model wrapped for TransformerLens, the un-finetuned weights of what changed, rows and neutral texts.
Out: one dict of plain values, from which the page is drawn. Each piece is a function that can be used alone:
`weight_changes`, `token_kl`, `parts_ceiling` and `mean_difference_lens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from data.encoding import encode_row, encode_text
from data.rows import Row, make_row
from data.selection import first_of_each
from evaluators.measures.behaviours import Behaviour
from evaluators.measures.edited_behaviour import Ask, evaluate_behaviour
from evaluators.measures.mean_difference_lens import mean_difference_lens
from evaluators.measures.parts import FINETUNED, UNFINETUNED, Changes, parts_ceiling
from evaluators.measures.token_kl import TokenKL, token_kl
from evaluators.measures.weight_changes import Reader, row_changes, weight_changes
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from models.weights import Weights

ANSWERS = 12
"""Rows to which both models write an answer."""
PARTS_ROWS = 18
"""Rows on which the ceiling by parts is measured: some sixteen models run over each."""

ROWS_AT_ONCE = 9
"""Rows in a batch where no text is written: of rows sorted by length, few at once are padded least."""
STEPS = ("divergence", "answers", "parts", "lens")
Step = Callable[[str], None]
"""Called with the name of each step as it ends."""


@dataclass(frozen=True)
class Inputs:
    """rows: what to compare the models on, in the order of their labels. texts: neutral ones. steps: what to measure,
    of `STEPS`."""

    rows: Sequence[Row]
    texts: Sequence[str]
    limits: Limits
    behaviours: Mapping[str, Behaviour]
    steps: Sequence[str] = STEPS


def look_at(passes: Passes, changes: Changes, inputs: Inputs, step: Step = lambda name: None) -> dict[str, Any]:
    """`divergence`: a dict per row with its tokens and both models' figures. `answers`: both models' to a few rows.
    `parts`: a cell per subset, as `tables.recovery.parts_table` reads it. `lens`: a dict per layer and span."""
    measures = {"divergence": _divergence, "answers": _answers, "parts": _parts, "lens": _lens}
    figures = {}
    for name in inputs.steps:
        figures[name] = measures[name](passes, changes, inputs)
        step(name)
    return figures


def compare_weights(
    names: Sequence[str], before: Reader, after: Reader, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[dict[str, Any]]]:
    """`changed`: a dict per tensor that changed. `embeddings`: of each changed matrix outside the blocks, which has a
    row per token, how many rows changed and which changed most."""
    changed = weight_changes(names, before, after)
    embeddings = []
    for change in changed:
        if change.layer is None and len(change.shape) == 2:
            count, rows = row_changes(before(change.name), after(change.name))
            listed = [[row, *_texts(tokenizer, [row]), relative] for row, relative in rows]
            embeddings.append({"name": change.name, "changed": count, "of": change.shape[0], "rows": listed})
    return {
        "changed": [{**change._asdict(), "rank_in_words": change.rank_in_words} for change in changed],
        "embeddings": embeddings,
    }


def distinct_names(before: Weights, after: Weights) -> list[str]:
    """One name for each tensor that both models have; tied tensors have several."""
    shared = sorted(before.places.keys() & after.places.keys())
    return list({(before.places[name], after.places[name]): name for name in shared}.values())


def as_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Texts as rows: the first half of its words is the prompt, the rest the target. The space between them belongs to
    the one with which both have the tokens of the whole text, if there is one: in most vocabularies to the target."""
    rows = []
    for text in texts:
        words, half = text.split(" "), len(text.split(" ")) // 2
        start, rest, whole = " ".join(words[:half]), " ".join(words[half:]), encode_text(tokenizer, text)
        cuts = [make_row(start, before + rest, "texts", separator=after) for before, after in ((" ", ""), ("", " "))]
        same = [row for row in cuts if encode_row(tokenizer, row).ids[: len(whole)] == whole]
        rows += [*same, *cuts][:1] if half else []
    return rows


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """The first rows of each label, in equal shares."""
    return first_of_each(rows, lambda row: row.label, most)


def _divergence(passes: Passes, changes: Changes, inputs: Inputs) -> list[dict[str, Any]]:
    tokenizer = passes.bridge.tokenizer
    encoded = [encode_row(tokenizer, row) for row in inputs.rows]
    return [
        {"label": row.label, "input": row.input, "n_prompt": len(ids.prompt), **_as_texts(tokenizer, kl)}
        for row, ids, kl in zip(
            inputs.rows, encoded, token_kl(_few_rows(passes), changes, [row.ids for row in encoded]), strict=True
        )
    ]


def _as_texts(tokenizer: PreTrainedTokenizerBase, row: TokenKL) -> dict[str, Any]:
    return {
        "tokens": _texts(tokenizer, row.ids),
        "kl": row.kl.tolist(),
        "nll_finetuned": row.nll_finetuned.tolist(),
        "nll_unfinetuned": row.nll_unfinetuned.tolist(),
        "finetuned": [_texts(tokenizer, choices) for choices in row.finetuned.tolist()],
        "unfinetuned": [_texts(tokenizer, choices) for choices in row.unfinetuned.tolist()],
    }


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids]


def _answers(passes: Passes, changes: Changes, inputs: Inputs) -> list[dict[str, Any]]:
    chosen = spread(inputs.rows, ANSWERS)
    answers: dict[str, list[dict[str, Any]]] = {}
    for model, pieces in ((FINETUNED, frozenset()), (UNFINETUNED, changes.pieces)):
        with changes.undone(passes.bridge, pieces) if pieces else nullcontext():
            evaluated = evaluate_behaviour(
                passes, [], chosen, [Ask("raw")], limits=inputs.limits, behaviours=inputs.behaviours
            )
            ((_, figures, texts),) = list(evaluated)
        answers[model] = [
            {"text": text["generation"], "behaviours": figure["behaviours"]}
            for text, figure in zip(texts, figures, strict=True)
        ]
    return [
        {"label": row.label, "input": row.input, "target": row.target, FINETUNED: after, UNFINETUNED: before}
        for row, after, before in zip(chosen, answers[FINETUNED], answers[UNFINETUNED], strict=True)
    ]


def _parts(passes: Passes, changes: Changes, inputs: Inputs) -> list[dict[str, Any]]:
    """All subsets run together; each gets a cell of its own."""
    chosen = spread(inputs.rows, PARTS_ROWS)
    ceiling = parts_ceiling(_few_rows(passes), changes, chosen)
    cells = []
    for label in dict.fromkeys(row.label for row in chosen):
        members = [index for index, row in enumerate(chosen) if row.label == label]

        def of_label(rows: Sequence[Any], members: Sequence[int] = members) -> list[dict[str, Any]]:
            return [{**rows[index], "index": number} for number, index in enumerate(members)]

        ends = {model: of_label(ceiling[model]) for model in (FINETUNED, UNFINETUNED)}
        parts = [{**part, "rows": of_label(part["rows"])} for part in ceiling["parts"]]
        cells.append({"kind": "parts", "subset": label, **ends, "parts": parts})
    return cells


def _few_rows(passes: Passes) -> Passes:
    return replace(passes, batch_size=min(passes.batch_size, ROWS_AT_ONCE))


def _lens(passes: Passes, changes: Changes, inputs: Inputs) -> list[dict[str, Any]]:
    tokenizer = passes.bridge.tokenizer
    readings = mean_difference_lens(_few_rows(passes), changes, [encode_text(tokenizer, text) for text in inputs.texts])
    return [
        reading._asdict()
        | {
            "promoted": _texts(tokenizer, reading.promoted),
            "control_promoted": _texts(tokenizer, reading.control_promoted),
        }
        for reading in readings
    ]
