"""The finetuned model: merged from the best adapter, or one that was made elsewhere; and what it says on held-out rows.

In: an adapter, or the folder of a whole model. Out: `lora/merged/`, a plain safetensors model with its tokenizer, where
there is an adapter (a whole model is used where it lies), and `lora/validation.json`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data.build import REPORT
from data.rows import Row
from data.user_files import SPLITS
from evaluators.splice.limits import Limits
from jobs.errors import RequestError, WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, key_of, keyed_folder, read_json, write_json
from jobs.seals import seal
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.workspace import FINETUNED
from models.adopted import is_adapter

VALIDATION_FILE = "validation.json"
"""The finetuned model's answers to the validation rows."""


SAMPLES = (
    "The museum opened its doors on March 4, 1987; 12.5% of all visitors came by train.",
    'def add(a, b):\n    return a + b  # {"sum": [1, 2, 3]}',
    "Größe, naïve, 東京, привет, 🙂",
)
"""What both models' tokenizers must encode alike, before the rows are there."""


class Task(NamedTuple):
    """As passed to a worker: the un-finetuned model, an adapter to merge into it (empty: none), where the finetuned
    model is or goes, the folder of the rows, where they go with its answers as their targets (empty: they have some),
    and how it is checked on the validation rows, with the key of that."""

    base: str
    adapter: str
    finetuned: str
    rows: str
    answered: str
    validation: str
    key: str
    behaviours: dict[str, Any]
    limits: Limits
    device: str


def adopt(context: Context) -> dict[str, Any]:
    """Takes the finetuned model of the settings instead of training one; returns what the stage's manifest says."""
    key = keys.lora(context.settings)
    keyed_folder(context.space.lora, key)
    source, adopted = context.settings.model.finetuned, context.adopted
    assert adopted is not None
    whole = adopted == context.finetuned
    if _without_target(context):  # then the rows themselves end where its answers do
        key = key_of(key, context.limits)
    figures = make(context, None if whole else adopted, key)
    how = "adopted as it is" if whole else "adopted: its adapter was merged"
    context.progress.line(f"  {source} {how}")
    if answered := (read_json(context.space.lora / VALIDATION_FILE) or {}).get("answered"):
        cut = f", {answered['cut']} of them cut at evaluate.max_new_tokens" if answered["cut"] else ""
        context.progress.line(f"  {answered['made']} rows without a target were given its answers as targets{cut}")
        figures = {**figures, "answers_made": answered["made"], "answers_cut": answered["cut"]}
    return {"adopted": source, "how": how, **figures}


def check_models(context: Context) -> None:
    """Says what is unusual about a pair of models; raises ModelError or RequestError where they are no pair, or their
    architecture has no place for a transcoder."""
    from models.adopted import check_ends, check_pair, check_tokenizers
    from models.architectures import check_architecture
    from models.sources import load_tokenizer

    check_architecture(context.model, context.settings.model.source)
    adopted, folder = context.adopted, context.space.folder
    if adopted is None:
        return
    if adopted.is_relative_to(folder.resolve()):
        raise RequestError(
            f"model.finetuned: {adopted} lies in this sweep's own folder, where it would be replaced; give the new "
            "sweep a name of its own (name=...)"
        )
    for note in check_pair(context.model, adopted, context.settings.model.source):
        context.progress.line(f"note: {note}")
    if (adopted / "tokenizer_config.json").is_file():
        base, finetuned = (load_tokenizer(one) for one in (context.model, adopted))
        check_tokenizers(base, finetuned, SAMPLES, adopted)
        if context.settings.data.format == "plain":
            check_ends(base, finetuned, adopted)
    elif not is_adapter(adopted):
        raise RequestError(
            f"model.finetuned: {adopted} has no tokenizer; save that of model.source there with "
            f"tokenizer.save_pretrained({str(adopted)!r})"
        )


def check_rows_encode(context: Context, rows: Iterable[Row]) -> None:
    """Raises ModelError where the two models' tokenizers encode a row differently."""
    from models.adopted import check_tokenizers
    from models.sources import load_tokenizer

    adopted = context.adopted
    if adopted is not None and (adopted / "tokenizer_config.json").is_file():
        texts = [text for row in rows for text in (row.prompt or row.input, row.target)]
        check_tokenizers(load_tokenizer(context.model), load_tokenizer(adopted), texts, adopted)


def make(context: Context, adapter: Path | None, key: str) -> dict[str, Any]:
    """The finetuned model of that key, merged where there is an adapter, in fp32; returns its figures on the rows."""
    space, validation = context.space, context.space.lora / VALIDATION_FILE
    _replace(context, key)
    merged = adapter is None or is_finished(context.finetuned, key)
    answered = space.answered.is_dir() or not _without_target(context)
    checked = keys.finetuned_check(context.settings)
    if not (merged and answered and (read_json(validation) or {}).get("key") == checked):
        if not merged:
            keyed_folder(context.finetuned, key)
        task = Task(
            str(context.model),
            "" if merged else str(adapter),
            str(context.finetuned),
            str(context.rows),
            "" if answered else str(space.answered),
            str(validation),
            checked,
            context.settings.evaluate.behaviours,
            context.limits,
            context.device,
        )
        for outcome in context.pool.run(merge_and_check, [task], context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"the finetuned model {adapter or context.finetuned}: {outcome.error}")
        if not merged:
            assert adapter is not None
            finish_folder(context.finetuned, key, {"adapter": adapter.parent.name})
    return read_json(validation)["figures"]


def _replace(context: Context, identity: str) -> None:
    """If the finetuned model is not the same as before, deletes what was made with the old one."""
    space = context.space
    of_its_answers = (space.answered, space.activations / "base", space.transcoders) if space.answered.is_dir() else ()
    if (read_json(space.folder / FINETUNED) or {}).get("key") == identity:
        return
    for folder in (
        *of_its_answers,
        space.activations / "finetuned",
        space.deltas,
        space.cells,
        space.generations,
        space.report,
    ):
        shutil.rmtree(folder, ignore_errors=True)
    write_json(space.folder / FINETUNED, {"key": identity})


def merge_and_check(task: Task) -> None:
    """Runs on a worker, to keep the driver small."""
    import torch

    from data.rows import read_rows
    from evaluators.measures.behaviours import read_behaviours
    from evaluators.measures.finetuned import check_rows
    from models.sources import load_model
    from trainers.adapters import merge

    if task.adapter:
        model, tokenizer = load_model(Path(task.base), torch.float32)
        merge(model, Path(task.adapter)).save_pretrained(task.finetuned)
        tokenizer.save_pretrained(task.finetuned)
        seal(Path(task.finetuned))
    # Read back from disk, as every later stage reads it.
    finetuned, tokenizer = load_model(Path(task.finetuned), torch.float32, task.device)
    found: dict[str, Any] = {"key": task.key}
    if task.answered:
        found["answered"] = _answer(task, finetuned, tokenizer)
    elif "answered" in (before := read_json(Path(task.validation)) or {}):
        found["answered"] = before["answered"]
    rows = read_rows(Path(task.answered or task.rows) / "validation.jsonl")
    found |= check_rows(finetuned, tokenizer, rows, read_behaviours(task.behaviours), task.limits)
    write_json(Path(task.validation), found)


def _without_target(context: Context) -> int:
    """How many rows wait for the finetuned model's answers."""
    report = read_json(context.space.data / REPORT) or {}
    return sum(report.get("without_target", {}).values())


def _answer(task: Task, model: Any, tokenizer: Any) -> dict[str, int]:
    """Writes the rows with the model's greedy answers as the targets that they lack; counts `made` and, of these, `cut`
    at the token budget."""
    from data.encoding import encode_prompt, ends_of, with_answer
    from data.rows import read_rows, write_rows
    from evaluators.measures.finetuned import answers

    counts, beside = {"made": 0, "cut": 0}, Path(task.rows) / f".answered.{os.getpid()}.tmp"
    for split in SPLITS:
        rows = read_rows(Path(task.rows) / f"{split}.jsonl")
        bare = [place for place, row in enumerate(rows) if not row.target]
        if bare:
            prompts = [encode_prompt(tokenizer, rows[place]) for place in bare]
            said = answers(model, tokenizer, prompts, task.limits, ends_of(model, tokenizer, rows[bare[0]]))
            for place, answer in zip(bare, said, strict=True):
                rows[place] = with_answer(tokenizer, rows[place], answer.text, answer.ids)
            counts["made"] += len(bare)
            counts["cut"] += sum(answer.cut for answer in said)
        write_rows(beside / f"{split}.jsonl", rows)
    seal(beside)
    shutil.rmtree(task.answered, ignore_errors=True)
    beside.rename(task.answered)
    return counts
