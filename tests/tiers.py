"""Three tiers of tests by what each took when `make durations` last measured them: `make test` runs those of three
seconds at most, CI those of a minute, and `make test-all` all of them. A test that was never measured belongs to every
tier.

In: `--most-seconds`, and `durations.json`, the seconds of each case of a test without its wait for a shared sweep. Out:
the order of the tests, what goes to a worker together, and a list of what was left out. The longest start first, each
by itself, and the short ones come last, file by file, so that no core waits at the end.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

EVERYTHING = float("inf")
NOTED_SECONDS = 0.5
"""Tests that take less are not in `durations.json`."""
ALONE_SECONDS = 10
"""A test that takes longer may run on another worker than the rest of its file, unless it uses what the module's tests
share, which another worker would have to make once more."""
SWEEPS = ("finished", "seeds")
"""Fixtures that are whole sweeps, made once for all workers."""
_DURATIONS = Path(__file__).with_name("durations.json")
_LEFT_OUT: Counter[str] = Counter()
"""Tests left out, by file."""
_SECONDS: defaultdict[str, float] = defaultdict(float)
"""What each test has taken in this run."""
_WAITED = [0.0]
"""Seconds that this process has spent on shared sweeps so far."""


@contextmanager
def not_counted() -> Iterator[None]:
    """Time spent here is not counted as a test's own: whichever test comes first makes what all of them share."""
    start = time.monotonic()
    try:
        yield
    finally:
        _WAITED[0] += time.monotonic() - start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--most-seconds",
        type=float,
        default=EVERYTHING,
        help="leave out tests that took more seconds; below 60, also those that read a whole sweep",
    )
    parser.addoption("--note-durations", action="store_true", help="write what the tests take to durations.json")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known: dict[str, float] = json.loads(_DURATIONS.read_text())
    limit = config.option.most_seconds

    def seconds(item: pytest.Item) -> float:
        return known.get(_name(item.nodeid), 0.0)

    left_out = [item for item in items if seconds(item) > limit or (limit < 60 and _sweeps(item))]
    _LEFT_OUT.update(item.nodeid.partition("::")[0] for item in left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    kept = [item for item in items if item not in set(left_out)]
    for item in kept:
        together = seconds(item) <= ALONE_SECONDS or _shares(item)
        if together and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    # One test of each shared sweep alone is among the first, so that the sweep is made early. Its other readers come
    # after the tests that need none, so that no worker waits.
    first = {sweep: max((i for i in kept if _sweeps(i) == {sweep}), key=seconds, default=None) for sweep in SWEEPS}

    def order(item: pytest.Item) -> tuple[int, float]:
        alone = seconds(item) if seconds(item) > ALONE_SECONDS else 0.0
        if item in first.values():
            return (0, -alone)
        return ((1 if alone else 3) + bool(_sweeps(item)), -alone)

    items[:] = sorted(kept, key=order)


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest 9.2 and xdist 3.8 together lose the groups without a word: every worker then sets all files up."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("this pytest does not let xdist see the groups of tests")


def _sweeps(item: pytest.Item) -> set[str]:
    return set(SWEEPS) & set(getattr(item, "fixturenames", ()))


def _shares(item: Any) -> bool:
    """Whether a test uses a fixture that is made once a module."""
    made = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
    return any(fixture.scope == "module" for fixtures in made for fixture in fixtures)


def _name(nodeid: str) -> str:
    """A test without the group that xdist appends."""
    return re.sub(r"@(tests/\S+|pages of servers)$", "", nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    before = _WAITED[0]
    try:
        return (yield)
    finally:
        item.user_properties.append(("waited", _WAITED[0] - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    waited = dict(report.user_properties).get("waited", 0.0) if report.when == "setup" else 0.0
    _SECONDS[_name(report.nodeid)] += report.duration - waited


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.note_durations and not hasattr(session.config, "workerinput"):
        noted = {name: round(taken, 1) for name, taken in sorted(_SECONDS.items()) if taken >= NOTED_SECONDS}
        _DURATIONS.write_text(json.dumps(noted, indent=0) + "\n")
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _LEFT_OUT.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - _LEFT_OUT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section(f"left out as they take longer: {_LEFT_OUT.total()} tests (`make test-all` runs all)")
        for file, count in sorted(_LEFT_OUT.items()):
            terminalreporter.line(f"{file}: {count}")
