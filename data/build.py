"""Writes a sweep's data: rows for training, validation and evaluation, text for the transcoders, and a report.

In: counts, a seed, generator options, and a user's own files if there are any. Out: a folder of
`{train,validation,evaluation}.jsonl`, `text_{train,validation}.txt` and `report.json`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.leakage import find_leaks, request_key, text_key
from data.readers import Reading
from data.renderings import Renderings
from data.requests.draw import LABELS, Generator
from data.requests.generator import RequestOptions
from data.rows import DataError, Row, read_lines, read_rows, sha256_of, write_lines, write_rows
from data.selection import fingerprint
from data.user_files import SPLITS, Repeated, Sizes, sample_user_texts, split_user_rows

TEXT_SPLITS = ("validation", "train")
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class DataOptions(RequestOptions):
    """What a sweep's data consists of: counts, a user's own files (instead of generated rows and text), and the
    generator's options, inherited. `reading` is how a user's rows are read, and the format of the rows written."""

    seed: int
    train_rows: int
    validation_rows: int
    eval_rows: int
    text_train_lines: int
    text_validation_lines: int
    rows_file: str | None = None
    evaluation_file: str | None = None
    text_train_file: str | None = None
    text_validation_file: str | None = None
    copy_source: str = "shipped"
    max_reject_fraction: float = 0.05
    repeated: Repeated = "exact"
    reading: Reading = field(default_factory=Reading)


def build_dataset(folder: Path, options: DataOptions) -> dict[str, Any]:
    """Write a sweep's data into `folder` and return the report, which is also written as `report.json`.

    The train split has `train_rows` rows, the validation split `validation_rows`, both in equal parts of each label,
    and the evaluation split `eval_rows` rows of each label. Without a user's rows, rows and text are generated, see
    `data.requests`; for a given seed, generated data is byte-identical on any machine.

    `rows_file` and `evaluation_file` replace the generated rows, see `data.user_files.split_user_rows`; then the only
    text is the rows' own, unless `text_train_file` and `text_validation_file` are given; with only the first, the
    validation lines are taken from it too. Lines of a user's files that would leak are left out on the less valuable
    side (evaluation is kept over validation over training, rows over text) and counted in the report.

    The report has `labels` in their order, `files` (an account of each of the user's files), `counts` per split and
    label, `without_target` per split, `leakage` (`ok`, `left_out`, and what each pair of training, validation and
    evaluation shares), and the `sha256` of each file. For generated chats it also has `rendering` and `notes`, see
    `data.renderings`; a user's files have these in their accounts.

    Raises `DataError` if a file cannot be read, has more than `max_reject_fraction` unusable lines or too few rows, or
    if settings contradict each other.
    """
    for second, first in (("text_validation_file", "text_train_file"), ("evaluation_file", "rows_file")):
        if getattr(options, second) and not getattr(options, first):
            raise DataError(f"{second} is {getattr(options, second)} but {first} is not set; set both")
    folder = Path(folder)
    reading: dict[str, Any] = {
        "seed": options.seed,
        "reading": options.reading,
        "max_reject_fraction": options.max_reject_fraction,
    }
    # The identity of generated exercises does not apply to a user's own prompts.
    key: Callable[[str], str] = text_key if options.rows_file else request_key
    files: dict[str, Any] = {}
    generated = Renderings(options.reading.chat.rendering) if options.reading.chat else None
    sizes, lines = _sizes(options)
    texts: dict[str, list[str]] = {split: [] for split in TEXT_SPLITS}
    if options.rows_file:
        sources = (options.rows_file, options.evaluation_file, sizes)
        splits, labels, files = split_user_rows(*sources, **reading, repeated=options.repeated)
    else:
        generator = Generator(options, options.seed, options.copy_source, options.reading.problem)
        splits, labels = generator.splits(*sizes), list(LABELS)
        if not options.text_train_file:
            texts = {split: generator.texts(f"text_{split}", lines[split]) for split in TEXT_SPLITS}
        splits = {split: [_as_read(row, options.reading, generated) for row in rows] for split, rows in splits.items()}
    for split in ("validation", "train"):
        random.Random(f"{options.seed}/order/{split}").shuffle(splits[split])
    if options.text_train_file:
        if not options.rows_file:
            key = _key_among(splits)
        paths = {"validation": options.text_validation_file, "train": options.text_train_file}
        texts = _user_texts(paths, lines, splits, files, {**reading, "key": key})

    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    for split in TEXT_SPLITS:
        write_lines(folder / f"text_{split}.txt", texts[split])
    report: dict[str, Any] = {
        "seed": options.seed,
        "rows": options.rows_file or "generated",
        "text": options.text_train_file or ("the rows" if options.rows_file else "generated"),
        "copy_source": options.copy_source,
        "labels": labels,
        "files": files,
        **({"rendering": generated.as_dict(), "notes": generated.sentences()} if generated and generated.rows else {}),
        **_inspect(folder, key),
    }
    report["leakage"]["left_out"] = sum(account.get("leaking", 0) for account in files.values())
    write_lines(folder / REPORT, [json.dumps(report, indent=2, ensure_ascii=False)])
    return report


def _sizes(options: DataOptions) -> tuple[Sizes, dict[str, int]]:
    """The rows wanted, and the text lines by split."""
    rows = Sizes(options.eval_rows, options.validation_rows, options.train_rows)
    return rows, {"validation": options.text_validation_lines, "train": options.text_train_lines}


def _as_read(row: Row, reading: Reading, rendered: Renderings | None) -> Row:
    """A generated row in the format of the settings."""
    if reading.chat is None or rendered is None:
        return replace(row, separator=reading.separator)
    rendering = reading.chat.render_text(row.input, row.target)
    rendered.add(f"the row {row.input[:40]!r}", rendering)
    return rendering.row(row.input, row.label)


def _key_among(splits: Mapping[str, Sequence[Row]]) -> Callable[[str], str]:
    """Identifies a user's text among generated rows: by its request if a row makes the same one, else by the text."""
    requests = {request_key(row.input) for rows in splits.values() for row in rows}

    def key(text: str) -> str:
        request = request_key(text)
        return request if request in requests else text_key(text)

    return key


def _user_texts(
    paths: dict[str, str | None],
    lines: dict[str, int],
    splits: dict[str, list[Row]],
    files: dict[str, Any],
    reading: dict[str, Any],
) -> dict[str, list[str]]:
    """Texts from a user's files, validation first so that it takes precedence over training; adds their accounts to
    `files`."""
    key = reading["key"]
    keys = {split: {fingerprint(key(row.input)) for row in rows} for split, rows in splits.items()}
    if not paths["validation"]:
        usable, files["text_train_file"] = sample_user_texts(
            str(paths["train"]), sum(lines.values()), forbidden=set().union(*keys.values()), **reading
        )
        if len(usable) <= lines["validation"]:
            raise DataError(
                f"{paths['train']} has {len(usable)} usable texts; validation takes {lines['validation']} of them, "
                "and at least one must be left for training"
            )
        return {"validation": usable[: lines["validation"]], "train": usable[lines["validation"] :]}
    texts: dict[str, list[str]] = {}
    forbidden = {"validation": keys["train"] | keys["evaluation"], "train": keys["validation"] | keys["evaluation"]}
    for split in TEXT_SPLITS:
        texts[split], files[f"text_{split}_file"] = sample_user_texts(
            str(paths[split]), lines[split], forbidden=forbidden[split], **reading
        )
        forbidden["train"] |= {fingerprint(key(text)) for text in texts[split]}
    return texts


def _inspect(folder: Path, key: Callable[[str], str]) -> dict[str, Any]:
    """Counts, leak check and hashes of the data in `folder`, read back from the files themselves."""
    counts: dict[str, Any] = {}
    without_target: dict[str, int] = {}
    sides: dict[str, list[str]] = {}
    for split in SPLITS:
        rows = read_rows(folder / f"{split}.jsonl")
        counts[split] = dict(sorted(Counter(row.label for row in rows).items()))
        without_target[split] = sum(not row.target for row in rows)
        sides["training" if split == "train" else split] = [row.input for row in rows]
    for split in TEXT_SPLITS:
        texts = read_lines(folder / f"text_{split}.txt")
        counts[f"text_{split}"] = len(texts)
        sides["training" if split == "train" else split] += texts
    leaks = find_leaks(sides, key)
    ok = not any(leak["same_request"] for leak in leaks.values())
    names = [f"{split}.jsonl" for split in SPLITS] + [f"text_{split}.txt" for split in TEXT_SPLITS]
    return {
        "counts": counts,
        "without_target": without_target,
        "leakage": {"ok": ok, "pairs": leaks},
        "sha256": {name: sha256_of(folder / name) for name in names},
    }
