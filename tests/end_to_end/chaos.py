"""A sweep whose processes are killed at random moments ends with the tables of one that was left alone.

    python -m tests.end_to_end.chaos --kills 100 [--seed 0]

Each kill is a SIGKILL of the whole machine's share (driver, Ray and workers), of the driver, of a worker, or of the
raylet, some seconds after the start; a driver that has ended is started again by the same command.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import optuna
import pandas as pd
import psutil
import typer
from mlflow import MlflowClient
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.end_to_end.conftest import REPOSITORY, SMALL, environment

VICTIMS = ("machine", "driver", "worker", "raylet")
ENDS_WITHIN = 60.0
"""Seconds in which a driver notices that its raylet is gone."""


def start(root: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs", "sweep", "tiny", f"storage.root={root}", *SMALL, *more]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file)


def kill_at_random(root: Path, kills: int, chance: random.Random, log: Path) -> collections.Counter[str]:
    """Starts the sweep again and again until it ends by itself; returns who was killed how often."""
    done: collections.Counter[str] = collections.Counter()
    process = start(root, log, "compute.max_retries=50", "compute.checkpoint_seconds=0")
    while True:
        if done.total() < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(1, 15))
        else:
            process.wait()
        if process.poll() is None:
            victim = chance.choice(VICTIMS)
            done[victim] += kill(process, victim, chance)
            if victim == "worker":
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDS_WITHIN)
            assert process.poll() is not None, f"the driver hangs after the death of its {victim}"
        elif process.returncode == 0:
            return done
        process = start(root, log, "compute.max_retries=50", "compute.checkpoint_seconds=0")


def kill(process: subprocess.Popen[bytes], victim: str, chance: random.Random) -> int:
    """Whether there was such a process to kill."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        named = [(child, " ".join(child.cmdline())) for child in family]
    except psutil.NoSuchProcess:
        return 0
    workers = [child for child, name in named if name.startswith("ray::")]
    chosen = {
        "machine": [child.pid for child in family] + [process.pid],
        "driver": [process.pid],
        "worker": [chance.choice(workers).pid] if workers else [],
        "raylet": [child.pid for child, name in named if "raylet/raylet" in name],
    }[victim]
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return int(bool(chosen))


def check_equal(root: Path, undisturbed: Path) -> None:
    """Same tables but for times, one MLflow run for each result and none RUNNING, no zombie in Optuna."""
    for path in sorted((undisturbed / "sweeps/tiny/report").glob("*.csv")):
        found, expected = (
            pd.read_csv(one).drop(columns="seconds", errors="ignore")
            for one in (root / "sweeps/tiny/report" / path.name, path)
        )
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=5000)
    keys = [run.data.tags["deltascope.key"] for run in runs]
    assert len(keys) == len(set(keys)), "a run is there twice"
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    results = [
        *(root / "sweeps/tiny").glob("lora/trial_*"),
        *(root / "sweeps/tiny").glob("deltas/layer_*/*/d*/trial_*"),
    ]
    assert sum(key.startswith(("lora/", "deltas/")) for key in keys) == len(results)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(root / "optuna" / "journal.log")))
    for name in optuna.get_all_study_names(storage):
        states = [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]
        assert TrialState.RUNNING not in states, f"a zombie in {name}"


def main(
    kills: Annotated[int, typer.Option(help="How many.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments and the victims.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        assert start(place / "calm", place / "calm.log").wait() == 0, (place / "calm.log").read_text()
        started = time.monotonic()
        done = kill_at_random(place / "killed", kills, random.Random(seed), place / "killed.log")
        check_equal(place / "killed", place / "calm")
    listed = ", ".join(f"{victim} {count}" for victim, count in sorted(done.items()))
    typer.echo(
        f"{done.total()} kills ({listed}) in {time.monotonic() - started:.0f} s: the tables are those of a calm run"
    )


if __name__ == "__main__":
    typer.run(main)
