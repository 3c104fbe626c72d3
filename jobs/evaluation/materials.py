"""What the pieces of an evaluation are made of: the deltas that are spliced in, as files, and the keys of cells.

In: a `Context` whose deltas are trained, or, for `ExpectedMaterials`, any. Out: site plans, lineages, and what all
pieces share, from which each kind of work makes its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from evaluators.splice.limits import Limits
from jobs.capture.bases import chosen_base, root
from jobs.capture.moments import moments_file
from jobs.capture.worker_memory import ModelSpec
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.kept import best_of_group, delta_folder, error_name
from jobs.context.workspace import FINETUNED
from jobs.errors import WorkFailed
from jobs.files import key_of, read_json
from jobs.seals import sealed_hash
from sites import Address, Ground, Site


@dataclass(frozen=True)
class Shared:
    """What all pieces of a sweep's evaluation share. `cells` is a folder, `rows` a file, `base_model` the folder of the
    un-finetuned model."""

    cells: str
    rows: str
    ranking_rows: str
    base_model: str
    subsets: tuple[str, ...]
    limits: Limits
    batch_size: int
    behaviours: dict[str, Any]
    """As the settings name them."""


class SitePlan(NamedTuple):
    """A site as files: the delta's folder, the moments of what it was trained on, and, where the ground is a base
    transcoder, where that is. `key` is that of the site's reconstruction cell."""

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
    """The deltas of a target whose behaviour is evaluated."""

    ground: Ground
    d_new: int


class Materials:
    """Those of a sweep whose deltas are trained."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.settings = context.settings.evaluate
        self.subsets = tuple(context.subsets)

    @cached_property
    def chosen(self) -> dict[str, Combination]:
        """The deltas that are spliced in, by target; raises WorkFailed where no width has one at every site."""
        return {target: self._combination(target) for target in self.context.settings.deltas.targets}

    def _combination(self, target: str) -> Combination:
        """The base and d_new as set, or those of the lowest mean validation error over sites."""
        means: dict[Combination, float] = {}
        for combination in self._combinations(target):
            groups = [Address(site, *combination) for site in self.context.sites_of(target)]
            best = [best_of_group(self.context, group) for group in groups]
            values = [one["figures"][error_name(target)] for one in best if one is not None]
            if len(values) == len(best):
                means[combination] = sum(values) / len(values)
        if not means:
            raise WorkFailed(f"no {target} deltas of one width on every layer: " + "; ".join(self.context.failures))
        return min(means, key=lambda one: (means[one], one.ground.percentile or 0.0, one.d_new))

    def _combinations(self, target: str) -> list[Combination]:
        """Those that the settings allow."""
        grounds = self.context.grounds_of(target)
        if target == "residual" and self.settings.percentile is not None:
            grounds = [Ground(target, self.settings.percentile)]
        widths = self.context.settings.deltas.d_new if self.settings.d_new is None else [self.settings.d_new]
        return [Combination(ground, d_new) for ground in grounds for d_new in widths]

    def kept(self, sites: Sequence[Site], ground: Ground, d_new: int) -> tuple[SitePlan, ...]:
        """The plans of those sites that have a delta."""
        plans = [self.site_plan(Address(site, ground, d_new)) for site in sites]
        return tuple(plan for plan in plans if plan is not None)

    def site_plan(self, group: Address) -> SitePlan | None:
        """None where no trial of the group succeeded."""
        delta = delta_folder(self.context, group)
        if delta is None:
            return None
        plan = SitePlan(group, str(delta), str(moments_file(self.context, group.site, group.ground)))
        if group.ground.target == "residual":
            base = chosen_base(self.context, group.site, group.ground.percentile)
            plan = plan._replace(root=root(self.context), candidate=(base.average_l0, base.path))
        key = key_of("reconstruction", self.lineage([plan]), self.computed_with, sorted(self.subsets))
        return plan._replace(key=key)

    def lineage(self, plans: Sequence[SitePlan]) -> list[Any]:
        """What the sites' weights are, without the paths of this machine."""
        return [
            (keys.place(plan.site), plan.candidate, sealed_hash(Path(plan.delta) / "delta.safetensors"))
            for plan in plans
        ]

    @cached_property
    def finetuned_key(self) -> str:
        return keys.lora(self.context.settings)

    @cached_property
    def computed_with(self) -> list[Any]:
        """What every cell depends on besides its sites."""
        settings = self.context.settings
        finetuned = read_json(self.context.space.folder / FINETUNED)
        return [
            self.finetuned_key,
            finetuned,
            settings.evaluate.max_new_tokens,
            settings.evaluate.stop,
            settings.compute.precision,
            *keys.own_dtype(settings),
        ]

    @cached_property
    def judged_with(self) -> list[Any]:
        """The same for cells that judge generated texts."""
        return [*self.computed_with, *keys.behaviours(self.context.settings)]

    def ranked(self, cell: str, plans: Sequence[SitePlan]) -> list[tuple[Site, int]]:
        """The features of these sites in the order of the finished cell that ranks them; empty where it is missing."""
        listed = read_json(self.context.space.cells / f"{cell}.json") or {"features": []}
        sites = {plan.site.label: plan.site for plan in plans}
        return [(sites[str(one["layer"])], one["feature"]) for one in listed["features"]]

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
        from trainers.precision import resolve_precision

        settings, device = self.context.settings, self.context.device
        precision = settings.compute.precision if settings.model.dtype == "auto" else settings.model.dtype
        if device == "cpu" and precision == "auto":
            precision = "fp32"  # bf16 is not worth the loss of exactness there, so it must be set explicitly
        return ModelSpec(str(self.context.finetuned), device, resolve_precision(precision, device))

    @property
    def unfinetuned(self) -> ModelSpec:
        return self.finetuned._replace(folder=str(self.context.model))

    def common(self) -> dict[str, Any]:
        """The fields of work on the finetuned model."""
        return {"model": self.finetuned, "shared": self.shared, "seed": self.context.settings.seed}


class ExpectedMaterials(Materials):
    """Those of a sweep whose every search will keep a delta: to count and to forecast, before anything is trained.

    Nothing is read, and all keys are alike. Where the evaluation will choose a width, it is the widest.
    """

    finetuned_key = ""
    computed_with = judged_with = ()  # type: ignore[assignment]

    def _combination(self, target: str) -> Combination:
        return max(self._combinations(target), key=lambda one: one.d_new)

    def site_plan(self, group: Address) -> SitePlan:
        return SitePlan(group)

    def lineage(self, plans: Sequence[SitePlan]) -> list[Any]:
        return []

    def ranked(self, cell: str, plans: Sequence[SitePlan]) -> list[tuple[Site, int]]:
        """All features; a change delta has one more, at BOS."""
        return [
            (plan.site, feature) for plan in plans for feature in range(plan.d_new + (plan.ground.target == "change"))
        ]

    finetuned = ModelSpec("finetuned", "", "")
