"""The web pages on a sweep's results: MLflow's, or Optuna's dashboard.

In: a storage root and a port. Out: a server on loopback until it is interrupted.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from jobs.errors import RequestError
from jobs.workspace import storage_root

HOST = "127.0.0.1"


def command(root: str, port: int, studies: bool) -> list[str]:
    """What to run; raises RequestError where there is nothing to show or the port is taken."""
    folder = storage_root(root)
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise RequestError(f"--port: {port} is in use on {HOST}; give another one")
    if studies:
        journal = folder / "optuna" / "journal.log"
        if not journal.is_file():
            raise RequestError(f"--root: no studies under {folder}; run a sweep first")
        program = os.path.join(os.path.dirname(sys.executable), "optuna-dashboard")
        return [program, "--host", HOST, "--port", str(port), str(journal)]
    database = folder / "mlflow.db"
    if not database.is_file():
        raise RequestError(f"--root: no tracked sweeps under {folder}; run a sweep first")
    store = f"sqlite:///{database.resolve()}"
    return [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", HOST, "--port", str(port)]


def serve(root: str, port: int, studies: bool = False) -> None:
    arguments = command(root, port, studies)
    print(f"http://{HOST}:{port} (Ctrl-C stops it)", flush=True)
    subprocess.run(arguments, check=False)
