"""How long a sweep would take on more workers: its units of work, at measured costs, scheduled on N workers.

In: a `Context`, and the folder of a sweep that has run. Out: for each number of workers the time, how much of it the
workers are busy, and what limits it. Stages run one after another. Each starts with the part that cannot be shared out,
then hands out its units as the engine does: longest first, each to the first worker that is free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluators.conditions import CONDITIONS
from jobs.context.context import CARDS_AT_ONCE, Context
from jobs.files import MANIFEST, read_json
from jobs.progress import clock

WORKERS = (1, 8, 64, 512)


class Load(NamedTuple):
    """A stage's units of work, `alone`, the part before them that cannot be shared out, and `shared`, what the units
    take at least on any number of workers, because all need the same storage or driver; in seconds."""

    stage: str
    units: list[float]
    alone: float = 0.0
    shared: float = 0.0

    def span(self, workers: int) -> float:
        return self.alone + max(self.shared, makespan(self.units, workers))


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
    spans = [load.span(workers) for load in loads]
    lost = [span * workers - sum(load.units) for span, load in zip(spans, loads, strict=True)]
    worst = loads[lost.index(max(lost))]
    limit, longest = f"{worst.stage}: ", makespan(worst.units, workers)
    at_the_end, waiting = longest - sum(worst.units) / workers, max(0.0, worst.shared - longest)
    if max(lost) <= 0.01 * sum(spans) * workers:
        limit = "the work itself"
    elif worst.alone >= max(waiting, at_the_end):
        limit += f"{clock(worst.alone)} of work that cannot be shared out"
    elif waiting >= at_the_end:
        limit += f"{clock(worst.shared)} of storage or a driver that all share"
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
    deltas, evaluate = settings.deltas, settings.evaluate
    residual, trained = len(context.layers_of("residual")), settings.transcoders.source == "train"
    trials = _seconds(folder.glob("lora/trial_*/result.json"))
    bases = _seconds(folder.glob(f"transcoders/layer_*/{MANIFEST}"))
    of_kind = {}
    for group in context.delta_groups:
        kind = "change" if group.ground.target == "change" else "[pl]*"
        of_kind[kind, group.d_new] = _seconds(
            folder.glob(f"deltas/layer_*/{kind}/d{group.d_new:03d}/trial_*/result.json")
        )
    behaviour = {target: _seconds(_cells_of(folder, target)) for target in deltas.targets}
    others = {name: _seconds(folder.glob(f"cells/{name}_*.json")) for name in other_kinds(context)}
    needed = [*of_kind.values(), *behaviour.values(), *others.values()]
    needed += [trials] * (settings.model.finetuned is None)
    needed += [bases] * (trained and bool(residual))
    if not all(needed):
        return []
    # One piece of work is a set of layers on one subset: all its strengths are rows in the same batches.
    pieces = [
        _mean(behaviour[target]) * (len(doses) + len(conditions))
        for target in deltas.targets
        for conditions, doses in context.sets_of(target).values()
    ]
    delta_units = []
    for group in context.delta_groups:
        kind = "change" if group.ground.target == "change" else "[pl]*"
        delta_units += [_mean(of_kind[kind, group.d_new])] * deltas.trials
    cells = pieces * (len(context.subsets) * evaluate.replicas)
    cells += [_mean(seconds) for name, seconds in others.items() for _ in range(other_kinds(context)[name])]
    every = [one for seconds in of_kind.values() for one in seconds]
    adapters = []
    if settings.model.finetuned is None:
        adapters = [Load("lora", [_mean(trials)] * settings.lora.trials, _alone(folder / "lora", trials))]
    layers = residual
    return [
        *adapters,
        Load("transcoders", [_mean(bases)] * layers if trained else [], _alone(folder / "transcoders", bases)),
        Load("deltas", delta_units, _alone(folder / "deltas", every)),
        Load("evaluate", cells),
    ]


def other_kinds(context: Context) -> dict[str, int]:
    """How many cells of each kind beside behaviour a sweep evaluates."""
    settings, residual = context.settings, len(context.layers_of("residual"))
    width = settings.evaluate.d_new or max(settings.deltas.d_new)
    found = {"reconstruction": residual * len(settings.deltas.selections) * len(settings.deltas.d_new)}
    found["ranking"] = residual * bool(context.cards_of("residual"))
    found["cards"] = residual * _pieces(context.cards_of("residual"), width)
    if "change" in settings.deltas.targets:
        features = len(context.layers_of("change")) * (width + 1)
        found["change"] = len(settings.deltas.d_new)
        found["ranking"] += bool(context.cards_of("change")) or settings.evaluate.curve
        found["cards"] += _pieces(context.cards_of("change"), features)
        ranked = sum(CONDITIONS[one].ranked for one in settings.evaluate.controls)
        found["width"] = (
            (len(settings.deltas.d_new) - 1) * (1 + ranked) * len(context.subsets) * settings.evaluate.widths
        )
        found["curve"] = settings.evaluate.curve * len(context.subsets)
    return {name: count for name, count in found.items() if count}


def _pieces(cards: int, features: int) -> int:
    """Pieces of work that the cards of one ranking are."""
    return math.ceil(min(cards, features) / CARDS_AT_ONCE)


def _cells_of(folder: Path, target: str) -> list[Path]:
    """Behaviour cells of a target's deltas."""
    return [path for path in folder.glob("cells/layer_*.json") if ("_change_" in path.name) == (target == "change")]


def schedule_rows(context: Context, folder: Path, workers: int | None) -> list[tuple[str, str]]:
    """One row of text for each number of workers."""
    loads = measured_loads(context, folder)
    if not loads:
        return []
    rows = []
    for count in sorted({*WORKERS, *([workers] if workers else [])}):
        found = forecast(loads, count)
        name = "on 1 worker" if count == 1 else f"on {count} workers"
        rows.append((name, f"{clock(found.seconds)}, {found.busy:.0%} busy; limited by {found.limit}"))
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
