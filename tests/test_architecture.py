"""The walls between the top-level folders, read off the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = {"jobs", "search_spaces", "trainers", "evaluators", "models", "data"}
MAY_IMPORT = {
    "jobs": OURS,
    "search_spaces": {"search_spaces"},
    "trainers": {"trainers", "models", "data"},
    "evaluators": {"evaluators", "models", "data"},
    "models": {"models"},
    "data": {"data"},
}
SCHEDULERS = {"ray", "optuna", "mlflow"}


def imports(path: Path) -> set[str]:
    """Top-level names of every import of a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_rooms_import_only_what_they_may(folder: str) -> None:
    files = list((REPOSITORY / folder).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) & OURS <= MAY_IMPORT[folder], path


@pytest.mark.parametrize("folder", sorted(OURS - {"jobs"}))
def test_only_jobs_speaks_to_ray_optuna_and_mlflow(folder: str) -> None:
    for path in (REPOSITORY / folder).rglob("*.py"):
        assert not imports(path) & SCHEDULERS, path


def test_every_file_says_what_it_is() -> None:
    for folder in OURS:
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
