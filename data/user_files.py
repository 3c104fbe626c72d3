"""A user's own rows and texts, split or sampled in one pass.

In: paths and the desired sizes. Out: rows per split, or texts, each with an account of the file for the report: rows
that were rejected (and why), repeated, not needed, and left out because they would leak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from data.leakage import text_key
from data.readers import Log, Reading, stream_rows, stream_texts
from data.rows import DataError, Row
from data.selection import Sample, fingerprint

SPLITS = ("evaluation", "validation", "train")
MOST_LABELS = 12
SHOWN = 80
"""Characters of a row that is quoted."""

Repeated = Literal["exact", "folded"]
"""Which rows of a label are copies: those equal in input, target and prompt, or those whose inputs differ at most in
case and spacing."""


class Sizes(NamedTuple):
    """Desired rows: per label for evaluation, in total for validation and for training."""

    evaluation: int
    validation: int
    train: int


class UserRows(NamedTuple):
    """Rows by split, the labels of the evaluation rows in file order, and an account of each file by its key in the
    settings."""

    splits: dict[str, list[Row]]
    labels: list[str]
    accounts: dict[str, dict[str, Any]]


def split_user_rows(
    rows_file: str,
    evaluation_file: str | None,
    sizes: Sizes,
    *,
    seed: int,
    reading: Reading,
    max_reject_fraction: float,
    repeated: Repeated = "exact",
) -> UserRows:
    """Rows of one file, or of one file for training and validation and another for evaluation.

    Rows are ranked by a hash of seed and input; for each label the first go to evaluation, the next to validation and
    the rest to training. Validation and training get equal shares of each label as far as possible. So a file and a
    seed always give the same splits, whatever the order of its rows. Of copies (`repeated`) the first is kept. Rows
    whose inputs differ at most in case and spacing have the same rank; if they would end up in two splits, those for
    the later split are left out. If a label has too few rows, evaluation takes precedence over validation, and
    validation over training, and the account says what is missing.

    Raises `DataError` for an unreadable file, too many rejected rows, more than 12 labels, or too few rows to split.
    """
    accounts: dict[str, dict[str, Any]] = {}
    held_out: dict[str, Sample[Row]] = {}
    if evaluation_file is not None:
        sampling = Sampling(sizes.evaluation, seed, repeated)
        held_out, log, _ = _samples(evaluation_file, sampling, reading)
        log.require(max_reject_fraction)
        accounts["evaluation_file"] = log.as_dict() | _copies(held_out, repeated)
    forbidden = {fingerprint(text_key(row.input)) for sample in held_out.values() for row in sample.items()}
    most = sum(sizes) if evaluation_file is None else sizes.validation + sizes.train
    samples, log, leaking = _samples(rows_file, Sampling(most, seed, repeated), reading, forbidden)
    log.require(max_reject_fraction)
    accounts["rows_file"] = log.as_dict() | _copies(samples, repeated)

    ranked = {label: sample.items() for label, sample in samples.items()}
    evaluation = {label: sample.items()[: sizes.evaluation] for label, sample in held_out.items()}
    if evaluation_file is None:
        evaluation = {label: rows[: sizes.evaluation] for label, rows in ranked.items()}
        ranked = {label: rows[sizes.evaluation :] for label, rows in ranked.items()}
    counts = [len(rows) for rows in ranked.values()]
    validation = shares(sizes.validation, [max(count - 1, 0) for count in counts])
    train = shares(sizes.train, [count - taken for count, taken in zip(counts, validation, strict=True)])
    if not sum(validation) or not sum(train):
        total = sum(len(sample.items()) for sample in samples.values())
        spent = "" if evaluation_file else f"; evaluation takes {total - sum(counts)} of them"
        raise DataError(
            f"{rows_file} has {total} distinct usable rows{spent}, but validation and training need one each: "
            "lower data.eval_rows, or give more rows"
        )
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for rows in evaluation.values():
        splits["evaluation"] += rows
    for rows, validation_count, train_count in zip(ranked.values(), validation, train, strict=True):
        splits["validation"] += rows[:validation_count]
        splits["train"] += rows[validation_count : validation_count + train_count]
    here_alone = SPLITS if evaluation_file is None else SPLITS[1:]
    chosen = Counter(row.label for split in here_alone for row in splits[split])
    dropped = _drop_shared_inputs(splits)
    used = Counter(row.label for split in here_alone for row in splits[split])
    accounts["rows_file"]["labels"] = {
        label: {
            "rows": sample.offered,
            "used": used[label],
            "repeated": sample.repeated,
            "beyond_need": sample.offered - sample.repeated - chosen[label],
        }
        for label, sample in samples.items()
    }
    accounts["rows_file"]["validation_rows_missing"] = sizes.validation - sum(validation)
    accounts["rows_file"]["training_rows_missing"] = sizes.train - sum(train)
    accounts["rows_file"]["leaking"] = leaking + dropped
    if empty := [split for split in SPLITS if not splits[split]]:
        raise DataError(f"{rows_file}: every row for {empty[0]} occurs among those for evaluation or validation too")
    return UserRows(splits, list(dict.fromkeys(row.label for row in splits["evaluation"])), accounts)


def sample_user_rows(
    path: str, most: int, *, seed: int, reading: Reading, max_reject_fraction: float
) -> tuple[list[Row], dict[str, Any]]:
    """At most `most` distinct rows of a file, or one of each label, in equal shares; and an account of the file.

    Raises `DataError` for an unreadable file, too many rejected rows, or more than 12 labels.
    """
    samples, log, _ = _samples(path, Sampling(most, seed, "exact"), reading)
    log.require(max_reject_fraction)
    rows_of = {label: sample.items() for label, sample in samples.items()}
    counts = shares(max(most, len(rows_of)), [len(rows) for rows in rows_of.values()])
    rows = [row for items, count in zip(rows_of.values(), counts, strict=True) for row in items[:count]]
    return rows, log.as_dict()


def shares(total: int, available: Sequence[int]) -> list[int]:
    """`total` split into equal shares of at most `available`; others make up for a shortfall, the first a remainder.

    >>> shares(10, [2, 9, 9])
    [2, 4, 4]
    """
    result = [0] * len(available)
    order = sorted(range(len(available)), key=lambda place: (available[place], -place))
    for done, place in enumerate(order):
        result[place] = min(available[place], (total - sum(result)) // (len(order) - done))
    return result


class Sampling(NamedTuple):
    """How many rows to sample per label, and which rows count as copies."""

    size: int
    seed: int
    repeated: Repeated


def _samples(
    path: str, sampling: Sampling, reading: Reading, forbidden: set[int] | frozenset[int] = frozenset()
) -> tuple[dict[str, Sample[Row]], Log, int]:
    """A sample of each label's rows, in the order in which labels appear, the file's log, and the number of rows left
    out because they would leak: the fingerprint of their input is in `forbidden`."""
    log, samples, leaking = Log(path), dict[str, Sample[Row]](), 0
    for row in stream_rows(log, reading):
        key = text_key(row.input)
        if fingerprint(key) in forbidden:
            leaking += 1
            continue
        if row.label not in samples and len(samples) == MOST_LABELS:
            raise DataError(
                f"{path} has more than {MOST_LABELS} labels, such as {', '.join(list(samples)[:3])}: too many subsets "
                "to evaluate one by one; data.columns.label names the column that they are read from"
            )
        exact = "" if sampling.repeated == "folded" else repr((row.input, row.target, row.prompt))
        samples.setdefault(row.label, Sample(sampling.size, sampling.seed)).offer(key, row, exact)
    return samples, log, leaking


def _copies(samples: dict[str, Sample[Row]], repeated: Repeated) -> dict[str, Any]:
    """For the account: how many rows were left out as copies, by which rule, and one of them."""
    first = next((sample.copy for sample in samples.values() if sample.copy is not None), None)
    example = None if first is None else {"input": first.input[:SHOWN], "target": first.target[:SHOWN]}
    count = sum(sample.repeated for sample in samples.values())
    return {"repeated": count, "repeated_rule": repeated, "repeated_example": example}


def sample_user_texts(
    path: str,
    size: int,
    *,
    seed: int,
    reading: Reading,
    max_reject_fraction: float,
    forbidden: set[int],
    key: Callable[[str], str],
) -> tuple[list[str], dict[str, Any]]:
    """Up to `size` distinct texts from a file, and the account.

    Texts whose `key` is among the fingerprints in `forbidden` would leak: they are left out and counted. Raises
    `DataError` for an unreadable file, too many rejected lines, or if nothing is left.
    """
    log, sample, leaking = Log(path), Sample[str](size, seed), 0
    for text in stream_texts(log, reading.problem):
        if fingerprint(key(text)) in forbidden:
            leaking += 1
        else:
            sample.offer(key(text), text)
    log.require(max_reject_fraction)
    texts = sample.items()
    if size and not texts:
        raise DataError(
            f"{path} has no usable text: of {log.lines} lines, {log.rejected} cannot be used "
            f"and {leaking} repeat other data"
        )
    account = log.as_dict() | {"used": len(texts), "repeated": sample.repeated, "leaking": leaking}
    return texts, account | {"beyond_need": sample.offered - sample.repeated - len(texts)}


def _drop_shared_inputs(splits: dict[str, list[Row]]) -> int:
    """Drops rows whose input is in an earlier split, which happens only between labels; returns how many."""
    inputs: set[int] = set()
    dropped = 0
    for split in SPLITS:
        keys = [fingerprint(text_key(row.input)) for row in splits[split]]
        unique_rows = [row for row, key in zip(splits[split], keys, strict=True) if key not in inputs]
        dropped += len(splits[split]) - len(unique_rows)
        splits[split] = unique_rows
        inputs.update(keys)
    return dropped
