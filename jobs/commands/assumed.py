"""Estimates how long a sweep would take on GPUs without measurements, from arithmetic and the settings in `machine`.

In: a `Context` and the model's config. Out: rows of text: the time on more GPUs, how busy they are, the assumptions.
Matrix products are counted by FLOPs, delta steps by kernels, evaluation by the Python of its passes, reading and
writing by bytes; no trial stops early. An estimate for planning: `--measured` uses measured costs instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jobs.capture.activations import SHARD_TOKENS
from jobs.commands.forecast import WORKERS, Load, forecast
from jobs.context.context import Context
from jobs.context.disk import disk_of, pair_bytes, reads_of
from jobs.evaluation.kinds import works_of
from jobs.evaluation.work import ExpectedPlanInputs, Timing
from jobs.progress import clock
from jobs.sweep.stages.deltas import trials_at_once
from models.architectures import kinds_of
from models.sources import model_facts, widths_of
from search_spaces.dimensions import Choice, Range
from sites import Kind, Site


class Weights(NamedTuple):
    """Parameter counts of a model: all, those on the path of a site of each kind, and those that each token is
    multiplied with."""

    all: int
    paths: dict[Kind, int]
    multiplied: int

    def on_paths(self, sites: Iterable[Site]) -> int:
        """Parameters on the paths of these sites."""
        return sum(self.paths[site.kind] for site in sites)


@lru_cache(maxsize=1)
def weights_of(folder: Path) -> Weights:
    """Counted on a model without values, built from the config alone."""
    from models.blocks import part_places
    from models.weights import build_skeleton

    model: Any = build_skeleton(folder)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    paths = {}
    for kind in kinds_of(model.config.model_type):
        places = tuple(f"{place}." for place in part_places(model.config, Site(0, kind)).values())
        paths[kind] = sum(count for name, count in sizes.items() if name.startswith(places))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    return Weights(sum(sizes.values()), paths, sum(sizes.values()) - looked_up)


def memory_rows(context: Context) -> list[tuple[str, str]]:
    """Peak weight memory of a worker: in evaluation, in the exactness checks, and where changes are always computed in
    fp32 (their capture, and `pca_delta`). Batches come on top."""
    weights, settings, change = weights_of(context.model), context.settings, context.sites_of("change")
    facts = model_facts(context.model)
    d_model, d_new = facts["d_model"], max(settings.deltas.d_new)
    size = 2 if settings.model.dtype == "bf16" else 4
    captured = 2 if settings.compute.precision in ("auto", "bf16") else 4
    paths = weights.on_paths(change)
    residual = len(context.layers_of("residual"))
    parts = {
        "model": size * weights.all,
        "un-finetuned paths": size * paths,
        "bases": 4 * 2 * d_model * _features(settings.transcoders.width) * residual,
        "deltas": 4 * d_new * max(2 * d_model * residual, sum(sum(widths_of(facts, site)) for site in change)),
    }
    evaluation, transcoders = sum(parts.values()), parts["bases"] + parts["deltas"]
    peaks = {
        "checks": size * (weights.all + 3 * paths) + transcoders,
        "capture": captured * weights.all + 2 * 4 * weights.on_paths(_computed(context)),
        "pca_delta": evaluation + 2 * 4 * paths if change and "pca_delta" in settings.evaluate.controls else 0,
    }
    listed = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items() if size)
    other_peaks = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in peaks.items() if size)
    return [("weights", f"{evaluation / 1e9:.3g} GB a worker in evaluation ({listed}); {other_peaks}")]


def _computed(context: Context) -> list[Site]:
    """The sites whose change is computed from activations: a linear change follows from the weights."""
    return [site for site in context.sites_of("change") if not context.is_linear(site)]


def _features(width: str | int) -> int:
    """Number of features of a width such as 16384 or, as in published names, 16k; 0 for a label without a number."""
    number, scale = str(width), 1
    if number[-1:] in ("k", "m"):
        number, scale = number[:-1], 1024 if number[-1] == "k" else 1024**2
    return int(number) * scale if number.isdigit() else 0


STEP_KERNELS, VALIDATION, EXTRA_RUN = 75, 20, 0.11
"""First the kernels of a delta step when `machine.kernel_us` was measured: the step took 75 times that. It now has 39
kernels but has not been timed again, so both values are still the old ones. Next, the number of steps that a validation
counts as; last, the share by which each further run side by side lengthens a step (on an H100, eight took 1.8 times as
long)."""
FP32 = 8
"""How many times longer a product takes in fp32 than in bf16."""


def assumed_rows(context: Context, workers: int | None = None) -> list[tuple[str, str]]:
    """One row of text for each number of workers (including `workers`) with a GPU each, and the assumptions."""
    rows = []
    for count in sorted({*WORKERS, *([workers] if workers else [])}):
        loads = assumed_loads(context, count)
        estimate, hours = forecast(loads, count), sum(sum(load.units) + load.alone for load in loads) / 3600
        name = "on 1 GPU" if count == 1 else f"on {count} GPUs"
        rows.append(
            (name, f"{clock(estimate.seconds)}, {estimate.busy:.0%} busy, {hours:.1f} hours of work; {estimate.limit}")
        )
    return [*rows, ("assumed", assumptions(context))]


def assumed_loads(context: Context, workers: int) -> list[Load]:
    """The stages' units of work, on `workers` workers."""
    weights = weights_of(context.model)
    stages = [
        Load("lora", [] if context.settings.model.finetuned else _lora(context, weights)),
        Load(
            "transcoders",
            _bases(context),
            shared=_storage(context, len(context.layers_of("residual")) * pair_bytes(context)),
        ),
        Load("capture", _capture(context, weights), shared=_storage(context, sum(disk_of(context).sizes.values()))),
        _deltas(context, workers),
        Load("evaluate", _evaluation(context, weights)),
    ]
    # Each worker first reads the stage's model, all at the same time.
    models = _storage(context, 2 * weights.all * workers)
    with_models = ("lora", "capture", "evaluate")
    return [load._replace(alone=models if load.stage in with_models else 0.0) for load in stages if load.units]


def assumptions(context: Context) -> str:
    machine = context.settings.machine
    return (
        f"{machine.tflops:g} TFLOPS in products, {machine.kernel_us:g} us a kernel, {machine.layer_ms:g} ms of Python "
        f"a layer of evaluation, {machine.answer_passes} passes an answer, {machine.row_tokens} tokens a row, "
        f"{machine.disk_gbs:g} GB/s of storage for all together, {machine.pcie_gbs:g} GB/s to each GPU, "
        f"{machine.trial_ms:g} ms of the driver and {machine.start_s:g} s of starting a trial (settings: machine)"
    )


def _lora(context: Context, weights: Weights) -> list[float]:
    """A token costs 6 FLOPs per weight in training (Kaplan et al. 2020) and 2 in validation."""
    lora, data, machine = context.settings.lora, context.settings.data, context.settings.machine
    batch = lora.space.batch_size
    rows = float(max(batch.choice) if isinstance(batch, Choice) else batch.high if isinstance(batch, Range) else batch)
    steps = lora.steps if lora.epochs is None else math.ceil(lora.epochs * data.train_rows / rows)
    validated = data.validation_rows * (steps // lora.eval_every + 1)
    flops = weights.multiplied * machine.row_tokens * (6 * steps * rows + 2 * validated)
    return [_products(context, flops) + machine.start_s] * lora.trials


def _bases(context: Context) -> list[float]:
    """A step multiplies each token with every encoder three times: in the forward pass and for two gradients."""
    section = context.settings.transcoders
    if section.source != "train" or not isinstance(section.width, int):
        return []
    tokens = section.epochs * context.settings.activations.train_tokens
    flops = 6 * tokens * model_facts(context.model)["d_model"] * section.width * len(section.target_l0)
    return [_products(context, flops)] * len(context.layers_of("residual"))


def _capture(context: Context, weights: Weights) -> list[float]:
    """Each token runs once per window of layers, up to the window's last layer; where changes are captured, also
    through both models' paths in fp32, unless they are linear. For bases, once more through the un-finetuned model."""
    section, count = context.settings.activations, model_facts(context.model)["n_layers"]
    tokens, sites = section.train_tokens + section.validation_tokens, context.sites_of("residual")
    passes = sum((window[-1].layer + 1) / count for window in disk_of(context).windows(context.sites))
    if sites and context.settings.transcoders.source == "train":
        passes += sum((window[-1].layer + 1) / count for window in disk_of(context).windows(sites))
    exact = FP32 * 2 * weights.on_paths(_computed(context))
    shards = math.ceil(tokens / SHARD_TOKENS[1])
    return [_products(context, 2 * tokens * (passes * weights.multiplied + exact)) / shards] * shards


def _deltas(context: Context, workers: int) -> Load:
    """Steps take as long as their kernels; each worker that needs pairs reads them once."""
    settings, machine = context.settings, context.settings.machine
    section = settings.deltas
    steps = section.epochs * (settings.activations.train_tokens // section.batch_size + VALIDATION)
    trials = len(context.delta_groups) * section.trials
    bytes_read = reads_of(context, workers) * pair_bytes(context)
    seconds = steps * STEP_KERNELS * machine.kernel_us * 1e-6
    calls = trials_at_once(context)
    overhead = machine.start_s + bytes_read / max(1, len(calls) * len(context.delta_groups)) / (machine.pcie_gbs * 1e9)
    units = [seconds * (1 + EXTRA_RUN * (runs - 1)) + overhead for runs in calls] * len(context.delta_groups)
    return Load("deltas", units, shared=max(_storage(context, bytes_read), trials * machine.trial_ms * 1e-3))


def _evaluation(context: Context, weights: Weights) -> list[float]:
    """Passes over whole rows are bound by products; decoding a token is bound by Python, layer by layer."""
    settings, machine = context.settings, context.settings.machine
    section, count = settings.evaluate, model_facts(context.model)["n_layers"]
    per_token = 2 * weights.multiplied * (1 if settings.model.dtype == "bf16" else FP32)

    def passes(rows: float, layers: int = count) -> float:
        flops = per_token * rows * machine.row_tokens * layers / count
        return max(_products(context, flops), math.ceil(rows / section.batch_size) * layers * machine.layer_ms * 1e-3)

    def answers(rows: float, layers: int = count) -> float:
        steps = math.ceil(rows / section.batch_size) * machine.answer_passes
        return passes(rows, layers) + steps * layers * machine.layer_ms * 1e-3

    timing = Timing(count, settings.data.eval_rows, len(context.subsets), passes, answers)
    works = [work for work in works_of(ExpectedPlanInputs(context)) if work.cells()]
    return [work.seconds(timing) for work in works for _ in range(work.units)]


def _products(context: Context, flops: float) -> float:
    return flops / (context.settings.machine.tflops * 1e12)


def _storage(context: Context, count: float) -> float:
    return count / (context.settings.machine.disk_gbs * 1e9)
