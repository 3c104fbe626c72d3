"""The Ray cluster a sweep runs on: its own on this machine, or one that is there.

In: an address and what one unit of work needs. Out: a running Ray and how many units fit at once.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import environment
from jobs.errors import RequestError
from search_spaces.schema import Compute

REPOSITORY = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 * 2**20
"""Results travel as files; only small messages go through the object store."""
CONNECT_SECONDS = 5.0
NOT_UPLOADED = [".git", ".venv", "mlruns", "**/__pycache__", "*.log", ".mypy_cache", ".ruff_cache", ".pytest_cache"]


@dataclass(frozen=True)
class Share:
    """What one trial or worker gets."""

    cpus: int
    gpus: float
    at_once: int

    @property
    def resources(self) -> dict[str, float]:
        if not self.cpus:
            return {"memory": 1}  # a byte, because Tune takes no empty request
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}

    def of_several(self, workers: int) -> Share:
        """Of trials that only start workers, each of which takes this share; raises RequestError where they do not
        fit."""
        if workers == 1:
            return self
        if workers > self.at_once:
            raise RequestError(
                f"lora.workers_per_trial: got {workers}, the cluster has room for {self.at_once} at once"
            )
        return Share(0, 0.0, self.at_once // workers)


def connect(address: str | None) -> None:
    """Starts Ray on this machine (loopback only), or joins the cluster at `address`.

    Inside a submitted job the job's own cluster is joined. Raises RequestError where the address does not answer.
    """
    address = address or environment.cluster_address() or "local"
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        environment.take_signals()
        return
    check_answers(address)
    in_job = "runtime_resources" in Path.cwd().parts
    runtime = {} if in_job else {"working_dir": str(REPOSITORY), "excludes": NOT_UPLOADED}
    try:
        ray.init(address=address, runtime_env=runtime, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise RequestError(f"--address: no Ray cluster answers at {address} ({_first_line(error)})") from None
    environment.take_signals()


def disconnect() -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.shutdown()


def share_of(compute: Compute) -> Share:
    """How the cluster is divided; raises RequestError where not even one unit fits."""
    import ray

    have = ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 0)), have.get("GPU", 0.0)
    each = compute.gpus_per_trial if compute.gpus_per_trial is not None else (1.0 if gpus else 0.0)
    at_once = cpus // compute.cpus_per_trial
    if each:
        at_once = min(at_once, int(gpus / each))
    if at_once < 1:
        raise RequestError(
            f"compute: a trial asks for {compute.cpus_per_trial} CPUs and {each:g} GPUs, "
            f"the cluster has {cpus} CPUs and {gpus:g} GPUs"
        )
    if compute.precision == "tf32" and not each:
        raise RequestError(
            "compute.precision: got tf32, which takes a GPU for each trial; allowed here: auto, fp32, bf16"
        )
    return Share(compute.cpus_per_trial, each, min(at_once, compute.max_concurrent or at_once))


def check_answers(address: str) -> None:
    """A TCP connection within seconds, so that a wrong address does not hang for Ray's own minutes."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise RequestError(
            f"--address: got {address}; a search cannot run through Ray Client: start the command on a node of the "
            "cluster with auto or HOST:PORT, or submit it with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RequestError(f"--address: {address!r} is not auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RequestError(f"--address: no Ray cluster answers at {address} ({error})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
