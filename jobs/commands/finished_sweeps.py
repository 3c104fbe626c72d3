"""Finds finished sweeps, on disk or in MLflow, and reads the settings and tables that their reports left.

In: names of sweeps and storage roots, folders of sweeps, or experiments of a store. Out: `ComparedSweep`s; what is
missing or damaged is one sentence.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import yaml

from evaluators.tables.compared_sweeps import ComparedSweep, ReportTables, flat, from_metrics, from_tables
from jobs.context.workspace import SETTINGS, START, storage_root
from jobs.errors import RequestError, without_secrets
from jobs.files import MANIFEST, read_json
from jobs.seals import require

if TYPE_CHECKING:
    from jobs.tracking.reader import Reader

MOST_NAMES = 20
"""Names that a message lists."""
TEXTS = ("target", "layer", "subset", "metric", "condition")
TABLES = {
    "gaps": ("target", "layer", "subset", "metric", "gap", "gap_low", "gap_high", "share", "n_examples"),
    "recovered": ("target", "layer", "subset", "metric", "condition", "recovered", "recovered_low", "recovered_high"),
    "exp2A_metrics": ("target", "layer", "subset", "condition", "mean_ce", "n_examples"),
    "few_features": ("subset", "k", "recovered"),
    "exp2B_metrics": ("target", "layer", "subset", "condition", "alpha", "mean_ce", "mean_ce_low", "mean_ce_high"),
}
"""The tables that are read, and the columns that each must have."""
FULL = {
    "gaps": ("layer", "subset", "metric", "gap", "n_examples"),
    "recovered": ("layer", "subset", "metric", "condition"),
    "exp2A_metrics": ("layer", "subset", "condition", "mean_ce", "n_examples"),
    "few_features": ("subset", "k"),
    "exp2B_metrics": ("layer", "subset", "condition", "alpha", "mean_ce", "n_examples"),
}
"""Columns with a value in every row: one without is from a file that ends too early."""
NEEDED = ("gaps", "recovered", "exp2A_metrics")
TRACKED = ("seed", "data", "model", "lora", "activations", "transcoders", "deltas")
"""The sections that MLflow keeps as parameters of a sweep's stages."""


class Sources(NamedTuple):
    """Where sweeps are looked for: names or folders, storage roots, experiments, and MLflow's address (None: the roots'
    own)."""

    sweeps: Sequence[str]
    roots: Sequence[str]
    experiments: Sequence[str] = ()
    tracking: str | None = None


class Found(NamedTuple):
    """A sweep's name, its folder, and the `start` that tells it from the one before `--fresh`."""

    name: str
    folder: Path
    start: str


class Read(NamedTuple):
    """A sweep, what had to be left out of it, and whether its settings are only those that MLflow keeps as
    parameters."""

    sweep: ComparedSweep
    notes: Sequence[str] = ()
    partly: bool = False


def read_sweeps(sources: Sources) -> tuple[list[ComparedSweep], list[str]]:
    """The sweeps asked for, in order, under names that tell them apart, and notes on what had to be left out.

    Raises RequestError for a name that is not there, a sweep given twice or not finished, and files that cannot be
    read.
    """
    folders = [found for name in sources.sweeps for found in _folders(name, sources.roots)]
    twice = [one for place, one in enumerate(folders) if one.folder in [other.folder for other in folders[:place]]]
    if twice:
        raise RequestError(f"the sweep {twice[0].name} in {twice[0].folder} is given twice; give each sweep once")
    read = [Read(from_folder(one.name, one.folder)) for one in folders]
    starts = {one.start: one.name for one in folders if one.start}
    for place, name in enumerate(sources.experiments):
        if name in sources.experiments[:place]:
            raise RequestError(f"--experiment: {name} is given twice; give each sweep once")
        read.append(_from_mlflow(name, sources, starts))
    if len(read) < 2:
        raise RequestError(
            f"a comparison takes two sweeps or more, got {len(read)}: give names, folders or --experiment"
        )
    sweeps = [one.sweep for one in read]
    names = [sweep.name for sweep in sweeps]
    sweeps = [_renamed(one, f"{one.name} ({one.where})") if names.count(one.name) > 1 else one for one in sweeps]
    if any(one.partly for one in read):
        sweeps = [replace(one, settings=_tracked(one.settings)) for one in sweeps]
    return sweeps, [note for one in read for note in one.notes]


def _tracked(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.partition(".")[0] in TRACKED}


def _renamed(sweep: ComparedSweep, name: str) -> ComparedSweep:
    return replace(sweep, name=name, figures=sweep.figures.assign(sweep=name))


def _folders(name: str, roots: Sequence[str]) -> list[Found]:
    """The sweeps of that name, one for each root that has it, or the folder that `name` is."""
    plain = name not in ("", ".", "..") and "/" not in name
    places = [storage_root(root) / "sweeps" / name for root in roots] if plain else []
    folders = [folder for folder in dict.fromkeys(places) if folder.is_dir()]
    if not folders and name and (given := Path(name).expanduser()).is_dir():
        folders = [given.resolve()]
        if not (given / SETTINGS).is_file():
            raise RequestError(f"{name} is not a sweep's folder: it has no {SETTINGS}; give ROOT/sweeps/NAME")
    if not folders:
        shown = " or ".join(str(storage_root(root)) for root in roots)
        names = sorted({path.parent.name for root in roots for path in storage_root(root).glob(f"sweeps/*/{SETTINGS}")})
        raise RequestError(f"there is no sweep {name!r} under {shown}, and no such folder; {_listed(names)}")
    return [Found(one.name, one.resolve(), _start(one)) for one in folders]


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
    where = folder.parent.parent if folder.parent.name == "sweeps" else folder.parent
    return _compared(name, settings, tables, str(where))


def _again(report: Path) -> str:
    """What mends a report."""
    return "the sweep's `report` command makes it again"


def _compared(name: str, settings: dict[str, Any], tables: ReportTables, where: str) -> ComparedSweep:
    try:
        return from_tables(name, settings, tables, where)
    except ValueError as error:
        raise RequestError(_no_deltas(name, where, error)) from None


def _no_deltas(name: str, where: str, error: Exception) -> str:
    return f"the sweep {name} under {where} {error}; a comparison takes sweeps with change among deltas.targets"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of `sweep.yaml` as it stores them, resolved and nested; an earlier version's need not fit today's
    schema. Raises RequestError where the file is damaged."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(
            f"{path} cannot be read as YAML ({_short(error)}); {_again(path.parent / 'report')}"
        ) from None
    if not isinstance(values, dict) or "seed" not in values:
        raise RequestError(f"{path} does not hold a sweep's settings; {_again(path.parent / 'report')}")
    return values


def read_tables(report: Path) -> ReportTables:
    """The tables in a report's folder; raises RequestError where one that is needed is missing, or any is damaged."""
    found = {name: read_table(report / f"{name}.csv", name) for name in TABLES}
    for name in NEEDED:
        if found[name] is None:
            raise RequestError(f"{report} has no {name}.csv; {_again(report)}")
    return ReportTables(*found.values())  # type: ignore[arg-type]  # of which the needed ones are there


def read_table(path: Path, name: str) -> pd.DataFrame | None:
    """One table, None where there is no such file. A label may be called `none`, `1` or `NA`, so labels stay text."""
    if not path.is_file():
        return None
    again = _again(path.parent)
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pd.errors.ParserError) as error:  # an empty file is a ValueError too
        raise RequestError(f"{path} cannot be read as a table ({_short(error)}); {again}") from None
    if missing := [column for column in TABLES[name] if column not in table]:
        raise RequestError(f"{path} lacks the column {missing[0]}; {again}")
    numbers = [column for column in TABLES[name] if column not in TEXTS]
    wrong = [column for column in numbers if len(table) and not pd.api.types.is_numeric_dtype(table[column])]
    if wrong:
        raise RequestError(f"{path}: the column {wrong[0]} must hold numbers; {again}")
    if gaps := [column for column in FULL[name] if table[column].isna().any()]:
        raise RequestError(f"{path}: the column {gaps[0]} is empty in some rows, so the file is damaged; {again}")
    return table


def _from_mlflow(name: str, sources: Sources, starts: Mapping[str, str]) -> Read:
    """A sweep from its own run in MLflow: its tables if the artifacts can be had, else the run's figures alone."""
    store, shown = _store_with(name, sources)
    run = store.last_finished(name)
    if run is None:
        raise RequestError(
            f"--experiment: the sweep {name} at {shown} has no finished run; run its `sweep` command again"
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
            what = str(error).partition(";")[0].replace(f"{folder}/", "")
            raise RequestError(f"--experiment: of the artifacts of {name} at {shown}, {what}") from None
    if partly:
        notes.append(f"{name}: MLflow has no evaluate and compute settings of it; they are not compared.")
    if tables is not None:
        return Read(_compared(name, settings, tables, shown), notes, partly)
    notes.append(
        f"{name}: the artifacts of its run cannot be had, so its knob, its rates and some intervals are left out."
    )
    try:
        return Read(from_metrics(name, settings, run.metrics, shown), notes, partly)
    except ValueError as error:
        raise RequestError(_no_deltas(name, shown, error)) from None


def _store_with(name: str, sources: Sources) -> tuple[Reader, str]:
    """The store that has that experiment, and how it is shown."""
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


def _short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "it is no JSON"
    return " ".join(str(error).split())[:200] or type(error).__name__
