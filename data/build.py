"""Writes the data of a sweep: rows to train, validate and evaluate on, text for the transcoders, and a report.

In: counts, a seed, generator options, and a user's own files where there are any. Out: a folder of
`{train,validation,evaluation}.jsonl`, `text_{train,validation}.txt` and `report.json`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.copy_grammar import copy_sentences
from data.copy_text import c4_copy_texts, shipped_copy_texts
from data.leakage import find_leaks, request_key
from data.readers import LineLog, stream_rows, stream_texts
from data.requests import RequestOptions, tool_ood_rows, tool_rows
from data.rows import DataError, Row, make_row, read_rows, sha256_of, write_lines, write_rows
from data.selection import Sample, fingerprint

COPY_SOURCES = ("shipped", "c4")
DRAWS_PER_ROW = 50

Splits = dict[str, list[Row]]


@dataclass
class _Context:
    """How long a row or text may be, in tokens with BOS and EOS; without a limit everything fits."""

    max_tokens: int | None
    count_tokens: Callable[[str], int] | None

    def fits_text(self, text: str) -> bool:
        if self.max_tokens is None:
            return True
        room = self.max_tokens - 2
        if self.count_tokens is None:
            return len(text.split()) <= room
        return self.count_tokens(text) <= room

    def fits_row(self, row: Row) -> bool:
        return self.fits_text(f"{row.input}\n{row.target}")


@dataclass
class _Draw:
    """Draws generated rows and texts that no earlier draw has given and no user's row repeats."""

    context: _Context
    taken: set[int] = field(default_factory=set)

    def rows(self, source: Iterator[Row], count: int, what: str) -> list[Row]:
        rows: list[Row] = []
        for _ in range(DRAWS_PER_ROW * count + 1000):
            if len(rows) == count:
                return rows
            row = next(source, None)
            if row is None:
                break
            key = fingerprint(request_key(row.input))
            if key not in self.taken and self.context.fits_row(row):
                self.taken.add(key)
                rows.append(row)
        if len(rows) == count:
            return rows
        raise DataError(
            f"only {len(rows)} of {count} distinct {what} rows could be made within {self.context.max_tokens or 'any'} "
            "tokens; ask for fewer rows, a wider range of operands or a longer context"
        )


def build_dataset(
    folder: Path,
    *,
    seed: int,
    tool_rows: int,
    copy_rows: int,
    validation_rows: int,
    eval_rows: int,
    text_train_lines: int,
    text_validation_lines: int,
    rows_file: str | None = None,
    text_train_file: str | None = None,
    text_validation_file: str | None = None,
    copy_source: str = "shipped",
    max_reject_fraction: float = 0.05,
    max_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    operators: str = "+-*/",
    operand_min: int = 1,
    operand_max: int = 999,
    ood_operand_min: int = 1000,
    ood_operand_max: int = 99999,
    decimals: bool = False,
    negatives: bool = False,
    parentheses: bool = False,
) -> dict[str, Any]:
    """Write a sweep's data into `folder` and return the report, which is also written as `report.json`.

    The train split has `tool_rows` tool and `copy_rows` copy rows, the validation split `validation_rows` rows,
    half of each; the evaluation split `eval_rows` rows of each of tool, copy and tool_ood. Text files have half
    requests and half copy sentences. Generated data is byte-identical for a seed on any machine.

    `rows_file` (JSON lines) replaces the generated rows: they are split by a hash of seed and request, so that
    the same file always gives the same splits; tool_ood rows are generated when it has none. `text_train_file`
    and `text_validation_file` replace the text; with the first alone, validation lines come out of it too.
    Lines of a user's file that would leak are left out of the less precious side (evaluation goes before
    validation before training, rows before text) and counted in the report.

    `max_tokens` is the context in tokens, BOS and EOS included, counted by `count_tokens`.

    Raises `DataError` when a file cannot be read, has more than `max_reject_fraction` unusable lines or too few
    rows, or when settings contradict each other.
    """
    if copy_source not in COPY_SOURCES:
        raise DataError(f"copy_source is {copy_source!r}; allowed are {' and '.join(COPY_SOURCES)}")
    if text_validation_file and not text_train_file:
        raise DataError("text_validation_file is given without text_train_file; give both or the second alone")
    options = RequestOptions(
        operators, operand_min, operand_max, ood_operand_min, ood_operand_max, decimals, negatives, parentheses
    )
    folder = Path(folder)
    context = _Context(max_tokens, count_tokens)
    draw = _Draw(context)
    copies = _copy_rows(seed, copy_source)
    sizes = {
        "tool": (eval_rows, validation_rows - validation_rows // 2, tool_rows),
        "copy": (eval_rows, validation_rows // 2, copy_rows),
        "tool_ood": (eval_rows, 0, 0),
    }
    report: dict[str, Any] = {
        "seed": seed,
        "rows": rows_file or "generated",
        "text": text_train_file or "generated",
        "copy_source": copy_source,
        "files": {},
        "left_out": Counter(),
    }
    splits = (
        _user_splits(rows_file, sizes, seed, context, max_reject_fraction, report)
        if rows_file
        else {"evaluation": [], "validation": [], "train": []}
    )
    draw.taken.update(fingerprint(request_key(row.input)) for rows in splits.values() for row in rows)
    for label, counts in sizes.items():
        if any(row.label == label for row in splits["evaluation"]) or (rows_file and label != "tool_ood"):
            continue
        for split, count in zip(("evaluation", "validation", "train"), counts, strict=True):
            source = copies if label == "copy" else _requests(seed, label, split, options)
            splits[split] += draw.rows(source, count, label)
    for split, rows in splits.items():
        if split != "evaluation":
            random.Random(f"{seed}/order/{split}").shuffle(rows)
        write_rows(folder / f"{split}.jsonl", rows)

    if text_train_file:
        texts = _user_texts(
            text_train_file,
            text_validation_file,
            (text_train_lines, text_validation_lines),
            splits,
            seed,
            context,
            max_reject_fraction,
            report,
        )
    else:
        texts = {}
        for split, count in (("validation", text_validation_lines), ("train", text_train_lines)):
            requests = draw.rows(_requests(seed, "tool", f"text_{split}", options), count // 2, "request")
            sentences = draw.rows(copies, count - count // 2, "copy")
            texts[split] = [row.input for row in requests + sentences]
            random.Random(f"{seed}/order/text_{split}").shuffle(texts[split])
    for split, lines in texts.items():
        write_lines(folder / f"text_{split}.txt", lines)

    report["left_out"] = dict(report["left_out"])
    report["counts"], report["leakage"], report["sha256"] = _check(folder, report["left_out"])
    write_lines(folder / "report.json", [json.dumps(report, indent=2, ensure_ascii=False)])
    return report


def _requests(seed: int, label: str, purpose: str, options: RequestOptions) -> Iterator[Row]:
    rng = random.Random(f"{seed}/{label}/{purpose}")
    return tool_ood_rows(rng, options) if label == "tool_ood" else tool_rows(rng, options)


def _copy_rows(seed: int, copy_source: str) -> Iterator[Row]:
    """Copy rows from one stream: the shipped sentences in seeded order, then the grammar's; or C4's."""
    texts: Iterable[str]
    if copy_source == "c4":
        texts = c4_copy_texts()
    else:
        shipped = shipped_copy_texts()
        random.Random(f"{seed}/shipped").shuffle(shipped)
        texts = shipped
    for text in texts:
        yield make_row(text, text, "copy")
    for text in copy_sentences(random.Random(f"{seed}/copy")):
        yield make_row(text, text, "copy")


def _user_splits(
    path: str,
    sizes: dict[str, tuple[int, int, int]],
    seed: int,
    context: _Context,
    max_reject_fraction: float,
    report: dict[str, Any],
) -> Splits:
    """A user's rows, split; what is rejected, repeated, unused or leaking is noted in `report`."""
    log = LineLog(path)
    samples: dict[str, Sample[Row]] = {label: Sample(sum(counts), seed) for label, counts in sizes.items()}
    for row in stream_rows(log, context.fits_row):
        samples[row.label].offer(request_key(row.input), row)
    log.require(max_reject_fraction)
    splits: Splits = {"evaluation": [], "validation": [], "train": []}
    usage = {}
    for label, (evaluation, validation, train) in sizes.items():
        sample, rows = samples[label], samples[label].items()
        least = evaluation + validation + min(train, 1)
        if len(rows) < least and label != "tool_ood":
            raise DataError(
                f"{path} has {len(rows)} distinct usable {label} rows; {evaluation} for evaluation, {validation} for "
                f"validation and at least {min(train, 1)} for training are needed"
            )
        splits["evaluation"] += rows[:evaluation]
        splits["validation"] += rows[evaluation : evaluation + validation]
        splits["train"] += rows[evaluation + validation :]
        usage[label] = {
            "rows": sample.offered,
            "used": len(rows),
            "repeated": sample.repeated,
            "beyond_need": sample.offered - sample.repeated - len(rows),
            "training_rows_missing": sum(sizes[label]) - len(rows) if label != "tool_ood" else 0,
        }
    held: set[int] = set()
    for split, rows in splits.items():
        keys = [fingerprint(request_key(row.input)) for row in rows]
        splits[split] = [row for row, key in zip(rows, keys, strict=True) if key not in held]
        if leaking := len(rows) - len(splits[split]):
            report["left_out"][f"{split} rows that repeat a row of another split"] = leaking
        held.update(keys)
    report["files"]["rows_file"] = log.as_dict() | {"usage": usage}
    return splits


def _user_texts(
    train_file: str,
    validation_file: str | None,
    lines: tuple[int, int],
    splits: Splits,
    seed: int,
    context: _Context,
    max_reject_fraction: float,
    report: dict[str, Any],
) -> dict[str, list[str]]:
    """A user's texts, validation first, so that training text gives way to it."""
    keys = {split: {fingerprint(request_key(row.input)) for row in rows} for split, rows in splits.items()}

    def sample(path: str, name: str, size: int, forbidden: set[int]) -> list[str]:
        log, chosen, leaking = LineLog(path), Sample[str](size, seed), 0
        for text in stream_texts(log, context.fits_text):
            key = request_key(text)
            if fingerprint(key) in forbidden:
                leaking += 1
            else:
                chosen.offer(key, text)
        log.require(max_reject_fraction)
        texts = chosen.items()
        if not texts:
            raise DataError(f"{path}: no line is left after {log.rejected} rejected and {leaking} leaking ones")
        usage = {"used": len(texts), "repeated": chosen.repeated, "leaking": leaking}
        report["files"][name] = log.as_dict() | {"usage": usage}
        if leaking:
            report["left_out"][f"{name} lines that repeat rows or validation text"] = leaking
        return texts

    train_lines, validation_lines = lines
    if validation_file:
        validation = sample(
            validation_file, "text_validation_file", validation_lines, keys["train"] | keys["evaluation"]
        )
        shown = {fingerprint(request_key(text)) for text in validation}
        train = sample(train_file, "text_train_file", train_lines, keys["validation"] | keys["evaluation"] | shown)
        return {"validation": validation, "train": train}
    both = sample(train_file, "text_train_file", sum(lines), set().union(*keys.values()))
    if len(both) <= validation_lines:
        raise DataError(f"{train_file} has {len(both)} usable texts; more than {validation_lines} are needed")
    return {"validation": both[:validation_lines], "train": both[validation_lines:]}


def _check(folder: Path, left_out: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Counts, leak check and hashes of what now lies in `folder`, read back from the files themselves."""
    counts: dict[str, Any] = {}
    sides: dict[str, list[str]] = {}
    for split, side in (("train", "training"), ("validation", "validation"), ("evaluation", "evaluation")):
        rows = read_rows(folder / f"{split}.jsonl")
        counts[split] = dict(sorted(Counter(row.label for row in rows).items()))
        sides[side] = [row.input for row in rows]
        if split != "evaluation":
            lines = (folder / f"text_{split}.txt").read_text(encoding="utf-8").split("\n")[:-1]
            counts[f"text_{split}"] = len(lines)
            sides[side] += lines
    leaks = find_leaks(sides)
    names = [f"{split}.jsonl" for split in ("train", "validation", "evaluation")]
    names += ["text_train.txt", "text_validation.txt"]
    leakage = {
        "ok": not any(leak["same_request"] for leak in leaks.values()),
        "pairs": leaks,
        "left_out": sum(left_out.values()),
    }
    return counts, leakage, {name: sha256_of(folder / name) for name in names}
