"""Three tiers of tests: `make test` runs the short ones, CI those that are expected to take a minute at most, and
`make test-all` all of them. The summary says which were left out, and why each takes long.

In: the marker `long("why")` on a test or a module, with about how many `minutes` it takes where it is one or more. Out:
the tests' order, what goes to a worker together, and lines at the end of a run that left some of them out. The longest
start first, each by itself, and the short ones come last, file by file, so that no core waits at the end. A worker of
xdist collects and its controller prints, so each worker passes on what it has left out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

EVERYTHING = float("inf")
_LEFT_OUT: Counter[tuple[str, str]] = Counter()
"""Tests by their file and the reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--most-minutes",
        type=float,
        default=EVERYTHING,
        help="leave out the tests marked `long` that take more minutes than this; 0 leaves out all of them",
    )


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("long")
        if marker is not None and not (len(marker.args) == 1 and isinstance(marker.args[0], str)):
            raise pytest.UsageError(f'{item.nodeid}: a long test says why: @pytest.mark.long("...")')
        if marker is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    most = config.option.most_minutes
    left_out = [item for item in items if _longest(item) > most]
    items[:] = [item for item in items if _longest(item) <= most]
    items.sort(key=_minutes, reverse=True)  # which leaves the order of the short ones
    for item in left_out:
        marker = item.get_closest_marker("long")
        _LEFT_OUT[item.nodeid.partition("::")[0], marker.args[0]] += 1
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


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = [[*where, count] for where, count in _LEFT_OUT.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for file, why, count in getattr(node, "workeroutput", {}).get("left_out", []):
        _LEFT_OUT[file, why] = count  # every worker collects the same


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section(f"left to `make test-all`: {_LEFT_OUT.total()} tests")
        for (file, why), count in sorted(_LEFT_OUT.items()):
            terminalreporter.line(f"{file}: {count}, {why}")
