"""Runs one trial, or other work, on several workers as a Ray Train job, which reports to Tune if Tune started it.

In: a module-level function `train(config, report)` and its configuration, including the number of workers. Out: what
the function returns on the first worker.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cluster import environment
from jobs.files import read_json, write_json

OUTCOME = "outcome.json"
"""File to which the first worker writes the outcome."""
Train = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]


def train_together(train: Train, config: dict[str, Any], retries: int | None = None) -> dict[str, Any]:
    """Runs `train` on `config["workers"]` workers, each with `config["resources"]`. Outside Tune, which retries its own
    trials, pass `retries`: how often to start again after a worker dies."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = Path(config["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _as_worker,
        train_loop_config={"train": train, "config": config},
        scaling_config=ScalingConfig(
            num_workers=config["workers"], use_gpu=config["device"] == "cuda", resources_per_worker=config["resources"]
        ),
        run_config=RunConfig(
            name=".train",
            storage_path=str(folder),
            callbacks=[TuneReportCallback()] if retries is None else [],  # type: ignore[list-item]
            failure_config=FailureConfig(max_failures=retries or 0),
        ),
    )
    trainer.fit()
    shutil.rmtree(folder / ".train", ignore_errors=True)
    outcome = read_json(folder / OUTCOME)
    (folder / OUTCOME).unlink()
    return outcome


def _as_worker(task: dict[str, Any]) -> None:
    """What each worker runs; the first one writes the outcome to the trial's folder."""
    environment.prepare()
    import ray.train

    outcome = task["train"](task["config"], lambda figures: ray.train.report(dict(figures)))
    if ray.train.get_context().get_world_rank() == 0:
        write_json(Path(task["config"]["folder"]) / OUTCOME, outcome)
