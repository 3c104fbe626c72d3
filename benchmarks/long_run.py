"""Whether a long sweep stays as fast, and its driver as small, as it began: thousands of trials, and of cells.

    python -m benchmarks.long_run [--cells 10000] [--trials 5000] [--root FOLDER]

In: how many. Out: for a sweep of the tiny model with so many trials, and one with so many cells: units a second in the
first eighth and in the last one and their ratio, the driver's largest resident memory, most threads and open files,
what was left in the temporary folder, and how long `status` takes afterwards.
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
"""Seconds between two looks at the driver."""
SMALL = (
    *("data.train_rows=60", "data.validation_rows=8", "data.eval_rows=2", "lora.trials=1", "lora.steps=2"),
    *("activations.train_tokens=1000", "deltas.targets=[change]", "deltas.replicas=1", "deltas.epochs=1"),
    *("evaluate.controls=[]", "evaluate.cards=0", "evaluate.curve=false", "evaluate.widths=false"),
)
SETS = "[[0, 1], [0, 2], [0, 3]]"
"""All of two layers, and they begin in the same one, so that their cells cost the same."""
SUBSETS, LAYERS = 3, 4
SEEDS = 8
"""Of each delta: a worker writes the cells of a seed, set and subset at once, so there must be many of those."""
TRIALS = 16
"""Of each group; more trials come as more groups, as in a large study, since what a proposal costs grows with those of
its own study."""


class Use(NamedTuple):
    """The most that the driver used, and how long it ran in seconds."""

    memory: int
    threads: int
    files: int
    seconds: float


def watched(command: Sequence[str]) -> Use:
    """Runs a command to its end and looks at it all the time."""
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
    """Units a second in the first eighth and in the last one, from when each unit ended."""
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
    cells: Annotated[int, typer.Option(min=200, help="About how many cells.")] = 10_000,
    trials: Annotated[int, typer.Option(min=64, help="About how many trials.")] = 5_000,
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
        show("trials", [one["started"] + one["seconds"] for one in results], use, entries() - before)

        count = cells // (SUBSETS * 3 * SEEDS)
        alphas = [round((number + 1) / (count + 1), 6) for number in range(count)]
        seeds = [f"deltas.replicas={SEEDS}", f"evaluate.replicas={SEEDS}", "deltas.trials=1", "deltas.d_new=[2]"]
        grid = [*sweep, "name=cells", *seeds, f"evaluate.alphas={alphas}", f"evaluate.sets={SETS}"]
        use = watched([*base, *grid])
        found = [path.stat().st_mtime for path in place.glob("sweeps/cells/cells/*_alpha*.json")]
        show("cells", found, use, entries() - before)

        for name, asked in (("trials", searched), ("cells", grid)):
            status = watched([*base, "status", *asked[1:]])
            typer.echo(f"status of the sweep with many {name}: {status.seconds:.1f} s")


if __name__ == "__main__":
    typer.run(main)
