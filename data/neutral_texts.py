"""Neutral texts, on which a finetuning's trace has nothing to do with its task.

In: a user's file with one text per line, or nothing, for the sentences that are shipped. Out: texts, and what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from data.readers import Log, stream_texts
from data.rows import DataError, Row

SHIPPED = Path(__file__).with_name("neutral_texts.txt")
MOST = 80


def neutral_texts(
    path: str | None = None, problem: Callable[[Row], str | None] = lambda row: None
) -> tuple[list[str], str]:
    """At most 80 texts, and one sentence on where they are from and how many were left out, as `problem` has a reason
    against them. Raises DataError for a file with fewer than two that can be used."""
    if path is None:
        texts = [text for text in stream_texts(Log(str(SHIPPED))) if not text.startswith("#")]
        return texts, f"unrelated text: {len(texts)} shipped sentences (data.text_train_file takes yours)"
    log = Log(path)
    texts = list(islice(stream_texts(log, problem), MOST))
    if len(texts) < 2:
        raise DataError(f"data.text_train_file: {path} has {len(texts)} usable lines, and at least two are needed")
    left_out = f", without {log.rejected} that cannot be used ({'; '.join(log.reasons)})" if log.rejected else ""
    return texts, f"unrelated text: {len(texts)} lines of {path}{left_out}"
