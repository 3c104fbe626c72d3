"""Stage 1, data: rows to train, validate and evaluate on, and text for the transcoders.

In: the data settings. Out: `data/*.jsonl`, `data/text_*.txt` and `data/report.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data.build import build_dataset
from jobs.context import Context


def run(context: Context) -> dict[str, Any]:
    settings = context.settings.data
    options = settings.model_dump()
    if settings.rows_file or settings.text_train_file:
        options |= _context_limit(context)
    report = build_dataset(context.space.data, seed=context.settings.seed, **options)
    return {"report": report}


def _context_limit(context: Context) -> dict[str, Any]:
    """A user's rows must fit the model: its context in tokens, and how its tokenizer counts."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(context.model)
    limit = getattr(AutoConfig.from_pretrained(context.model), "max_position_embeddings", None)
    count: Callable[[str], int] = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    return {"max_tokens": limit, "count_tokens": count}
