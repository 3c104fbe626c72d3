"""The base transcoders of a sweep, and their errors on the finetuned MLPs, on which residual deltas are trained.

In: captured activations and bases. Out: the base of each selection; `deltas/SITE/pP/base_error.json`, the size of a
base's error; the pairs of inputs and residuals; and next to that file `residual/{train,validation}`, if residuals are
stored instead of recomputed by every worker that reads them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.capture.activations import SPLITS, capture_base, delete_damaged
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.disk import keeps_base_errors
from jobs.errors import WorkFailed
from jobs.files import MANIFEST, is_finished, keyed_folder, read_json, write_json
from jobs.files import finish as finish_folder
from models.gemma_scope import Candidate, candidate_at, candidates, select, width_label
from sites import Ground, Site
from trainers.activations import INDEX

if TYPE_CHECKING:
    from models.transcoder import Transcoder
    from trainers.activations import Pairs
    from trainers.delta_data import DeltaData


def root(context: Context) -> str:
    """The folder or hub repository that holds the bases."""
    source = context.settings.transcoders.source
    return str(context.space.transcoders) if source == "train" else source


def base_folder(context: Context, site: Site) -> Path:
    """Folder of a site's bases if they are trained here, named as in Gemma Scope."""
    return context.space.transcoders / site.published_folder


def chosen_base(context: Context, site: Site, percentile: float | None) -> Candidate:
    """A site's base, selected by a percentile or the target L0. Once the stage that selects is done, it is what that
    selected: a hub that cannot be reached lists only what was fetched from it, of which the percentiles are others."""
    settings = context.settings
    source, width = settings.transcoders.source, settings.transcoders.width
    if not Path(root(context)).is_dir():
        done = read_json(context.space.transcoders / MANIFEST) or {}
        label = Ground("residual", percentile).label.removeprefix("p")
        path = done.get("chosen", {}).get(site.label, {}).get(label, "") if done.get("source") == source else ""
        if path.startswith(f"{site.published_folder}/{width_label(width)}/"):
            return candidate_at(path)
    available = candidates(root(context), site, settings.transcoders.width)
    return select(available, percentile, settings.deltas.target_l0)


class Residuals(NamedTuple):
    """A base's errors on a site's activations, as passed to a worker: the folders of the finetuned model's activations
    and of the errors, and the base, by its root and candidate. If `kept`, the errors are read, else computed."""

    site: Site
    activations: str
    folder: str
    root: str
    candidate: tuple[float, str]
    device: str
    kept: bool

    def pairs(self, split: str) -> Pairs:
        """x and the base's error, (tokens, d_model) each, bf16; memory-mapped if the errors are kept."""
        from trainers.activations import Pairs, read_pairs
        from trainers.delta_data import residual_of

        source = Path(self.activations) / split / self.site.folder
        if not self.kept:
            base = self.base()
            return Pairs([(x, residual_of(base, x, y).bfloat16()) for x, y in read_pairs(source).shards])
        inputs, targets = read_pairs(source, ("x",)), read_pairs(Path(self.folder) / split, ("residual",))
        shards = zip(inputs.shards, targets.shards, strict=True)
        return Pairs([(x, target) for (x,), (target,) in shards])

    def base(self) -> Transcoder:
        from models.gemma_scope import Candidate, read

        return read(self.root, Candidate(*self.candidate), self.site).to(self.device)


class ResidualTask(NamedTuple):
    """Residuals to measure and, if they are kept, to write. `unfinetuned` is the folder of the un-finetuned model's
    held-out activations."""

    residuals: Residuals
    unfinetuned: str
    key: str


def residual_folder(context: Context, site: Site, ground: Ground) -> Path:
    return context.space.deltas / site.folder / ground.label / "residual"


def residuals_of(context: Context, site: Site, ground: Ground) -> Residuals:
    base = chosen_base(context, site, ground.percentile)
    return Residuals(
        site=site,
        activations=str(context.space.activations / "finetuned"),
        folder=str(residual_folder(context, site, ground)),
        root=root(context),
        candidate=(base.average_l0, base.path),
        device=context.device,
        kept=keeps_base_errors(context),
    )


def _is_measured(context: Context, site: Site, ground: Ground) -> bool:
    """Whether the base's error has been measured."""
    measured = read_json(residual_folder(context, site, ground).parent / "base_error.json") or {}
    return measured.get("key") == keys.delta_data(context.settings, site, ground)


def without_base_errors(context: Context) -> set[Site]:
    """Sites with a base whose errors have not been measured yet."""
    grounds = context.grounds_of("residual")
    return {
        site
        for site in context.sites_of("residual")
        if not all(_is_measured(context, site, ground) for ground in grounds)
    }


def compute_base_errors(context: Context, sites: Collection[Site]) -> None:
    """Computes the missing errors at those of `sites` that have bases; their activations must be captured."""
    sites, missing = [site for site in context.sites_of("residual") if site in sites], []
    places = [(site, ground) for site in sites for ground in context.grounds_of("residual")]
    delete_damaged(context, [residual_folder(context, *place) / split for place in places for split in SPLITS])
    for site, ground in places:
        key, folder = keys.delta_data(context.settings, site, ground), residual_folder(context, site, ground)
        stored = not keeps_base_errors(context) or all((folder / split / INDEX).is_file() for split in SPLITS)
        if not (is_finished(keyed_folder(folder, key), key) and _is_measured(context, site, ground) and stored):
            missing.append((residuals_of(context, site, ground), key))
    if not missing:
        return
    unfinetuned = str(capture_base(context, sites, ("validation",)) / "validation")
    tasks = [ResidualTask(residuals, unfinetuned, key) for residuals, key in missing]
    with context.progress.bar("base errors", len(tasks), "bases") as bar:
        for outcome in context.pool.run(compute_residual, tasks, context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"errors of {outcome.task.residuals.candidate[1]}: {outcome.error}")
            bar.advance()


def compute_residual(task: ResidualTask) -> None:
    """Measures y - base(x) and, if it is kept, writes it for both splits in bf16, one shard per shard of activations.

    The manifest, and `base_error.json` next to the folder, hold the base's error on held-out text, as a share of the
    output's variance, in both models' residual streams.
    """
    import torch

    from trainers.activations import captured_columns, read_index, read_pairs, write_index, write_shard
    from trainers.delta_data import fraction_unexplained, mean_square, output_variance, residual_of

    residuals, base = task.residuals, task.residuals.base()
    facts: dict[str, Any] = {"base": residuals.candidate[1]}
    for split in SPLITS if residuals.kept else ("validation",):
        source = Path(residuals.activations) / split / residuals.site.folder
        index = read_index(source)
        error = 0.0
        for shard, (x, y) in zip(index["shards"], read_pairs(source).shards, strict=True):
            residual = residual_of(base, x, y)
            error += residual.pow(2).sum(dtype=torch.float64).item()
            if residuals.kept:
                write_shard(Path(residuals.folder) / split / shard["file"], {"residual": residual.bfloat16()})
        if residuals.kept:
            write_index(Path(residuals.folder) / split, index["shards"], {"layer": residuals.site.layer})
        if split == "validation":
            facts["variance"] = output_variance(read_pairs(source))
            facts["val_fvu_base"] = error / (index["tokens"] * base.d_out * facts["variance"])
            captured = "change" in captured_columns(source)
            facts["change_share"] = captured and mean_square(read_pairs(source, ("change",))) / facts["variance"]
    before = read_pairs(Path(task.unfinetuned) / residuals.site.folder)
    facts["val_fvu_base_unfinetuned"] = fraction_unexplained(base, before)
    write_json(Path(residuals.folder).parent / "base_error.json", {"key": task.key, **facts})
    finish_folder(Path(residuals.folder), task.key, facts)


def read_residuals(residuals: Residuals) -> DeltaData:
    """The training and validation data of residual deltas for one (site, base)."""
    from trainers.delta_data import DeltaData

    facts = read_json(Path(residuals.folder) / "manifest.json")
    return DeltaData(
        residuals.pairs("train"),
        residuals.pairs("validation"),
        facts["variance"],
        facts["val_fvu_base"],
        residuals.site,
        "residual",
        facts["change_share"] or None,
    )
