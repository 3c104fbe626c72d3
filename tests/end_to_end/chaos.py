"""A sweep whose processes are killed at random moments ends with the same tables as one that was left alone.

    python -m tests.end_to_end.chaos --kills 100 [--seed 0] [--damage]

In: a number of kills and a seed; with `--damage` a file is damaged before each restart. Out: one line that says who
was killed, or an AssertionError. Every start of the command uses its own Ray or a cluster of two nodes. SIGKILL hits
one of these, while it works or while it starts: a worker, the driver, the driver's raylet, the driver and everything it
started (`machine`), or the raylet of the cluster's second node (`node`), after which another node joins. A sweep that
ends before there were enough kills is compared, and another one is started.
"""

from __future__ import annotations

import collections
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import optuna
import psutil
import typer
from mlflow import MlflowClient
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.end_to_end.conftest import REPOSITORY, SMALL, environment
from tests.end_to_end.damage import WAYS, kinds, tables

SETTINGS = (*SMALL, "compute.max_concurrent=2", "compute.max_retries=100", "compute.checkpoint_seconds=0")
"""Two workers, and a checkpoint at every step; the tables are those of `SMALL`."""
DURING = {"local": ("worker",), "cluster": ("worker", "node", "node")}
AT_LAST = {"local": ("machine", "driver", "raylet"), "cluster": ("driver",)}
KILLS_A_START = (3, 5)
WORKS_SECONDS = 0.7
"""Most seconds from a sign of work to the kill."""
STARTS_SECONDS = 8.0
STARTING = 0.1
"""Fraction of the kills that hit at any moment of a start."""
ENDS_SECONDS = 10.0
"""Seconds within which a driver must end once its raylet is gone."""
PATIENCE_SECONDS = 300.0
BEGAN = time.monotonic()
STORES = 0.1
"""Fraction of the damage that hits Optuna's journal or MLflow's database."""
WORK = ("lora", "activations", "transcoders", "deltas", "cells")


class Nodes:
    """`tests.end_to_end.two_nodes` in its own process."""

    def __init__(self, variables: dict[str, str], log: Path) -> None:
        self.variables = variables
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.end_to_end.two_nodes"],
                cwd=REPOSITORY,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.address = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster has ended"
        return line

    def replace(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._line() == "replaced"

    @property
    def family(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def end(self) -> None:
        family = self.family
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for one in [*family, psutil.Process(self._process.pid)] if self._process.poll() is None else family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._process.wait()


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """The cluster, with its own token."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text("c" * 64)
    nodes = Nodes({**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}, folder / "nodes.log")
    try:
        yield nodes
    finally:
        nodes.end()


class Start:
    """One start of the command, on its own Ray or on the cluster's nodes."""

    def __init__(self, root: Path, log: Path, nodes: Nodes | None = None) -> None:
        self.root, self.log, self.nodes = root, log, nodes
        self._logged = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "jobs", "sweep", "tiny", f"storage.root={root}", *SETTINGS]
        if nodes is not None:
            command += ["--address", nodes.address]
        variables = environment() if nodes is None else nodes.variables
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=file, stderr=file)

    @property
    def said(self) -> str:
        return self.log.read_bytes()[self._logged :].decode()

    def ends_in(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def works(self) -> bool:
        """Waits for a change in the results; False if the driver ends first."""
        before, deadline = newest(self.root), time.monotonic() + PATIENCE_SECONDS
        while newest(self.root) == before:
            if self.ends_in(0.05):
                return False
            assert time.monotonic() < deadline, "the sweep hangs:\n" + self.said
        return True

    def kill(self, victim: str, most: int, chance: random.Random) -> int:
        """Kills `victim` and returns how many were killed: one, several workers at once, or none if there was no such
        process."""
        if victim == "node":
            assert self.nodes is not None
            self.nodes.replace()
            return 1
        own = psutil.Process(self.process.pid)
        family = own.children(recursive=True)
        workers = [one for one in (self.nodes.family if self.nodes else family) if _is_worker(one)]
        chosen = {
            "machine": [own, *family],
            "driver": [own],
            "worker": chance.sample(workers, min(len(workers), chance.randint(1, most))),
            "raylet": [one for one in family if one.name() == "raylet"],
        }[victim]
        for one in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        if chosen and victim != "worker":
            assert self.ends_in(ENDS_SECONDS), f"the driver hangs after the death of its {victim}:\n{self.said}"
            if victim == "raylet":
                assert self.process.returncode == 1
                assert "run the same command to continue from here" in self.said
                left = psutil.wait_procs(family, timeout=ENDS_SECONDS)[1]
                assert all(one.status() == psutil.STATUS_ZOMBIE for one in left), left
        return len(chosen) if victim == "worker" else int(bool(chosen))


def _is_worker(process: psutil.Process) -> bool:
    """Whether this is a Ray worker that is working, and not one of Ray's agents."""
    with contextlib.suppress(psutil.NoSuchProcess):
        name = " ".join(process.cmdline())
        return name.startswith("ray::") and not name.startswith("ray::IDLE") and "Agent" not in name
    return False


def newest(root: Path) -> int:
    """When the last result, checkpoint or shard of a sweep was written."""
    stamps = [0]
    for folder in WORK:
        for path in (root / "sweeps/tiny" / folder).rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                stamps.append(path.stat().st_mtime_ns)
    return max(stamps)


def harass(start: Start, kills: int, chance: random.Random) -> collections.Counter[str]:
    """Kills until the driver ends or there were enough kills; returns who was killed how often."""
    done: collections.Counter[str] = collections.Counter()
    where = "cluster" if start.nodes else "local"
    while done.total() < kills:
        if chance.random() < STARTING:
            if start.ends_in(chance.uniform(0, STARTS_SECONDS)):
                break
        elif not start.works() or start.ends_in(chance.uniform(0, WORKS_SECONDS)):
            break
        victim = chance.choice((AT_LAST if done.total() == kills - 1 else DURING)[where])
        done[victim] += start.kill(victim, kills - done.total(), chance)
        print(f"{time.monotonic() - BEGAN:.0f} s: {victim} ({where})", flush=True)
    return done


def damage_one(root: Path, chance: random.Random) -> str:
    """Damages a random file of what a killed sweep has left; returns which, and how."""
    sweep = root / "sweeps/tiny"
    paths = [path for of_kind in kinds(sweep).values() for path in of_kind] if sweep.is_dir() else []
    stores = [path for path in (root / "mlflow.db", root / "optuna/journal.log") if path.is_file()]
    if not paths:
        return "nothing"
    path = chance.choice(stores) if stores and chance.random() < STORES else sweep / chance.choice(paths)
    way = chance.choice(WAYS)
    way(path)
    return f"{path.relative_to(root)}, {way.__name__}"


def kill_at_random(
    root: Path, kills: int, chance: random.Random, log: Path, nodes: Nodes, damage: bool = False
) -> collections.Counter[str]:
    """Starts the sweep again and again until it succeeds; returns who was killed how often."""
    done: collections.Counter[str] = collections.Counter()
    turn = chance.random() < 0.5
    while True:
        turn = not turn
        left = kills - done.total()
        if damage and done:
            print(f"damaged: {damage_one(root, chance)}", flush=True)
        start = Start(root, log, nodes if turn else None)
        done += harass(start, min(left, chance.randint(*KILLS_A_START)), chance)
        assert start.ends_in(PATIENCE_SECONDS), "the sweep hangs:\n" + start.said
        if start.process.returncode == 0:
            return done
        if start.process.returncode > 0:
            _, found, sentence = start.said.rpartition("\nerror: ")
            assert found, start.said
            assert "Traceback" not in sentence, start.said


def check_equal(root: Path, calm: Path, damage: bool = False) -> None:
    """Checks for the tables of the sweep in the folder `calm` except times, one MLflow run per result and none RUNNING,
    no zombie in Optuna. What was damaged and made again has two runs, which differ in when they were started; where it
    was `start.json`, all of the sweep is told anew, and what a kill had left of the first telling stays KILLED."""
    sweep = root / "sweeps/tiny"
    found = tables(sweep)
    for name, expected in tables(calm).items():
        assert found[name] == expected, name
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=5000)
    newest = max((run for run in runs if run.info.run_name == "tiny"), key=lambda run: run.info.start_time)
    start = newest.data.tags["deltascope.key"].rpartition("#")[2]
    for run in runs:
        present = run.data.tags["deltascope.key"].endswith(f"#{start}")
        assert present or damage, "runs of an earlier start"
        assert run.info.status in ({"FINISHED"} if present else {"FINISHED", "KILLED"}), run.info.run_name
    keys = [run.data.tags["deltascope.key"] for run in runs]
    assert len(keys) == len(set(keys)), "two runs share a key"
    assert _results(sweep) == _results(calm)
    for sealed in sweep.glob("*/**/trial_*/files.json"):  # a seal with a file that is gone would undo the trial
        assert "checkpoint" not in sealed.read_text(), sealed
    trials = [key.rpartition("@")[0] for key in keys if key.startswith(("lora/", "deltas/"))]
    assert len(set(trials) if damage else trials) == len(_results(sweep))
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(root / "optuna" / "journal.log")))
    for name in optuna.get_all_study_names(storage):
        states = [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]
        assert TrialState.RUNNING not in states, f"a zombie in {name}"


def _results(sweep: Path) -> list[str]:
    """The group of each trial that ended. Trial numbers may differ: a trial left half drawn by a kill keeps its own."""
    found = [*sweep.glob("lora/trial_*/result.json"), *sweep.glob("deltas/layer_*/*/d*/trial_*/result.json")]
    return sorted(str(path.parent.parent.relative_to(sweep)) for path in found)


def chaos(place: Path, kills: int, seed: int, calm: Path | None = None, damage: bool = False) -> str:
    """Kills sweeps until there were `kills` kills; raises AssertionError if their tables are not those of `calm`, the
    folder of a sweep of the settings `SMALL` that was left alone, which is run first where none is given.

    Returns who was killed how often, in one line.
    """
    chance = random.Random(seed)
    if calm is None:
        alone = Start(place / "calm", place / "calm.log")
        assert alone.process.wait(PATIENCE_SECONDS) == 0, alone.said
        calm = place / "calm/sweeps/tiny"
    started = time.monotonic()
    done: collections.Counter[str] = collections.Counter()
    sweeps = 0
    with two_nodes(place) as nodes:
        while done.total() < kills:
            sweeps += 1
            root = place / f"killed_{sweeps}"
            done += kill_at_random(root, kills - done.total(), chance, root.with_suffix(".log"), nodes, damage)
            check_equal(root, calm, damage)
    listed = ", ".join(f"{victim} {count}" for victim, count in sorted(done.items()))
    seconds = time.monotonic() - started
    return f"seed {seed}: {done.total()} kills ({listed}) in {sweeps} sweeps, {seconds:.0f} s: the tables are equal"


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    kills: Annotated[int, typer.Option(min=1, help="Number of kills.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed for the moments and the victims.")] = 0,
    place: Annotated[Path | None, typer.Option(help="Folder for sweeps and logs; default: a temporary one.")] = None,
    damage: Annotated[bool, typer.Option("--damage", help="Also damage a file before each restart.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if place is not None:
            place.mkdir(parents=True)
        typer.echo(chaos(place or Path(folder), kills, seed, damage=damage))


if __name__ == "__main__":
    app()
