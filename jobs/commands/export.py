"""Exports the deltas of a finished sweep in another tool's format.

In: a `Context` whose sweep is finished up to its deltas. Out: the folders that were written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.capture.bases import chosen_base
from jobs.commands.feature_choice import EVERY_FEATURE, FeatureChoice
from jobs.commands.load import DeltaChoice, combination, finetuned, load_base, load_deltas, load_patches
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.evaluation.kinds import Reconstruction
from jobs.files import MANIFEST, read_json
from sites import KINDS, Address, Ground, Site, sites_label

if TYPE_CHECKING:
    from models.gemma_scope import Candidate

SUPPORTED = {"gemma-scope": ("mlp",), "saelens": ("o", "mlp"), "circuit-tracer": ("mlp",)}
"""Kinds of site that each format supports: SAELens takes one hook to read and one to write."""
FORMATS = tuple(SUPPORTED)


def export(
    context: Context,
    kind: str,
    folder: Path,
    choice: DeltaChoice,
    alpha: float,
    onto_bases: bool = False,
    features: FeatureChoice = EVERY_FEATURE,
) -> list[Path]:
    """Exports the chosen features of the deltas in another tool's format, with a model card; other features are kept,
    but never fire. Residual deltas are fused with their bases; change deltas are exported alone or, with `onto_bases`,
    fused with their layers' bases, if any.

    A change delta combines with any base transcoder as `base(x) + error(x) + alpha * delta(x)`, with the error node
    `error(x) = y_un(x) - base(x)`; the notes say so. Raises RequestError for an unknown format or feature, or without
    bases.
    """
    from jobs.commands.model_card import Exported, hub_name, model_card
    from models import exports
    from models.fuse import fuse, scaled
    from models.sources import model_facts
    from models.transcoder import without_bos

    if kind not in FORMATS:
        raise RequestError(f"--format: got {kind!r}, allowed are {', '.join(FORMATS)}")
    if folder.resolve() == Path.cwd():
        raise RequestError(f"--to: got {folder}, give the name of a new folder")
    chosen = ground, d_new = combination(context, choice)
    sites = [site for site in context.sites_of(ground.target) if site.kind.name in SUPPORTED[kind]]
    if not sites:
        supported = ", ".join(KINDS[name].words for name in SUPPORTED[kind])
        raise RequestError(
            f"--format: {kind} can hold deltas of {supported}, but the sweep has them at "
            f"{sites_label(context.sites_of(ground.target))}; without {kind}, each delta can be read from its own "
            f"safetensors file under {context.space.deltas}"
        )
    if left_out := [site for site in context.sites_of(ground.target) if site not in sites]:
        context.progress.line(f"  left out, as {kind} cannot hold them: the deltas at {sites_label(left_out)}")
    bases: dict[Site, Candidate] = {}
    if ground.target == "change":
        deltas = load_deltas(context, sites, chosen, features)
        fused = {site: scaled(without_bos(delta), alpha) for site, delta in deltas.items()}
        if onto_bases:
            bases = _bases(context, choice, list(fused))
            fused = {site: fuse(load_base(context, base, site), fused[site]) for site, base in bases.items()}
    else:
        patches = load_patches(context, None, chosen, features=features)
        fused = {patch.site: fuse(patch.base, patch.transcoder, alpha) for patch in patches if patch.base}
    facts = model_facts(context.model)
    model = exports.ExportedModel(
        name=hub_name(context) or str(finetuned(context)),
        n_layers=facts["n_layers"],
        d_model=facts["d_model"],
        context_size=context.settings.activations.max_length,
        kind=context.mlp_kind,
    )
    notes = {"sweep": context.settings.name, **ground._asdict(), "d_new": d_new, "alpha": alpha}
    if ground.target == "change" and context.settings.deltas.polish_steps:
        notes["figures"] = "L0 and errors are those of the search, before the deltas were polished together"
    if features:
        notes["features"] = f"{features}; those left out are silent, and keep their numbers"
    if ground.target == "change":
        error = "error(x) = y_un(x) - base(x), the base's error on the un-finetuned MLP"
        notes["use"] = f"add to the un-finetuned output of its site, or at an MLP to base(x) + error(x), {error}"
        if onto_bases:
            notes["bases"] = {site.label: base.path for site, base in bases.items()}
            notes["use"] = f"holds base(x) + alpha * delta(x); the finetuned MLP also needs the error node {error}"
        notes["bos"] = "what the deltas add at BOS, where no transcoder is read, is left out"
    card = model_card(context, Exported(kind, ground, d_new, sorted(fused), alpha, onto_bases, str(features)))
    if kind == "gemma-scope":
        average_l0 = _average_l0(context, sites, ground, d_new)
        for site, base in bases.items():
            average_l0[site] += base.average_l0
        return exports.write_gemma_scope(fused, model, folder, average_l0, notes, card)
    if kind == "saelens":
        return exports.write_saelens(fused, model, folder, notes, card)
    return exports.write_circuit_tracer(fused, model, folder, notes, card)


def _bases(context: Context, choice: DeltaChoice, sites: list[Site]) -> dict[Site, Candidate]:
    """The base transcoders of `sites`, without sites that have none. Raises RequestError if no site has one."""
    with_bases = [site for site in sites if site in context.sites_of("residual")]
    if not with_bases:
        raise RequestError(
            f"--onto-bases: the sweep {context.settings.name} has no base transcoders; they come with residual among "
            "deltas.targets"
        )
    ground, _ = combination(context, DeltaChoice("residual", choice.percentile, choice.d_new))
    return {site: chosen_base(context, site, ground.percentile) for site in with_bases}


def _average_l0(context: Context, sites: Sequence[Site], ground: Ground, d_new: int) -> dict[Site, float]:
    """Active features per token of each exported transcoder, measured on the evaluation text or in training."""
    l0: dict[Site, float] = {}
    for site in sites:
        group = Address(site, ground, d_new)
        best = context.best_of(group)
        assert best is not None, "its delta has been loaded"
        l0[site] = best["figures"]["val_l0_delta"]
        if ground.target == "residual":
            name = Reconstruction.name_of(group)
            evaluated = (context.space.cells / MANIFEST).is_file()  # else the cells may be of earlier deltas
            cell: dict[str, Any] = (read_json(context.space.cells / f"{name}.json") if evaluated else None) or {}
            base = cell.get("l0_base", chosen_base(context, site, ground.percentile).average_l0)
            l0[site] = base + cell.get("l0_delta", l0[site])
    return l0
