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
    exact = {end: found["figures"][f"exact_match_rate{end}"] for end in ("", "_low", "_high", "_n")}
    lines = [
        ["exact match", "all", f"{number(exact[''])} [{number(exact['_low'])}, {number(exact['_high'])}]", exact["_n"]]
    ]
    lines += [
        [
            one["behaviour"],
            one["label"],
            f"{number(one['value'])} [{number(one['low'])}, {number(one['high'])}]",
            one["n"],
        ]
        for one in found["rates"]
    ]
    count = len(found["rows"])
    help = f"The finetuned model's greedy answers to the {count} validation rows."
    if answered := found.get("answered"):
        help += (
            f" {answered['made']} rows had no target: what it says itself, greedily, was made their target"
            f" ({answered['cut']} were cut at the token budget)."
        )
    return [
        Table("The finetuned model on held-out rows", help, ["behaviour", "subset", "rate", "n"], lines),
        _examples(found["rows"]),
    ]


def _examples(rows: Sequence[Mapping[str, Any]]) -> Table:
    missed = [row for row in rows if not row["exact"]][:EXAMPLES]
    labels = dict.fromkeys(row["label"] for row in rows)
    hit = {label: [row for row in rows if row["exact"] and row["label"] == label] for label in labels}
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
