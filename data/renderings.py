"""Counts how the rows of a file compare with what training on whole conversations reads.

In: rendered conversations. Out: counts and an example for the report, and sentences about them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.chat import Rendered

_BEFORE, _SHOWN = 60, 160
"""Characters of an example that are shown: before the first difference, and in all."""


@dataclass
class Renderings:
    """Counts of rendered rows; see `data.chat.Rendered` for what they mean."""

    taken: str
    rows: int = 0
    unlike_generation: int = 0
    regrouped: int = 0
    without_end: int = 0
    example: dict[str, str] | None = None

    def add(self, place: str, row: Rendered) -> None:
        self.rows += 1
        self.regrouped += row.regrouped
        self.without_end += not row.has_end
        if row.mismatch is not None:
            self.unlike_generation += 1
            if self.example is None:
                generation, conversation = _around_difference(*row.mismatch)
                self.example = {"row": place, "generation": generation, "conversation": conversation}

    def as_dict(self) -> dict[str, Any]:
        """For the report: taken, rows, unlike_generation, regrouped, without_end, example."""
        return dict(vars(self))

    def sentences(self) -> list[str]:
        """What a reader must know about these rows, one fact each."""
        sentences = []
        if self.example is not None:
            rendered_as = "the conversation" if self.taken == "conversation" else "the generation prompt"
            sentences = [
                f"in {self.unlike_generation} of {self.rows} rows the generation prompt, the answer and its end differ "
                "from the chat template's rendering of the whole conversation, which is what training reads; the rows "
                f"follow {rendered_as} (data.rendering={self.taken})",
                f"{self.example['row']} by its generation prompt: {self.example['generation']}",
                f"{self.example['row']} in its conversation: {self.example['conversation']}",
            ]
        if self.regrouped:
            sentences.append(
                f"in {self.regrouped} of {self.rows} rows the text is that of training but some tokens differ, because "
                "in training one token holds the end of the prompt and the beginning of the target"
            )
        if self.without_end:
            sentences.append(
                f"in {self.without_end} of {self.rows} rows the chat template writes no token that ends the answer; "
                "the tokenizer's EOS is added"
            )
        return sentences


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """Both texts as literals, cut to what surrounds the first place where they differ."""
    pairs = enumerate(zip(a, b, strict=False))
    place = next((at for at, (left, right) in pairs if left != right), min(len(a), len(b)))
    start = max(place - _BEFORE, 0) if place > _BEFORE + 3 else 0

    def shown(text: str) -> str:
        part = repr(text[start : start + _SHOWN])
        return f"{'...' if start else ''}{part}{'...' if len(text) > start + _SHOWN else ''}"

    return shown(a), shown(b)
