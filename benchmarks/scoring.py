"""Rows scored per second on one core: `python -m benchmarks.scoring [ROWS]`.

In: generated rows with realistic generations (right, wrong, reordered, chatty, unclosed, empty). Out: prints two rates
of the quickstart's behaviours: of rows in memory, and of `score_file`, including reading and JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from data.requests.copy_grammar import copy_sentences
from data.requests.generator import RequestOptions, tool_rows
from data.rows import Row, make_row
from evaluators.measures.behaviours import Answer, read_behaviours
from evaluators.measures.scoring import score_file
from search_spaces.load import load


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
    behaviours = read_behaviours(load("quickstart", []).evaluate.behaviours)
    start = time.perf_counter()
    for row, generation in pairs:
        answer = Answer(row.input, row.target, row.label, generation, 0)
        _ = [check(answer) for check in behaviours.values()]
    print(f"in memory:  {count / (time.perf_counter() - start):,.0f} rows/s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row, generation in pairs:
                record = {"input": row.input, "target": row.target, "generation": generation, "label": row.label}
                file.write(json.dumps(record) + "\n")
        start = time.perf_counter()
        score_file(path, behaviours)
        print(f"score_file: {count / (time.perf_counter() - start):,.0f} rows/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
