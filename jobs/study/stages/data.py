"""Stage 1, data: rows for training, validation and evaluation, and text for the transcoders.

In: the data settings. Out: `data/*.jsonl`, `data/text_*.txt` and `data/report.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data.build import DataOptions, build_dataset
from jobs.errors import WorkFailed
from jobs.study.context import Context


def run(context: Context) -> dict[str, Any]:
    settings = context.settings.data
    options = settings.model_dump()
    if settings.rows_file or settings.text_train_file:
        options |= _context_limit(context)
    report = build_dataset(context.space.data, DataOptions(seed=context.settings.seed, **options))
    _say(context, report)
    if not report["leakage"]["ok"]:
        raise WorkFailed(f"the data leaks between train, validation and evaluation: {report['leakage']['pairs']}")
    return {"report": report}


def _say(context: Context, report: dict[str, Any]) -> None:
    """Shows counts, rejected lines and the leakage check on the terminal and in MLflow."""
    leakage = report["leakage"]
    for key, account in report["files"].items():
        context.progress.line(f"  {key}: " + ", ".join(f"{name} {value}" for name, value in _numbers(account)))
        for example in account["first"]:
            context.progress.line(f"    {example}")
    context.progress.line(
        f"  leakage between train, validation and evaluation: {'none' if leakage['ok'] else leakage['pairs']}"
        + (f" ({leakage['left_out']} lines of your files would leak and were left out)" if leakage["left_out"] else "")
    )
    context.tracker.log("data", metrics_of(report))


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    """The figures of the stage's report that go to MLflow."""
    leakage = report["leakage"]
    metrics = {"leakage_ok": float(leakage["ok"]), "leakage_left_out": leakage["left_out"]}
    for split, counts in report["counts"].items():
        values = counts.items() if isinstance(counts, dict) else [("lines", counts)]
        metrics |= {f"{split}_{label}": count for label, count in values}
    return metrics | {f"{key}_rejected": account["rejected"] for key, account in report["files"].items()}


def _numbers(account: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, value) for name, value in account.items() if isinstance(value, int) and not isinstance(value, bool)]


def _context_limit(context: Context) -> dict[str, Any]:
    """The model's context in tokens, and how its tokenizer counts: a user's rows must fit."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(context.model)
    limit = getattr(AutoConfig.from_pretrained(context.model), "max_position_embeddings", None)
    count: Callable[[str], int] = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    return {"max_tokens": limit, "count_tokens": count}
