"""Three tiers of tests: `make test` runs the quick ones, CI those that are expected to take a minute at most, and
`make test-all` all of them. The summary says what was left out: long tests with why they take long.

In: the marker `long("why")` on a test or a module, with about how many `minutes` it takes where it is one or more; and
`durations.json`, the seconds of all cases of a test together, as the last `make durations` measured them. Out: the
tests' order, what goes to a worker together, and lines at the end of a run that left some of them out. The longest
start first, each by itself, and the short ones come last, file by file, so that no core waits at the end. A worker of
xdist collects and its controller prints, so each worker passes on what it has left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

EVERYTHING = float("inf")
NOTED_SECONDS = 0.5
"""Tests whose cases take less than this together are not in `durations.json`."""
SWEEPS = {"finished", "seeds"}
"""Fixtures that are whole sweeps, which take minutes; the tests that read them are quick."""
_DURATIONS = Path(__file__).with_name("durations.json")
_LEFT_OUT: Counter[tuple[str, str]] = Counter()
"""Tests by their file and the reason."""
_SECONDS: defaultdict[str, float] = defaultdict(float)
"""What each test has taken in this run, over all its cases."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--most-minutes",
        type=float,
        default=EVERYTHING,
        help="leave out the tests marked `long` that take more minutes than this; 0 leaves out all of them",
    )
    parser.addoption(
        "--most-seconds",
        type=float,
        default=EVERYTHING,
        help="leave out other tests too if all their cases together took more seconds, or if they read a whole sweep",
    )
    parser.addoption("--note-durations", action="store_true", help="write what the tests take to durations.json")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("long")
        if marker is not None and not (len(marker.args) == 1 and isinstance(marker.args[0], str)):
            raise pytest.UsageError(f'{item.nodeid}: a long test says why: @pytest.mark.long("...")')
        if marker is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    minutes, seconds = config.option.most_minutes, config.option.most_seconds
    known = json.loads(_DURATIONS.read_text()) if seconds < EVERYTHING else {}

    def reason(item: pytest.Item) -> str:
        """Why a test is left out; empty if it is not."""
        if _longest(item) > minutes:
            return item.get_closest_marker("long").args[0]
        if seconds < EVERYTHING and SWEEPS & set(getattr(item, "fixturenames", ())):
            return "each reads a whole sweep"
        slow = known.get(_function(item.nodeid), 0.0) > seconds
        return f"each takes more than {seconds:g} seconds" if slow else ""

    reasons = [(item, reason(item)) for item in items]
    left_out = [item for item, why in reasons if why]
    items[:] = [item for item, why in reasons if not why]
    items.sort(key=_minutes, reverse=True)  # which leaves the order of the short ones
    for item, why in reasons:
        if why:
            _LEFT_OUT[item.nodeid.partition("::")[0] if _longest(item) > minutes else "", why] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest 9.2 and xdist 3.8 together lose the groups without a word: every worker then sets all files up."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("this pytest does not let xdist see the groups of tests")


def _longest(item: pytest.Item) -> float:
    return max((one.kwargs.get("minutes", 0.5) for one in item.iter_markers("long")), default=0.0)


def _minutes(item: pytest.Item) -> float:
    """Of a short test none; but those marked as `early` come first, and those that read the shared sweep last, so that
    no worker waits for it. Of the tests that need the shared seeds, only the longest is among the first, for the same
    reason."""
    reads = getattr(item, "fixturenames", ())
    of_short = 0.1 if item.get_closest_marker("early") else -0.1 if "finished" in reads else 0.0
    minutes = _longest(item) or of_short
    return minutes - 1.2 if "seeds" in reads and 0.5 < minutes < 5 else minutes


def _function(nodeid: str) -> str:
    """A test without its case, and without the group that xdist appends."""
    return re.sub(r"@tests/\S+$", "", nodeid).partition("[")[0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _SECONDS[_function(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.option.note_durations and not hasattr(session.config, "workerinput"):
        noted = {name: round(taken, 1) for name, taken in sorted(_SECONDS.items()) if taken >= NOTED_SECONDS}
        _DURATIONS.write_text(json.dumps(noted, indent=0) + "\n")
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = [[*where, count] for where, count in _LEFT_OUT.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for file, why, count in getattr(node, "workeroutput", {}).get("left_out", []):
        _LEFT_OUT[file, why] = count  # every worker collects the same


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section(f"left out: {_LEFT_OUT.total()} tests (`make test-all` runs all)")
        for (file, why), count in sorted(_LEFT_OUT.items()):
            terminalreporter.line(f"{file or 'other tests'}: {count}, {why}")
