"""Estimates how long a sweep would take on more workers: its units of work, at measured costs, scheduled on N workers.

In: a `Context`, and the folder of a sweep that has run. Out: for each number of workers, the time, the share of it that
workers are busy, and the bottleneck. Stages run one after another. Each starts with its serial part, then assigns units
as the engine does: longest first, each to the first free worker.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.context.context import Context
from jobs.evaluation.kinds import works_of
from jobs.evaluation.work import ExpectedPlanInputs
from jobs.files import MANIFEST, read_json
from jobs.progress import clock
from sites import Address

WORKERS = (1, 8, 64, 512)


class Load(NamedTuple):
    """A stage's work, in seconds: its `units`; `alone`, the serial part before them; and `shared`, the minimum time of
    the units on any number of workers, because they share storage or the driver."""

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
    """Seconds until the last unit is done, with the longest first, each on the first free worker."""
    free = [0.0] * min(workers, max(1, len(units)))
    for unit in sorted(units, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


def forecast(loads: Sequence[Load], workers: int) -> Forecast:
    """The forecast of a whole sweep on `workers` workers; `limit` names the stage with the most idle time."""
    spans = [load.span(workers) for load in loads]
    idle = [span * workers - sum(load.units) for span, load in zip(spans, loads, strict=True)]
    bottleneck = loads[idle.index(max(idle))]
    limit, longest = f"{bottleneck.stage}: ", makespan(bottleneck.units, workers)
    at_the_end, waiting = longest - sum(bottleneck.units) / workers, max(0.0, bottleneck.shared - longest)
    if max(idle) <= 0.01 * sum(spans) * workers:
        limit = "the work itself"
    elif bottleneck.alone >= max(waiting, at_the_end):
        limit += f"{clock(bottleneck.alone)} of work that cannot be shared out"
    elif waiting >= at_the_end:
        limit += f"{clock(bottleneck.shared)} of storage or a driver that all share"
    elif len(bottleneck.units) < workers:
        limit += f"{len(bottleneck.units)} units for {workers} workers"
    else:
        limit += f"its longest unit takes {clock(max(bottleneck.units))}"
    work = sum(sum(load.units) for load in loads)
    total = sum(spans)
    return Forecast(total, work / (total * workers) if total else 0.0, limit)


def measured_loads(context: Context, folder: Path) -> list[Load]:
    """This sweep's units of work at the mean costs of the sweep in `folder`; empty if some costs are missing there. The
    few cells of the raw models are left out."""
    settings = context.settings
    residual, trained = context.sites_of("residual"), settings.transcoders.source == "train"
    trials = _seconds(folder.glob("lora/trial_*/result.json"))
    bases = _seconds(folder.glob(f"transcoders/layer_*/{MANIFEST}"))
    delta_costs, cell_costs = _delta_seconds(folder), _cell_seconds(folder)
    groups = [(group.ground.target, group.d_new) for group in context.delta_groups]
    works = [work for work in works_of(ExpectedPlanInputs(context)) if work.sites and work.cells()]
    kinds = [(work.kind, work.sites[0].ground.target) for work in works]
    costs = [*(delta_costs[group] for group in groups), *(cell_costs[kind] for kind in kinds)]
    costs += [trials] * (settings.model.finetuned is None)
    costs += [bases] * (trained and bool(residual))
    if not all(costs):
        return []
    cells: list[float] = []
    for work, kind in zip(works, kinds, strict=True):
        cells += [_mean(cell_costs[kind]) * len(work.cells()) / work.units] * work.units
    delta_units = [_mean(delta_costs[group]) for group in groups for _ in range(settings.deltas.trials)]
    all_trials = [cost for group in dict.fromkeys(groups) for cost in delta_costs[group]]
    adapters = []
    if settings.model.finetuned is None:
        adapters = [Load("lora", [_mean(trials)] * settings.lora.trials, _alone(folder / "lora", trials))]
    return [
        *adapters,
        Load("transcoders", [_mean(bases)] * len(residual) * trained, _alone(folder / "transcoders", bases)),
        Load("deltas", delta_units, _alone(folder / "deltas", all_trials)),
        Load("evaluate", cells),
    ]


def _delta_seconds(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Seconds of finished delta trials, by target and d_new."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for path in sorted(folder.glob("deltas/layer_*/*/d*/trial_*/result.json")):
        group = Address.parse(str(path.parents[1].relative_to(folder / "deltas")))
        seconds[group.ground.target, group.d_new] += _seconds([path])
    return seconds


def _cell_seconds(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Seconds of finished cells, by kind and target."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for path in sorted(folder.glob("cells/*.json")):
        cell = read_json(path)
        if cell and cell.get("seconds") and "kind" in cell:
            seconds[cell["kind"], cell["target"]].append(cell["seconds"])
    return seconds


def schedule_rows(context: Context, folder: Path, workers: int | None) -> list[tuple[str, str]]:
    """One row of text for each number of workers."""
    loads = measured_loads(context, folder)
    if not loads:
        return []
    rows = []
    for count in sorted({*WORKERS, *([workers] if workers else [])}):
        estimate = forecast(loads, count)
        name = "on 1 worker" if count == 1 else f"on {count} workers"
        rows.append((name, f"{clock(estimate.seconds)}, {estimate.busy:.0%} busy; limited by {estimate.limit}"))
    return [("costs measured in", str(folder)), *rows]


def _alone(folder: Path, units: Sequence[float]) -> float:
    """Seconds that a stage spent outside its units: capture, merging, starting workers."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST) or {}
    if "seconds" not in manifest:
        return 0.0
    return max(0.0, manifest["seconds"] - sum(units) / manifest.get("workers", 1))


def _seconds(paths: Any) -> list[float]:
    """Seconds of trials that ended by themselves or were stopped early: what a search costs holds both."""
    results = [read_json(path) for path in paths]
    return [
        result["seconds"]
        for result in results
        if result and result.get("seconds") and result.get("state", "COMPLETE") in ("COMPLETE", "STOPPED")
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
