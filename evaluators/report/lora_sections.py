"""Blocks of the report about the LoRA study: its pictures, and the merged model on held-out rows.

In: PNGs by name, and what `finetuned.check_rows` found. Out: blocks for the LoRA section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evaluators.report.findings import number
from evaluators.report.page import Block, Gallery, Picture, Section, Table

EXAMPLES = 4
"""Rows shown of those that missed, and of those that matched."""
TEXT_SHOWN = 200
STUDY_PICTURES = {
    "lora_importances": ("Importances", "How much of the spread of the loss each searched value explains."),
    "lora_parallel": ("Parallel coordinates", "One line a trial, through its values to its loss; dark is better."),
    "lora_history": (
        "Study history",
        "Loss of each finished trial in the order of their numbers, and the best so far.",
    ),
}
RATES = {
    "exact_match_rate": "the answer is the target, character by character",
    "math_correct_rate": "of requests: the call's expression has the target's value",
    "false_call_rate": "of rows to copy: a tool is called",
}
SCORES = {
    "tool_call_precision": "of rows that were called, those that are requests",
    "tool_call_recall": "of requests, those that were called",
    "tool_call_f1": "harmonic mean of the two",
}


def completed(
    section: Section | None, finetuned: Mapping[str, Any] | None, pictures: Mapping[str, bytes]
) -> Section | None:
    """The LoRA section with the study's pictures and the finetuned model's answers after what it holds; the answers
    alone where the model was made elsewhere."""
    if section is None:
        lead = "It was made elsewhere and adopted: nothing was trained to get it."
        return Section("finetuned", "The finetuned model", lead, finetuned_blocks(finetuned)) if finetuned else None
    shown = [Picture(name, pictures[name], *says) for name, says in STUDY_PICTURES.items() if name in pictures]
    blocks: list[Block] = [Gallery(shown)] if shown else []
    return replace(section, blocks=[*section.blocks, *blocks, *finetuned_blocks(finetuned)])


def finetuned_blocks(found: Mapping[str, Any] | None) -> list[Block]:
    """Figures and examples of the merged model; none where it was not checked."""
    if not found:
        return []
    figures = found["figures"]
    lines = [
        [name, f"{number(figures[name])} [{number(figures[f'{name}_low'])}, {number(figures[f'{name}_high'])}]", says]
        for name, says in RATES.items()
        if name in figures
    ]
    lines += [[name, number(figures[name]), says] for name, says in SCORES.items()]
    count = len(found["rows"])
    help = f"The finetuned model's greedy answers to the {count} validation rows."
    return [
        Table("The finetuned model on held-out rows", help, ["metric", "value", "meaning"], lines, wide_text=True),
        _examples(found["rows"]),
    ]


def _examples(rows: Sequence[Mapping[str, Any]]) -> Table:
    missed = [row for row in rows if not row["exact"]][:EXAMPLES]
    hit = {label: [row for row in rows if row["exact"] and row["label"] == label] for label in ("tool", "copy")}
    shown = [*missed, *(row for some in hit.values() for row in some[: EXAMPLES // 2])]
    lines = [
        [
            "yes" if row["exact"] else "no",
            row["label"],
            *(_shorten(row[name]) for name in ("input", "target", "generation")),
        ]
        for row in shown
    ]
    return Table(
        "Examples",
        "Rows whose answer is not the target come first.",
        ["exact", "label", "input", "target", "generated"],
        lines,
        marks=["" if row["exact"] else "failed" for row in shown],
        wide_text=True,
    )


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..."
