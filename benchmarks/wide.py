"""As many groups as for Gemma-2-2B: 26 layers x 3 percentiles x 3 widths, 8 trials each, on the tiny preset's settings.

    python -m benchmarks.wide [--layers 26]

In: a number of layers. Runs the delta studies of a random model with that many, then opens every study in
optuna-dashboard. Out: prints seconds per trial for each eighth of the trials (constant if nothing slows down as trials
accumulate), and the seconds it takes to open a study.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cluster import environment
from jobs.commands import ui

environment.prepare()

PERCENTILES, WIDTHS, TRIALS = (0.25, 0.5, 0.75), (4, 8, 16), 8
PORT = 8765


def main(layers: Annotated[int, typer.Option(help="Layers of the model.")] = 26) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, groups = Path(folder) / "mlruns", layers * len(PERCENTILES) * len(WIDTHS)
        sweep(Path(folder) / "model", root, layers)
        results = [json.loads(path.read_text()) for path in root.glob("sweeps/wide/deltas/*/*/d*/trial_*/result.json")]
        assert len(results) == groups * TRIALS
        ends = sorted(result["started"] + result["seconds"] for result in results)
        marks = [
            min(result["started"] for result in results),
            *(ends[len(ends) * part // 8 - 1] for part in range(1, 9)),
        ]
        spans = [later - earlier for earlier, later in pairwise(marks)]
        states = Counter(result["state"] for result in results)
        typer.echo(f"{groups} groups x {TRIALS} trials: {dict(states)}, {sum(spans):.0f} s")
        typer.echo("seconds per trial, by eighths: " + ", ".join(f"{span * 8 / len(ends):.3f}" for span in spans))
        seconds = open_studies(root, groups)
        typer.echo(f"studies opened: {len(seconds)}, the slowest in {max(seconds):.2f} s, all in {sum(seconds):.1f} s")


def sweep(model: Path, root: Path, layers: int) -> None:
    from models.tiny import build_tiny_gemma2

    build_tiny_gemma2(model, seed=0, n_layers=layers)
    settings = {
        "name": "wide",
        "model.source": model,
        "storage.root": root,
        "lora.trials": 1,
        "transcoders.layers": "all",
        "transcoders.target_l0": [4, 8, 16],
        "deltas.percentiles": list(PERCENTILES),
        "deltas.d_new": list(WIDTHS),
        "deltas.trials": TRIALS,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "jobs", "deltas", "tiny", *given], check=True)


def open_studies(root: Path, groups: int) -> list[float]:
    """Seconds to open each group's study; fails if a study lacks a trial."""
    server = subprocess.Popen(ui.command(str(root), PORT, studies=True), stderr=subprocess.DEVNULL)
    seconds = []
    try:
        while not ui.listens(PORT):
            assert server.poll() is None
            time.sleep(0.1)
        for study in _get("/api/studies")["study_summaries"]:
            if "/deltas/" in study["study_name"]:
                started = time.perf_counter()
                trials = _get(f"/api/studies/{study['study_id']}")["trials"]
                seconds.append(time.perf_counter() - started)
                assert len(trials) == TRIALS, study["study_name"]
    finally:
        server.terminate()
        server.wait()
    assert len(seconds) == groups
    return seconds


def _get(path: str) -> Any:
    with urllib.request.urlopen(f"http://{ui.HOST}:{PORT}{path}", timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    typer.run(main)
