"""A file of generations, judged by the behaviours of the settings.

In: a JSON-lines file of `{input, target, generation, label}` rows. Out: for each group of rows the rate of each
behaviour with its Wilson 95% interval.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.readers import UNLABELLED
from data.rows import DataError
from data.sources import raw_lines
from evaluators.measures.behaviours import Answer, Behaviour
from evaluators.tables.statistics import wilson

MAX_LINE_BYTES = 64 << 20
Verdicts = tuple[bool | None, ...]
"""Each behaviour's result for a row."""


def summarise(counts: Mapping[Verdicts, int], names: list[str]) -> dict[str, float | int | None]:
    """Rates over counted verdicts, each with the ends of its Wilson 95% interval.

    Keys: `n_examples`, and each `NAME_rate` with its `_low` and `_high`. A rate is over the rows to which the check
    applies, and None if there are none.
    """
    result: dict[str, float | int | None] = {"n_examples": sum(counts.values())}
    for index, name in enumerate(names):
        judged = sum(count for verdicts, count in counts.items() if verdicts[index] is not None)
        true = sum(count for verdicts, count in counts.items() if verdicts[index])
        low, high = wilson(true, judged) if judged else (None, None)
        result[f"{name}_rate"] = true / judged if judged else None
        result[f"{name}_rate_low"], result[f"{name}_rate_high"] = low, high
    return result


def score_file(
    path: str | Path, behaviours: Mapping[str, Behaviour], by: str = "label"
) -> dict[str, dict[str, float | int | None]]:
    """`summarise` for each group of the file's rows.

    `by` names the column to group by; groups are sorted by name, and rows without a label are in the group `all`. A
    check that counts tokens needs `tokens`, a list or a number, in every row. Streams: memory does not grow with the
    file.

    Raises `DataError`, naming file and line, for a line that is not such a row: skipping rows would bias every rate.
    """
    counts: defaultdict[str, Counter[Verdicts]] = defaultdict(Counter)
    checks = list(behaviours.values())
    for number, record in _records(path):
        target, generation, label = record.get("target"), record.get("generation"), record.get("label")
        if not isinstance(target, str) or not isinstance(generation, str):
            name = "generation" if isinstance(target, str) else "target"
            raise DataError(f"{path}, line {number}: {name} is {_shown(record, name)}; text is needed")
        if label is not None and not isinstance(label, str):
            raise DataError(f"{path}, line {number}: label is {_shown(record, 'label')}; text is needed")
        tokens = record.get("tokens")
        if any(check.counts_tokens for check in checks) and not isinstance(tokens, list | int):
            raise DataError(
                f"{path}, line {number}: tokens is {_shown(record, 'tokens')}; a list or a number is needed"
            )
        group = (label or UNLABELLED) if by == "label" else _group(path, number, record, by)
        length = len(tokens) if isinstance(tokens, list) else int(tokens or 0)
        answer = Answer(str(record.get("input", "")), target, label or UNLABELLED, generation, length)
        counts[group][tuple(check(answer) for check in checks)] += 1
    if not counts:
        raise DataError(f"{path} has no rows to score")
    return {group: summarise(counts[group], list(behaviours)) for group in sorted(counts)}


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(raw_lines(str(path), MAX_LINE_BYTES), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}, line {number}: longer than 64 MiB")
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        yield number, record


def _group(path: str | Path, number: int, record: dict[str, Any], by: str) -> str:
    value = record.get(by)
    if by not in record or isinstance(value, (dict, list)):
        raise DataError(
            f"{path}, line {number}: {by} is {_shown(record, by)}; rows can be grouped by a text or a number, "
            f"and this row has {', '.join(record)}"
        )
    return value if isinstance(value, str) else json.dumps(value)


def _shown(record: dict[str, Any], name: str) -> str:
    return f"{json.dumps(record[name])[:40]}" if name in record else "missing"
