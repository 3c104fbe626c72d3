"""A first look at a pair of models: what changed, what they say differently, where that lives. No training, no Ray.

In: a `Context`: of a sweep, whose models, rows and cells are used, or of a user's own pair. Out: a self-contained page,
the same figures as JSON, ten lines on the terminal and, for a user's own pair, the settings of a sweep to run next.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from data.files import replacing
from data.neutral_texts import neutral_texts
from data.rows import Row, read_rows
from jobs.commands.load import device_for, finetuned
from jobs.commands.made_with import differing
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.files import MANIFEST, read_json, short_hash
from jobs.progress import Progress, clock
from jobs.sweep.finetuned import ROUNDING, check_tokenizer
from jobs.sweep.pair import rounded_copy
from jobs.sweep.stages.data import reading_of
from models.adapters import is_adapter
from models.errors import ModelError
from search_spaces.load import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUGGESTED: dict[str, dict[str, Any]] = {
    "activations": {"train_tokens": 20000, "validation_tokens": 4000},
    "deltas": {
        "targets": ["change"],
        "d_new": [64],
        "trials": 2,
        "epochs": 3,
        "batch_size": 512,
        "l0_budget": 16,
        "asha": False,
    },
    "evaluate": {"alphas": [0.0, 0.5, 1.0], "sets": ["all"], "controls": ["random_delta"], "cards": 12},
}
"""Settings of a small sweep, as of the quickstart."""


ROWS = 60
"""Rows to compare the models on, unless told otherwise."""


class Subject(NamedTuple):
    """The finetuned model as it is loaded, the un-finetuned model's folder, which weights differ between the two, and
    what is unusual about them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Path
    weights: dict[str, list[dict[str, Any]]]
    notes: list[str]


class Request(NamedTuple):
    """What to look at: the pair of a `Context`; the settings file, if it is a sweep's pair; the maximum number of rows;
    and where to write the page (None: under the storage root)."""

    context: Context
    config: str | None = None
    rows: int = ROWS
    page: Path | None = None

    @property
    def html(self) -> Path:
        settings = self.context.settings
        model = settings.model
        # Many models are called `checkpoint-500` or `final`: the hash tells them apart.
        folders = (
            str(Path(each).resolve()) if Path(each).exists() else each for each in (model.source, model.finetuned or "")
        )
        pair = short_hash(*folders, model.revision, model.finetuned_revision)
        name = settings.name if self.config else f"{Path(str(model.finetuned)).name}-{pair[:6]}"
        return self.page or self.context.space.root / "looks" / f"{name}.html"


def look(request: Request) -> dict[str, Any]:
    """Looks at the pair, or takes what a sweep has measured, writes the page, and prints what was found. Returns the
    figures.

    Raises RequestError, ModelError or DataError if there is no pair, if rows or texts cannot be used, or if the page
    cannot be written.
    """
    started, context = time.monotonic(), request.context
    _check_page(request.html, request.page is not None)
    stored = look_of_sweep(context) if request.config and request.rows == ROWS else None
    report = stored or _measured(request)
    report["facts"] = {"title": _title(context), "seconds": round(time.monotonic() - started, 1)}
    if report["changed"]:
        report["next"] = _suggest(request)
    _write(request.html, report, context.settings.seed)
    _say(request, report)
    return report


def look_of_sweep(context: Context) -> dict[str, Any] | None:
    """The first look that the sweep itself has measured with these settings; None if it has not got that far."""
    from evaluators.report.report import first_look

    if context.pair is None or any(differing(context, "all")):
        return None  # what is there may be of another pair, which the settings named before, or of other rows
    names = [*context.space.cells.glob("look.json"), *sorted(context.space.cells.glob("parts_*.json"))]
    return first_look([read_json(path) for path in names], "")


STEPS = {
    "weights": "both models on every row",
    "divergence": "a dozen answers of each model",
    "answers": "the ceiling by parts",
    "parts": "the lens on neutral text",
}
"""What follows each step, for the progress bar."""


def _measured(request: Request) -> dict[str, Any]:
    from evaluators.measures.behaviours import read_behaviours
    from evaluators.measures.look import Inputs, as_rows, look_at
    from evaluators.measures.parts import Changes
    from evaluators.splice.passes import Passes
    from models.adopted import NothingChanged
    from models.bridge import wrap

    context = request.context
    with context.progress.bar("look", 1 + len(STEPS), "steps") as bar:

        def step(name: str) -> None:
            bar.advance()
            bar.note(STEPS.get(name, ""))

        bar.note("comparing weights")
        try:
            subject = _subject(context)
        except NothingChanged:
            return {"changed": []}
        if not subject.weights["changed"]:
            return {"changed": []}
        step("weights")
        rows, about_rows = _rows(request, subject)
        texts, about_texts = neutral_texts(context.settings.data.text_train_file, reading_of(context).problem)
        behaviours = read_behaviours(context.settings.evaluate.behaviours if request.config else {})
        bridge = wrap(subject.model, subject.tokenizer)
        passes = Passes(bridge, context.settings.evaluate.batch_size)
        changes = Changes.between(bridge, subject.base, [change["name"] for change in subject.weights["changed"]])
        rows = rows or as_rows(texts, subject.tokenizer)
        measurements = look_at(passes, changes, Inputs(rows, texts, context.limits, behaviours), step)
    return {**subject.weights, "notes": [*subject.notes, about_rows, about_texts], **measurements}


def _title(context: Context) -> str:
    chosen, name = context.settings.model, context.settings.name
    return f"{chosen.finetuned or f'the finetuned model of the sweep {name}'} compared with {chosen.source}"


def _subject(context: Context) -> Subject:
    """The pair. Raises NothingChanged if all weights are equal."""
    import torch

    from evaluators.measures.look import compare_weights, distinct_names
    from models.adopted import check_pair
    from models.architectures import check_architecture
    from models.sources import check_source, load_model
    from models.weights import open_weights

    chosen = context.settings.model
    check_source(chosen.source, chosen.revision)
    if chosen.finetuned is not None:
        check_source(chosen.finetuned, chosen.finetuned_revision, "model.finetuned")
    check_architecture(context.source, chosen.source)
    device, source = device_for(context), chosen.source
    if (context.finetuned / MANIFEST).is_file():  # of a sweep that trained or merged it
        folder, base, notes = finetuned(context), context.model, list((context.pair or {"notes": []})["notes"])
    elif context.adopted is None:
        raise RequestError(
            f"the sweep {context.settings.name} has no finetuned model yet; run `deltascope lora` first, or give one "
            "of your own as model.finetuned"
        )
    else:
        pair = check_pair(context.source, context.adopted, source, finetuned_source=chosen.finetuned or "")
        check_tokenizer(context, context.adopted)
        base = Path(rounded_copy(context, pair)) if pair.rounded else context.source
        folder, notes = context.adopted, list(pair.notes)
    if is_adapter(folder):
        model, tokenizer = _merged(base, folder, source, device)
        names, parameters = [name for name, _ in model.named_parameters()], dict(model.named_parameters())
        with open_weights(base).reader() as before:
            weights = compare_weights(names, before, lambda name: parameters[name].data.cpu(), tokenizer)
        return Subject(model, tokenizer, base, weights, notes)
    model, tokenizer = load_model(folder, torch.float32, device)
    unfinetuned, changed = open_weights(base), open_weights(folder)
    with unfinetuned.reader() as before, changed.reader() as after:
        weights = compare_weights(distinct_names(unfinetuned, changed), before, after, tokenizer)
    return Subject(model, tokenizer, base, weights, notes)


def _merged(base: Path, adapter: Path, source: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the adapter merged in, in memory. Raises ModelError if merging changes what it computes."""
    import torch

    from data.encoding import encode_text
    from models.adapters import attach
    from models.sources import load_model

    model, tokenizer = load_model(base, torch.float32, device)
    attached = attach(model, adapter, source)
    ids = torch.tensor([encode_text(tokenizer, neutral_texts()[0][0])], device=device)
    with torch.inference_mode():
        before = attached.base(input_ids=ids).logits
    folded = attached.fold_in().eval()
    with torch.inference_mode():
        apart = ((folded(input_ids=ids).logits - before).abs().max() / before.abs().max()).item()
    if not apart <= ROUNDING:
        raise ModelError(
            f"model.finetuned: merging the adapter in {adapter} changes what it computes (logits differ by {apart:.2g} "
            "of the largest)"
        )
    return folded, tokenizer


def _rows(request: Request, subject: Subject) -> tuple[list[Row], str]:
    """Rows to compare the models on, and what they are; none if there are only texts."""
    from data.user_files import sample_user_rows
    from evaluators.measures.look import spread

    context, most = request.context, request.rows
    settings = context.settings
    evaluation = context.rows / "evaluation.jsonl"
    if request.config and evaluation.is_file() and not any(differing(context, "rows")):
        rows, origin = spread(read_rows(evaluation), most), "evaluation rows of the sweep"
    elif settings.data.rows_file:
        path = settings.data.evaluation_file or settings.data.rows_file
        allowed = settings.data.max_reject_fraction
        rows, account = sample_user_rows(
            path, most, seed=settings.seed, reading=reading_of(context), max_reject_fraction=allowed
        )
        rejected = (
            f" ({account['rejected']} of its {account['lines']} rows cannot be used)" if account["rejected"] else ""
        )
        origin = f"rows of {path}{rejected}"
    else:
        return (
            [],
            "no rows: the models are compared on texts, whose first half is the prompt (data.rows_file has yours)",
        )
    rows, generated = _with_targets(context, subject, rows)
    answered = f", {generated} of them with the finetuned model's own answer as target" if generated else ""
    return rows, f"{len(rows)} {origin}{answered}"


def _with_targets(context: Context, subject: Subject, rows: list[Row]) -> tuple[list[Row], int]:
    """The rows with the finetuned model's answers as missing targets, and how many it made."""
    from data.encoding import encode_prompt, ends_of, with_answer
    from evaluators.measures.finetuned_answers import answers

    without_target = [index for index, row in enumerate(rows) if not row.target]
    if not without_target:
        return rows, 0
    model, tokenizer = subject.model, subject.tokenizer
    prompts = [encode_prompt(tokenizer, rows[index]) for index in without_target]
    generated = answers(model, tokenizer, prompts, context.limits, ends_of(model, tokenizer, rows[without_target[0]]))
    rows = list(rows)
    for index, answer in zip(without_target, generated, strict=True):
        rows[index] = with_answer(tokenizer, rows[index], answer.text, answer.ids, answer.ended)
    return rows, len(without_target)


def _suggest(request: Request) -> dict[str, Any]:
    """The sweep to run next: its command and its `plan`. For a user's own pair, also writes its settings next to the
    page."""
    from rich.console import Console

    from jobs.commands.plan import plan_rows

    settings, command = request.context.settings, f"deltascope sweep {request.config}"
    if request.config is None:
        path = _write_settings(request)
        settings, command = load(path), f"deltascope sweep {path}"
        if settings.data.rows_file is None:
            command += " data.rows_file=YOUR_ROWS"
    try:
        planned = dict(plan_rows(Context(settings, Progress(Console(quiet=True)))))
    except (RequestError, ModelError) as error:
        return {"command": command, "refused": str(error), "plan": {}}
    shown = ("change deltas", "delta studies", "evaluation", "disk", "time")
    return {"command": command, "plan": {name: planned[name] for name in shown if name in planned}}


def _write_settings(request: Request) -> Path:
    """Writes the settings of the suggested sweep next to the page, under a name that no other file has."""
    chosen = request.context.settings.model_dump(mode="json", exclude_unset=True)
    chosen |= {section: {**values, **chosen.get(section, {})} for section, values in SUGGESTED.items()}
    request.html.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = request.html.with_name(f"{request.html.stem}{f'-{number}' if number > 1 else ''}.yaml")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[-64:].lstrip("._-") or "pair"
        text = yaml.safe_dump({**chosen, "name": name}, sort_keys=False)
        if not path.exists() or path.read_bytes() == text.encode():  # others may be the user's own, or edited
            path.write_text(text, encoding="utf-8")
            return path
    raise AssertionError("there is always a number left")


def _check_page(html: Path, given: bool) -> None:
    """Raises RequestError if the page, its figures and settings cannot be written as three files."""
    if html.suffix in (".json", ".yaml"):
        raise RequestError(f"--html: got {html}, but the page's figures and settings are written next to it; use .html")
    if html.is_dir():
        raise RequestError(f"--html: {html} is a folder, must be a file")
    existing = next(parent for parent in html.resolve().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        setting = "--html" if given else "storage.root"
        raise RequestError(f"{setting}: {html} cannot be written ({error.strerror})") from None


def _write(html: Path, report: dict[str, Any], seed: int) -> None:
    from evaluators.report.look_page import look_page

    html.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((html, look_page(report, seed=seed)), (html.with_suffix(".json"), json.dumps(report))):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _say(request: Request, report: dict[str, Any]) -> None:
    from evaluators.report.look_page import in_ten_lines

    progress = request.context.progress
    for line in in_ten_lines(report, seed=request.context.settings.seed):
        progress.line(line)
    progress.line(f"page: {request.html} ({clock(report['facts']['seconds'])})")
