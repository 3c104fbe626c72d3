"""What single features do: one shared pass a text, against a pass through the whole model for each feature.

    python -m benchmarks.single_features [quickstart storage.root=mlruns] [--features 8] [--prompts 4]

In: a finished sweep. Out: prints CPU seconds of one thread both ways, the ratio, and the largest difference of a row's
cross-entropy. The features are the most effective ones; both ways ablate each, and keep each alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import torch
import typer

from data.encoding import encode_row
from data.rows import read_rows
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.single_features import WAYS, single_features
from evaluators.splice.decoding import Stop, generate
from evaluators.splice.interventions import Edit, Ranks
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, score
from evaluators.tables.feature_tables import ranking_table
from jobs.commands.load import DeltaChoice, combination, load_bridge, load_sites
from jobs.study.context import Context
from models.bridge import device_of
from search_spaces.load import load


def main(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
    features: Annotated[int, typer.Option(min=1, help="How many features.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts of each subset.")] = 4,
) -> None:
    torch.set_num_threads(1)
    name, *overrides = config or ["quickstart"]
    context = Context(load(name, overrides))
    bridge = load_bridge(context)
    kept = load_sites(context, None, combination(context, DeltaChoice("change")), bridge)
    sites = [site.to(device_of(bridge)) for site in kept]
    every = list(read_rows(str(context.rows / "evaluation.jsonl")))
    rows = [row for subset in context.subsets for row in [one for one in every if one.label == subset][:prompts]]
    ranking = ranking_table(context.cells)
    chosen = [(one.layer, one.feature) for one in ranking[ranking["target"] == "change"].head(features).itertuples()]
    passes, behaviours = Passes(bridge), read_behaviours(context.settings.evaluate.behaviours)

    started = time.process_time()
    found = single_features(passes, sites, rows, chosen, limits=context.limits, behaviours=behaviours)
    shared = time.process_time() - started

    starts = [sum(site.delta.d_sae for site in sites[:place] if site.delta) for place in range(len(sites))]
    ranked = [
        replace(site, ranks=torch.arange(first, first + site.delta.d_sae))
        for site, first in zip(sites, starts, strict=True)
        if site.delta
    ]
    first_of = {site.layer: first for site, first in zip(sites, starts, strict=True)}
    encoded = [encode_row(bridge.tokenizer, row) for row in rows]
    stop = Stop.of(bridge, context.limits, rows[0])
    started, apart = time.process_time(), 0.0
    for layer, feature in chosen:
        rank = first_of[layer] + feature
        for way in WAYS:
            jobs = [Job(row, kept=Ranks(rank, rank + 1, outside=way == "ablated")) for row in encoded]
            scored = score(passes, Edit(ranked, "full"), jobs)
            generate(passes, Edit(ranked, "full"), jobs, scored, stop)
            ours = found[layer, feature][way]
            apart = max(apart, *(abs(one["nll"] - other.nll) for one, other in zip(ours, scored, strict=True)))
    whole = time.process_time() - started
    typer.echo(f"{features} features, {len(rows)} prompts: shared {shared:.1f} s, whole passes {whole:.1f} s of CPU")
    typer.echo(f"ratio {whole / shared:.1f}x; largest difference of a row's cross-entropy {apart:.1e} nats")


if __name__ == "__main__":
    typer.run(main)
