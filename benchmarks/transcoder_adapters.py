"""Transcoder Adapters, trained end to end, against deltas trained layer by layer, in one run.

    python -m benchmarks.transcoder_adapters [quickstart storage.root=mlruns] [--epochs 3] [--minutes 60]

In: a sweep that is finished up to its change deltas. The rival is in `benchmarks/rivals/end_to_end.py`, which says what
it takes from the paper and what is simplified. It has adapters at MLPs alone; where our deltas stand at attention's
sites too, it has to explain with its MLPs what finetuning changed in both. It is trained on the same text as our
deltas, with the same number of features per layer, summed over our sites there (ours have one more a site, at BOS;
theirs act at BOS too, and have a bias), and of active features. Short runs choose the learning rate on held-out text;
then come runs with the requested numbers of epochs, as far as they end in time.

Out: prints a table for each subset: the share of the CE gap of un-finetuning all sites with deltas that is recovered at
alpha 1, with paired 95% bootstrap intervals over prompts; the CE above ours; KL(finetuned || spliced) per target token;
active features per token and layer on held-out text; CPU seconds of training; and the process's peak memory so far. Our
training is the pass that computes the changes and each site's kept trial, both repeated here; theirs is the run itself.
The cost of selection (our other trials, their short runs) is printed separately. Both compute products in the sweep's
precision.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import typer
from torch import Tensor

from benchmarks.rivals.end_to_end import Losses, Pair, Trained, TrainingInputs, train
from data.encoding import Batch, Encoded, by_length, encode_row
from data.rows import read_rows
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, Reference, score
from evaluators.tables.statistics import paired_bootstrap, recovered_share
from jobs.capture.activations import Text, plan_of
from jobs.commands.load import DeltaChoice, combination, device_for, finetuned, load_bridge, load_patches
from jobs.context.context import Context
from jobs.files import read_json
from jobs.progress import clock
from models.blocks import exchanged, read_paths
from models.bridge import device_of, wrap
from models.sources import load_model
from models.transcoder import silenced, without_bos
from search_spaces.load import load
from sites import MLP, Address, Site
from trainers.capture import Columns, capture_batch
from trainers.delta_data import read_change
from trainers.delta_transcoder import train_delta
from trainers.precision import dtype_of, resolve_precision
from trainers.settings import DeltaSettings, settings_of

RATES = (1e-3, 3e-3, 1e-2)
SHOWN = 20
"""Steps between two progress lines."""
BATCH_TOKENS = 256


class Row(NamedTuple):
    """A row of the table."""

    name: str
    patches: Sequence[Patch]
    active: float
    cpu_seconds: float
    memory: float


def peak() -> float:
    """Peak memory of the process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def text(context: Context, split: str, tokens: int) -> list[list[int]]:
    """The sequences that the sweep's deltas learnt from, or were validated on, in batches of similar length."""
    settings = context.settings
    section = settings.activations
    folders = str(context.rows), str(context.space.data), str(context.model)
    plan = plan_of(Text(split, tokens, *folders, section.batch_tokens, section.max_length, settings.seed))
    return [list(ids) for ids in plan.sequences]


def batches(pair: Pair, sequences: Sequence[Sequence[int]]) -> list[Batch]:
    chosen = by_length([len(ids) for ids in sequences], BATCH_TOKENS)
    return [pair.batch([sequences[i] for i in places]) for places in chosen]


def captured(bridge: Any, sequences: Sequence[Sequence[int]], columns: Mapping[Site, Columns]) -> dict[Site, Tensor]:
    """What the finetuned model's sites read, (tokens, d_in), by site."""
    parts = [
        capture_batch(bridge, [sequences[i] for i in places], columns)
        for places in by_length([len(ids) for ids in sequences], 16 * BATCH_TOKENS)
    ]
    return {site: torch.cat([part[site]["x"] for part in parts]) for site in columns}


@torch.no_grad()
def l0(patches: Sequence[Patch], inputs: Mapping[Site, Tensor]) -> float:
    """Active features per token and layer, on what the finetuned model's sites read."""
    counts = [
        (patch.delta.encode(inputs[patch.site]) > 0).sum(1).double().mean().item() for patch in patches if patch.delta
    ]
    return sum(counts) / len({patch.site.layer for patch in patches})


def silent(patch: Patch) -> Patch:
    """An un-finetuned site whose delta adds nothing."""
    delta = patch.transcoder
    return replace(patch, delta=silenced(delta, torch.ones_like(delta.b_enc, dtype=torch.bool)))


def without(patches: Sequence[Patch]) -> list[Patch]:
    return [replace(patch, delta=without_bos(patch.transcoder)) for patch in patches if patch.delta]


def repeat(context: Context, site: Site, delta: tuple[Any, int], precision: str) -> tuple[float, float]:
    """Trains all trials of a site's deltas again; returns the CPU seconds of the kept one and of the others."""
    section, settings = context.settings.deltas, context.settings
    data = read_change(context.space.activations / "finetuned", site)
    fixed = settings_of(DeltaSettings, section, d_new=delta[1], seed=settings.seed, precision=precision)
    folder = context.space.deltas / Address(site, *delta).folder
    kept_trial, seconds = read_json(folder / "best.json")["trial"], [0.0, 0.0]
    for path in sorted(folder.glob("trial_*/result.json")):
        params, begun = read_json(path)["params"], time.process_time()
        chosen = {name: params[name] for name in ("lr", "sparsity")}
        train_delta(data, replace(fixed, **chosen))
        seconds[path.parent.name != f"trial_{kept_trial:04d}"] += time.process_time() - begun
    return seconds[0], seconds[1]


def sums(passes: Passes, edit: Edit, rows: Sequence[Encoded], reference: Reference) -> tuple[list[float], float]:
    """Nats of each row, and KL(finetuned || spliced) per target token."""
    scored = score(passes, edit, [Job(row) for row in rows], reference=reference)
    return [row.nll for row in scored], sum(row.kl or 0.0 for row in scored) / sum(row.n_tokens for row in scored)


def show(bridge: Any, context: Context, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Prints the tables; returns their figures."""
    figures = []
    all_rows = list(read_rows(str(context.rows / "evaluation.jsonl")))
    typer.echo(f"{'':<38}{'recovered of the CE gap':<25}{'above':>9}{'KL':>7}{'L0':>6}{'CPU seconds':>16}{'GiB':>6}")
    for subset in dict.fromkeys(row.label for row in all_rows):
        encoded = [encode_row(bridge.tokenizer, row) for row in all_rows if row.label == subset]
        tokens = [float(len(row.target)) for row in encoded]
        measured_on: tuple[Any, ...] = (encoded, Reference(bridge))
        raw, _ = sums(Passes(bridge), Edit(), *measured_on)
        ground, kl = sums(Passes(bridge), Edit(rows[0].patches, "no_delta"), *measured_on)
        typer.echo(f"{subset}: CE gap {(sum(ground) - sum(raw)) / sum(tokens):.3f}, KL {kl:.3f} without deltas")
        best: list[float] = []
        for row in rows:
            nats, kl = sums(Passes(bridge), Edit(row.patches, "full"), *measured_on)
            share = recovered_share((ground, tokens), (nats, tokens), (raw, tokens), seed=context.settings.seed)
            best = best or nats
            above = paired_bootstrap(nats, tokens, best, tokens, seed=context.settings.seed)
            interval = f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"
            took = f"{row.cpu_seconds:16.0f}{row.memory:6.1f}"
            typer.echo(f"  {row.name:<36}{interval:<25}{above.value:9.4f}{kl:7.4f}{row.active:6.1f}{took}")
            facts = {name: getattr(row, name) for name in ("name", "active", "cpu_seconds", "memory")}
            ends = {"recovered": share.value, "low": share.low, "high": share.high}
            apart = {"above": above.value, "above_low": above.low, "above_high": above.high}
            figures.append({"subset": subset, **facts, **ends, **apart, "kl": kl})
    return figures


def run(pair: Pair, material: TrainingInputs, lr: float, steps: int) -> Trained:
    """Trains their adapters once, with progress lines."""
    begun = time.perf_counter()

    def report(step: int, losses: Losses) -> None:
        if step % SHOWN == 0 or step == steps:
            remaining = clock((time.perf_counter() - begun) * (steps - step) / step)
            typer.echo(f"  step {step} of {steps}: KL {losses.kl.item():.4f}, L0 {losses.active:.1f}, {remaining} left")

    return train(pair, material, lr, steps, report)


def main(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
    nudge: Annotated[
        list[float] | None, typer.Option(help="How strongly biases are steered to our L0 [default: 0.02].")
    ] = None,
    epochs: Annotated[list[int] | None, typer.Option(help="Epochs of each of their runs [default: 3].")] = None,
    minutes: Annotated[float, typer.Option(help="Skip their runs that would end after this time.")] = 60,
    choice: Annotated[int, typer.Option(help="Steps of each run for choosing the learning rate.")] = 30,
    csv: Annotated[
        Path | None,
        typer.Option(help="Also write the figures to this file, which keeps those of the other kind of sites."),
    ] = None,
) -> None:
    ends = time.perf_counter() + 60 * minutes
    name, *overrides = config or ["quickstart"]
    context = Context(load(name, overrides))
    section = context.settings.activations
    chosen = combination(context, DeltaChoice("change", d_new=max(context.settings.deltas.d_new)))
    precision = resolve_precision(context.settings.compute.precision, device_for(context))
    bridge = load_bridge(context)
    device = device_of(bridge)
    patches = [patch.to(device) for patch in load_patches(context, None, chosen, bridge)]
    mlps = [patch for patch in patches if patch.site.kind.name == MLP.name]
    if not mlps:
        typer.echo("error: this sweep has no deltas at MLPs, where the rival's adapters are", err=True)
        raise typer.Exit(2)
    others = [silent(patch) for patch in patches if patch.site.kind.name != MLP.name]
    sites = [patch.site for patch in patches]
    learnt = text(context, "train", section.train_tokens)
    held_out = text(context, "validation", section.validation_tokens)

    before = read_paths(bridge, context.model, sites)
    begun = time.process_time()
    inputs = captured(bridge, learnt, {site: Columns(y=False, unfinetuned=before[site]) for site in sites})
    seconds, other_seconds = time.process_time() - begun, 0.0
    for site in sites:
        kept_seconds, rejected_seconds = repeat(context, site, chosen, precision)
        seconds, other_seconds = seconds + kept_seconds, other_seconds + rejected_seconds
    typer.echo(f"ours: {seconds:.0f} CPU seconds; the trials that were not kept took {other_seconds:.0f} more")
    inputs_held_out = captured(bridge, held_out, dict.fromkeys(sites, Columns(y=False)))
    active = l0(patches, inputs_held_out)
    rows = [Row("ours", patches, active, seconds, peak())]
    rows.append(rows[0]._replace(name="ours, no BOS", patches=without(patches)))

    finetuned_bridge = wrap(*load_model(finetuned(context), torch.float32, str(device)))
    pair = Pair(bridge, finetuned_bridge, mlps, dtype_of(precision))
    nudges = nudge or [0.02]
    width = chosen[1] * len(patches) // len(mlps)
    shared = batches(pair, learnt), batches(pair, held_out), inputs, width, active, context.settings.seed
    material = TrainingInputs(*shared, nudges[0])
    with exchanged(finetuned_bridge, list(before.values())):
        tries = {}
        for lr in RATES:
            tries[lr] = train(pair, material, lr, choice)
            typer.echo(f"{choice} steps, learning rate {lr:g}: KL {tries[lr].held_out:.4f} a token of held-out text")
        lr = min(tries, key=lambda rate: tries[rate].held_out)
        spent, each = (sum(getattr(tried, name) for tried in tries.values()) for name in ("cpu_seconds", "seconds"))
        typer.echo(f"choosing their learning rate took {spent:.0f} CPU seconds")
        first = encode_row(bridge.tokenizer, next(iter(read_rows(str(context.rows / "evaluation.jsonl"))))).ids[0]
        for count, strength in product(epochs or [3], nudges):
            steps, estimate = count * len(material.batches), each / (len(RATES) * choice)
            if time.perf_counter() + steps * estimate > ends:
                typer.echo(f"{count} epochs would take {clock(steps * estimate)}: left out")
                continue
            trained = run(pair, material._replace(nudge=strength), lr, steps)
            name = f"theirs, epochs: {count}, nudge {strength:g}"
            typer.echo(f"{name}: KL {trained.held_out:.4f} a token of held-out text")
            spliced_patches = [*trained.adapters.spliced(pair, first), *others]
            rows.append(Row(name, spliced_patches, l0(spliced_patches, inputs_held_out), trained.cpu_seconds, peak()))
            rows.append(rows[-1]._replace(name=f"{name}, no BOS", patches=without(rows[-1].patches)))
    figures = show(bridge, context, rows)
    if csv is not None:
        table = pd.DataFrame(figures).round(5)
        table.insert(0, "deltas_at", "all sites" if others else "MLPs")
        if csv.is_file():
            before_it = pd.read_csv(csv)
            table = pd.concat([before_it[before_it["deltas_at"] != table["deltas_at"][0]], table])
        table.to_csv(csv, index=False)


if __name__ == "__main__":
    typer.run(main)
