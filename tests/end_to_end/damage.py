"""Damages files of a finished sweep: each must be named and made again, and no table may change.

    python -m tests.end_to_end.damage [--root FOLDER]

In: the storage root of a finished sweep of the tiny preset's smaller settings, which is run first where none is given.
Out: one line that counts what was tried, mended and not noticed. Of every kind of file one is taken, kinds being the
paths with their numbers left out, and each is cut, garbled, emptied and deleted; the kinds of a folder at once, but
lists and manifests, whose damage keeps others from being named, by themselves.
"""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import typer

from tests.end_to_end.conftest import SMALL, run, together

LOGS = {".lock", "timeline.jsonl", "sweep.yaml", "versions.json", ".progress.json"}
"""What every run writes anew, or only adds to; no result is read from there."""
TIMES = re.compile(r"seconds|started")


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def garbled(path: Path) -> None:
    """Bytes in the middle are others, as after a disk's error."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for place in range(middle, min(middle + 8, len(data))):
        data[place] ^= 0x15
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def deleted(path: Path) -> None:
    path.unlink()


WAYS: tuple[Callable[[Path], None], ...] = (cut, garbled, emptied, deleted)


class Tried(NamedTuple):
    """One damaged file, and how."""

    path: Path
    way: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.path}, {self.way.__name__}"


def kinds(sweep: Path) -> dict[str, list[Path]]:
    """The files of a sweep by kind, within its folder; cells differ by the first word, what is in a report by how the
    name ends."""
    found: dict[str, list[Path]] = {}
    for path in sorted(sweep.rglob("*")):
        shown = path.relative_to(sweep)
        if path.is_file() and path.name not in LOGS:
            kind = re.sub(r"\d+(\.\d+)?", "N", str(shown))
            kind = re.sub(r"^((?:cells|generations)/[a-z]+)_.*(\.\w+)$", r"\1\2", kind)
            kind = re.sub(r"^report/.*?((?:files|manifest)?\.\w+)$", r"report/\1", kind)
            found.setdefault(kind, []).append(shown)
    return found


def is_cache(path: Path) -> bool:
    return bool({"activations", "residual"} & set(path.parts))


def tables(sweep: Path) -> dict[str, str]:
    """The report's tables, without times."""
    return {path.name: _table(path) for path in sorted((sweep / "report").glob("*.csv"))}


def _table(path: Path) -> str:
    table = pd.read_csv(path, dtype=str) if path.stat().st_size > 1 else pd.DataFrame()
    return table[[name for name in table if not TIMES.search(str(name))]].to_csv()


def copied(root: Path, to: Path) -> Path:
    """A copy of a storage root, whose runs in MLflow are its own."""
    shutil.copytree(root, to)
    store = sqlite3.connect(to / "mlflow.db")
    for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
        store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(root), str(to)))
    store.commit()
    store.close()
    return to


def check_mended(sweep: Path, tried: list[Tried], asked: tuple[str, ...]) -> None:
    """Damages a sweep's files in these ways, and runs `verify`, `sweep` and `verify`."""
    expected = tables(sweep)
    for one in tried:
        one.way(sweep / one.path)
    before, mended, after = together(("verify", *asked), ("sweep", *asked), ("verify", *asked))
    said = "\n".join(part for one in (before, mended, after) for part in (one.stdout, one.stderr))
    assert "Traceback" not in said, said
    assert before.returncode == 1, f"{tried}: {said}"
    assert mended.returncode == 0, f"{tried}: {said}"
    assert after.returncode == 0, f"{tried}: {said}"
    for one in tried:
        cached = is_cache(one.path)
        assert cached or str(one.path) in before.stdout, f"verify does not name {one}: {said}"
        assert cached or str(one.path) in mended.stdout, f"sweep does not name {one}: {said}"
    assert tables(sweep) == expected, f"{tried}: the tables have changed"


def rounds(sweep: Path, chance: random.Random) -> Iterator[list[Tried]]:
    """Every kind of file in every way, the kinds of a folder at once."""
    every = kinds(sweep)
    folders = sorted({kind.partition("/")[0] for kind in every})
    for way in WAYS:
        for folder in folders:
            here = [chance.choice(paths) for kind, paths in every.items() if kind.partition("/")[0] == folder]
            here = [path for path in here if not (is_cache(path) and way is deleted)]  # they may be deleted for space
            lists = [path for path in here if len(path.parts) == 2 and path.name in ("files.json", "manifest.json")]
            yield from ([Tried(path, way)] for path in lists)
            if rest := [Tried(path, way) for path in here if path not in lists]:
                yield rest


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    root: Annotated[Path | None, typer.Option(help="The storage root of a finished sweep; it stays as it is.")] = None,
    seed: Annotated[int, typer.Option(help="Which files are taken.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory(prefix="damage") as folder:
        place = Path(folder)
        if root is None:
            root = place / "whole"
            done = run("sweep", "tiny", f"storage.root={root}", *SMALL)
            assert done.returncode == 0, done.stdout + done.stderr
        files, wrong = 0, 0
        every = list(rounds(root / "sweeps/tiny", random.Random(seed)))
        for number, tried in enumerate(every, start=1):
            own = copied(root, place / "own")
            try:
                check_mended(own / "sweeps/tiny", tried, ("tiny", f"storage.root={own}", *SMALL))
            except AssertionError as error:
                wrong += 1
                typer.echo(str(error), err=True)
            shutil.rmtree(own)
            files += len(tried)
            typer.echo(f"round {number} of {len(every)}: {len(tried)} files such as {tried[0]}", err=True)
        typer.echo(f"{files} files damaged in {len(every)} rounds: {len(every) - wrong} mended, {wrong} not")
        raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    app()
