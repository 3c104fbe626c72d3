"""A cluster of one machine that pretends to have two GPUs: what workers and trials see of them.

    python -m tests.jobs.cluster.pretended_gpus FOLDER

In: an empty folder. Out: one line of JSON: for whole GPUs and for halves of them, how many workers fit, and of every
task and trial the device it was given, its process, and from when to when it ran.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray

from jobs.cluster import connection as cluster
from jobs.cluster.fanout import Pool
from jobs.progress import Progress
from jobs.search.grouped import Runtime, run_search
from jobs.search.studies import Group, open_storage, trials_of
from search_spaces.dimensions import Range
from search_spaces.schema import Compute

GPUS, SHORT, LONG = 2, 0.2, 120.0
"""How many there are, how many seconds a task takes at least, and how many it waits for the other workers at most."""


def task(number: int, workers: Path, at_once: int) -> dict[str, Any]:
    """Waits until all workers have a task: on a busy machine the first could end all of them before the next starts."""
    started, device, process = time.time(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()
    (workers / str(process)).touch()
    while len(list(workers.iterdir())) < at_once and time.time() < started + LONG:
        time.sleep(0.05)
    time.sleep(SHORT)
    return {"device": device, "process": process, "started": started, "ended": time.time()}


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    seen = task(config["trial"], Path(config["workers"]), config["at_once"])
    return {**seen, "val_loss": config["x"], "step": 1}


def main(root: Path) -> None:
    ray.init(address="local", num_cpus=8, num_gpus=GPUS, include_dashboard=False, **cluster.QUIET)
    found = {}
    for part in (1.0, 0.5):
        share = cluster.share_of(Compute(gpus_per_trial=part))
        folder, at_once = root / str(part), share.at_once
        of_tasks, of_trials = folder / "of_tasks", folder / "of_trials"
        for workers in (of_tasks, of_trials):
            workers.mkdir(parents=True)
        pool = Pool(share)
        wait = functools.partial(task, workers=of_tasks, at_once=at_once)
        tasks = [outcome.result for outcome in pool.run(wait, range(2 * at_once))]
        pool.close()
        space = {"x": Range(low=0.0, high=1.0)}
        constants = {"workers": str(of_trials), "at_once": at_once}
        groups = [Group(name, folder / name, space, 4, 1, constants, f"test/{name}") for name in ("one", "two")]
        runtime = Runtime(open_storage(None, folder), share, 1, folder / ".tune")
        with Progress().bar("trials", 8, "trials") as bar:
            run_search(groups, trial, runtime, early_stopping=None, bar=bar)
        trials = [result["figures"] for group in groups for result in trials_of(group)]
        found[str(part)] = {"at_once": at_once, "tasks": tasks, "trials": trials}
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
