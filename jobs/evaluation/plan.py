"""The pieces of work that an evaluation consists of: which cells are computed together, on which model and sites.

In: a `Context` whose deltas are trained, and the combination chosen for each target. Out: `Work`, plain values that a
worker is handed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import slug
from evaluators.conditions import CONDITIONS
from evaluators.layer_sets import layer_label
from jobs.capture.bases import chosen_base, root
from jobs.capture.moments import moments_file
from jobs.capture.worker_memory import ModelSpec
from jobs.context import keys
from jobs.context.context import CARDS_AT_ONCE, Context
from jobs.context.grounds import DeltaGroup, Ground, error_name, grounds_of
from jobs.context.kept import best_of_group, delta_folder, replica_folder
from jobs.context.workspace import FINETUNED
from jobs.errors import WorkFailed
from jobs.evaluation.work import Evaluation, SitePlan, Work
from jobs.files import key_of, read_json
from jobs.seals import sealed_hash


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


def _shared(context: Context) -> Evaluation:
    section = context.settings.evaluate
    return Evaluation(
        cells=str(context.space.cells),
        rows=str(context.rows / "evaluation.jsonl"),
        ranking_rows=str(context.rows / "validation.jsonl"),
        base_model=str(context.model),
        subsets=tuple(context.subsets),
        limits=context.limits,
        batch_size=section.batch_size,
        behaviours=section.behaviours,
    )


def _model(context: Context, folder: Path | None = None) -> ModelSpec:
    """The finetuned model, or the one in another folder, as workers load it."""
    from trainers.precision import resolve_precision

    settings, device = context.settings, context.device
    precision = settings.compute.precision if settings.model.dtype == "auto" else settings.model.dtype
    if device == "cpu" and precision == "auto":
        precision = "fp32"  # bf16 is not worth the loss of exactness there, so it must be set explicitly
    return ModelSpec(
        str(folder or context.finetuned),
        device,
        resolve_precision(precision, device),
        settings.transcoders.convention,
    )


def _work(context: Context, kind: str, name: str, key: str, **asked: Any) -> Work:
    """A piece of work on the finetuned model, unless `asked` names another."""
    given = {"model": _model(context), "seed": context.settings.seed, **asked}
    return Work(kind, name, key, shared=_shared(context), **given)


def raw_work(context: Context) -> list[Work]:
    """Nothing spliced: the finetuned model, and the one before finetuning where something is measured against it."""
    key = key_of("raw with text", keys.lora(context.settings), judging_settings(context))
    settings = context.settings.evaluate
    models = {"raw": _model(context)}
    if "change" in context.settings.deltas.targets or any(CONDITIONS[one].model == "base" for one in settings.controls):
        models["base_model_raw"] = _model(context, context.model)
    return [
        _work(context, "raw", f"{name}_{slug(subset)}", key, subset=subset, conditions=(name,), model=model)
        for name, model in models.items()
        for subset in context.subsets
    ]


def behaviour_work(context: Context, target: str, chosen: Combination) -> list[Work]:
    settings = context.settings.evaluate
    works = []
    for layers, (conditions, doses) in context.sets_of(target).items():
        elsewhere = tuple(one for one in conditions if CONDITIONS[one].model == "base")
        here = tuple(one for one in conditions if one not in elsewhere)
        sites = site_plans(context, layers, chosen)
        cell = ("cell", lineage(context, sites), judging_settings(context))
        key = key_of(*cell)
        for subset in context.subsets:
            name = f"{_name(layers, chosen)}_{slug(subset)}"
            asked = {"sites": sites, "subset": subset}
            # At 0 and 1 weights in between are those of no_delta and of raw.
            between = tuple(dose for dose in doses if dose not in (0.0, 1.0))
            work = _work(context, "behaviour", name, key, **asked, conditions=here, doses=doses, control_doses=between)
            works += [work, *(_of_replica(work, rank, key_of(*cell, rank)) for rank in range(1, settings.replicas))]
            if elsewhere:  # another model, so another worker's
                model = _model(context, context.model)
                works.append(_work(context, "behaviour", name, key, **asked, conditions=elsewhere, model=model))
    return works


def widths_work(context: Context, chosen: dict[str, Combination]) -> list[Work]:
    """The change deltas of every width but the chosen one, in all layers at once, and controls of the same rank."""
    settings = context.settings.evaluate
    if "change" not in chosen or not settings.widths:
        return []
    layers = tuple(context.layers_of("change"))
    conditions = ("full", *(one for one in settings.controls if CONDITIONS[one].ranked))
    works = []
    for d_new in context.settings.deltas.d_new:
        one = Combination(Ground("change"), d_new)
        trained = all(best_of_group(context, DeltaGroup(layer, *one)) is not None for layer in layers)
        if d_new == chosen["change"].d_new or not trained:
            continue
        sites = site_plans(context, layers, one)
        key = key_of("width", lineage(context, sites), judging_settings(context))
        works += [
            _work(
                context,
                "width",
                f"width_{_name(layers, one)}_{slug(subset)}",
                key,
                sites=sites,
                subset=subset,
                conditions=conditions,
            )
            for subset in context.subsets
        ]
    return works


def _name(layers: tuple[int, ...], chosen: Combination) -> str:
    return f"layer_{layer_label(layers, digits=2)}_{chosen.ground.label}_d{chosen.d_new:03d}"


def _of_replica(work: Work, rank: int, key: str) -> Work:
    """The same cells for the kept trials' next best seeds, without those in which the delta plays no part."""
    return replace(
        work,
        name=f"{work.name}_s{rank}",
        key=key,
        sites=tuple(site._replace(delta=str(replica_folder(Path(site.delta), rank))) for site in work.sites),
        conditions=tuple(one for one in work.conditions if CONDITIONS[one].uses_delta),
        doses=tuple(dose for dose in work.doses if dose),
        seed=work.seed + rank,
    )


def ranking_work(context: Context, chosen: dict[str, Combination]) -> list[Work]:
    """The order of the features: of the change deltas of all layers together, of residual deltas layer by layer."""
    settings, works = context.settings.evaluate, []
    for target, one in chosen.items():
        layers = tuple(context.layers_of(target))
        sets = [layers] if target == "change" else [(layer,) for layer in layers]
        if context.cards_of(target) or (settings.curve and target == "change"):
            for together in sets:
                sites = site_plans(context, together, one)
                key = key_of("ranking with firing", lineage(context, sites), evaluation_settings(context))
                works.append(_work(context, "ranking", f"ranking_{_name(together, one)}", key, sites=sites))
    return works


def curve_work(context: Context, rankings: list[Work]) -> list[Work]:
    """The first k features of the change deltas, subset by subset."""
    return [
        _work(
            context,
            "curve",
            f"{one.name.replace('ranking', 'curve')}_{slug(subset)}",
            key_of("curve", one.key),
            sites=one.sites,
            subset=subset,
            ranking=one.name,
        )
        for one in rankings
        if one.sites[0].ground.target == "change" and context.settings.evaluate.curve
        for subset in context.subsets
    ]


def cards_work(context: Context, rankings: list[Work]) -> list[Work]:
    """The features of largest estimated effect, several of neighbouring layers at a time."""
    works = []
    for one in rankings:
        found = read_json(context.space.cells / f"{one.name}.json") or {"features": []}
        best = found["features"][: context.cards_of(one.sites[0].ground.target)]
        features = sorted((feature["layer"], feature["feature"]) for feature in best)
        for start in range(0, len(features), CARDS_AT_ONCE):
            some = tuple(features[start : start + CARDS_AT_ONCE])
            name = f"{one.name.replace('ranking', 'cards')}_{start // CARDS_AT_ONCE}"
            key = key_of("cards", one.key, some, judging_settings(context))
            works.append(_work(context, "cards", name, key, sites=one.sites, features=some))
    return works


def change_work(context: Context) -> list[Work]:
    """How much each MLP changed and what the deltas of each width leave of it."""
    layers = tuple(context.layers_of("change"))
    subsets = sorted(context.subsets)
    works = []
    for d_new in context.settings.deltas.d_new if layers else ():
        one = Combination(Ground("change"), d_new)
        kept = tuple(layer for layer in layers if best_of_group(context, DeltaGroup(layer, *one)) is not None)
        sites = site_plans(context, kept, one)
        key = key_of("change", lineage(context, sites), evaluation_settings(context), subsets)
        works.append(_work(context, "change", f"change_{_name(layers, one)}", key, sites=sites))
    return works


def reconstruction_work(context: Context) -> list[Work]:
    works = []
    for layer in context.layers_of("residual"):
        sites = tuple(
            site_plan(context, DeltaGroup(layer, ground, d_new))
            for ground in grounds_of(context.settings.deltas, "residual")
            for d_new in context.settings.deltas.d_new
            if best_of_group(context, DeltaGroup(layer, ground, d_new)) is not None
        )
        if sites:
            works.append(_work(context, "reconstruction", f"reconstruction_layer_{layer:02d}", "", sites=sites))
    return works


def exactness_work(context: Context, chosen: dict[str, Combination]) -> list[Work]:
    works = []
    model = _model(context)
    if context.settings.model.dtype != "bf16":  # less than fp32 would drown what is compared in rounding
        model = model._replace(precision="fp32")
    for target, one in chosen.items():
        sites = site_plans(context, tuple(context.layers_of(target)), one)
        key = key_of("exactness", lineage(context, sites), evaluation_settings(context))
        works.append(_work(context, "exactness", f"checks_{target}", key, sites=sites, model=model))
    return works
