"""The same settings with several seeds: a sweep for each, one after the other on one cluster, and their comparison.

In: settings, overrides and seeds. Out: the sweeps NAME-s0, NAME-s1, ... and the page that compares them.

They share what does not depend on the seed: Ray, which starts once; the un-finetuned model under `models/` in the
storage root (except `tiny-gemma2`, whose random weights differ by seed); an adopted whole finetuned model, which is
used in place; published base transcoders; and the databases of Optuna and MLflow. Everything else depends on the seed
through the rows: each seed draws and splits its own, so it has its own adapter, activations, trained bases and deltas.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Sequence

from data.rows import DataError
from jobs.cluster import connection as cluster
from jobs.commands.compare import Sources, as_page, compare, page_path, show, write
from jobs.context.context import Context
from jobs.errors import RequestError, WorkFailed
from jobs.progress import Progress
from jobs.sweep.sweep import run_sweep
from models.errors import ModelError
from search_spaces.load import load
from search_spaces.schema import Sweep

REFUSED = (RequestError, ModelError, DataError)


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers; raises RequestError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch("[0-9]+", part)]
    if len(seeds) < len(parts) or len(set(seeds)) < len(seeds):
        raise RequestError(f"--seeds: got {text!r}, must be distinct whole numbers, 0 or larger, such as 0,1,2")
    return seeds


def settings_of(config: str, overrides: Sequence[str], seeds: str) -> list[Sweep]:
    """The settings of each seed's sweep; raises RequestError for wrong seeds, SettingsError for wrong settings."""
    seed_overrides = [override for override in overrides if override.partition("=")[0].strip() == "seed"]
    if seed_overrides:
        raise RequestError(f"--seeds: got {seeds!r} together with {seed_overrides[0]}; give one of the two")
    numbers, name = parse_seeds(seeds), load(config, [*overrides]).name
    return [load(config, [*overrides, f"name={name}-s{seed}", f"seed={seed}"]) for seed in numbers]


def run_seeds(sweeps: Sequence[Sweep], *, address: str | None, insecure: bool, fresh: bool) -> None:
    """Runs the sweeps and compares those that finished. One that fails does not stop the others.

    Raises the first sweep's error if the requests of all are invalid, WorkFailed at the end if some failed.
    """
    progress = Progress()
    contexts = [Context(settings, progress, address, insecure, keeps_cluster=True) for settings in sweeps]
    for context in contexts:
        context.check_request()
    failed: dict[int, Exception] = {}
    try:
        for index, context in enumerate(contexts, start=1):
            seed = context.settings.seed
            progress.line(f"seed {seed}, {index} of {len(contexts)}")
            try:
                run_sweep(context, fresh=fresh)
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise  # the others would not fit either
                if not isinstance(error, (*REFUSED, WorkFailed)):
                    traceback.print_exc()
                failed[seed] = error
                progress.line(f"seed {seed} failed: {error}")
    finally:
        if any("share" in vars(context) for context in contexts):
            cluster.disconnect()
    if len(failed) == len(contexts) and all(isinstance(error, REFUSED) for error in failed.values()):
        raise next(iter(failed.values()))
    _compare([context for context in contexts if context.settings.seed not in failed], progress)
    if failed:
        reasons = "\n  ".join(f"seed {seed}: {str(error).splitlines()[0]}" for seed, error in failed.items())
        raise WorkFailed(
            f"{len(failed)} of {len(contexts)} seeds failed; the same command continues them:\n  {reasons}"
        )


def _compare(contexts: Sequence[Context], progress: Progress) -> None:
    """Shows the comparison of the finished sweeps, if there are several with change deltas."""
    if len(contexts) < 2:
        return
    root = contexts[0].settings.storage.root
    try:
        comparison = compare(Sources([str(context.space.folder) for context in contexts], [root]))
    except RequestError as error:
        progress.line(f"no comparison: {error}")
        return
    show(comparison, progress.console)
    progress.line(f"comparison: {write(page_path(root, comparison), as_page(comparison), 'storage.root')}")
