"""Delta training against sparsify and dictionary_learning on the pairs of a finished sweep, in one run.

    python -m benchmarks.delta_rivals mlruns/sweeps/quickstart --sparsify PYTHON --dictionary-learning PYTHON

In: a sweep's folder, and the Python interpreters of environments with those packages. Each trains one transcoder of the
same width on the same pairs (x, residual) with the same batch size, epochs and active features per token (an upper
bound for ours); the best of four learning rates counts. The others train in fp32, as they do on a CPU; ours in each
precision that this machine supports. Out: prints tokens per second, the fraction of the residual left on validation
tokens, and the ratios.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_file

from sites import Ground, Site
from trainers.activations import Pairs, read_pairs
from trainers.delta_data import DeltaData, output_variance
from trainers.delta_transcoder import DeltaSettings, train_delta
from trainers.precision import resolve_precision

HERE = Path(__file__).parent / "rivals"
LEARNING_RATES = (1e-3, 3e-3, 5e-3, 1e-2)


def main(
    sweep: Annotated[Path, typer.Argument(help="Folder of a sweep that has reached its deltas.")],
    sparsify: Annotated[Path | None, typer.Option(help="Python of an environment with eai-sparsify.")] = None,
    dictionary_learning: Annotated[
        Path | None, typer.Option(help="Python of an environment with dictionary-learning.")
    ] = None,
    layer: Annotated[int, typer.Option()] = 18,
    percentile: Annotated[float, typer.Option()] = 0.75,
    d_new: Annotated[int, typer.Option()] = 128,
    active: Annotated[int, typer.Option(help="Active features per token.")] = 16,
    epochs: Annotated[int, typer.Option()] = 2,
    batch: Annotated[int, typer.Option()] = 512,
) -> None:
    data, energy = _pairs(sweep, Site(layer), percentile)
    tokens, d_model = data.train.tokens, data.train.shards[0][0].shape[1]
    typer.echo(f"{tokens} tokens, d_model {d_model}, width {d_new}, L0 {active}, {epochs} epochs, batch {batch}, fp32")
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.safetensors"
        (x, residual), (held_x, held) = data.train.whole(), data.validation.whole()
        save_file({"x": x, "residual": residual, "held_x": held_x, "held_residual": held}, pairs)
        rivals = {"train_sparsify.py": sparsify, "train_dictionary_learning.py": dictionary_learning}
        for script, python in rivals.items():
            if python is not None:
                sizes = [str(size) for size in (d_new, active, epochs, batch)]
                runs = [_run([str(python), str(HERE / script), str(pairs), *sizes, str(lr)]) for lr in LEARNING_RATES]
                rates[script] = max(run["tokens_per_second"] for run in runs)
                best = min(runs, key=lambda run: run["unexplained"])
                _say(script, rates[script], best["unexplained"], best["l0"])
    for precision in sorted({"fp32", resolve_precision("auto", "cpu")}, reverse=True):
        settings = DeltaSettings(
            d_new=d_new, sparsity=1e-4, epochs=epochs, batch_size=batch, l0_budget=float(active), precision=precision
        )
        runs = [_ours(data, replace(settings, lr=lr)) for lr in LEARNING_RATES]
        ours = max(run["tokens_per_second"] for run in runs)
        best = min(runs, key=lambda run: run["val_loss"])
        _say(f"ours, {precision}", ours, best["val_fvu"] * energy, best["val_l0_delta"])
        for name, rate in rates.items():
            typer.echo(f"  over {name}: {ours / rate:.2f}x")


def _ours(data: DeltaData, settings: DeltaSettings) -> dict[str, Any]:
    """The figures of a run, and its tokens per second between the first step and the last."""
    times: list[float] = []
    trained = train_delta(data, settings, on_step=lambda losses: times.append(time.perf_counter()))
    return {**trained.figures, "tokens_per_second": (len(times) - 1) * settings.batch_size / (times[-1] - times[0])}


def _pairs(sweep: Path, site: Site, percentile: float) -> tuple[DeltaData, float]:
    """A sweep's residuals for one (layer, base), and the variance of y over their energy, on validation tokens."""
    splits: list[Pairs] = []
    for split in ("train", "validation"):
        inputs = read_pairs(sweep / "activations" / "finetuned" / split / site.folder, ("x",))
        folder = sweep / "deltas" / site.folder / Ground("residual", percentile).label / "residual" / split
        both = zip(inputs.shards, read_pairs(folder, ("residual",)).shards, strict=True)
        splits.append(Pairs([(x, residual) for (x,), (residual,) in both]))
    outputs = read_pairs(sweep / "activations" / "finetuned" / "validation" / site.folder)
    variance = output_variance(outputs)
    energy = sum(residual.double().pow(2).sum().item() for _, residual in splits[1].shards)
    whole = variance * splits[1].tokens * splits[1].shards[0][1].shape[1]
    return DeltaData(splits[0], splits[1], variance, energy / whole, site), whole / energy


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise typer.BadParameter(f"{Path(command[1]).name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _say(name: str, rate: float, unexplained: float, l0: float) -> None:
    typer.echo(f"{name:32s} {rate:9.0f} tokens/s, {unexplained:.4f} of the residual left, L0 {l0:.1f}")


if __name__ == "__main__":
    typer.run(main)
