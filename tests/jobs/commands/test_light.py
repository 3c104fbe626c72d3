"""What only reads results starts at once: no library of the models is imported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "pandas", "ray", "mlflow", "optuna", "matplotlib"}


@pytest.mark.parametrize("module", ["jobs.cli", "jobs.commands.status", "search_spaces.load", "trainers.settings"])
def test_nothing_heavy_is_imported(module: str) -> None:
    asked = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert module in done.stdout.split()
    assert HEAVY & set(done.stdout.split()) == set()
