"""What the change deltas leave, and where: kept deltas, kept deltas without their feature at BOS, and the exact change.

    python -m benchmarks.what_is_missing [quickstart storage.root=mlruns]

In: a sweep that is finished up to its deltas. Out: prints, for each subset, the share of the CE gap of swapping all
MLPs that comes back at alpha 1, with paired 95% bootstrap intervals over prompts: by the deltas, by the deltas without
BOS, and by the change itself (computed by both MLPs, nothing learnt) at every token but BOS, which is the most that
deltas without BOS could reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from data.encoding import encode_row
from data.rows import Row, read_rows
from evaluators.splice.interventions import Edit
from evaluators.splice.passes import Passes
from evaluators.splice.sites import Site, TrueChange
from evaluators.splice.teacher_forcing import Job, score
from evaluators.tables.statistics import recovered_share
from jobs.commands.load import DeltaChoice, combination, load_bridge, load_sites
from jobs.study.context import Context
from models.blocks import read_paths
from models.bridge import device_of
from models.transcoder import without_bos
from search_spaces.load import load

Sums = tuple[list[float], list[float]]


def sums(passes: Passes, rows: Sequence[Row], edit: Edit) -> Sums:
    """Nats and target tokens of each row."""
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    scored = score(passes, edit, [Job(row) for row in encoded])
    return [one.nll for one in scored], [float(one.n_tokens) for one in scored]


def main(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
) -> None:
    name, *overrides = config or ["quickstart"]
    context = Context(load(name, overrides))
    bridge = load_bridge(context)
    kept = load_sites(context, None, combination(context, DeltaChoice("change")), bridge)
    sites = [site.to(device_of(bridge)) for site in kept]
    layers = [site.layer for site in sites]
    before, after = (read_paths(bridge, folder, layers) for folder in (context.model, context.finetuned))
    asked: dict[str, Sequence[Any]] = {
        "deltas": sites,
        "deltas without BOS": [replace(site, delta=without_bos(site.delta)) for site in sites if site.delta],
        "exact change without BOS": [
            Site(site.layer, site.ground, TrueChange(before[site.layer], after[site.layer]))  # type: ignore[arg-type]
            for site in sites
        ],
    }
    every = list(read_rows(str(context.space.data / "evaluation.jsonl")))
    passes = Passes(bridge)
    for subset in dict.fromkeys(row.label for row in every):
        rows = [row for row in every if row.label == subset]
        raw, ground = (sums(passes, rows, edit) for edit in (Edit(), Edit(sites, "no_delta")))
        for what, spliced in asked.items():
            found = recovered_share(ground, sums(passes, rows, Edit(spliced, "full")), raw, seed=context.settings.seed)
            typer.echo(f"{subset:<10} {what:<26} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")


if __name__ == "__main__":
    typer.run(main)
