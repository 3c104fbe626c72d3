"""Whether a long sweep slows down or its driver grows, over thousands of trials and of cells.

    python -m benchmarks.long_run [--cells 10000] [--trials 5000] [--root FOLDER]

In: numbers of cells and trials. Out: for a sweep of the tiny model with that many trials, and one with that many cells:
units per second in the first and the last eighth and their ratio, the driver's peak resident memory, threads and open
files, the number of entries left in the temporary folder, and how long `status` takes afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer

PERIOD = 0.5
"""Seconds between two samples of the driver."""
SMALL = (
    *("data.train_rows=60", "data.validation_rows=8", "data.eval_rows=2", "lora.trials=1", "lora.steps=2"),
    *("activations.train_tokens=1000", "deltas.targets=[change]", "deltas.replicas=1", "deltas.epochs=1"),
    *("evaluate.controls=[]", "evaluate.cards=0", "evaluate.groups=0", "evaluate.graphs=0"),
    *("evaluate.curve=false", "evaluate.widths=false"),
)
SETS = "[[0, 1], [0, 2], [0, 3]]"
"""All have two layers and begin at the same one, so that their cells cost the same."""
SUBSETS, LAYERS = 3, 4
SEEDS = 8
"""Seeds of each delta: a worker writes the cells of a seed, set and subset at once, so there must be many of these."""
TRIALS = 16
"""Trials per group. More trials means more groups, as in a large study, because the cost of a proposal grows with the
trials of its own study."""


class Use(NamedTuple):
    """Peak usage of the driver, and its run time in seconds."""

    memory: int
    threads: int
    files: int
    seconds: float


def watched(command: Sequence[str]) -> Use:
    """Runs a command to its end and samples its usage."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver, memory, threads, files = psutil.Process(process.pid), 0, 0, 0
    while process.poll() is None:
        try:
            memory = max(memory, driver.memory_info().rss)
            threads, files = max(threads, driver.num_threads()), max(files, driver.num_fds())
        except psutil.NoSuchProcess:
            break
        time.sleep(PERIOD)
    if process.wait():
        raise typer.Exit(process.returncode)
    return Use(memory, threads, files, time.perf_counter() - started)


def eighths(ends: list[float]) -> tuple[float, float]:
    """Units per second in the first and the last eighth, from the end times of the units."""
    ends, part = sorted(ends), len(ends) // 8
    return part / (ends[part] - ends[0]), part / (ends[-1] - ends[-1 - part])


def show(what: str, ends: list[float], use: Use, left: int) -> None:
    first, last = eighths(ends)
    typer.echo(
        f"{len(ends)} {what} in {use.seconds:.0f} s: {first:.1f} a second in the first eighth, {last:.1f} in the last "
        f"({last / first:.2f}); driver: {use.memory / 2**30:.2f} GiB, {use.threads} threads, {use.files} open files; "
        f"{left:+d} entries in {tempfile.gettempdir()}"
    )


def entries() -> int:
    return sum(1 for _ in Path(tempfile.gettempdir()).iterdir())


def main(
    cells: Annotated[int, typer.Option(min=200, help="Approximate number of cells.")] = 10_000,
    trials: Annotated[int, typer.Option(min=64, help="Approximate number of trials.")] = 5_000,
    root: Annotated[Path | None, typer.Option(help="Storage root; default: a temporary folder.")] = None,
) -> None:
    with tempfile.TemporaryDirectory(prefix="long_run") as folder:
        place = root or Path(folder)
        base = [sys.executable, "-m", "jobs"]
        before = entries()
        sweep = ["sweep", "tiny", f"storage.root={place}", *SMALL]

        widths = list(range(1, max(1, trials // (TRIALS * LAYERS)) + 1))
        searched = [*sweep, "name=trials", f"deltas.trials={TRIALS}", f"deltas.d_new={widths}"]
        use = watched([*base, *searched, "evaluate.alphas=[1.0]", "evaluate.sets=[all]"])
        results = [
            json.loads(path.read_text()) for path in place.glob("sweeps/trials/deltas/*/*/*/trial_*/result.json")
        ]
        show("trials", [result["started"] + result["seconds"] for result in results], use, entries() - before)

        count = cells // (SUBSETS * 3 * SEEDS)
        alphas = [round((number + 1) / (count + 1), 6) for number in range(count)]
        seeds = [f"deltas.replicas={SEEDS}", f"evaluate.replicas={SEEDS}", "deltas.trials=1", "deltas.d_new=[2]"]
        grid = [*sweep, "name=cells", *seeds, f"evaluate.alphas={alphas}", f"evaluate.sets={SETS}"]
        use = watched([*base, *grid])
        found = [path.stat().st_mtime for path in place.glob("sweeps/cells/cells/*_alpha*.json")]
        show("cells", found, use, entries() - before)

        for name, arguments in (("trials", searched), ("cells", grid)):
            status = watched([*base, "status", *arguments[1:]])
            typer.echo(f"status of the sweep with many {name}: {status.seconds:.1f} s")


if __name__ == "__main__":
    typer.run(main)
