"""The walls between rooms, and the sizes that keep them readable, read off the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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
GROUND = {"jobs.errors", "jobs.files", "jobs.seals", "jobs.progress"}
"""Files of `jobs` that every room of it may use."""
INNER = {
    "jobs/cluster": {"jobs.cluster", *GROUND},
    "jobs/tracking": {"jobs.tracking", *GROUND},
    "jobs/search": {"jobs.search", "jobs.cluster", *GROUND},
    "jobs/study": {"jobs.study", "jobs.search", "jobs.tracking", "jobs.cluster", *GROUND},
    "jobs/commands": {"jobs.commands", "jobs.study", "jobs.tracking", "jobs.cluster", *GROUND},
    "evaluators/splice": {"evaluators.splice", "evaluators.conditions"},
    "evaluators/tables": {"evaluators.tables", "evaluators.conditions", "evaluators.layer_sets"},
    "evaluators/measures": {
        "evaluators.measures",
        "evaluators.splice",
        "evaluators.tables",
        "evaluators.conditions",
        "evaluators.layer_sets",
    },
    "evaluators/report": {
        "evaluators.report",
        "evaluators.tables",
        "evaluators.conditions",
        "evaluators.layer_sets",
    },
}
ONLY_IN = {
    "mlflow": {"jobs/tracking"},
    "optuna": {"jobs/search"},
    "ray.tune": {"jobs/search"},
    "ray": {"jobs/cluster", "jobs/search"},
}
WITHOUT_MODELS = ("evaluators/tables", "evaluators/report", "sites")
MOST_PARAMETERS = 7
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
COMMAND_LINES = ("jobs/cli", "benchmarks")
"""A command has a parameter for each option."""


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


def test_no_files_need_each_other() -> None:
    """Imports inside functions count too."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in sources(*OURS)}
    needs = {
        module: {one for one in modules for name in imports(path) if within(name, {one}) and one != module}
        for module, path in modules.items()
    }
    left = dict(needs)
    while free := [module for module, needed in left.items() if not needed & set(left)]:
        for module in free:
            del left[module]
    assert sorted(left) == []


def test_every_file_says_what_it_is() -> None:
    for path in sources(*OURS):
        assert ast.get_docstring(parsed(path)), path


def test_nothing_else_knows_of_the_reference_studys_task() -> None:
    """Any model pair can be looked at: the calculator is a data generator, a check and some presets."""
    others = [path for path in sources(*OURS) if not any(path.is_relative_to(REPOSITORY / room) for room in ITS_ROOMS)]
    templates = [path for folder in OURS for path in (REPOSITORY / folder).rglob("*.jinja")]
    assert templates
    assert [path for path in (*others, *templates) if THE_REFERENCE_TASK.search(path.read_text())] == []


def test_functions_carry_few_parameters() -> None:
    def crowded() -> Iterator[str]:
        for path in sources(*OURS, "benchmarks"):
            if any(path.is_relative_to(REPOSITORY / place) for place in COMMAND_LINES):
                continue
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                    if len([name for name in names if name not in ("self", "cls")]) > MOST_PARAMETERS:
                        yield f"{path}: {node.name}"

    assert list(crowded()) == []
