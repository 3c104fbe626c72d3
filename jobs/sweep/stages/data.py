"""Stage 1, data: rows for training, validation and evaluation, and text for the transcoders.

In: the data settings. Out: `data/*.jsonl`, `data/text_*.txt` and `data/report.json`.
"""

from __future__ import annotations

from typing import Any

from data.build import REPORT, DataOptions, build_dataset
from data.chat import Chat
from data.readers import Reading
from data.rows import Row, read_rows, slug
from data.user_files import SPLITS
from evaluators.measures.behaviours import subsets_of
from jobs.context.context import Context
from jobs.errors import RequestError, WorkFailed
from jobs.files import read_json, write_json
from jobs.sweep.finetuned import check_rows_encode

RULES = {
    "exact": "the same label, input and target",
    "folded": "the same label, and inputs that differ at most in case and spacing",
}
"""What makes two rows copies, by `data.repeated`."""


def run(context: Context) -> dict[str, Any]:
    settings = context.settings.data
    options = settings.model_dump(exclude={"columns", "format", "separator", "rendering", "special_tokens"})
    options["reading"] = reading_of(context) if needs_tokenizer(context) else Reading(separator=settings.separator)
    report = build_dataset(context.space.data, DataOptions(seed=context.settings.seed, **options))
    if needs_tokenizer(context):
        report |= _opening(context)
    if settings.rows_file and settings.format == "plain":
        report["notes"] = [*report.get("notes", []), *_regrouped(context)]
    write_json(context.space.data / REPORT, report)  # the same, with a checksum of its own
    _say(context, report)
    check_labels(context)
    for split in SPLITS:
        check_rows_encode(context, read_rows(context.space.data / f"{split}.jsonl"))
    if not report["leakage"]["ok"]:
        raise WorkFailed(f"the data leaks between train, validation and evaluation: {report['leakage']['pairs']}")
    return {"report": report}


def _say(context: Context, report: dict[str, Any]) -> None:
    """Prints counts, rejected lines, assumptions and the leakage check; logs figures to MLflow."""
    leakage = report["leakage"]
    for key, account in report["files"].items():
        context.progress.line(f"  {key}: " + ", ".join(f"{name} {value}" for name, value in _numbers(account)))
        for example in account["first"]:
            context.progress.line(f"    {example}")
    for note in notes_of(report):
        context.progress.line(f"  {note}")
    context.progress.line(
        f"  leakage between train, validation and evaluation: {'none' if leakage['ok'] else leakage['pairs']}"
        + (f" ({leakage['left_out']} lines of your files would leak and were left out)" if leakage["left_out"] else "")
    )
    if missing := sum(report["without_target"].values()):
        context.progress.line(f"  {missing} rows have no target; the finetuned model's own answers will be used")
    context.tracker.log("data", metrics_of(report))


def notes_of(report: dict[str, Any]) -> list[str]:
    """What was assumed about the rows, and what was left out or not used, one fact each."""
    notes = list(report.get("notes", []))
    for key, account in report["files"].items():
        notes += [f"{key}: {note}" for note in account.get("notes", [])]
        if account.get("repeated_example"):
            example, rule = account["repeated_example"], account["repeated_rule"]
            notes.append(
                f"{key}: rows left out because they repeat another one: {account['repeated']} (data.repeated={rule}: "
                f"{RULES[rule]}), such as {example['input']!r} with the target {example['target']!r}"
            )
    if "bos" in report and report["bos"] is None:
        notes.append(f"the tokenizer has no BOS token; {report['opens_with']!r} opens every plain text instead")
    return notes


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    """The figures of the stage's report that go to MLflow."""
    leakage = report["leakage"]
    metrics = {"leakage_ok": float(leakage["ok"]), "leakage_left_out": leakage["left_out"]}
    for split, counts in report["counts"].items():
        values = counts.items() if isinstance(counts, dict) else [("lines", counts)]
        metrics |= {f"{split}_{slug(label)}": count for label, count in values}
    return metrics | {f"{key}_rejected": account["rejected"] for key, account in report["files"].items()}


def _numbers(account: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, value) for name, value in account.items() if isinstance(value, int) and not isinstance(value, bool)]


def needs_tokenizer(context: Context) -> bool:
    """Whether making the data needs the tokenizer: a user's text must fit the context, a chat uses its template."""
    settings = context.settings.data
    return bool(settings.rows_file or settings.text_train_file or settings.format == "chat")


def chat_of(context: Context) -> Chat | None:
    """The chat template, if the format needs one: that of an adopted finetuned model, if it has one, else that of the
    un-finetuned model. Raises DataError if there is none."""
    if context.settings.data.format == "plain":
        return None
    from models.sources import read_tokenizer

    adopted, section = context.adopted, context.settings.data
    options = (section.rendering, section.special_tokens)
    if adopted is not None and (adopted / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(adopted, "model.finetuned")
        if tokenizer.chat_template:
            return Chat(tokenizer, str(context.settings.model.finetuned), *options)
    return Chat(read_tokenizer(context.model), context.settings.model.source, *options)


def _opening(context: Context) -> dict[str, str | None]:
    """The tokenizer's BOS token, if it has one, and the token that opens every plain text."""
    from models.sources import load_tokenizer, read_tokenizer

    bos = read_tokenizer(context.model).bos_token
    return {"bos": bos, "opens_with": load_tokenizer(context.model).bos_token}


COMPARED_ROWS = 2000
"""Number of plain rows whose tokens are compared with those of their whole text."""


def _regrouped(context: Context) -> list[str]:
    """A note on how many plain rows would have other tokens if input, separator and target were encoded as one text, as
    in training on whole texts: a token may span the end of one and the beginning of the next."""
    from data.encoding import encode_row, encode_text
    from models.sources import load_tokenizer

    tokenizer = load_tokenizer(context.model)
    rows = [row for split in SPLITS for row in read_rows(context.space.data / f"{split}.jsonl")]
    compared = [row for row in rows if row.target and not row.special_tokens][:COMPARED_ROWS]
    count = 0
    for row in compared:
        joined = encode_text(tokenizer, f"{row.input}{row.separator}{row.target}")
        count += encode_row(tokenizer, row).ids[: len(joined)] != joined
    if not count:
        return []
    return [
        f"in {count} of {len(compared)} rows some tokens are not those of input, separator and target as one text: a "
        "token would hold the end of the separator and the beginning of the target (another data.separator may help)"
    ]


LEARNED_POSITIONS = ("gpt2", "gpt_neo", "opt")
"""Architectures that have an embedding for each position, and no further ones."""


def reading_of(context: Context) -> Reading:
    """How a user's rows are read: they must fit this model's context."""
    from data.encoding import encode_row
    from data.special import special_tokens_of
    from models.sources import load_tokenizer
    from models.weights import load_config

    settings = context.settings
    tokenizer = load_tokenizer(context.model)
    config = load_config(context.model)
    limit = getattr(config, "max_position_embeddings", None)

    def problem(row: Row) -> str | None:
        # Nothing is generated after a line of text, which has no label. Without a target an answer will be the target,
        # and where positions are learned an answer cannot go on beyond the last one.
        generated = row.label and (not row.target or config.model_type in LEARNED_POSITIONS)
        answer = settings.evaluate.max_new_tokens if generated else 0
        # Tokenizers give at most one token per byte, so most texts need no counting.
        text = f"{row.prompt or row.input}{row.separator}{row.target}"
        if limit is None or len(text.encode()) + answer + 3 <= limit:
            return None
        encoded = encode_row(tokenizer, row)
        if len(encoded.prompt) + max(answer, len(encoded.target)) <= limit:
            return None
        with_answer = f", with evaluate.max_new_tokens={answer} for an answer" if len(encoded.ids) <= limit else ""
        return f"longer than the context of {limit} tokens{with_answer}"

    return Reading(
        columns=settings.data.columns,
        chat=chat_of(context),
        problem=problem,
        targets_needed=settings.model.finetuned is None,
        separator=settings.data.separator,
        special=special_tokens_of(tokenizer),
        special_tokens=settings.data.special_tokens == "tokens",
    )


def check_labels(context: Context) -> None:
    """Raises RequestError if the settings name a subset without evaluation rows."""
    evaluate, labels = context.settings.evaluate, read_json(context.space.data / REPORT)["labels"]
    named = [("evaluate.subsets", label) for label in evaluate.subsets or ()]
    named += [("evaluate.expected", rate.subset) for rate in evaluate.expected]
    for name, behaviour in evaluate.behaviours.items():
        named += [(f"evaluate.behaviours.{name}: on", label) for label in subsets_of(behaviour) or ()]
    for key, label in named:
        if label not in labels:
            raise RequestError(f"{key}: no row has the label {label!r}; the evaluation rows have {', '.join(labels)}")
