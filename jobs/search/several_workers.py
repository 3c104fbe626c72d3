"""One trial, or another piece of work, on several workers: a Ray Train job, whose reports reach Tune if there is one.

In: a module-level function `train(config, report)`, and its configuration, which says how many workers share it. Out:
what the function returns on the first worker.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cluster import environment
from jobs.files import read_json, write_json

OUTCOME = "outcome.json"
"""Where the workers of a trial leave its outcome."""
Train = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]


def train_together(train: Train, config: dict[str, Any], retries: int | None = None) -> dict[str, Any]:
    """Runs `train` on `config["workers"]` workers, each with `config["resources"]`; where no trial of Tune does the
    retrying, once more for each of `retries` if one dies."""
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


def _as_worker(given: dict[str, Any]) -> None:
    """What each worker runs; the first one writes the outcome to the trial's folder."""
    environment.prepare()
    import ray.train

    outcome = given["train"](given["config"], lambda figures: ray.train.report(dict(figures)))
    if ray.train.get_context().get_world_rank() == 0:
        write_json(Path(given["config"]["folder"]) / OUTCOME, outcome)
