"""The command `deltascope`: the same program as `python -m jobs`, from any folder, whatever lies there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search_spaces.load import presets
from tests.end_to_end.conftest import SMALLEST, environment, run

COMMAND = Path(sys.executable).with_name("deltascope")


def deltascope(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    assert COMMAND.is_file(), "`make setup` installs it"
    settings = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(COMMAND), *arguments], env=settings, capture_output=True, text=True, timeout=1200, check=False, **options
    )


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A project of one's own: data, a package and a module with names that ours have too, and a check."""
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "trainers.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "my_checks.py").write_text("def is_good(input, target, generation):\n    return True\n")
    return tmp_path


def test_both_names_are_one_program() -> None:
    ours, module = deltascope("sweep", "--help"), run("sweep", "--help")
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout == module.stdout
    assert "Usage: deltascope sweep" in ours.stdout
    listed = ours.stdout.partition("a preset:")[2].partition(".")[0]
    assert sorted(re.findall(r"\w+", listed)) == presets()


def test_paths_are_those_of_the_current_folder_and_presets_are_found(elsewhere: Path) -> None:
    done = deltascope("plan", "tiny", "storage.root=runs", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs/models").is_dir()
    done = deltascope("plan", "mine.yaml", cwd=elsewhere)
    assert (done.returncode, "there is no settings file mine.yaml" in done.stderr) == (2, True)


def test_workers_find_our_code_and_checks_of_ones_own(elsewhere: Path) -> None:
    mine = "evaluate.behaviours.mine={python: 'my_checks:is_good'}"
    done = deltascope("sweep", "tiny", *SMALLEST, mine, "storage.root=runs", cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine_rate" in (elsewhere / "runs/sweeps/tiny/report/exp2A_metrics.csv").read_text()
