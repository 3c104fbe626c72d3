"""The web pages for a sweep's results: MLflow's UI, or Optuna's dashboard.

In: a storage root and a port. Out: a server on loopback that runs until interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile

from jobs.context.workspace import storage_root
from jobs.errors import RequestError, WorkFailed
from jobs.tracking.opening_view import pages
from jobs.tracking.reader import comparison

HOST = "127.0.0.1"


def command(root: str, port: int, studies: bool) -> list[str]:
    """The command to run; raises RequestError if there is nothing to show or the port is taken."""
    folder = storage_root(root)
    if listens(port):
        raise RequestError(f"--port: {port} is in use on {HOST}; choose another one")
    if studies:
        journal = folder / "optuna" / "journal.log"
        if not journal.is_file():
            raise RequestError(f"--root: no studies under {folder}; run a sweep first")
        program = os.path.join(os.path.dirname(sys.executable), "optuna-dashboard")
        return [program, "--host", HOST, "--port", str(port), str(journal)]
    if not (folder / "mlflow.db").is_file():
        raise RequestError(f"--root: no tracked sweeps under {folder}; run a sweep first")
    server = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", _store(root)]
    return [*server, "--host", HOST, "--port", str(port), "--workers", "1"]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def serve(root: str, port: int, studies: bool = False) -> None:
    arguments = command(root, port, studies)
    address = f"http://{HOST}:{port}"
    print(f"{address} (press Ctrl-C to stop)", flush=True)
    if not studies:
        for name, page in pages(_store(root)):
            print(f"  {name}: {address}{page}", flush=True)
        if (comparison_page := comparison(_store(root))) is not None:
            print(f"  all of them side by side: {address}{comparison_page}", flush=True)
    # MLflow's server would start a dozen processes for submitted jobs, but nothing submits jobs to it.
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile("w+") as log:  # dozens of lines of startup log, only useful on failure
        server = subprocess.Popen(
            arguments, env=quiet | dict(os.environ), start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status = server.wait()
        finally:  # the servers have child processes, which would keep the port
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()
        log.seek(0)
        if status:
            raise WorkFailed(f"the server has ended with status {status}:\n{log.read()[-2000:]}")


def _store(root: str) -> str:
    return f"sqlite:///{(storage_root(root) / 'mlflow.db').resolve()}"
