"""What the base transcoders leave of the finetuned MLPs, on which residual deltas are trained.

In: captured activations and bases. Out: `deltas/layer_LL/pP/residual/{train,validation}`, computed once, and
`base_error.json` beside it, how large they are; and the pairs, read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.errors import WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, keyed_folder, read_json, write_json
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.grounds import Ground, grounds_of
from jobs.study.stages.activations import SPLITS, capture_base, set_damaged_aside
from jobs.study.stages.transcoders import chosen_base, root
from trainers.activations import INDEX

if TYPE_CHECKING:
    from models.transcoder import Taps
    from trainers.delta_data import DeltaData


class ResidualTask(NamedTuple):
    """The base's errors on one layer's activations, as passed to a worker; `unfinetuned` holds held-out ones of the
    un-finetuned model."""

    layer: int
    root: str
    candidate: tuple[float, str]
    activations: str
    unfinetuned: str
    folder: str
    key: str
    device: str
    convention: str


def residual_folder(context: Context, layer: int, ground: Ground) -> Path:
    return context.space.deltas / f"layer_{layer:02d}" / ground.label / "residual"


def compute_base_errors(context: Context, activations: Path, layers: Sequence[int]) -> None:
    """What is missing of the errors in those of `layers` that have bases; `activations` are the finetuned model's."""
    missing, layers = [], [layer for layer in context.layers_of("residual") if layer in layers]
    asked = [(layer, ground) for layer in layers for ground in grounds_of(context.settings.deltas, "residual")]
    held = [residual_folder(context, *one) / split for one in asked for split in SPLITS]
    set_damaged_aside(context, held)
    for layer, ground in asked:
        key = keys.delta_data(context.settings, layer, ground)
        folder = residual_folder(context, layer, ground)
        known = (read_json(folder.parent / "base_error.json") or {}).get("key") == key
        whole = all((folder / split / INDEX).is_file() for split in SPLITS)
        if not (is_finished(keyed_folder(folder, key), key) and known and whole):
            missing.append((layer, chosen_base(context, layer, ground.percentile), folder, key))
    if not missing:
        return
    unfinetuned = capture_base(context, layers, ("validation",)) / "validation"
    convention = context.settings.transcoders.convention
    tasks = [
        ResidualTask(
            layer=layer,
            root=root(context),
            candidate=(base.average_l0, base.path),
            activations=str(activations),
            unfinetuned=str(unfinetuned),
            folder=str(folder),
            key=key,
            device=context.device,
            convention=convention,
        )
        for layer, base, folder, key in missing
    ]
    with context.progress.bar("base errors", len(tasks), "bases") as bar:
        for outcome in context.pool.run(compute_residual, tasks, context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"errors of {outcome.task.candidate[1]}: {outcome.error}")
            bar.advance()


def compute_residual(task: ResidualTask) -> None:
    """Writes y - base(x) of both splits in bf16, one shard for each shard of the activations.

    The manifest, and `base_error.json` beside the folder, hold the base's error on held-out text, as a share of the
    output's variance, in both models' streams.
    """
    import torch

    from models.gemma_scope import Candidate, read
    from models.transcoder import CONVENTIONS
    from trainers.activations import captured_columns, read_index, read_pairs, write_index, write_shard
    from trainers.capture import layer_folder
    from trainers.delta_data import fraction_unexplained, mean_square, output_variance, residual_of

    taps = CONVENTIONS[task.convention]
    base = read(task.root, Candidate(*task.candidate), task.layer, taps).to(task.device)
    facts: dict[str, Any] = {"base": task.candidate[1]}
    for split in ("train", "validation"):
        source = layer_folder(Path(task.activations) / split, task.layer)
        index = read_index(source)
        error = 0.0
        for shard, (x, y) in zip(index["shards"], read_pairs(source).shards, strict=True):
            residual = residual_of(base, x, y)
            error += residual.pow(2).sum(dtype=torch.float64).item()
            write_shard(Path(task.folder) / split / shard["file"], {"residual": residual.bfloat16()})
        write_index(Path(task.folder) / split, index["shards"], {"layer": task.layer})
        if split == "validation":
            facts["variance"] = output_variance(read_pairs(source))
            facts["val_fvu_base"] = error / (index["tokens"] * base.d_model * facts["variance"])
            captured = "change" in captured_columns(source)
            facts["change_share"] = captured and mean_square(read_pairs(source, ("change",))) / facts["variance"]
    before = read_pairs(layer_folder(Path(task.unfinetuned), task.layer))
    facts["val_fvu_base_unfinetuned"] = fraction_unexplained(base, before)
    write_json(Path(task.folder).parent / "base_error.json", {"key": task.key, **facts})
    finish_folder(Path(task.folder), task.key, facts)


def read_residuals(activations: Path, residual: Path, layer: int, taps: Taps) -> DeltaData:
    """The (x, residual) pairs of one (layer, base), memory-mapped."""
    from trainers.activations import Pairs, read_pairs
    from trainers.capture import layer_folder
    from trainers.delta_data import DeltaData

    facts = read_json(residual / "manifest.json")
    pairs = {}
    for split in ("train", "validation"):
        inputs = read_pairs(layer_folder(activations / split, layer), ("x",))
        targets = read_pairs(residual / split, ("residual",))
        both = zip(inputs.shards, targets.shards, strict=True)
        pairs[split] = Pairs([(x, target) for (x,), (target,) in both])
    return DeltaData(
        pairs["train"],
        pairs["validation"],
        facts["variance"],
        facts["val_fvu_base"],
        layer,
        "residual",
        facts["change_share"] or None,
        taps,
    )
