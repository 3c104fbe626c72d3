"""The kinds of cell that say how well deltas fit, and the table of all kinds, from which the stage, plan and forecast
are derived.

In: the inputs of an evaluation. Out: its pieces of work and, on a worker, `cells/NAME.json`. A new kind of cell needs a
class, an entry in `ROUNDS`, and a table that reads its cells.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from data.rows import read_rows, slug
from jobs.capture.worker_memory import bridge, exact_paths, own_paths
from jobs.evaluation.behaviour import Behaviour, Raw, Width
from jobs.evaluation.features import Cards, Curve, GroupEffects, Grouping, Ranking
from jobs.evaluation.graphs import Graphs
from jobs.evaluation.parts import Look, Parts
from jobs.evaluation.work import Combination, PlanInputs, Timing, Work, cell_name, place_of
from jobs.files import key_of, read_json, write_json
from sites import Address, Ground

CHECK_ROWS = 1
"""Rows of each subset for the exactness checks, which compare all logits at all positions."""
EXACT_LAYERS = 14
"""Number of layers whose MLPs are in memory in fp32 at once, next to a (possibly large) model in bf16."""


@dataclass(frozen=True)
class Change(Work):
    """How much finetuning changed each site, and how much the deltas of each width leave unexplained."""

    kind: ClassVar[str] = "change"
    columns: ClassVar[tuple[str, ...]] = ("kind", "target", "d_new")

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        works = []
        sites = inputs.context.sites_of("change")
        for d_new in inputs.context.settings.deltas.d_new if sites else ():
            combination = Combination(Ground("change"), d_new)
            plans = inputs.kept(sites, *combination)
            key_parts = (inputs.lineage(plans), inputs.computed_with, sorted(inputs.subsets))
            name = cell_name("change", place_of(sites, *combination))
            works.append(cls(name, key_of("change", *key_parts), **inputs.common(), sites=plans))
        return works

    def cost(self, n_layers: int) -> int:
        return 7 * self.above(n_layers)

    def seconds(self, timing: Timing) -> float:
        return 2 * timing.passes(timing.prompts * timing.subsets)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.change_fit import evaluate_change

        started, patches, passes = time.perf_counter(), self.load_patches(), self.plain_passes(model)
        if self.model.precision == "fp32":
            fits = evaluate_change(passes, patches, rows)
        else:
            fits = []
            for first in range(0, len(patches), EXACT_LAYERS):
                exact_paths.cache_clear()  # before more are read
                window = tuple(plan.site for plan in self.sites[first : first + EXACT_LAYERS])
                before, after = (
                    exact_paths(self.model, folder, window) for folder in (self.shared.base_model, self.model.folder)
                )
                fits += evaluate_change(passes, patches[first : first + EXACT_LAYERS], rows, (before, after))
                del before, after
        layers = [{"layer": plan.site.key, "rows": entries} for plan, entries in zip(self.sites, fits, strict=True)]
        return self.write({"d_new": self.sites[0].d_new, "layers": layers}, started)


@dataclass(frozen=True)
class Reconstruction(Work):
    """The errors of the bases and their deltas on a site's output: a cell for each ground and width."""

    kind: ClassVar[str] = "reconstruction"
    columns: ClassVar[tuple[str, ...]] = ("kind", "target", "layer", "percentile", "d_new", "base", "convention")

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        context, works = inputs.context, []
        for site in context.sites_of("residual"):
            groups = [
                Address(site, ground, d_new)
                for ground in context.grounds_of("residual")
                for d_new in context.settings.deltas.d_new
            ]
            plans = [plan for group in groups if (plan := inputs.site_plan(group)) is not None]
            if plans:
                name = cell_name(cls.kind, site.folder)
                works.append(cls(name, "", **inputs.common(), sites=tuple(plans)))
        return works

    @classmethod
    def name_of(cls, group: Address) -> str:
        """The name of the cell of a kept delta."""
        return cell_name(cls.kind, group.name)

    def cells(self) -> dict[str, str]:
        return {self.name_of(plan.address): plan.key for plan in self.sites}

    def remaining(self, done: set[str]) -> Self:
        return replace(self, sites=tuple(plan for plan in self.sites if self.name_of(plan.address) not in done))

    def cost(self, n_layers: int) -> int:
        """Every subset's rows, with every position projected to the vocabulary."""
        passes = 1 + len({plan.candidate for plan in self.sites}) + len(self.sites)
        return passes * len(self.shared.subsets) * (self.above(n_layers) + n_layers // 4)

    def seconds(self, timing: Timing) -> float:
        return 3 * timing.passes(timing.prompts * timing.subsets)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.reconstruction import evaluate_reconstruction

        raw = [self.earlier_cell(cell_name("raw", slug(subset)))["rows"] for subset in self.shared.subsets]
        texts = [row for cell in raw for row in cell]
        ce_raw = sum(row["text_nll"] for row in texts) / sum(row["n_act_tokens"] for row in texts)
        names = []
        by_site = evaluate_reconstruction(self.kept_passes(model), self.load_patches(), rows, ce_raw)
        for plan, figures in zip(self.sites, by_site, strict=True):
            assert plan.candidate is not None
            cell = {
                "kind": self.kind,
                "layer": plan.site.key,
                "target": plan.ground.target,
                "percentile": plan.ground.percentile,
                "d_new": plan.d_new,
                "convention": plan.site.kind.reading,
                "seed": self.seed,
                "base": plan.candidate[1],
                "key": plan.key,
                **figures,
            }
            names.append(self.name_of(plan.address))
            write_json(self.cell_file(names[-1]), cell)
        return names


@dataclass(frozen=True)
class Exactness(Work):
    """Checks of the splice against a model edited by hand; written to `checks_TARGET.json` instead of cells."""

    kind: ClassVar[str] = "exactness"
    columns: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        works, context = [], inputs.context
        for target, chosen in inputs.chosen.items():
            plans = inputs.kept(context.sites_of(target), *chosen)
            key = key_of("exactness", inputs.lineage(plans), inputs.computed_with, *inputs.some_subsets)
            works.append(cls(cell_name("checks", target), key, **inputs.common(), sites=plans))
        return works

    def cells(self) -> dict[str, str]:
        return {}

    def is_finished(self) -> bool:
        return (read_json(checks_file(self.shared.cells, self.name)) or {}).get("key") == self.key

    def cost(self, n_layers: int) -> int:
        return 8 * self.above(n_layers)

    def seconds(self, timing: Timing) -> float:
        return 0.0

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.checks import change_checks, exactness_checks

        by_label: dict[str, list[Any]] = defaultdict(list)
        for row in rows:
            by_label[row.label].append(row)
        check_rows = [row for subset in by_label.values() for row in subset[:CHECK_ROWS]]
        patches = self.load_patches()
        sets = [patches[:1], patches] if len(patches) > 1 else [patches]
        checks = [check for chosen in sets for check in exactness_checks(model, check_rows, chosen, self.shared.limits)]
        if self.sites[0].ground.target == "change":
            places = tuple(plan.site for plan in self.sites)
            before, after = (
                own_paths(self.model, folder, places) for folder in (self.shared.base_model, self.model.folder)
            )
            checks += [check for chosen in sets for check in change_checks(model, check_rows, chosen, before, after)]
        write_json(checks_file(self.shared.cells, self.name), {"key": self.key, "checks": checks})
        return []


CEILING: tuple[type[Work], ...] = (Raw, Look, Parts)
"""Kinds that need no deltas: how much there is to explain, and where in the model."""
ROUNDS: dict[str, tuple[type[Work], ...]] = {
    "ceiling": CEILING,
    "rankings and fits": (Ranking, Change, Reconstruction, Exactness),
    "behaviour": (Behaviour, Width, Grouping),
    "features, groups and graphs": (Cards, Curve, GroupEffects, Graphs),
}
"""In order: the cells of a round build on those of earlier rounds."""
KINDS = tuple(kind for kinds in ROUNDS.values() for kind in kinds)
BY_NAME = {kind.kind: kind for kind in KINDS}
"""Kinds by their name in cells."""


def works_of(inputs: PlanInputs, kinds: Iterable[type[Work]] = KINDS) -> list[Work]:
    """The evaluation's pieces of work of these kinds."""
    return [work for kind in kinds for work in kind.plan(inputs)]


def evaluate(work: Work) -> list[str]:
    """Computes the cells of one piece of work, on a worker; returns their names."""
    subsets = (work.subset,) if work.subset else work.shared.subsets
    all_rows = read_rows(work.shared.rows)
    rows = [row for subset in subsets for row in all_rows if row.label == subset]
    return work.compute(bridge(work.model.folder, work.model.device, work.model.precision), rows)


def checks_file(cells: str | Path, name: str) -> Path:
    """The file of exactness checks, next to the folder of cells."""
    return Path(cells).parent / f"{name}.json"
