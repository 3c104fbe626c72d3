"""The engine's overhead on top of training and evaluation, compared with plain tools; each comparison is one run.

    python -m benchmarks.engine trials [--trials 200]
    python -m benchmarks.engine cells [--cells 10000]
    python -m benchmarks.engine workers [quickstart storage.root=mlruns]
    python -m benchmarks.engine outside [quickstart storage.root=mlruns]

In: numbers of trials or cells, or a finished sweep's settings. Out: prints one comparison. `trials`: seconds that a
short trial takes beyond its own time, with our search and tracking, with Ray Tune as in its documentation (defaults,
MLflowLoggerCallback), and with Optuna alone on joblib processes. `cells`: trivial cells per second through the fan-out
and as bare Ray tasks. `workers`: behaviour cells of a finished sweep on one worker and on two, one thread each.
`outside`: the fraction of a finished sweep's wall time in which all workers were idle, that is, nothing was trained,
captured, merged or evaluated.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cluster import connection as cluster
from jobs.cluster import environment

environment.prepare()

TRAINER_SECONDS = 0.05
"""Seconds that a short trial takes before each report."""
REPORTS = 3

app = typer.Typer(add_completion=False)


def loss_of(lr: float, step: int) -> float:
    return (lr - 0.3) ** 2 + 1 / step


def our_trial(config: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    for step in range(1, REPORTS + 1):
        time.sleep(TRAINER_SECONDS)
        report({"step": step, "val_loss": loss_of(config["lr"], step)})
    return {"val_loss": loss_of(config["lr"], REPORTS)}


@app.command()
def trials(number: Annotated[int, typer.Option("--trials")] = 200) -> None:
    with _ray() as share, tempfile.TemporaryDirectory() as folder:
        slots = share.at_once
        seconds = {}
        for name, run in (("ours", _ours), ("Ray Tune", _plain_tune), ("Optuna, joblib", _optuna)):
            run(Path(folder) / name.replace(" ", "_") / "warm", 2 * slots, share)
            started = time.perf_counter()
            run(Path(folder) / name.replace(" ", "_") / "timed", number, share)
            seconds[name] = (time.perf_counter() - started) * slots / number - REPORTS * TRAINER_SECONDS
    typer.echo(f"{number} trials of {REPORTS * TRAINER_SECONDS:.2f} s, {slots} at once; extra seconds per trial:")
    for name, over in seconds.items():
        typer.echo(f"  {name:<16} {over:.3f} s   {over / seconds['ours']:.2f}x ours")


def _ours(folder: Path, number: int, share: cluster.Share) -> None:
    from jobs.progress import Progress
    from jobs.search.grouped import Runtime, run_search
    from jobs.search.studies import Group, open_storage
    from jobs.tracking.writer import Record, Tracker
    from search_spaces.dimensions import Range

    folder.mkdir(parents=True)
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", "engine", folder / "artifacts")
    tracker.open("search", "search")
    group = Group(
        "one", folder / "one", {"lr": Range(low=0.0, high=1.0)}, number, 0, {}, "engine/one", sampler="random"
    )

    def track(group: Group, result: dict[str, Any]) -> None:
        name = f"trial_{result['trial']:04d}"
        facts = {key: result[key] for key in ("history", "started", "seconds", "params")}
        tracker.record(Record(f"search/{name}", name, "search", metrics=result["figures"], **facts))

    with Progress().bar("search", number, "trials") as bar:
        run_search(
            [group],
            our_trial,
            Runtime(open_storage(None, folder), share, 1, folder / "scratch"),
            early_stopping=None,
            bar=bar,
            on_trial=track,
        )
    tracker.finish()
    assert len(list((folder / "one").glob("trial_*/result.json"))) == number


def _plain_tune(folder: Path, number: int, share: cluster.Share) -> None:
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    folder.mkdir(parents=True)

    def train(config: dict[str, Any]) -> None:
        our_trial(config, lambda values: tune.report(values))

    logger = MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", experiment_name="engine")
    tuner = tune.Tuner(
        train,
        param_space={"lr": tune.uniform(0.0, 1.0)},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", num_samples=number),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder), callbacks=[logger], verbose=0),
    )
    assert not tuner.fit().errors


def _optuna(folder: Path, number: int, share: cluster.Share) -> None:
    from joblib import Parallel, delayed

    folder.mkdir(parents=True)
    counts = [number // share.at_once + (index < number % share.at_once) for index in range(share.at_once)]
    Parallel(n_jobs=share.at_once)(delayed(optimise)(str(folder / "journal.log"), count) for count in counts)


def optimise(journal: str, count: int) -> None:
    """Runs some trials of a study that several processes share."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(journal))
    study = optuna.create_study(
        storage=storage, study_name="engine", load_if_exists=True, sampler=optuna.samplers.RandomSampler()
    )

    def objective(trial: optuna.Trial) -> float:
        config = {"lr": trial.suggest_float("lr", 0.0, 1.0)}
        return our_trial(config, lambda values: trial.report(values["val_loss"], values["step"]))["val_loss"]

    study.optimize(objective, n_trials=count)


def nothing(task: int) -> int:
    return task


@app.command()
def cells(number: Annotated[int, typer.Option("--cells")] = 10_000) -> None:
    import ray

    from jobs.cluster.fanout import Pool

    with _ray() as share:
        bare = ray.remote(num_cpus=1)(nothing)
        ray.get([bare.remote(task) for task in range(100)])
        pool = Pool(share)
        list(pool.run(nothing, range(100)))
        started = time.perf_counter()
        results = sorted(
            outcome.result for outcome in pool.run(nothing, range(number), affinity=lambda task: task // 8)
        )
        ours = number / (time.perf_counter() - started)
        pool.close()
        started = time.perf_counter()
        expected = ray.get([bare.remote(task) for task in range(number)])
        plain = number / (time.perf_counter() - started)
    assert results == expected
    typer.echo(
        f"{number} cells: {ours:.0f} per second through the fan-out, {plain:.0f} as bare Ray tasks: {ours / plain:.2f}x"
    )


@app.command()
def workers(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
    above: Annotated[int, typer.Option(help="Lowest layer to compute cells for.")] = 18,
) -> None:
    from jobs.cluster.fanout import Pool
    from jobs.context.context import Context
    from jobs.evaluation.behaviour import Behaviour
    from jobs.evaluation.kinds import evaluate
    from jobs.evaluation.work import PlanInputs
    from search_spaces.load import load

    name, *overrides = config or ["quickstart"]
    context = Context(load(name, overrides))
    with _ray() as share, tempfile.TemporaryDirectory() as folder:
        seconds = {}
        for count in (1, 2):
            place = Path(folder) / str(count)
            shutil.copytree(context.space.generations, place / "generations", ignore=_all_but_raw)
            works = [
                replace(work, shared=replace(work.shared, cells=str(place / "cells")))
                for work in Behaviour.plan(PlanInputs(context))
                if len(work.sites) == 1 and work.sites[0].site.layer >= above
            ]
            works.sort(key=lambda work: work.sites[0].site.layer)
            pool = Pool(cluster.Share(1, share.gpus, count))
            list(pool.run(evaluate, works[:1] * count))  # loads the model
            started = time.perf_counter()
            outcomes = list(pool.run(evaluate, works, affinity=lambda work: work.affinity))
            seconds[count] = time.perf_counter() - started
            pool.close()
            assert not any(outcome.error for outcome in outcomes), outcomes
        written = [sorted((Path(folder) / str(count) / "cells").iterdir()) for count in seconds]
        assert [path.name for path in written[0]] == [path.name for path in written[1]]
    typer.echo(f"{len(written[0])} cells, a thread per worker: one took {seconds[1]:.1f} s, two {seconds[2]:.1f} s")
    typer.echo(f"two over one: {seconds[1] / seconds[2]:.2f}x")


@app.command()
def outside(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
) -> None:
    from jobs.context.context import Context
    from jobs.context.workspace import TIMELINE
    from jobs.files import MANIFEST, read_json
    from jobs.sweep.stage_list import STAGES
    from search_spaces.load import load

    name, *overrides = config or ["quickstart"]
    context = Context(load(name, overrides))
    folder = context.space.folder
    tasks = [json.loads(line) for line in (folder / TIMELINE).read_text().splitlines()]
    for pattern in ("lora/trial_*/result.json", "deltas/layer_*/*/d*/trial_*/result.json"):
        tasks += [read_json(path) for path in folder.glob(pattern)]
    work = [(task["started"], task["started"] + task["seconds"]) for task in tasks]
    total = spent = 0.0
    for stage in STAGES:
        path = stage.folder(context) / MANIFEST
        seconds = (read_json(path) or {})["seconds"]
        begun = path.stat().st_mtime - seconds
        busy = covered([(max(start, begun), min(end, begun + seconds)) for start, end in work])
        total, spent = total + seconds, spent + seconds - busy
        typer.echo(f"  {stage.name:<12} {seconds:8.1f} s   workers idle for {seconds - busy:6.1f} s of it")
    typer.echo(f"workers were idle for {spent:.1f} of {total:.1f} s: {spent / total:.1%}")


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end); a span that ends before it starts is empty."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _all_but_raw(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("raw_")]


@contextmanager
def _ray() -> Iterator[cluster.Share]:
    from search_spaces.schema import Compute

    cluster.connect(None)
    try:
        yield cluster.share_of(Compute())
    finally:
        cluster.disconnect()


if __name__ == "__main__":
    app()
