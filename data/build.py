"""Writes a sweep's data: rows for training, validation and evaluation, text for the transcoders, and a report.

In: counts, a seed, generator options, and a user's own files if there are any. Out: a folder of
`{train,validation,evaluation}.jsonl`, `text_{train,validation}.txt` and `report.json`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import requests
from data.copy_grammar import copy_sentences
from data.copy_text import c4_copy_texts, shipped_copy_texts
from data.leakage import find_leaks, request_key
from data.rows import DataError, Row, make_row, read_lines, read_rows, sha256_of, write_lines, write_rows
from data.selection import fingerprint
from data.user_files import SPLITS, sample_user_texts, split_user_rows

COPY_SOURCES = ("shipped", "c4")
TEXT_SPLITS = ("validation", "train")
DRAWS_PER_ROW = 50
"""Rows to generate per row used before giving up: repeats are rare unless there are few operands."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(requests.RequestOptions):
    """What a sweep's data consists of: counts, a user's own files instead of generated rows and text, and the
    generator's options, inherited.

    `max_tokens` is the model's context, including BOS and EOS; `count_tokens` counts a text's tokens without them.
    """

    seed: int
    tool_rows: int
    copy_rows: int
    validation_rows: int
    eval_rows: int
    text_train_lines: int
    text_validation_lines: int
    rows_file: str | None = None
    text_train_file: str | None = None
    text_validation_file: str | None = None
    copy_source: str = "shipped"
    max_reject_fraction: float = 0.05
    max_tokens: int | None = None
    count_tokens: Callable[[str], int] | None = None


def build_dataset(folder: Path, options: DataOptions) -> dict[str, Any]:
    """Write a sweep's data into `folder` and return the report, which is also written as `report.json`.

    The train split has `tool_rows` tool and `copy_rows` copy rows, the validation split `validation_rows` rows, half
    of each kind, and the evaluation split `eval_rows` rows each of tool, copy and tool_ood. Text files are half
    requests, half copy sentences. For a given seed, generated data is byte-identical on any machine.

    `rows_file` (JSON lines) replaces the generated rows, see `data.user_files.split_user_rows`; tool_ood rows are
    generated if it has none. `text_train_file` and `text_validation_file` replace the text; with only the first, the
    validation lines are taken from it too. Lines of a user's files that would leak are left out on the less valuable
    side (evaluation is kept over validation over training, rows over text) and counted in the report.

    The report has `files` (an account of each of the user's files), `counts` per split and label, `leakage` (`ok`,
    `left_out`, and what each pair of training, validation and evaluation shares), and the `sha256` of each file.

    Raises `DataError` if a file cannot be read, has more than `max_reject_fraction` unusable lines or too few rows, or
    if settings contradict each other.
    """
    if options.copy_source not in COPY_SOURCES:
        raise DataError(f"copy_source is {options.copy_source!r}; allowed are {' and '.join(COPY_SOURCES)}")
    if options.text_validation_file and not options.text_train_file:
        raise DataError(
            f"text_validation_file is {options.text_validation_file} but text_train_file is not set; set both"
        )
    folder = Path(folder)
    fits = _context_check(options.max_tokens, options.count_tokens)
    reading: dict[str, Any] = {"seed": options.seed, "fits": fits, "max_reject_fraction": options.max_reject_fraction}
    sizes = {
        "tool": (options.eval_rows, options.validation_rows - options.validation_rows // 2, options.tool_rows),
        "copy": (options.eval_rows, options.validation_rows // 2, options.copy_rows),
        "tool_ood": (options.eval_rows, 0, 0),
    }
    files: dict[str, Any] = {}
    generator = _Generator(options, fits)

    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    generated = set(sizes)
    if options.rows_file:
        splits, files["rows_file"] = split_user_rows(options.rows_file, sizes, **reading)
        generator.avoid(row.input for rows in splits.values() for row in rows)
        has_ood = any(row.label == "tool_ood" for row in splits["evaluation"])
        generated = set() if has_ood else {"tool_ood"}
    for label in sorted(generated):
        for split, count in zip(SPLITS, sizes[label], strict=True):
            splits[split] += generator.rows(label, split, count)
    for split in ("validation", "train"):
        random.Random(f"{options.seed}/order/{split}").shuffle(splits[split])

    lines = {"validation": options.text_validation_lines, "train": options.text_train_lines}
    if options.text_train_file:
        paths = {"validation": options.text_validation_file, "train": options.text_train_file}
        texts = _user_texts(paths, lines, splits, files, reading)
    else:
        texts = {split: generator.texts(f"text_{split}", lines[split]) for split in TEXT_SPLITS}

    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    for split in TEXT_SPLITS:
        write_lines(folder / f"text_{split}.txt", texts[split])
    report: dict[str, Any] = {
        "seed": options.seed,
        "rows": options.rows_file or "generated",
        "text": options.text_train_file or "generated",
        "copy_source": options.copy_source,
        "files": files,
        **_inspect(folder),
    }
    report["leakage"]["left_out"] = sum(account["leaking"] for account in files.values())
    write_lines(folder / "report.json", [json.dumps(report, indent=2, ensure_ascii=False)])
    return report


class _Generator:
    """Draws rows and texts that have not been drawn before and were not passed to `avoid`.

    Evaluation is drawn before validation, and validation before training, so that asking for more of a later one does
    not change an earlier one.
    """

    def __init__(self, options: DataOptions, fits: Callable[[str], bool]) -> None:
        self.seed, self.options, self.fits = options.seed, options, fits
        self.copies = _copy_rows(options.seed, options.copy_source)
        self.taken: set[int] = set()

    def avoid(self, texts: Iterable[str]) -> None:
        """Excludes these requests from later draws."""
        self.taken.update(fingerprint(request_key(text)) for text in texts)

    def rows(self, label: str, purpose: str, count: int) -> list[Row]:
        """`count` rows of a label; raises `DataError` if the options do not allow that many distinct ones."""
        rng = random.Random(f"{self.seed}/{label}/{purpose}")
        source = {
            "tool": requests.tool_rows(rng, self.options),
            "tool_ood": requests.tool_ood_rows(rng, self.options),
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
            row = next(source)
            key = fingerprint(request_key(row.input))
            if key not in self.taken and self.fits(f"{row.input}\n{row.target}"):
                self.taken.add(key)
                rows.append(row)
        return rows

    def texts(self, purpose: str, count: int) -> list[str]:
        """`count` texts, half requests and half copy sentences, shuffled."""
        rows = self.rows("tool", purpose, count // 2) + self.rows("copy", purpose, count - count // 2)
        random.Random(f"{self.seed}/order/{purpose}").shuffle(rows)
        return [row.input for row in rows]


def _copy_rows(seed: int, copy_source: str) -> Iterator[Row]:
    """An endless stream of copy rows: from C4, or the shipped sentences in seeded order and then the grammar's."""
    if copy_source == "c4":
        yield from (make_row(text, text, "copy") for text in c4_copy_texts())
    else:
        shipped = shipped_copy_texts()
        random.Random(f"{seed}/copy/shipped").shuffle(shipped)
        yield from (make_row(text, text, "copy") for text in shipped)
        yield from (make_row(text, text, "copy") for text in copy_sentences(random.Random(f"{seed}/copy/grammar")))


def _context_check(max_tokens: int | None, count_tokens: Callable[[str], int] | None) -> Callable[[str], bool]:
    """A function that says whether a text fits the context together with BOS and EOS."""
    if max_tokens is None:
        return lambda text: True
    if count_tokens is None:
        raise DataError("max_tokens is set without count_tokens, so the length of a text cannot be measured")
    room = max_tokens - 2

    def fits(text: str) -> bool:
        # No tokenizer in use gives more tokens than bytes, so most texts need no counting.
        return len(text.encode("utf-8")) <= room or count_tokens(text) <= room

    return fits


def _user_texts(
    paths: dict[str, str | None],
    lines: dict[str, int],
    splits: dict[str, list[Row]],
    files: dict[str, Any],
    reading: dict[str, Any],
) -> dict[str, list[str]]:
    """Texts from a user's files, validation first so that it takes precedence over training; adds their accounts to
    `files`."""
    keys = {split: {fingerprint(request_key(row.input)) for row in rows} for split, rows in splits.items()}
    if not paths["validation"]:
        both, files["text_train_file"] = sample_user_texts(
            str(paths["train"]), sum(lines.values()), forbidden=set().union(*keys.values()), **reading
        )
        if len(both) <= lines["validation"]:
            raise DataError(
                f"{paths['train']} has {len(both)} usable texts; validation takes {lines['validation']} of them, "
                "and at least one must be left for training"
            )
        return {"validation": both[: lines["validation"]], "train": both[lines["validation"] :]}
    texts: dict[str, list[str]] = {}
    forbidden = {"validation": keys["train"] | keys["evaluation"], "train": keys["validation"] | keys["evaluation"]}
    for split in TEXT_SPLITS:
        texts[split], files[f"text_{split}_file"] = sample_user_texts(
            str(paths[split]), lines[split], forbidden=forbidden[split], **reading
        )
        forbidden["train"] |= {fingerprint(request_key(text)) for text in texts[split]}
    return texts


def _inspect(folder: Path) -> dict[str, Any]:
    """Counts, leak check and hashes of the data in `folder`, read back from the files themselves."""
    counts: dict[str, Any] = {}
    sides: dict[str, list[str]] = {}
    for split in SPLITS:
        rows = read_rows(folder / f"{split}.jsonl")
        counts[split] = dict(sorted(Counter(row.label for row in rows).items()))
        sides["training" if split == "train" else split] = [row.input for row in rows]
    for split in TEXT_SPLITS:
        texts = read_lines(folder / f"text_{split}.txt")
        counts[f"text_{split}"] = len(texts)
        sides["training" if split == "train" else split] += texts
    leaks = find_leaks(sides)
    ok = not any(leak["same_request"] for leak in leaks.values())
    names = [f"{split}.jsonl" for split in SPLITS] + [f"text_{split}.txt" for split in TEXT_SPLITS]
    return {
        "counts": counts,
        "leakage": {"ok": ok, "pairs": leaks},
        "sha256": {name: sha256_of(folder / name) for name in names},
    }
