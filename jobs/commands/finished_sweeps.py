"""Finds finished sweeps, on disk or in MLflow, and reads the settings and tables of their reports.

In: names of sweeps and storage roots, folders of sweeps, or experiments of a store. Out: `ComparedSweep`s, or one
sentence on what is missing or damaged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import yaml

from data.rows import one_line
from evaluators.tables.compared_sweeps import ComparedSweep, ReportTables, flat, from_metrics, from_tables
from jobs.context.workspace import SETTINGS, START, storage_root
from jobs.errors import RequestError, without_secrets
from jobs.files import MANIFEST, read_json, require

if TYPE_CHECKING:
    from jobs.tracking.reader import Reader

MOST_NAMES = 20
"""Maximum number of names in a message."""
TEXTS = ("target", "layer", "subset", "metric", "condition")
TABLES = {
    "gaps": ("target", "layer", "subset", "metric", "gap", "gap_low", "gap_high", "share", "n_examples"),
    "recovered": ("target", "layer", "subset", "metric", "condition", "recovered", "recovered_low", "recovered_high"),
    "exp2A_metrics": ("target", "layer", "subset", "condition", "mean_ce", "n_examples"),
    "few_features": ("subset", "k", "recovered"),
    "exp2B_metrics": ("target", "layer", "subset", "condition", "alpha", "mean_ce", "mean_ce_low", "mean_ce_high"),
}
"""The tables to read, and the columns that each must have."""
FULL = {
    "gaps": ("layer", "subset", "metric", "gap", "n_examples"),
    "recovered": ("layer", "subset", "metric", "condition"),
    "exp2A_metrics": ("layer", "subset", "condition", "mean_ce", "n_examples"),
    "few_features": ("subset", "k"),
    "exp2B_metrics": ("layer", "subset", "condition", "alpha", "mean_ce", "n_examples"),
}
"""Columns with a value in every row; a missing one means that the file is truncated."""
NEEDED = ("gaps", "recovered", "exp2A_metrics")
TRACKED = ("seed", "data", "model", "lora", "activations", "transcoders", "deltas")
"""The settings sections that MLflow has as parameters of a sweep's stages."""


class Sources(NamedTuple):
    """Where to look for sweeps: names or folders, storage roots, experiments, and MLflow's address (None for the roots'
    own)."""

    sweeps: Sequence[str]
    roots: Sequence[str]
    experiments: Sequence[str] = ()
    tracking: str | None = None


class SweepFolder(NamedTuple):
    """A sweep's name, its folder, and its `start`, which changes with `--fresh`."""

    name: str
    folder: Path
    start: str


class LoadedSweep(NamedTuple):
    """A sweep, notes on what was left out, and whether it only has the settings that MLflow has as parameters."""

    sweep: ComparedSweep
    notes: Sequence[str] = ()
    partly: bool = False


def read_sweeps(sources: Sources) -> tuple[list[ComparedSweep], list[str]]:
    """The requested sweeps, in order and with distinct names, and notes on what had to be left out.

    Raises RequestError for an unknown name, a sweep given twice or not finished, and unreadable files.
    """
    folders = [folder for name in sources.sweeps for folder in _folders(name, sources.roots)]
    duplicates = [
        sweep for index, sweep in enumerate(folders) if sweep.folder in [earlier.folder for earlier in folders[:index]]
    ]
    if duplicates:
        raise RequestError(
            f"the sweep {duplicates[0].name} in {duplicates[0].folder} is given twice; give each sweep once"
        )
    loaded = [LoadedSweep(from_folder(sweep.name, sweep.folder)) for sweep in folders]
    starts = {sweep.start: sweep.name for sweep in folders if sweep.start}
    for index, name in enumerate(sources.experiments):
        if name in sources.experiments[:index]:
            raise RequestError(f"--experiment: {name} is given twice; give each sweep once")
        loaded.append(_from_mlflow(name, sources, starts))
    if len(loaded) < 2:
        raise RequestError(
            f"a comparison needs at least two sweeps, got {len(loaded)}; give names, folders or --experiment"
        )
    sweeps = [entry.sweep for entry in loaded]
    names = [sweep.name for sweep in sweeps]
    sweeps = [
        _renamed(sweep, f"{sweep.name} ({sweep.where})") if names.count(sweep.name) > 1 else sweep for sweep in sweeps
    ]
    if any(entry.partly for entry in loaded):
        sweeps = [replace(sweep, settings=_tracked(sweep.settings)) for sweep in sweeps]
    return sweeps, [note for entry in loaded for note in entry.notes]


def _tracked(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.partition(".")[0] in TRACKED}


def _renamed(sweep: ComparedSweep, name: str) -> ComparedSweep:
    return replace(sweep, name=name, figures=sweep.figures.assign(sweep=name))


def _folders(name: str, roots: Sequence[str]) -> list[SweepFolder]:
    """The sweeps called `name`, one for each root that has it, or `name` itself if it is a folder."""
    plain = name not in ("", ".", "..") and "/" not in name
    places = [storage_root(root) / "sweeps" / name for root in roots] if plain else []
    folders = [folder for folder in dict.fromkeys(places) if folder.is_dir()]
    if not folders and name and (given_folder := Path(name).expanduser()).is_dir():
        folders = [given_folder.resolve()]
        if not (given_folder / SETTINGS).is_file():
            raise RequestError(f"{name} is not a sweep's folder: it has no {SETTINGS}; give ROOT/sweeps/NAME")
    if not folders:
        shown = " or ".join(str(storage_root(root)) for root in roots)
        names = sorted({path.parent.name for root in roots for path in storage_root(root).glob(f"sweeps/*/{SETTINGS}")})
        raise RequestError(f"there is no sweep {name!r} under {shown}, and no such folder; {_listed(names)}")
    return [SweepFolder(folder.name, folder.resolve(), _start(folder)) for folder in folders]


def _start(folder: Path) -> str:
    try:
        return (read_json(folder / START) or {}).get("start", "")
    except ValueError:
        return ""


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "there are none"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"there are: {', '.join(names[:MOST_NAMES])}{more}"


def from_folder(name: str, folder: Path) -> ComparedSweep:
    """A finished sweep from its folder."""
    report = folder / "report"
    key = (read_json(report / MANIFEST) or {}).get("key")
    if key in (None, "incomplete"):
        why = "is not finished" if key is None else "has trials or cells that failed"
        raise RequestError(f"the sweep {name} in {folder} {why}; run its `sweep` command again before comparing it")
    settings, tables = flat(read_settings(report / SETTINGS)), read_tables(report)
    require(report / SETTINGS, *(path for table in TABLES if (path := report / f"{table}.csv").is_file()))
    root = folder.parent.parent if folder.parent.name == "sweeps" else folder.parent
    return _compared(name, settings, tables, str(root))


def _remedy() -> str:
    """How to repair a report."""
    return "the sweep's `report` command rebuilds it"


def _compared(name: str, settings: dict[str, Any], tables: ReportTables, root: str) -> ComparedSweep:
    try:
        return from_tables(name, settings, tables, root)
    except ValueError as error:
        raise RequestError(_no_deltas(name, root, error)) from None


def _no_deltas(name: str, root: str, error: Exception) -> str:
    return f"the sweep {name} under {root} {error}; only sweeps with change among deltas.targets can be compared"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in `sweep.yaml`, resolved and nested; those of an earlier version need not fit the current schema.
    Raises RequestError if the file is damaged."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read as YAML ({one_line(error)}); {_remedy()}") from None
    if not isinstance(values, dict) or "seed" not in values:
        raise RequestError(f"{path} does not hold a sweep's settings; {_remedy()}")
    return values


def read_tables(report: Path) -> ReportTables:
    """The tables in a report's folder. Raises RequestError if a required one is missing, or any is damaged."""
    tables = {name: read_table(report / f"{name}.csv", name) for name in TABLES}
    for name in NEEDED:
        if tables[name] is None:
            raise RequestError(f"{report} has no {name}.csv; {_remedy()}")
    return ReportTables(*tables.values())  # type: ignore[arg-type]  # the required ones are not None


def read_table(path: Path, name: str) -> pd.DataFrame | None:
    """One table, or None if there is no file. Labels stay text, because one may be called `none`, `1` or `NA`."""
    if not path.is_file():
        return None
    remedy = _remedy()
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pd.errors.ParserError) as error:  # an empty file is a ValueError too
        raise RequestError(f"{path} cannot be read as a table ({one_line(error)}); {remedy}") from None
    if missing := [column for column in TABLES[name] if column not in table]:
        raise RequestError(f"{path} lacks the column {missing[0]}; {remedy}")
    numbers = [column for column in TABLES[name] if column not in TEXTS]
    wrong = [column for column in numbers if len(table) and not pd.api.types.is_numeric_dtype(table[column])]
    if wrong:
        raise RequestError(f"{path}: the column {wrong[0]} must hold numbers; {remedy}")
    if gaps := [column for column in FULL[name] if table[column].isna().any()]:
        raise RequestError(f"{path}: the column {gaps[0]} is empty in some rows, so the file is damaged; {remedy}")
    return table


def _from_mlflow(name: str, sources: Sources, starts: Mapping[str, str]) -> LoadedSweep:
    """A sweep from its own run in MLflow: with its tables if they can be downloaded, else only the run's figures."""
    store, address = _store_with(name, sources)
    run = store.last_finished(name)
    if run is None:
        raise RequestError(
            f"--experiment: the sweep {name} at {address} has no finished run; run its `sweep` command again"
        )
    if run.scope in starts:
        raise RequestError(f"--experiment: {name} is the sweep {starts[run.scope]} on disk; give each sweep once")
    notes, tables = [], None
    with tempfile.TemporaryDirectory() as folder:
        store.fetch(run.run, [SETTINGS, *(f"{table}.csv" for table in TABLES)], Path(folder))
        partly = not (Path(folder) / SETTINGS).is_file()
        try:
            settings = flat(run.settings if partly else read_settings(Path(folder) / SETTINGS))
            if all((Path(folder) / f"{table}.csv").is_file() for table in NEEDED):
                tables = read_tables(Path(folder))
        except RequestError as error:
            problem = str(error).partition(";")[0].replace(f"{folder}/", "")
            raise RequestError(f"--experiment: among the artifacts of {name} at {address}, {problem}") from None
    if partly:
        notes.append(f"{name}: MLflow lacks its evaluate and compute settings; they are not compared.")
    if tables is not None:
        return LoadedSweep(_compared(name, settings, tables, address), notes, partly)
    notes.append(
        f"{name}: its run's artifacts cannot be downloaded, so its knob, its rates and some intervals are left out."
    )
    try:
        return LoadedSweep(from_metrics(name, settings, run.metrics, address), notes, partly)
    except ValueError as error:
        raise RequestError(_no_deltas(name, address, error)) from None


def _store_with(name: str, sources: Sources) -> tuple[Reader, str]:
    """The store with that experiment, and its address for messages."""
    from jobs.tracking.reader import Reader

    uris = [sources.tracking] if sources.tracking else []
    for root in () if uris else sources.roots:
        if (database := storage_root(root) / "mlflow.db").is_file():
            uris.append(f"sqlite:///{database.resolve()}")
    if not uris:
        shown = " or ".join(str(storage_root(root)) for root in sources.roots)
        raise RequestError(f"--experiment: there is no mlflow.db under {shown}; give --tracking URI or --root")
    names: list[str] = []
    for uri in uris:
        reader = Reader(uri, "--tracking" if sources.tracking else "--root")
        if name in reader.sweeps:
            return reader, without_secrets(uri)
        names += reader.sweeps
    raise RequestError(
        f"--experiment: there is no sweep {name!r} at {without_secrets(' or '.join(uris))}; {_listed(names)}"
    )
