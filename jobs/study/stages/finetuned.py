"""The finetuned model: merged from the best adapter, or one that was made elsewhere; and what it says on held-out rows.

In: an adapter, or the folder of a whole model. Out: `lora/merged/`, a plain safetensors model with its tokenizer, where
there is an adapter (a whole model is used where it lies), and `lora/validation.json`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import RequestError, WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, keyed_folder, read_json, write_json
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.workspace import FINETUNED

VALIDATION_FILE = "validation.json"
"""The finetuned model's answers to the validation rows."""


class Task(NamedTuple):
    """As passed to a worker: the un-finetuned model, an adapter to merge into it (empty: none), where the finetuned
    model is or goes, and the rows it is checked on."""

    base: str
    adapter: str
    finetuned: str
    rows: str
    validation: str
    device: str


def adopt(context: Context) -> dict[str, Any]:
    """Takes the finetuned model of the settings instead of training one; returns what the stage's manifest says."""
    key = keys.lora(context.settings)
    keyed_folder(context.space.lora, key)
    source, adopted = context.settings.model.finetuned, context.adopted
    assert adopted is not None
    whole = adopted == context.finetuned
    figures = make(context, None if whole else adopted, key)
    how = "adopted as it is" if whole else "adopted: its adapter was merged"
    context.progress.line(f"  {source} {how}")
    return {"adopted": source, "how": how, **figures}


def check_adopted(context: Context) -> None:
    """Says what is unusual about a pair of models; raises ModelError or RequestError where they are no pair."""
    from models.adopted import check_pair, check_tokenizers

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
        from transformers import AutoTokenizer

        from data.copy_text import shipped_copy_texts

        base, finetuned = (AutoTokenizer.from_pretrained(one) for one in (context.model, adopted))
        check_tokenizers(base, finetuned, shipped_copy_texts(), adopted)


def make(context: Context, adapter: Path | None, key: str) -> dict[str, Any]:
    """The finetuned model of that key, merged where there is an adapter, in fp32; returns its figures on the rows."""
    space, validation = context.space, context.space.lora / VALIDATION_FILE
    _replace(context, key)
    done = is_finished(context.finetuned, key) if adapter else validation.is_file()
    if not done:
        if adapter:
            keyed_folder(context.finetuned, key)
        task = Task(
            str(context.model),
            str(adapter or ""),
            str(context.finetuned),
            str(space.data / "validation.jsonl"),
            str(validation),
            context.device,
        )
        for outcome in context.pool.run(merge_and_check, [task], context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"the finetuned model {adapter or context.finetuned}: {outcome.error}")
        if adapter:
            finish_folder(context.finetuned, key, {"adapter": adapter.parent.name})
    return (read_json(validation) or {"figures": {}})["figures"]


def _replace(context: Context, identity: str) -> None:
    """If the finetuned model is not the same as before, deletes what was made with the old one."""
    space = context.space
    if (read_json(space.folder / FINETUNED) or {}).get("key") == identity:
        return
    for folder in (space.activations / "finetuned", space.deltas, space.cells, space.generations, space.report):
        shutil.rmtree(folder, ignore_errors=True)
    write_json(space.folder / FINETUNED, {"key": identity})


def merge_and_check(task: Task) -> None:
    """Runs on a worker, to keep the driver small."""
    import torch

    from data.rows import read_rows
    from evaluators.measures.finetuned import check_rows
    from models.adopted import check_tokenizers
    from models.sources import load_model
    from trainers.adapters import merge

    rows = read_rows(task.rows)
    if task.adapter:
        model, tokenizer = load_model(Path(task.base), torch.float32)
        merge(model, Path(task.adapter)).save_pretrained(task.finetuned)
        tokenizer.save_pretrained(task.finetuned)
    # Read back from disk, as every later stage reads it.
    finetuned, tokenizer = load_model(Path(task.finetuned), torch.float32, task.device)
    if not task.adapter:
        from transformers import AutoTokenizer

        texts = [text for row in rows for text in (row.input, row.target)]
        check_tokenizers(AutoTokenizer.from_pretrained(task.base), tokenizer, texts, Path(task.finetuned))
    write_json(Path(task.validation), check_rows(finetuned, tokenizer, rows))
