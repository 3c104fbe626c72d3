"""How long a sweep would take on more workers: its units of work, at measured costs, scheduled on N workers.

In: a `Context`, and the folder of a sweep that has run. Out: for each number of workers the time, how much of it the
workers are busy, and what limits it. Stages run one after another. Each starts with the part that cannot be shared out,
then hands out its units as the engine does: longest first, each to the first worker that is free.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.files import MANIFEST, read_json
from jobs.progress import clock
from jobs.study.context import Context

WORKERS = (1, 8, 64, 512)


class Load(NamedTuple):
    """A stage's units of work, and `alone`, the part before them that cannot be shared out; in seconds."""

    stage: str
    units: list[float]
    alone: float = 0.0


class Forecast(NamedTuple):
    seconds: float
    busy: float
    limit: str


def makespan(units: Sequence[float], workers: int) -> float:
    """Seconds until the last unit is done, if the longest go first, each to the first worker that is free."""
    free = [0.0] * min(workers, max(1, len(units)))
    for unit in sorted(units, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


def forecast(loads: Sequence[Load], workers: int) -> Forecast:
    """The forecast of a whole sweep on that many workers; `limit` names the stage that leaves them idle longest."""
    spans = [load.alone + makespan(load.units, workers) for load in loads]
    lost = [span * workers - sum(load.units) for span, load in zip(spans, loads, strict=True)]
    worst = loads[lost.index(max(lost))]
    limit = f"{worst.stage}: "
    if worst.alone > makespan(worst.units, workers):
        limit += f"{clock(worst.alone)} of work that cannot be shared out"
    elif len(worst.units) < workers:
        limit += f"{len(worst.units)} units for {workers} workers"
    else:
        limit += f"its longest unit takes {clock(max(worst.units))}"
    work = sum(sum(load.units) for load in loads)
    whole = sum(spans)
    return Forecast(whole, work / (whole * workers) if whole else 0.0, limit)


def measured_loads(context: Context, folder: Path) -> list[Load]:
    """This sweep's units of work at the mean costs of the sweep in `folder`; empty if that lacks some of the costs."""
    settings = context.settings
    layers, deltas, evaluate = len(context.layers), settings.deltas, settings.evaluate
    trials = _seconds(folder.glob("lora/trial_*/result.json"))
    bases = _seconds(folder.glob(f"transcoders/layer_*/{MANIFEST}"))
    of_width = {
        d_new: _seconds(folder.glob(f"deltas/layer_*/*/d{d_new:03d}/trial_*/result.json")) for d_new in deltas.d_new
    }
    behaviour = _seconds(folder.glob("cells/layer_*.json"))
    reconstruction = _seconds(folder.glob("cells/reconstruction_*.json"))
    features = _seconds(folder.glob("cells/features_*.json"))
    trained = settings.transcoders.source == "train"
    needed = [trials, *of_width.values(), behaviour, reconstruction]
    needed += [bases] * trained + [features] * bool(evaluate.features)
    if not all(needed):
        return []
    groups = layers * len(deltas.selections)
    # One piece of work is a set of layers on one subset: all its strengths are rows in the same batches.
    pieces = [_mean(behaviour) * (len(doses) + len(evaluate.controls) + 1) for doses in context.spliced.values()]
    delta_units = [_mean(seconds) for seconds in of_width.values() for _ in range(groups * deltas.trials)]
    cells = pieces * (len(evaluate.subsets) * evaluate.replicas)
    cells += [_mean(reconstruction) * groups / layers * len(deltas.d_new)] * layers
    cells += [_mean(features)] * (layers if evaluate.features else 0)
    return [
        Load("lora", [_mean(trials)] * settings.lora.trials, _alone(folder / "lora", trials)),
        Load("transcoders", [_mean(bases)] * layers if trained else [], _alone(folder / "transcoders", bases)),
        Load("deltas", delta_units, _alone(folder / "deltas", [one for of in of_width.values() for one in of])),
        Load("evaluate", cells),
    ]


def schedule_rows(context: Context, folder: Path, workers: int | None) -> list[tuple[str, str]]:
    """One row of text for each number of workers."""
    loads = measured_loads(context, folder)
    if not loads:
        return []
    rows = []
    for count in sorted({*WORKERS, *([workers] if workers else [])}):
        found = forecast(loads, count)
        rows.append((f"on {count} workers", f"{clock(found.seconds)}, {found.busy:.0%} busy; limited by {found.limit}"))
    return [("costs measured in", str(folder)), *rows]


def _alone(folder: Path, units: Sequence[float]) -> float:
    """Time a stage spent outside its units: capture, merging, starting workers."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST) or {}
    if "seconds" not in manifest:
        return 0.0
    return max(0.0, manifest["seconds"] - sum(units) / manifest.get("workers", 1))


def _seconds(paths: Any) -> list[float]:
    found = [read_json(path) for path in paths]
    return [
        one["seconds"] for one in found if one and one.get("seconds") and one.get("state", "COMPLETE") == "COMPLETE"
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
