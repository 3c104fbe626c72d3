"""A graph that the command `graph` wrote, in circuit-tracer's own viewer, where what that needs can be downloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser.conftest import PICTURES
from tests.end_to_end.conftest import REPOSITORY


@pytest.mark.timeout(900)
def test_circuit_tracers_viewer_shows_a_graph_of_ours(finished, jobs, tmp_path: Path) -> None:
    asked = ("graph", "tiny", f"storage.root={finished[0]}", "--prompt", "What is 12 plus 30?", "--out", str(tmp_path))
    made = jobs(*asked)
    assert made.returncode == 0, made.stdout + made.stderr
    (folder,) = tmp_path.glob("*.circuit-tracer")
    assert f"circuit-tracer start-server --graph_file_dir {folder}" in made.stdout

    PICTURES.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.compatibility.check_viewer", str(folder)]
    picture = PICTURES / "circuit-tracers-viewer.png"
    done = subprocess.run(
        [*command, "--picture", str(picture)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "could not be tried" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.stdout.count(": pass\n") == 7, done.stdout
