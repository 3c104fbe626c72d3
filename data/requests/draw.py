"""Distinct rows and texts of the reference study, drawn from its generators.

In: options, a seed, and a function that says why the model cannot use a row. Out: rows by label and purpose, and texts;
for a seed the same bytes on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from data.leakage import request_key
from data.requests.copy_text import c4_copy_texts, shipped_copy_texts
from data.requests.generator import RequestOptions, tool_ood_rows, tool_rows
from data.rows import DataError, Row, make_row
from data.selection import fingerprint

LABELS = ("tool", "copy", "tool_ood")
PURPOSES = ("evaluation", "validation", "train")
COPY_SOURCES = ("shipped", "c4")
DRAWS_PER_ROW = 50
"""Rows to generate per row used before giving up: repeats are rare unless there are few operands."""
FIRST_SHIPPED = 6000
"""The first shipped sentences, shuffled separately, so that adding sentences does not change the rows of a seed."""


class Generator:
    """Draws rows and texts that have not been drawn before.

    Evaluation is drawn before validation, and validation before training, so that asking for more of a later one does
    not change an earlier one.
    """

    def __init__(
        self, options: RequestOptions, seed: int, copy_source: str, problem: Callable[[Row], str | None]
    ) -> None:
        if copy_source not in COPY_SOURCES:
            raise DataError(f"copy_source is {copy_source!r}; allowed are {' and '.join(COPY_SOURCES)}")
        self.seed, self.options, self.problem = seed, options, problem
        self.copies = _copy_rows(seed, copy_source)
        self.taken: set[int] = set()

    def splits(self, evaluation: int, validation: int, train: int) -> dict[str, list[Row]]:
        """Rows by purpose: each label for evaluation; half `copy` and half `tool` for validation and training."""
        sizes = {
            "copy": (evaluation, validation // 2, train // 2),
            "tool": (evaluation, validation - validation // 2, train - train // 2),
            "tool_ood": (evaluation, 0, 0),
        }
        drawn = {
            label: [self.rows(label, purpose, count) for purpose, count in zip(PURPOSES, counts, strict=True)]
            for label, counts in sizes.items()
        }
        return {
            purpose: [row for by_purpose in drawn.values() for row in by_purpose[index]]
            for index, purpose in enumerate(PURPOSES)
        }

    def rows(self, label: str, purpose: str, count: int) -> list[Row]:
        """`count` rows of a label; raises `DataError` if the options do not allow that many distinct ones."""
        rng = random.Random(f"{self.seed}/{label}/{purpose}")
        source = {
            "tool": tool_rows(rng, self.options),
            "tool_ood": tool_ood_rows(rng, self.options),
            "copy": self.copies,
        }[label]
        rows: list[Row] = []
        draws = 0
        while len(rows) < count:
            draws += 1
            if draws > DRAWS_PER_ROW * (count + 20):
                raise DataError(
                    f"only found {len(rows)} of {count} distinct {label} rows for {purpose} in {draws - 1} draws; "
                    "ask for fewer rows, a wider range of operands or a model with a longer context"
                )
            row = next(source, None)
            if row is None:
                raise DataError(
                    f"only found {len(rows)} of {count} distinct {label} rows for {purpose}: there are no more "
                    "sentences to copy; ask for fewer rows, or for data.copy_source=c4"
                )
            key = fingerprint(request_key(row.input))
            if key not in self.taken and self.problem(row) is None:
                self.taken.add(key)
                rows.append(row)
        return rows

    def texts(self, purpose: str, count: int) -> list[str]:
        """`count` texts, half requests and half copy sentences, shuffled."""
        rows = self.rows("tool", purpose, count // 2) + self.rows("copy", purpose, count - count // 2)
        random.Random(f"{self.seed}/order/{purpose}").shuffle(rows)
        return [row.input for row in rows]


def _copy_rows(seed: int, copy_source: str) -> Iterator[Row]:
    """Copy rows: an endless stream from C4, or the shipped sentences in seeded order."""
    if copy_source == "c4":
        texts = c4_copy_texts()
    else:
        shipped, chance = shipped_copy_texts(), random.Random(f"{seed}/copy/shipped")
        first, later = shipped[:FIRST_SHIPPED], shipped[FIRST_SHIPPED:]
        for part in (first, later):
            chance.shuffle(part)
        texts = iter([*first, *later])
    yield from (make_row(text, text, "copy") for text in texts)
