"""A piece of evaluation as plain values: its inputs, and what all kinds of cell have in common.

In: a `Context` with trained deltas, or any for `ExpectedPlanInputs`. Out: pieces of work, with the names, keys and
costs of their cells; on a worker, passes of the model, what is spliced into it, and the cells' files. Nothing is loaded
before that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from evaluators.splice.limits import Limits
from jobs.capture.bases import chosen_base, root
from jobs.capture.moments import moments_file
from jobs.capture.worker_memory import ModelSpec, paths, prefixes
from jobs.context import keys
from jobs.context.context import Context, error_name
from jobs.context.workspace import FINETUNED
from jobs.errors import WorkFailed
from jobs.files import key_of, read_json, sealed_hash, short_hash, write_json
from sites import Address, Ground, SetAddress, Site, width_label

LONGEST_PLACE = 120
"""Characters of a cell's name that say what is spliced in; the kind, the subset and the condition come on top."""


@dataclass(frozen=True)
class Shared:
    """What all pieces of a sweep's evaluation share. `cells` is a folder, `rows` a file, `base_model` the un-finetuned
    model's folder."""

    cells: str
    rows: str
    ranking_rows: str
    base_model: str
    subsets: tuple[str, ...]
    limits: Limits
    batch_size: int
    behaviours: dict[str, Any]
    """As in the settings."""


class SitePlan(NamedTuple):
    """A site as files: the delta's folder, the moments of its training data and, if the ground is a base transcoder,
    the base's location. `key` is that of the site's reconstruction cell."""

    address: Address
    delta: str = ""
    moments: str = ""
    root: str = ""
    candidate: tuple[float, str] | None = None
    key: str = ""

    @property
    def site(self) -> Site:
        return self.address.site

    @property
    def ground(self) -> Ground:
        return self.address.ground

    @property
    def d_new(self) -> int:
        return self.address.d_new


class Combination(NamedTuple):
    """Ground and width of the deltas whose behaviour is evaluated."""

    ground: Ground
    d_new: int


class PlanInputs:
    """What the works of an evaluation are planned from, for a sweep with trained deltas."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = context.settings.evaluate
        self.subsets = tuple(context.subsets)

    @cached_property
    def chosen(self) -> dict[str, Combination]:
        """The deltas to splice in, by target. Raises WorkFailed if no width has one at every site."""
        return {target: self._combination(target) for target in self.context.settings.deltas.targets}

    def _combination(self, target: str) -> Combination:
        """The base and d_new of the settings, or those with the lowest mean validation error over sites."""
        means: dict[Combination, float] = {}
        for combination in self._combinations(target):
            groups = [Address(site, *combination) for site in self.context.sites_of(target)]
            best = [self.context.best_of(group) for group in groups]
            values = [result["figures"][error_name(target)] for result in best if result is not None]
            if len(values) == len(best):
                means[combination] = sum(values) / len(values)
        if not means:
            raise WorkFailed(f"no {target} deltas of one width on every layer: " + "; ".join(self.context.failures))
        return min(
            means, key=lambda combination: (means[combination], combination.ground.percentile or 0.0, combination.d_new)
        )

    def _combinations(self, target: str) -> list[Combination]:
        """The combinations that the settings allow."""
        grounds = self.context.grounds_of(target)
        if target == "residual" and self.settings.percentile is not None:
            grounds = [Ground(target, self.settings.percentile)]
        widths = self.context.settings.deltas.d_new if self.settings.d_new is None else [self.settings.d_new]
        return [Combination(ground, d_new) for ground in grounds for d_new in widths]

    def kept(self, sites: Sequence[Site], ground: Ground, d_new: int) -> tuple[SitePlan, ...]:
        """The plans of the sites that have a delta."""
        plans = [self.site_plan(Address(site, ground, d_new)) for site in sites]
        return tuple(plan for plan in plans if plan is not None)

    def site_plan(self, group: Address) -> SitePlan | None:
        """The plan of a group; None if none of its trials succeeded."""
        delta = self.context.kept_delta(group)
        if delta is None:
            return None
        plan = SitePlan(group, str(delta), str(moments_file(self.context, group.site, group.ground)))
        if group.ground.target == "residual":
            base = chosen_base(self.context, group.site, group.ground.percentile)
            plan = plan._replace(root=root(self.context), candidate=(base.average_l0, base.path))
        key = key_of("reconstruction", self.lineage([plan]), self.computed_with, sorted(self.subsets))
        return plan._replace(key=key)

    def lineage(self, plans: Sequence[SitePlan]) -> list[Any]:
        """Identifies the sites' weights, without paths of this machine."""
        return [
            (keys.place(plan.site), plan.candidate, sealed_hash(Path(plan.delta) / "delta.safetensors"))
            for plan in plans
        ]

    @cached_property
    def finetuned_key(self) -> str:
        return keys.lora(self.context.settings)

    @cached_property
    def computed_with(self) -> list[Any]:
        """Key parts of every cell, besides its sites."""
        settings = self.context.settings
        finetuned = read_json(self.context.space.folder / FINETUNED)
        return [
            self.finetuned_key,
            finetuned,
            settings.evaluate.max_new_tokens,
            settings.evaluate.stop,
            "auto" if self.context.device == "cpu" else "fp32",  # `auto`, in the keys of before, was bf16 on a GPU
            *keys.own_dtype(settings),
        ]

    @property
    def some_subsets(self) -> list[Sequence[str]]:
        """Key part of cells about all subsets at once: the subsets, if the settings name them."""
        return [self.subsets] if self.context.settings.evaluate.subsets else []

    @cached_property
    def judged_with(self) -> list[Any]:
        """Key parts of cells that judge generated texts."""
        return [*self.computed_with, *keys.behaviours(self.context.settings)]

    def ranked(self, cell: str, plans: Sequence[SitePlan]) -> list[tuple[Site, int]]:
        """The features of these sites in the order of the finished ranking cell; empty if it is missing."""
        listed = read_json(self.context.space.cells / f"{cell}.json") or {"features": []}
        sites = {plan.site.label: plan.site for plan in plans}
        return [(sites[str(entry["layer"])], entry["feature"]) for entry in listed["features"]]

    @cached_property
    def shared(self) -> Shared:
        return Shared(
            cells=str(self.context.space.cells),
            rows=str(self.context.rows / "evaluation.jsonl"),
            ranking_rows=str(self.context.rows / "validation.jsonl"),
            base_model=str(self.context.model),
            subsets=self.subsets,
            limits=self.context.limits,
            batch_size=self.settings.batch_size,
            behaviours=self.settings.behaviours,
        )

    @cached_property
    def finetuned(self) -> ModelSpec:
        """The finetuned model, as workers load it."""
        return ModelSpec(str(self.context.finetuned), self.context.device, self.context.settings.model.dtype)

    @property
    def unfinetuned(self) -> ModelSpec:
        return self.finetuned._replace(folder=str(self.context.model))

    def common(self) -> dict[str, Any]:
        """The fields of work on the finetuned model."""
        return {"model": self.finetuned, "shared": self.shared, "seed": self.context.settings.seed}


class ExpectedPlanInputs(PlanInputs):
    """Inputs that assume every search will keep a delta: to count and forecast before anything is trained.

    Nothing is read, and all keys are the same. Where the evaluation will choose a width, this takes the widest.
    """

    finetuned_key = ""
    computed_with = judged_with = ()  # type: ignore[assignment]

    def _combination(self, target: str) -> Combination:
        return max(self._combinations(target), key=lambda combination: combination.d_new)

    def site_plan(self, group: Address) -> SitePlan:
        return SitePlan(group)

    def lineage(self, plans: Sequence[SitePlan]) -> list[Any]:
        return []

    def ranked(self, cell: str, plans: Sequence[SitePlan]) -> list[tuple[Site, int]]:
        """All features; change deltas have one more, at BOS."""
        return [
            (plan.site, feature) for plan in plans for feature in range(plan.d_new + (plan.ground.target == "change"))
        ]

    finetuned = ModelSpec("finetuned", "", "")


def cell_name(kind: str, *parts: object) -> str:
    """A cell's name, such as `ranking_layer_00-29_change_d032` or `raw_tool`. Empty parts are left out."""
    return "_".join(str(part) for part in (kind, *parts) if part != "")


class Timing(NamedTuple):
    """Estimated seconds on a machine without measurements: for passes over whole rows, and for answering rows token by
    token, through all layers or the number given as second argument. A subset has `prompts` rows."""

    n_layers: int
    prompts: int
    subsets: int
    passes: Callable[..., float]
    answers: Callable[..., float]


@dataclass(frozen=True)
class Work:
    """Work of one worker: sites that share a model, and the cells to compute for them.

    Each kind of cell is a subclass. It defines its pieces of work (`plan`), what a worker does (`compute`), what that
    costs (`cost`, `seconds`), and the fields that distinguish its cells (`columns`).
    """

    kind: ClassVar[str]
    """Its name in the cells' files."""
    columns: ClassVar[tuple[str, ...]]
    """Fields of a cell that trackers show as its parameters."""

    name: str
    """Name of the cell, or the prefix of its cells' names."""
    key: str
    model: ModelSpec
    shared: Shared
    sites: tuple[SitePlan, ...] = ()
    subset: str = ""
    """Empty for all subsets."""
    seed: int = 0

    @classmethod
    def params(cls, cell: dict[str, Any]) -> dict[str, Any]:
        """A cell's columns. Several layers are written `1+2`, as in file names, because MLflow would wrap a list."""
        shown = {name: cell[name] for name in cls.columns if cell.get(name) not in (None, "")}
        return {name: "+".join(map(str, value)) if isinstance(value, list) else value for name, value in shown.items()}

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        """The figures of a cell that trackers show."""
        return {name: value for name, value in cell.items() if isinstance(value, float)}

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        """The evaluation's pieces of work of this kind."""
        raise NotImplementedError

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        """Computes the cells, on a worker; returns their names."""
        raise NotImplementedError

    def cost(self, n_layers: int) -> int:
        """Relative cost, in layers per 20 rows: passes times the layers above the first splice. The factors are
        measured, so that the longest pieces start first."""
        raise NotImplementedError

    def seconds(self, timing: Timing) -> float:
        """Estimated seconds per cell on a GPU without measurements."""
        raise NotImplementedError

    @property
    def units(self) -> int:
        """Number of parts that could run in parallel, for forecasts."""
        return len(self.cells())

    @property
    def affinity(self) -> tuple[Any, ...]:
        """Works with the same affinity share a model and everything computed below the first spliced site."""
        return (self.model.folder, self.sites[0].site) if self.sites else (self.model.folder, self.name)

    @property
    def needs_moments(self) -> bool:
        """Whether it needs the moments of its deltas' training data."""
        return False

    def cells(self) -> dict[str, str]:
        """The names of the cells to write, and the key of each."""
        return {self.name: self.key}

    def reusable(self, done: Mapping[str, Sequence[float]]) -> set[str]:
        """The finished cells that need not be recomputed; `done` maps each to the strengths it was measured with."""
        return set(done)

    def remaining(self, done: set[str]) -> Self:
        """The same work without the cells in `done`."""
        return self

    def is_finished(self) -> bool:
        """Whether work without cells has written its results."""
        return False

    def above(self, n_layers: int) -> int:
        """Number of layers from the first spliced one on."""
        return n_layers - self.sites[0].site.layer if self.sites else n_layers

    def cell_file(self, name: str) -> Path:
        return Path(self.shared.cells) / f"{name}.json"

    def plain_passes(self, model: Any) -> Any:
        from evaluators.splice.passes import Passes

        return Passes(model, self.shared.batch_size)

    def kept_passes(self, model: Any) -> Any:
        """Passes that reuse the raw model's prefixes at the first spliced site, which this worker caches."""
        return replace(self.plain_passes(model), prefixes=prefixes(self.model, self.sites[0].site))

    def load_patches(self) -> list[Any]:
        """The patches to splice in at the sites: their grounds and deltas, on the worker's device."""
        from evaluators.splice.interventions import Patch
        from models.deltas import read_delta
        from models.gemma_scope import Candidate, read

        without_base = tuple(plan.site for plan in self.sites if plan.candidate is None)
        before = paths(self.model, self.shared.base_model, without_base) if without_base else {}
        patches = []
        for plan in self.sites:
            base = plan.candidate and read(plan.root, Candidate(*plan.candidate), plan.site)
            patch = Patch(plan.site, base or before[plan.site], read_delta(Path(plan.delta)))
            patches.append(patch.to(self.model.device))
        return patches

    def earlier_cell(self, name: str) -> dict[str, Any]:
        """A cell that an earlier round should have written. Raises WorkFailed if it did not."""
        cell: dict[str, Any] | None = read_json(self.cell_file(name))
        if cell is None:
            raise WorkFailed(f"it needs the cell {name}, which is missing")
        return cell

    def write(self, figures: dict[str, Any], started: float) -> list[str]:
        """Writes the cell of work that has a single one; returns its name."""
        ground = self.sites[0].ground
        cell = {
            "kind": self.kind,
            "target": ground.target,
            "layers": [plan.site.key for plan in self.sites],
            "percentile": ground.percentile,
            "d_new": self.sites[0].d_new,
            "seed": self.seed,
            "key": self.key,
            "seconds": time.perf_counter() - started,
            **figures,
        }
        write_json(self.cell_file(self.name), cell)
        return [self.name]


def place_of(sites: Sequence[Site], ground: Ground, d_new: int) -> str:
    """The part of a cell's name that says what is spliced in: `layer_00-29_change_d032`. A long list of sites is cut
    and gets a hash: file systems limit a name to 255 bytes."""
    name = SetAddress(tuple(sites), ground, d_new).name
    if len(name) <= LONGEST_PLACE:
        return name
    end = f"{short_hash(name)}_{ground.label}_{width_label(d_new)}"
    return f"{name[: LONGEST_PLACE - len(end) - 1]}-{end}"
