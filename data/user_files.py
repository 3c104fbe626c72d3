"""A user's own rows and texts, split or sampled in one pass.

In: a path and the sizes wanted. Out: rows per split, or texts, each with an account of the file for the report: lines
that were rejected (and why), repeated, not needed, and left out because they would leak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.leakage import request_key
from data.readers import LineLog, stream_rows, stream_texts
from data.rows import DataError, Row
from data.selection import Sample, fingerprint

SPLITS = ("evaluation", "validation", "train")


def split_user_rows(
    path: str,
    sizes: Mapping[str, tuple[int, int, int]],
    *,
    seed: int,
    fits: Callable[[str], bool],
    max_reject_fraction: float,
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Rows of a JSON-lines file as `{"evaluation": [...], "validation": [...], "train": [...]}`, and the account.

    `sizes` gives, for each label, the number of rows wanted in those three splits. Rows are ranked by a hash of seed
    and request; the first go to evaluation, the next to validation, the rest to training. So a file and a seed always
    give the same splits, whatever the order of its lines, and asking for more training rows moves no other row. Of rows
    with the same request the first is kept. If rows run short, the train split is `training_rows_missing` shorter.

    Raises `DataError` for an unreadable file, too many rejected lines, or too few tool or copy rows to split.
    """
    log = LineLog(path)
    samples = {label: Sample[Row](sum(wanted), seed) for label, wanted in sizes.items()}
    for row in stream_rows(log, fits):
        samples[row.label].offer(request_key(row.input), row)
    log.require(max_reject_fraction)

    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    account = log.as_dict() | {"labels": {}}
    for label, (evaluation, validation, train) in sizes.items():
        sample, rows = samples[label], samples[label].items()
        if train and len(rows) <= evaluation + validation:
            raise DataError(
                f"{path} has {len(rows)} distinct usable {label} rows; evaluation takes {evaluation} and validation "
                f"{validation} of them, and at least one must be left for training"
            )
        splits["evaluation"] += rows[:evaluation]
        splits["validation"] += rows[evaluation : evaluation + validation]
        splits["train"] += rows[evaluation + validation :]
        account["labels"][label] = {
            "rows": sample.offered,
            "used": len(rows),
            "repeated": sample.repeated,
            "beyond_need": sample.offered - sample.repeated - len(rows),
            "training_rows_missing": sample.size - len(rows) if train else 0,
        }
    account["leaking"] = _drop_shared_requests(splits)
    return splits, account


def sample_user_texts(
    path: str,
    size: int,
    *,
    seed: int,
    fits: Callable[[str], bool],
    max_reject_fraction: float,
    forbidden: set[int],
) -> tuple[list[str], dict[str, Any]]:
    """Up to `size` distinct texts from a file, and the account.

    Texts whose request is among the fingerprints in `forbidden` would leak: they are left out and counted. Raises
    `DataError` for an unreadable file, too many rejected lines, or if nothing is left.
    """
    log, sample, leaking = LineLog(path), Sample[str](size, seed), 0
    for text in stream_texts(log, fits):
        key = request_key(text)
        if fingerprint(key) in forbidden:
            leaking += 1
        else:
            sample.offer(key, text)
    log.require(max_reject_fraction)
    texts = sample.items()
    if size and not texts:
        raise DataError(
            f"{path} has no usable text: of {log.lines} lines, {log.rejected} cannot be used "
            f"and {leaking} repeat other data"
        )
    account = log.as_dict() | {"used": len(texts), "repeated": sample.repeated, "leaking": leaking}
    return texts, account | {"beyond_need": sample.offered - sample.repeated - len(texts)}


def _drop_shared_requests(splits: dict[str, list[Row]]) -> int:
    """Drops rows whose request is in an earlier split, which happens only between labels; returns how many."""
    held: set[int] = set()
    dropped = 0
    for split in SPLITS:
        keys = [fingerprint(request_key(row.input)) for row in splits[split]]
        kept = [row for row, key in zip(splits[split], keys, strict=True) if key not in held]
        dropped += len(splits[split]) - len(kept)
        splits[split] = kept
        held.update(keys)
    return dropped
