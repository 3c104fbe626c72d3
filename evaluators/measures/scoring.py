"""The one scorer of generated text: tool calls, their format, their arithmetic, exact copies.

In: rows of (target, generation, label), or a JSON-lines file of them. Out: per row a `RowScore`, per group the rates of
method.md section 6 with their Wilson 95% intervals.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.readers import LABEL_NAMES, implied_label, raw_lines
from data.rows import CALL_CLOSE, CALL_OPEN, DataError
from evaluators.measures.arithmetic import equal, ratio
from evaluators.tables.statistics import wilson

MAX_LINE_BYTES = 64 << 20

RATES = ("tool_call_rate", "valid_tool_format_rate", "math_correct_rate", "copy_exact_rate")


class RowScore(NamedTuple):
    """What one generation achieved; None where the question does not arise."""

    tool_call: bool
    valid_format: bool
    math_correct: bool | None
    copy_exact: bool | None


def first_expression(text: str) -> str | None:
    """The expression of the first closed `<tool_call>calculator(EXPR)</tool_call>` in `text`, or None.

    White space around `calculator`, its parentheses and EXPR is ignored. A closing tag closes the nearest opening
    tag before it, so an expression never contains a tag. Linear in the length of `text`.
    """
    start = 0
    while (end := text.find(CALL_CLOSE, start)) >= 0:
        opening = text.rfind(CALL_OPEN, start, end)
        if opening >= 0:
            call = text[opening + len(CALL_OPEN) : end].strip()
            if call.startswith("calculator") and call.endswith(")"):
                arguments = call[len("calculator") : -1].lstrip()
                if arguments.startswith("("):
                    return arguments[1:].strip()
        start = end + len(CALL_CLOSE)
    return None


def score_row(target: str, generation: str, label: str | None) -> RowScore:
    """Score one generation against its target.

    `label` is tool, copy, tool_ood, positive or negative; with None or any other, a target that holds a tool call makes
    a tool row. `math_correct` is None on copy rows and where the target has no expression with a value; `copy_exact` is
    None except on copy rows. Never raises, whatever the texts hold.
    """
    opening = generation.find(CALL_OPEN)
    tool_call = opening >= 0
    valid_format = tool_call and generation.find(CALL_CLOSE, opening) >= 0
    if (LABEL_NAMES.get(label or "") or implied_label(target)) == "copy":
        return RowScore(tool_call, valid_format, None, generation == target)
    return RowScore(tool_call, valid_format, _math_correct(target, generation), None)


def _math_correct(target: str, generation: str) -> bool | None:
    gold_expression = first_expression(target)
    gold = None if gold_expression is None else ratio(gold_expression)
    if gold is None:
        return None
    if generation == target:
        return True
    expression = first_expression(generation)
    if expression is None:
        return False
    if expression == gold_expression:
        return True
    value = ratio(expression)
    return value is not None and equal(value, gold)


def summarise(scores: Iterable[RowScore] | Counter[RowScore]) -> dict[str, float | int | None]:
    """Rates over scores, or over counted scores, each with the ends of its Wilson 95% interval.

    Keys: `n_examples`, and each of `tool_call_rate`, `valid_tool_format_rate`, `math_correct_rate`, `copy_exact_rate`
    alone, with `_low` and with `_high`. A rate is over the rows where it is defined, and None where there is none.
    """
    counts = Counter(scores)
    result: dict[str, float | int | None] = {"n_examples": counts.total()}
    for index, name in enumerate(RATES):
        known = sum(count for score, count in counts.items() if score[index] is not None)
        true = sum(count for score, count in counts.items() if score[index])
        low, high = wilson(true, known) if known else (None, None)
        result[name] = true / known if known else None
        result[f"{name}_low"], result[f"{name}_high"] = low, high
    return result


def score_file(path: str | Path, by: str = "label") -> dict[str, dict[str, float | int | None]]:
    """`summarise` for each group of a JSON-lines file of `{input, target, generation, label}` rows.

    `by` names the column that makes the groups, sorted by name. For `label`, positive counts as tool, negative as copy,
    and a row without a label gets the one its target implies. Streams: memory does not grow with the file.

    Raises `DataError`, naming file and line, for a line that is not such a row: an unscored row would bend every rate.
    """
    counts: defaultdict[str, Counter[RowScore]] = defaultdict(Counter)
    for number, record in _records(path):
        target, generation, label = record.get("target"), record.get("generation"), record.get("label")
        if not isinstance(target, str) or not isinstance(generation, str):
            name = "generation" if isinstance(target, str) else "target"
            raise DataError(f"{path}, line {number}: {name} is {_shown(record, name)}; text is needed")
        if label is not None and not isinstance(label, str):
            raise DataError(f"{path}, line {number}: label is {_shown(record, 'label')}; text is needed")
        if by == "label":
            group = LABEL_NAMES.get(label, label) if label else implied_label(target)
        else:
            group = _group(path, number, record, by)
        counts[group][score_row(target, generation, label)] += 1
    if not counts:
        raise DataError(f"{path} has no rows to score")
    return {group: summarise(counts[group]) for group in sorted(counts)}


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
