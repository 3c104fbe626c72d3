"""Rows scored per second on one core: `python -m benchmarks.scoring [ROWS]`.

In: generated rows with realistic generations (right, wrong, reordered, chatty, unclosed, empty). Out: prints two rates,
for `score_row` on rows in memory and for `score_file` on a file, including reading and JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from data.copy_grammar import copy_sentences
from data.requests import RequestOptions, tool_rows
from data.rows import Row, make_row
from evaluators.measures.scoring import score_file, score_row


def realistic_rows(count: int) -> list[tuple[Row, str]]:
    """Half tool, half copy rows, with generations like those of a half-trained model."""
    rng = random.Random("benchmark")
    plain, rich = RequestOptions(), RequestOptions(decimals=True, negatives=True, parentheses=True)
    tools = itertools.chain.from_iterable(zip(tool_rows(rng, plain), tool_rows(rng, rich), strict=True))
    copies = (make_row(text, text, "copy") for text in copy_sentences(rng))
    pairs = []
    for index in range(count):
        row = next(tools if index % 2 else copies)
        generations = (
            row.target,
            row.target,
            row.target,
            row.target.replace("(", "( ").replace("1", "2"),
            f"Sure. {row.target} That is it.",
            row.target[: len(row.target) // 2],
            row.input,
            "",
        )
        pairs.append((row, rng.choice(generations)))
    return pairs


def main(count: int) -> None:
    """Prints both rates."""
    pairs = realistic_rows(count)
    start = time.perf_counter()
    for row, generation in pairs:
        score_row(row.target, generation, row.label)
    print(f"score_row:  {count / (time.perf_counter() - start):,.0f} rows/s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row, generation in pairs:
                record = {"input": row.input, "target": row.target, "generation": generation, "label": row.label}
                file.write(json.dumps(record) + "\n")
        start = time.perf_counter()
        score_file(path)
        print(f"score_file: {count / (time.perf_counter() - start):,.0f} rows/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
