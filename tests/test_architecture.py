"""The walls between rooms and the depth of each, read off the source."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = {"jobs", "search_spaces", "trainers", "evaluators", "models", "data", "sites"}
MAY_IMPORT = {
    "jobs": OURS,
    "search_spaces": {"search_spaces", "sites", "trainers", "evaluators"},
    "trainers": {"trainers", "models", "data", "sites"},
    "evaluators": {"evaluators", "models", "data", "sites"},
    "models": {"models", "sites", "data"},
    "data": {"data"},
    "sites": {"sites"},
}
PURE = {"trainers.settings", "evaluators.conditions"}
"""Files of other rooms that the settings follow from; they import nothing heavy."""
GROUND = {"jobs.errors", "jobs.files", "jobs.progress"}
"""Files of `jobs` that every room of it may use."""
ROOMS_OF_A_STUDY = {
    *("jobs.context", "jobs.capture", "jobs.evaluation", "jobs.search", "jobs.tracking", "jobs.cluster"),
    *GROUND,
}
INNER = {
    "jobs/cluster": {"jobs.cluster", *GROUND},
    "jobs/tracking": {"jobs.tracking", *GROUND},
    "jobs/search": {"jobs.search", "jobs.cluster", *GROUND},
    "jobs/context": {"jobs.context", "jobs.search", "jobs.tracking", "jobs.cluster", *GROUND},
    "jobs/capture": {"jobs.capture", "jobs.context", *GROUND},
    "jobs/evaluation": {"jobs.evaluation", "jobs.capture", "jobs.context", *GROUND},
    "jobs/sweep": {"jobs.sweep", *ROOMS_OF_A_STUDY},
    "jobs/commands": {"jobs.commands", "jobs.sweep", *ROOMS_OF_A_STUDY},
    "evaluators/splice": {"evaluators.splice", "evaluators.conditions"},
    "evaluators/tables": {"evaluators.tables", "evaluators.conditions"},
    "evaluators/measures": {
        "evaluators.measures",
        "evaluators.splice",
        "evaluators.tables",
        "evaluators.conditions",
    },
    "evaluators/report": {"evaluators.report", "evaluators.tables", "evaluators.conditions"},
}
ONLY_IN = {
    "mlflow": {"jobs/tracking"},
    "optuna": {"jobs/search"},
    "ray.tune": {"jobs/search"},
    "ray": {"jobs/cluster", "jobs/search"},
}
WITHOUT_MODELS = ("evaluators/tables", "evaluators/report", "sites")
MOST_FLOORS = 8
"""Files in the longest chain of imports within one room."""
THE_REFERENCE_TASK = re.compile(
    r"calculator|tool_call(?!s\b)|tool_ood|math_correct|copy_exact|CALL_OPEN|CALL_CLOSE|\"tool\""
)
"""Its tags, labels and names; `tool_calls` is a field of any chat model's messages."""
ITS_ROOMS = (
    "data/requests",
    "data/shapes.py",  # names the role of a tool in chats
    "evaluators/measures/calculator.py",
    "evaluators/measures/behaviours.py",  # holds the check `calculator`, one function among others
)


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert files
    return files


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Full names of every import of a file, those inside functions too: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_rooms_import_only_what_they_may(folder: str) -> None:
    for path in sources(folder):
        assert {name.split(".")[0] for name in imports(path)} & OURS <= MAY_IMPORT[folder], path


def test_settings_follow_from_pure_files() -> None:
    for path in sources("search_spaces"):
        ours = {name for name in imports(path) if within(name, OURS - {"search_spaces", "sites"})}
        assert {name for name in ours if not within(name, PURE)} == set(), path


@pytest.mark.parametrize("room", sorted(INNER))
def test_inner_rooms_import_only_what_they_may(room: str) -> None:
    house = room.split("/")[0]
    for path in sources(room):
        ours = {name for name in imports(path) if within(name, {house})}
        assert {name for name in ours if not within(name, INNER[room])} == set(), path


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_each_library_has_its_room(library: str) -> None:
    for path in sources(*OURS):
        if not any(path.is_relative_to(REPOSITORY / room) for room in ONLY_IN[library]):
            assert {name for name in imports(path) if within(name, {library})} == set(), path


@pytest.mark.parametrize("room", WITHOUT_MODELS)
def test_tables_and_reports_never_see_a_model(room: str) -> None:
    for path in sources(room):
        assert {name for name in imports(path) if within(name, {"torch", "transformers", "models"})} == set(), path


@cache
def needs() -> dict[str, set[str]]:
    """The modules that each module imports, those inside functions too."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in sources(*OURS)}
    return {
        module: {other for other in modules for name in imports(path) if within(name, {other}) and other != module}
        for module, path in modules.items()
    }


def test_no_files_need_each_other() -> None:
    left = dict(needs())
    while free := [module for module, needed in left.items() if not needed & set(left)]:
        for module in free:
            del left[module]
    assert sorted(left) == []


def room_of(module: str) -> str:
    """A folder of `jobs` or `evaluators` with all that is in it, or one of the other packages."""
    package, *inner, _ = module.split(".")
    return f"{package}/{inner[0]}" if inner and package in ("jobs", "evaluators") else package


def test_rooms_are_shallow() -> None:
    """A reader of any file reaches the ground of its room in few steps."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        below = [chain(other) for other in needs()[module] if room_of(other) == room_of(module)]
        return (module, *max(below, key=len, default=()))

    longest: dict[str, tuple[str, ...]] = {}
    for module in needs():
        room = room_of(module)
        longest[room] = max(longest.get(room, ()), chain(module), key=len)
    deep = {room: " -> ".join(found) for room, found in longest.items() if len(found) > MOST_FLOORS}
    assert deep == {}


def test_every_file_says_what_it_is() -> None:
    for path in sources(*OURS):
        assert ast.get_docstring(parsed(path)), path


def test_nothing_else_knows_of_the_reference_studys_task() -> None:
    """Any model pair can be looked at: the calculator is a data generator, a check and some presets."""
    others = [path for path in sources(*OURS) if not any(path.is_relative_to(REPOSITORY / room) for room in ITS_ROOMS)]
    templates = [path for folder in OURS for path in (REPOSITORY / folder).rglob("*.jinja")]
    assert templates
    assert [path for path in (*others, *templates) if THE_REFERENCE_TASK.search(path.read_text())] == []
