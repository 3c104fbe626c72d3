"""Our trainers and evaluation against the usual way on a GPU (or the device that is there), without Ray.

    python -m benchmarks.gpu [--device cuda] [--only deltas,lora]

In: nothing; models and activations are random, with the shapes of SmolLM2-135M and Gemma-2-2B. Out: prints for each
part the rates of both ways and their ratio, kernel launches per step, and the share of the time in which the device
computes: kernel time, from a profiled run, over the time of a run without a profiler. Ratios compare runs of one
process.
"""

from __future__ import annotations

import gc
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.evaluation_grid import ALPHAS, CELLS, ours, plain_cell, timed
from benchmarks.lora import BATCH, train_ours, train_reference
from benchmarks.plain_delta import train_plainly
from benchmarks.random_subjects import SHAPES, random_delta, random_pairs, random_rows, save_other_blocks
from data.encoding import encode_row
from data.rows import Row
from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour
from evaluators.splice.interventions import Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import ALL, Passes
from jobs.commands.device_figures import transcoder
from models.blocks import read_paths
from models.bridge import wrap
from sites import KINDS, Site, mlp_sites
from trainers.activations import Pairs
from trainers.base_transcoder import BaseSettings, train_bases
from trainers.delta_data import DeltaData
from trainers.delta_transcoder import DeltaSettings, train_delta
from trainers.lora import LoraSettings
from trainers.packing import Example, shuffled_batches
from trainers.precision import dtype_of, number_format

PARTS = ("deltas", "bases", "lora", "evaluation", "knob")


def main(
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(PARTS)}.")] = ",".join(PARTS),
    models: Annotated[str, typer.Option(help="Model shapes: some of smollm2, gemma2_2b, tiny.")] = "smollm2,gemma2_2b",
    d_model: Annotated[int, typer.Option(help="Width of the layer whose deltas and base are trained.")] = 2304,
    d_sae: Annotated[int, typer.Option(help="Features of its base.")] = 16384,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    steps: Annotated[int, typer.Option(help="Steps an epoch.")] = 50,
) -> None:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    typer.echo(f"{name}; torch {torch.__version__}")
    chosen = only.split(",")
    if "deltas" in chosen:
        delta_steps(device, d_model, d_sae, batch, steps)
    if "bases" in chosen:
        base_steps(device, d_model, d_sae, batch, steps)
    for model in models.split(","):
        if "lora" in chosen:
            lora_tokens(device, model)
        if "evaluation" in chosen:
            cells(device, model)
        if "knob" in chosen:
            knob(device, model)


def delta_steps(device: str, d_model: int, d_sae: int, batch: int, steps: int, d_new: int = 128) -> None:
    """Optimiser steps of a delta, against a script that runs the frozen base at every step."""
    typer.echo(f"deltas: d_model {d_model}, d_sae {d_sae}, d_new {d_new}, {batch} tokens a step")
    pairs = random_pairs(device, d_model, steps * batch)
    x, y = (torch.cat(column) for column in zip(*pairs.shards, strict=True))
    base = transcoder(d_model, d_sae, 0, bias=True)
    data = DeltaData(pairs, Pairs([(x[:4096], y[:4096])]), 1.0, 1.0, Site(0), "change")
    settings = DeltaSettings(d_new=d_new, batch_size=batch, epochs=4, sparsity=1e-4)
    with fresh_memory(device):
        curve = train_plainly(base, x[: 9 * batch], y[: 9 * batch], 1.0, settings, device=device)
        plain = (len(curve.losses) - 1) / curve.seconds
    typer.echo(f"  reference, fp32     {plain:9.1f} steps/s")
    for precision in ("fp32", "tf32", "bf16") if device.startswith("cuda") else ("fp32", "bf16"):
        for replicas in (1, 8):
            run_settings = replace(settings, precision=precision, replicas=replicas)
            with fresh_memory(device) as peak:
                train_delta(data, replace(run_settings, epochs=1), device=device)
                rate = delta_rate(data, run_settings, device)
            seconds, launches = profiled(partial(train_delta, data, run_settings, device=device), device)
            count = run_settings.epochs * steps
            typer.echo(
                f"  ours, {precision}, {replicas} side by side {rate:9.1f} steps/s   {rate / plain:7.1f}x   "
                f"{launches / count:5.1f} launches a step   {share(seconds / count * rate)}"
                f"   {peak()}"
            )


def delta_rate(data: DeltaData, settings: DeltaSettings, device: str) -> float:
    """Steps per second of all but the first epoch, without validations."""
    times: list[float] = []
    per_epoch, count = data.train.batch_count(settings.batch_size), 0

    def note(losses: object) -> None:
        nonlocal count
        count += 1
        if count % per_epoch in (1, 0):  # the first and last step of an epoch
            synchronise(device)
            times.append(time.perf_counter())

    train_delta(data, settings, device=device, on_step=note)
    spent = [end - start for start, end in zip(times[2::2], times[3::2], strict=True)]
    return len(spent) * (per_epoch - 1) / sum(spent)


def base_steps(device: str, d_model: int, width: int, batch: int, steps: int) -> None:
    """Optimiser steps of one base transcoder."""
    pairs = random_pairs(device, d_model, steps * batch)
    held_out = Pairs([(pairs.shards[0][0][:2048], pairs.shards[0][1][:2048])])
    typer.echo(f"bases: d_model {d_model}, width {width}, L0 64, {batch} tokens a step")
    for precision in ("fp32", "tf32", "bf16") if device.startswith("cuda") else ("fp32", "bf16"):
        settings = BaseSettings(target_l0=(64,), width=width, epochs=2, batch_size=batch, precision=precision)
        times: list[float] = []

        def note(step: int, total: int, figures: object, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        with fresh_memory(device) as peak:
            train_bases(pairs, held_out, settings, site=Site(0), device=device, report=note)
        rate = (len(times) - 1) * 20 / (times[-1] - times[0]) if len(times) > 1 else math.nan
        seconds, launches = profiled(
            partial(train_bases, pairs, held_out, settings, site=Site(0), device=device), device
        )
        count = 2 * steps
        flops = 2 * batch * d_model * width  # the encoder's product; the others are sparse
        typer.echo(
            f"  ours, {precision} {rate:9.1f} steps/s   {launches / count:5.1f} launches a step   "
            f"{share(seconds / count * rate)}   "
            f"{flops * rate / matmul_rate(device, precision):.2f} of the matmul rate   {peak()}"
        )


def lora_tokens(device: str, name: str, steps: int = 30) -> None:
    """Tokens per second against transformers' Trainer with PEFT, in bf16, from the same adapter on the same batches."""
    rows = random_rows(steps * BATCH)
    settings = LoraSettings(r=16, lr=1e-4, batch_size=BATCH, steps=steps, eval_every=steps)
    rates = {}
    for side in ("reference", "ours"):
        with fresh_memory(device) as peak, tempfile.TemporaryDirectory() as folder:
            model, tokenizer = SHAPES[name].build(device, torch.bfloat16, Path(folder))
            encoded = [encode_row(tokenizer, row) for row in rows]
            tokens = sum(len(row.ids) for row in encoded)
            for run_settings in (replace(settings, steps=3, eval_every=3), settings):  # the first is a warm-up
                if side == "ours":
                    model, seconds = train_ours(model, tokenizer, rows, run_settings)
                else:
                    examples = [Example(row.ids, index) for index, row in enumerate(encoded)]
                    batches = islice(shuffled_batches(examples, BATCH, 0), run_settings.steps)
                    order = [encoded[row.labelled] for batch in batches for row in batch]
                    model, seconds = train_reference(model, tokenizer, order, run_settings)
                model = model.unload() if run_settings is not settings else model
            rates[side] = tokens / seconds
            typer.echo(f"lora, {name}, bf16: {side:<9} {rates[side]:9.0f} tokens/s   {peak()}")
        del model
    typer.echo(f"lora, {name}, bf16: ours {rates['ours'] / rates['reference']:.2f}x the reference")


def cells(device: str, name: str, prompts: int = 16, budget: int = 16, sampled: int = 6) -> None:
    """The grid of two layers, spliced on un-finetuned MLPs, against one cell and prompt at a time."""
    with fresh_memory(device) as peak, tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = SHAPES[name].build(device, torch.float32, Path(scratch))
        layers = [len(model.model.layers) // 3, 2 * len(model.model.layers) // 3]
        save_other_blocks(model, layers, Path(scratch))
        bridge = wrap(model, tokenizer)
        patches = []
        for site, path in read_paths(bridge, Path(scratch), mlp_sites(layers)).items():
            delta = transcoder(bridge.cfg.d_model, 128, site.layer, bias=False)
            patches.append(Patch(site, path, replace(delta, W_dec=0.05 * delta.W_dec)).to(device))
        candidates = random_rows(4 * prompts)
        rows = {label: [row for row in candidates if row.label == label][:prompts] for label in ("tool", "copy")}
        as_they_are = replace(ALL, record_steps=False)
        ours(bridge, {label: few[:2] for label, few in rows.items()}, patches, budget)  # warms up libraries
        seconds, table = timed(lambda: ours(bridge, rows, patches, budget), device)
        chance, spent, equal, furthest = random.Random(0), 0.0, 0, 0.0
        grid = [(patch, *cell, label) for patch in patches for cell in CELLS for label in rows]
        for patch, condition, alpha, label in chance.sample(grid, sampled):
            place = chance.randrange(prompts)
            chosen = [rows[label][place]]
            took, (plain,) = timed(partial(plain_cell, bridge, chosen, patch, condition, alpha, budget), device)
            mine = table[patch.site, condition, alpha, label, place]
            spent, equal = spent + took, equal + (mine.output == plain.output)
            furthest = max(furthest, abs(mine.ce - plain.ce))
        without, _ = timed(lambda: ours(bridge, rows, patches, budget, as_they_are), device)
        whole = spent / sampled * len(grid) * prompts
        few = {label: some[:4] for label, some in rows.items()}
        less, _ = timed(lambda: ours(bridge, few, patches, budget), device)
        computing, launches = profiled(lambda: ours(bridge, few, patches, budget), device)
        typer.echo(
            f"evaluation, {name}, fp32, {len(grid)} cells of {prompts} prompts: ours {seconds:.1f} s, "
            f"one by one {whole / seconds:.0f}x (from {sampled} of {len(grid) * prompts}; "
            f"{equal} of {sampled} texts equal, CE at most {furthest:.1e} apart)   "
            f"{launches / less:.0f} launches a second   {share(computing / less)}   {peak()}   "
            f"without recorded steps {without / seconds:.1f}x as long"
        )


def knob(device: str, name: str, prompts: int = 32, budget: int = 32, d_new: int = 32) -> None:
    """Five strengths of deltas at all sites of all layers, with steps of decoding recorded and as they are."""
    with fresh_memory(device) as peak, tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = SHAPES[name].build(device, torch.float32, Path(scratch))
        layers = range(model.config.num_hidden_layers)
        save_other_blocks(model, layers, Path(scratch))
        bridge = wrap(model, tokenizer)
        sites = [Site(layer, kind) for layer in layers for kind in KINDS.values()]
        patches = [
            Patch(site, path, random_delta(path, d_new, device))
            for site, path in read_paths(bridge, Path(scratch), sites).items()
        ]
        rows, asks = random_rows(prompts), [Ask("alpha", alpha) for alpha in ALPHAS]
        written, rates, shares = {}, {}, {}
        for way, records in (("as they are", False), ("recorded", True)):
            passes = Passes(bridge, 100, replace(ALL, record_steps=records))

            def run(rows: Sequence[Row], budget: int = budget, passes: Passes = passes) -> list[list[int]]:
                settings: dict[str, Any] = {"limits": Limits(budget), "behaviours": {}}
                answers = evaluate_behaviour(passes, patches, rows, asks, known=Known(), **settings)
                return [text["tokens"] for _, _, texts in answers for text in texts]

            run(rows[:4])  # warms up libraries
            seconds, written[way] = timed(partial(run, rows), device)
            less, _ = timed(partial(run, rows[:20], budget // 2), device)  # profiles take long to read
            computing, _ = profiled(partial(run, rows[:20], budget // 2), device)
            rates[way], shares[way] = seconds, share(computing / less)
        one, other = written.values()
        equal = sum(mine == plain for mine, plain in zip(one, other, strict=True))
        typer.echo(
            f"knob, {name}, fp32, {len(sites)} sites, {len(asks)} strengths of {prompts} prompts, {budget} tokens: "
            + ", ".join(f"steps {way} {rates[way]:.1f} s ({shares[way]})" for way in rates)
            + f", {rates['as they are'] / rates['recorded']:.1f}x; {equal} of {len(one)} texts equal   {peak()}"
        )


def profiled(run: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds in which kernels ran, and the number of launches; one launch of a graph starts many kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not device.startswith("cuda"):
        return math.nan, 0
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    spans, launches = [], 0
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
        elif event.name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch"):
            launches += 1
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6, launches


def share(computing: float) -> str:
    """The share as text, at most 1: it can exceed 1 slightly because the profiled run is another run."""
    return f"computing {min(1.0, computing):.2f} of the time" if math.isfinite(computing) else ""


def matmul_rate(device: str, precision: str, size: int = 8192, tries: int = 6) -> float:
    """FLOP/s of a large product in that format, the best of several tries."""
    size = size if device.startswith("cuda") else 1024
    with number_format(device, precision):
        left, right = (torch.randn(size, size, device=device, dtype=dtype_of(precision)) for _ in range(2))
        return 2 * size**3 / min(timed(lambda: left @ right, device)[0] for _ in range(tries))


@contextmanager
def fresh_memory(device: str) -> Iterator[Callable[[], str]]:
    """Yields a function that describes the peak device memory since then."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
    else:
        yield lambda: ""


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
