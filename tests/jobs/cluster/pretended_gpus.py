"""A cluster of one machine that pretends to have two GPUs: what workers and trials see of them.

    python -m tests.jobs.cluster.pretended_gpus FOLDER

In: an empty folder. Out: one line of JSON: for whole GPUs and for halves of them, how many workers fit, and of every
task and trial the device it was given, its process, and from when to when it ran.
"""

from __future__ import annotations

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

GPUS, SHORT = 2, 0.5
"""How many there are, and how many seconds a task takes: long enough that all workers have one at the same time."""


def task(number: int) -> dict[str, Any]:
    started = time.time()
    time.sleep(SHORT)
    device, process = os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()
    return {"device": device, "process": process, "started": started, "ended": time.time()}


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    return {**task(config["trial"]), "val_loss": config["x"], "step": 1}


def main(root: Path) -> None:
    ray.init(address="local", num_cpus=8, num_gpus=GPUS, include_dashboard=False, **cluster.QUIET)
    found = {}
    for part in (1.0, 0.5):
        share = cluster.share_of(Compute(gpus_per_trial=part))
        pool = Pool(share)
        tasks = [outcome.result for outcome in pool.run(task, range(2 * share.at_once))]
        pool.close()
        folder = root / str(part)
        space = {"x": Range(low=0.0, high=1.0)}
        groups = [Group(name, folder / name, space, 4, 1, {}, f"test/{name}") for name in ("one", "two")]
        runtime = Runtime(open_storage(None, folder), share, 1, folder / ".tune")
        with Progress().bar("trials", 8, "trials") as bar:
            run_search(groups, trial, runtime, early_stopping=None, bar=bar)
        trials = [result["figures"] for group in groups for result in trials_of(group)]
        found[str(part)] = {"at_once": share.at_once, "tasks": tasks, "trials": trials}
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
