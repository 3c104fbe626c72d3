"""Which deltas the evaluation splices in, as files: the combination chosen for a target, and where its sites are.

In: a `Context` whose deltas are trained. Out: a `Combination` for each target, `SitePlan`s, and what they depend on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import WorkFailed
from jobs.files import key_of, read_json
from jobs.seals import sealed_hash
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.grounds import DeltaGroup, Ground, error_name, grounds_of
from jobs.study.stages.moments import moments_file
from jobs.study.stages.transcoders import chosen_base, root
from jobs.study.stages.work import SitePlan
from jobs.study.workspace import FINETUNED


class Combination(NamedTuple):
    """The deltas of a target whose behaviour is evaluated."""

    ground: Ground
    d_new: int


def combination(context: Context, target: str) -> Combination:
    """The base and d_new of a target whose deltas are spliced: as set, or of the lowest mean validation error over
    layers."""
    settings = context.settings
    grounds = grounds_of(settings.deltas, target)
    if target == "residual" and settings.evaluate.percentile is not None:
        grounds = [Ground(target, settings.evaluate.percentile)]
    widths = [settings.evaluate.d_new] if settings.evaluate.d_new is not None else settings.deltas.d_new
    means: dict[Combination, float] = {}
    for ground in grounds:
        for d_new in widths:
            best = [best_of_group(context, DeltaGroup(layer, ground, d_new)) for layer in context.layers_of(target)]
            values = [one["figures"][error_name(target)] for one in best if one is not None]
            if len(values) == len(best):
                means[Combination(ground, d_new)] = sum(values) / len(values)
    if not means:
        raise WorkFailed(f"no {target} deltas of one width on every layer: " + "; ".join(context.failures))
    return min(means, key=lambda one: (means[one], one.ground.percentile or 0.0, one.d_new))


def site_plans(context: Context, layers: tuple[int, ...], one: Combination) -> tuple[SitePlan, ...]:
    return tuple(site_plan(context, DeltaGroup(layer, *one)) for layer in layers)


def site_plan(context: Context, group: DeltaGroup) -> SitePlan:
    delta = delta_folder(context, group)
    assert delta is not None
    plan = SitePlan(*group, delta=str(delta), moments=str(moments_file(context, group.layer, group.ground)))
    if group.ground.target == "residual":
        base = chosen_base(context, group.layer, group.ground.percentile)
        plan = plan._replace(root=root(context), candidate=(base.average_l0, base.path))
    subsets = sorted(context.subsets)
    made_from = lineage(context, (plan,))
    return plan._replace(key=key_of("reconstruction", made_from, evaluation_settings(context), subsets))


def best_of_group(context: Context, group: DeltaGroup) -> dict[str, Any] | None:
    return read_json(context.space.deltas / group.name / "best.json")


def delta_folder(context: Context, group: DeltaGroup) -> Path | None:
    """Where the delta of a group that is spliced in lies: the one kept by the search, or what joint polish made of it;
    None where no trial succeeded."""
    best = best_of_group(context, group)
    if best is None:
        return None
    together = polished_folder(context, group.d_new) / f"layer_{group.layer:02d}"
    if group.ground.target == "change" and context.settings.deltas.polish_steps and together.is_dir():
        return together
    return context.space.deltas / group.name / f"trial_{best['trial']:04d}"


def polished_folder(context: Context, d_new: int) -> Path:
    return context.space.deltas / "polished" / f"d{d_new:03d}"


def lineage(context: Context, sites: tuple[SitePlan, ...]) -> list[Any]:
    """What the sites' weights are, without the paths of this machine."""
    return [(site.layer, site.candidate, sealed_hash(Path(site.delta) / "delta.safetensors")) for site in sites]


def evaluation_settings(context: Context) -> list[Any]:
    settings = context.settings
    finetuned = read_json(context.space.folder / FINETUNED)
    return [
        keys.lora(settings),
        finetuned,
        settings.evaluate.max_new_tokens,
        settings.evaluate.stop,
        settings.compute.precision,
        *keys.own_dtype(settings),
    ]


def judging_settings(context: Context) -> list[Any]:
    """The same for cells that judge generated texts."""
    return [*evaluation_settings(context), *keys.behaviours(context.settings)]
