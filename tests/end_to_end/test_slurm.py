"""The Slurm script on a fake one-node Slurm: `scontrol` and `srun` act on this machine, but what they start is real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPOSITORY, SMALLEST, environment, free_port, read

SCRIPT = REPOSITORY / "deploy" / "slurm.sh"


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node."""
    tools = tmp_path / "slurm"
    tools.mkdir()
    # srun: drop the options; the rest is the command.
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    (tools / "scontrol").write_text('#!/bin/bash\necho "$3"\n')
    (tools / "hostname").write_text("#!/bin/bash\necho 127.0.0.1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        **environment(),
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_CPUS_ON_NODE": "2",
        "RAY_PORT": str(free_port()),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def test_a_job_brings_ray_up_runs_the_sweep_and_leaves_nothing(allocation: dict[str, str], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray") as session:  # its sockets need a short path
        done = subprocess.run(
            ["bash", str(SCRIPT), "tiny", f"storage.root={tmp_path / 'runs'}", *SMALLEST],
            env={**allocation, "RAY_TMPDIR": session},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "sweeps" / "tiny" / "report" / "report.html").is_file()
    assert read(tmp_path / "runs" / "sweeps" / "tiny" / "start.json")
    assert not list(REPOSITORY.glob(".ray-token.*")), "the token goes with the job"
    left = subprocess.run(
        ["pgrep", "-f", f"port={allocation['RAY_PORT']}"], capture_output=True, text=True, check=False
    )
    assert left.stdout == "", "and so does Ray"


def test_the_signal_before_the_time_limit_stops_the_sweep_cleanly(allocation: dict[str, str], tmp_path: Path) -> None:
    """Slurm sends it to the batch shell alone."""
    with tempfile.TemporaryDirectory(prefix="ray") as session:
        job = subprocess.Popen(
            ["bash", str(SCRIPT), "tiny", f"storage.root={tmp_path / 'runs'}", *SMALLEST],
            env={**allocation, "RAY_TMPDIR": session},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert job.stdout is not None
        said = ""
        for line in job.stdout:
            said += line
            if "] lora" in line:
                job.send_signal(signal.SIGINT)
        assert job.wait(timeout=120) != 0, said
    assert "stopped; run the same command to continue from here" in said
    assert not list(REPOSITORY.glob(".ray-token.*"))


def test_it_prints_its_usage(allocation: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=allocation, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
