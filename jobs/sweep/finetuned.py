"""The finetuned model: merged from the best adapter, or made elsewhere; and its answers to held-out rows.

In: an adapter, or the folder of a whole model. Out: for an adapter `lora/merged/`, a plain safetensors model with its
tokenizer (a whole model is used in place); and `lora/validation.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data.build import REPORT
from data.files import replacing
from data.rows import Row, read_rows
from data.user_files import SPLITS
from evaluators.splice.limits import Limits
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.workspace import FINETUNED, VALIDATION_FILE
from jobs.errors import RequestError, WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, key_of, keyed_folder, read_json, seal, write_json
from jobs.sweep import pair
from models.adapters import is_adapter
from search_spaces.dimensions import Choice
from sites import Site

SAMPLES = (
    "The museum opened its doors on March 4, 1987; 12.5% of all visitors came by train.",
    'def add(a, b):\n    return a + b  # {"sum": [1, 2, 3]}',
    "Größe, naïve, 東京, привет, 🙂",
)
"""Texts that both models' tokenizers must encode alike; checked before there are rows."""


MERGED_ROWS = 4
"""Rows on which the merged model is compared with the model and its adapter."""
ROUNDING = 1e-3
"""Largest allowed change of an output by folding an adapter into fp32 weights, relative to the largest output."""


class Task(NamedTuple):
    """As passed to a worker: the un-finetuned model, an adapter to merge into it (or empty), the finetuned model's
    folder, whether to compare their weights, the folder of the rows, the folder for rows with the model's answers as
    targets (empty if they have targets), and the settings and key of the check on the validation rows."""

    base: str
    adapter: str
    finetuned: str
    compares: bool
    rows: str
    answered: str
    validation: str
    key: str
    behaviours: dict[str, Any]
    limits: Limits
    device: str


def adopt(context: Context) -> dict[str, Any]:
    """Uses the finetuned model of the settings instead of training one; returns the facts for the stage's manifest."""
    key = keys.lora(context.settings)
    keyed_folder(context.space.lora, key)
    source, adopted = context.settings.model.finetuned, context.adopted
    assert adopted is not None
    is_whole_model = adopted == context.finetuned
    for split in SPLITS:  # plain rows are kept from one finetuned model to the next
        check_rows_encode(context, read_rows(context.space.data / f"{split}.jsonl"))
    if _without_target(context):  # then the rows depend on where its answers stop
        key = key_of(key, context.limits)
    figures = make(context, None if is_whole_model else adopted, key)
    how = "adopted as it is" if is_whole_model else "adopted: its adapter was merged"
    context.progress.line(f"  {source} {how}")
    if answered := (read_json(context.space.lora / VALIDATION_FILE) or {}).get("answered"):
        cut = f", {answered['cut']} of them cut at evaluate.max_new_tokens" if answered["cut"] else ""
        context.progress.line(f"  {answered['made']} rows without a target were given its answers as targets{cut}")
        figures = {**figures, "answers_made": answered["made"], "answers_cut": answered["cut"]}
    return {"adopted": source, "how": how, **figures}


def check_models(context: Context, keep: bool = True) -> None:
    """Prints what is unusual about a pair of models, and writes it down if `keep`. Raises ModelError or RequestError if
    they are not a pair, or their architecture has no place for a transcoder."""
    from models.architectures import check_architecture, check_mlps

    check_architecture(context.source, context.settings.model.source)
    deltas = context.settings.deltas
    if "residual" in deltas.targets:
        check_mlps(context.source, context.settings.model.source, "deltas.targets: residual")
    if "change" in deltas.targets and deltas.sites != "auto" and "mlp" in deltas.sites:
        check_mlps(context.source, context.settings.model.source, "deltas.sites: mlp")
    adopted, folder = context.adopted, context.space.folder
    if adopted is None or is_adapter(adopted):
        pair.examine_base(context)
    if adopted is None:
        check_targets(context)
        return
    if adopted.is_relative_to(folder.resolve()):
        raise RequestError(
            f"model.finetuned: {adopted} is in this sweep's own folder, where it would be overwritten; give this sweep "
            "another name (name=...)"
        )
    pair.examine(context, keep)
    check_tokenizer(context, adopted)


def check_tokenizer(context: Context, adopted: Path) -> None:
    """Raises ModelError or RequestError if a finetuned model made elsewhere reads other tokens than the un-finetuned
    one, or is a whole model without a tokenizer."""
    from models.adopted import check_ends, check_tokenizers
    from models.sources import load_tokenizer

    if (adopted / "tokenizer_config.json").is_file():
        base, finetuned = load_tokenizer(context.source), load_tokenizer(adopted, "model.finetuned")
        check_tokenizers(base, finetuned, SAMPLES, adopted)
        if context.settings.data.format == "plain":
            check_ends(base, finetuned, adopted)
    elif not is_adapter(adopted):
        raise RequestError(
            f"model.finetuned: {adopted} has no tokenizer; save model.source's tokenizer in that folder, with "
            f"tokenizer.save_pretrained({str(adopted)!r})"
        )


def check_targets(context: Context) -> None:
    """Raises RequestError if LoRA cannot adapt what `lora.space.targets` names, or if it would not change any site with
    change deltas."""
    from models.blocks import sites_with
    from models.weights import build_skeleton
    from trainers.adapters import add_adapter
    from trainers.errors import TrainingError

    settings = context.settings
    setting = settings.lora.space.targets
    choices = [str(choice) for choice in setting.choice] if isinstance(setting, Choice) else [str(setting)]
    if choices == ["all-linear"] or pair.has_finetuned(context):
        return
    reached: set[Site] = set()
    for targets in choices:
        try:
            adapted = add_adapter(build_skeleton(context.source), targets, r=1)
        except TrainingError as error:
            raise RequestError(str(error)) from None
        names = [name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")]
        reached.update(sites_with(adapted.config, names)[0])
    if "change" in settings.deltas.targets and not reached.intersection(context.sites_of("change")):
        kinds = ", ".join(kind.name for kind in context.kinds)
        raise RequestError(
            f"lora.space.targets: a LoRA on {' or '.join(choices)} changes nothing at the sites that get change deltas "
            f"({kinds}, in the layers of deltas.layers), so there is nothing for them to explain"
        )


def check_rows_encode(context: Context, rows: Iterable[Row]) -> None:
    """Raises ModelError if the two models' tokenizers encode a row differently."""
    from models.adopted import check_tokenizers
    from models.sources import load_tokenizer

    adopted = context.adopted
    if adopted is not None and (adopted / "tokenizer_config.json").is_file():
        texts = [text for row in rows for text in (row.prompt or row.input, row.target, row.end)]
        check_tokenizers(load_tokenizer(context.model), load_tokenizer(adopted), texts, adopted)


def make(context: Context, adapter: Path | None, key: str) -> dict[str, Any]:
    """Makes the finetuned model of `key`, merging the adapter, if any, in fp32; returns its figures on the rows."""
    space, validation = context.space, context.space.lora / VALIDATION_FILE
    _replace(context, key)
    context.forget_pair()
    merged = adapter is None or is_finished(context.finetuned, key)
    answered = space.answered.is_dir() or not _without_target(context)
    checked = keys.finetuned_check(context.settings)
    compared = context.pair is not None and context.pair["exact"]
    if not (merged and answered and compared and (read_json(validation) or {}).get("key") == checked):
        if not merged:
            keyed_folder(context.finetuned, key)
        task = Task(
            str(context.model),
            "" if merged else str(adapter),
            str(context.finetuned),
            not compared,
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
        change = read_json(validation)
        if not compared:
            _note_change(context, change)
        if not merged:
            assert adapter is not None
            finish_folder(context.finetuned, key, {"adapter": adapter.parent.name})
    return read_json(validation)["figures"]


def _note_change(context: Context, change: dict[str, Any]) -> None:
    """Checks the merge and records what changed. Raises RequestError if the merged model is wrong, or if nothing has
    changed."""
    setting, source = "model.finetuned", context.settings.model.finetuned
    if source is None:
        setting, source = "lora", "the best trial's adapter"
    for model, name, count in change["not_finite"][:1]:
        tensor = (
            f"model.source: {name} of {context.settings.model.source}" if model == "before" else f"{setting}: {name}"
        )
        raise RequestError(f"{tensor} has {count} values that are NaN or infinite")
    if (merge := change.get("merge")) is not None and not merge_check(merge)["passed"]:
        raise RequestError(f"{setting}: merging {source} changes what it computes ({merge_check(merge)['detail']})")
    if not change["changed"]:
        raise RequestError(
            f"{setting}: {source} leaves every weight as it was, so there is no change to explain; was it ever trained?"
        )
    notes = list(context.pair["notes"]) if context.pair is not None else []
    if merge and (idle := merge["unchanged"]):
        notes.append(f"{len(idle)} of {merge['modules']} modules that {source} adapts are unchanged, such as {idle[0]}")
        context.progress.line(f"note: {notes[-1]}")
    pair.note(context, change["changed"], exact=True, notes=notes)
    pair.say_what_changed(context)


def merge_check(merge: dict[str, Any]) -> dict[str, Any]:
    """Check of the report: whether the merged model computes the same as the model with its adapter."""
    agrees = merge["modules_apart"] <= ROUNDING and merge["logits_apart"] <= ROUNDING
    return {
        "name": "the merged model computes what the model with its adapter attached does",
        "passed": agrees and len(merge["unchanged"]) < merge["modules"],
        "detail": f"logits of {merge['rows']} rows differ by {merge['logits_apart']:.2g} of the largest, outputs of "
        f"{merge['modules']} adapted modules by {merge['modules_apart']:.2g}; "
        f"{merge['modules'] - len(merge['unchanged'])} of them changed",
    }


def _replace(context: Context, identity: str) -> None:
    """Deletes what was made with the previous finetuned model, if this is another one."""
    space = context.space
    stale = (space.answered, space.activations / "base", space.transcoders) if space.answered.is_dir() else ()
    if (read_json(space.folder / FINETUNED) or {}).get("key") == identity:
        return
    for folder in (
        *stale,
        space.activations / "finetuned",
        space.deltas,
        space.cells,
        space.generations,
        space.report,
    ):
        shutil.rmtree(folder, ignore_errors=True)
    write_json(space.folder / FINETUNED, {"key": identity})


def merge_and_check(task: Task) -> None:
    """Merges and checks on a worker, to keep the driver small."""
    import torch

    from evaluators.measures.behaviours import read_behaviours
    from evaluators.measures.finetuned_answers import check_rows
    from models.comparison import compare
    from models.sources import load_model
    from models.weights import open_weights

    before = read_json(Path(task.validation)) or {}
    report: dict[str, Any] = {"key": task.key}
    merging = _Merging(task) if task.adapter else None
    # Read back from disk, as every later stage reads it.
    finetuned, tokenizer = load_model(Path(task.finetuned), torch.float32, task.device)
    if merging is not None:
        report["merge"] = merging.compared_with(finetuned)
    elif "merge" in before:
        report["merge"] = before["merge"]
    if task.compares:
        weights = compare(open_weights(Path(task.base)), open_weights(Path(task.finetuned)))
        report |= {"changed": list(weights.changed), "not_finite": [list(entry) for entry in weights.not_finite]}
        if merging is not None:
            names = [f"{name}." for name in report["changed"]]
            idle = [module for module in merging.outputs if not any(name.startswith(f"{module}.") for name in names)]
            report["merge"]["unchanged"] = idle
    elif "changed" in before:
        report["changed"] = before["changed"]
    if task.answered:
        report["answered"] = _answer(task, finetuned, tokenizer)
    elif "answered" in before:
        report["answered"] = before["answered"]
    rows = read_rows(Path(task.answered or task.rows) / "validation.jsonl")
    report |= check_rows(finetuned, tokenizer, rows, read_behaviours(task.behaviours), task.limits)
    write_json(Path(task.validation), report)


class _Merging:
    """Merges an adapter into the un-finetuned model and saves the result. Keeps what the model with its adapter
    computed before: logits of some rows, and outputs of the adapted modules."""

    def __init__(self, task: Task) -> None:
        import torch

        from data.encoding import encode_row
        from models.adapters import attach, probe
        from models.sources import load_model

        model, tokenizer = load_model(Path(task.base), torch.float32)
        rows = read_rows(Path(task.rows) / "validation.jsonl")[:MERGED_ROWS]
        self.rows = [encode_row(tokenizer, row).ids for row in rows]
        attached = attach(model, Path(task.adapter))
        self.logits = _logits(attached.base, self.rows)  # its modules are replaced by PEFT
        self.outputs = {name: probe(module, seed) for seed, (name, module) in enumerate(attached.modules().items())}
        attached.fold_in().save_pretrained(task.finetuned)
        tokenizer.save_pretrained(task.finetuned)
        seal(Path(task.finetuned))

    def compared_with(self, merged: Any) -> dict[str, Any]:
        """The differences of the merged model, read back, as shares of the largest logit and output."""
        from models.adapters import apart, probe

        modules = dict(merged.named_modules())
        after = [probe(modules[name], seed) for seed, name in enumerate(self.outputs)]
        return {
            "rows": len(self.rows),
            "modules": len(self.outputs),
            "unchanged": [],
            "logits_apart": apart(self.logits, _logits(merged, self.rows)),
            "modules_apart": apart(list(self.outputs.values()), after),
        }


def _logits(model: Any, rows: list[list[int]]) -> list[Any]:
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row], device=device)).logits.float().cpu() for row in rows]


def _without_target(context: Context) -> int:
    """Number of rows that lack a target."""
    report = read_json(context.space.data / REPORT) or {}
    return sum(report.get("without_target", {}).values())


def _answer(task: Task, model: Any, tokenizer: Any) -> dict[str, int]:
    """Writes the rows with the model's greedy answers as missing targets; counts those `made` and those `cut` at the
    token budget."""
    from data.encoding import encode_prompt, ends_of, with_answer
    from data.rows import write_rows
    from evaluators.measures.finetuned_answers import answers

    counts = {"made": 0, "cut": 0}
    with replacing(Path(task.answered)) as folder:
        for split in SPLITS:
            rows = read_rows(Path(task.rows) / f"{split}.jsonl")
            missing = [index for index, row in enumerate(rows) if not row.target]
            if missing:
                prompts = [encode_prompt(tokenizer, rows[index]) for index in missing]
                generated = answers(model, tokenizer, prompts, task.limits, ends_of(model, tokenizer, rows[missing[0]]))
                for index, answer in zip(missing, generated, strict=True):
                    rows[index] = with_answer(tokenizer, rows[index], answer.text, answer.ids, answer.ended)
                counts["made"] += len(missing)
                counts["cut"] += sum(answer.cut for answer in generated)
            write_rows(folder / f"{split}.jsonl", rows)
        seal(folder)
        shutil.rmtree(task.answered, ignore_errors=True)
    return counts
