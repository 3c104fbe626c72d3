"""The exports in the real SAELens and circuit-tracer, where those can be installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.end_to_end.conftest import REPOSITORY


@pytest.mark.timeout(1500)
def test_other_libraries_compute_what_we_compute() -> None:
    command = [sys.executable, "-m", "tests.compatibility.check_exports"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    missing = [line for line in done.stdout.splitlines() if "could not be installed" in line]
    if missing:
        pytest.skip("; ".join(missing))
    assert "pass" in done.stdout
