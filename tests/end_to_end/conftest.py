"""Whole commands in their own processes, as a user runs them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sites import KINDS, Site, sites_label

REPOSITORY = Path(__file__).resolve().parents[2]
Jobs = Callable[..., subprocess.CompletedProcess[str]]
PR_SET_PDEATHSIG = 1

SMALL = (
    "lora.trials=2",
    "lora.steps=4",
    "lora.asha=false",
    "deltas.layers=[1, 2]",
    "deltas.sites=[mlp]",
    "deltas.d_new=[4]",
    "deltas.percentiles=[0.25]",
    "transcoders.target_l0=[4]",
    "evaluate.alphas=[0.0, 1.0]",
    "evaluate.sets=[all]",
    "evaluate.controls=[dense_delta, pca_delta]",
    "evaluate.cards=2",
    "evaluate.groups=0",
    "evaluate.graphs=0",
    "compute.max_concurrent=1",
)
"""The tiny preset with fewer groups, for tests that run it several times; a worker takes longer to start than to work,
so one of them does it all. No trial is stopped early, which may depend on which of two is faster."""
SMALLEST = (
    *SMALL,
    "lora.trials=1",
    "lora.steps=2",
    "deltas.targets=[change]",
    "deltas.layers=[1]",
    "deltas.sites=[mlp]",
    "deltas.trials=1",
)
"""One trial of everything there must be, for tests that only need a whole study."""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "TUNE_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


def run(*arguments: str, timeout: float = 1200, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", *arguments]
    settings: dict[str, Any] = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True} | options
    return subprocess.run(command, timeout=timeout, check=False, **settings)


def together(*commands: Sequence[str], env: dict[str, str] | None = None) -> list[subprocess.CompletedProcess[str]]:
    """What each of these commands of `python -m jobs` gets, one after the other in a process that imports them once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.many_requests"],
        input=json.dumps(commands),
        cwd=REPOSITORY,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=1200,
        check=True,
    )
    answers = json.loads(done.stdout)
    return [subprocess.CompletedProcess(*one) for one in zip(commands, *zip(*answers, strict=True), strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(root: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs `python -m jobs ui` while it is needed: its address and its process."""
    port = free_port()
    command = [sys.executable, "-m", "jobs", "ui", "--root", str(root), "--port", str(port), *options]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/"), process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20):
            return True
    except OSError:
        return False


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[Any] | None = None, seconds: float = 300) -> None:
    """Fails if `process` ends before."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert process is None or process.poll() is None, "the process ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


class MlflowServer:
    """A real `mlflow server` on a database, which can be killed and started again; it ends with this process."""

    def __init__(self, store: str, artifacts: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--workers", "1", "--artifacts-destination", str(artifacts)]
        self._variables = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env={**environment(), **self._variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=ends_with_us,
        )
        wait_until(lambda: answers(f"{self.url}/health"), self.process)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def ends_with_us() -> None:
    """For a child that starts: Linux sends it SIGINT when this process ends, were it killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def of_every_kind(layers: Sequence[int]) -> str:
    """What tables call the set of all sites in these layers."""
    return sites_label(Site(layer, kind) for layer in layers for kind in KINDS.values())


EVERY = of_every_kind(range(4))
"""Of all sites of the tiny preset."""


def read(path: Path) -> Any:
    return json.loads(path.read_text())
