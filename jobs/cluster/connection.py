"""The Ray cluster of a sweep: one started on this machine, or an existing one.

In: an address and the resources of one unit of work. Out: a running Ray, and the number of units that fit at once.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.cluster import environment, raylet_watch
from jobs.cluster.address import LOCAL, Address, check, chosen
from jobs.errors import RequestError, WorkFailed, first_line
from search_spaces.schema import Compute

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 256 * 2**20
"""Results travel as files; only small messages go through the object store."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
STORAGE_SECONDS = 60.0
NOT_UPLOADED = [".git", ".venv", "mlruns", "**/__pycache__", "*.log", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
NOT_UPLOADED += [".ray-token.*"]  # written here by a Slurm job while it runs
_watches: list[raylet_watch.Watch] = []
"""Watches over the raylet of this driver, while it is connected."""


@dataclass(frozen=True)
class Share:
    """What one trial or worker gets."""

    cpus: int
    gpus: float
    at_once: int

    @property
    def resources(self) -> dict[str, float]:
        if not self.cpus:
            return {"memory": 1}  # one byte, because Tune accepts no empty request
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}

    def of_several(self, workers: int, setting: str) -> Share:
        """The share of a trial that itself needs nothing but starts `workers` workers with this share each. Raises
        RequestError, naming `setting`, if they do not fit."""
        if workers == 1:
            return self
        if 0 < self.gpus < 1:
            raise RequestError(
                f"{setting}: got {workers}, but processes that exchange gradients need whole GPUs, and "
                f"compute.gpus_per_trial is {self.gpus:g}"
            )
        if workers > self.at_once:
            raise RequestError(f"{setting}: got {workers}, but the cluster only has room for {self.at_once} at once")
        return Share(0, 0.0, self.at_once // workers)


def connect(address: str | None, insecure: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
    """Starts Ray on this machine (loopback only), or joins the cluster at `address` or, with a message, at RAY_ADDRESS.

    Inside a submitted job, joins the job's own cluster. Raises RequestError if the address does not answer, or if
    others can use the cluster without a token and `insecure` does not allow that; WorkFailed if Ray does not start
    here. If this machine's raylet dies later, the process ends.
    """
    cluster = chosen(address)
    import ray

    if ray.is_initialized():
        return
    try:
        if cluster.joins:
            _join(cluster)
            if cluster.source == environment.ADDRESS:
                say(f"  joined the Ray cluster at {cluster.value}, which the variable {environment.ADDRESS} names")
        else:
            _start()
        environment.install_stop_handlers()
    except (KeyboardInterrupt, SystemExit):  # Ray raises SystemExit on a SIGTERM while it starts
        environment.acknowledge_stop()
        disconnect()
        raise KeyboardInterrupt from None
    except Exception:
        disconnect()
        raise
    if cluster.joins and not _in_job() and not insecure:
        try:
            check_closed(ray.get_runtime_context().gcs_address, cluster)
        except RequestError:
            disconnect()
            raise


def _in_job() -> bool:
    """Whether this is a submitted job, which runs in a copy of the repository."""
    return "runtime_resources" in Path.cwd().parts


def _start() -> None:
    import ray

    _watches.append(raylet_watch.Watch(raylet_watch.child))
    try:
        ray.init(address=LOCAL, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **QUIET)
    except Exception as error:  # Ray has no specific class for this
        raise WorkFailed(
            f"Ray did not start on this machine ({first_line(error)}); run the same command again"
        ) from None


def _join(address: Address) -> None:
    import ray

    check(address)
    runtime = {} if _in_job() else {"working_dir": str(REPOSITORY), "excludes": NOT_UPLOADED}
    try:
        ray.init(address=address.value, runtime_env=runtime, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise address.refusal(
            f"no Ray cluster answers at {address.value} ({first_line(error)})", "start the cluster"
        ) from None
    node_id = ray.get_runtime_context().get_node_id()
    (socket_name,) = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == node_id]
    _watches.append(raylet_watch.Watch(partial(raylet_watch.at, socket_name)))


def check_closed(gcs: str, address: Address | None = None) -> None:
    """Raises RequestError if anyone on the network can use the control store at HOST:PORT: it is not on loopback, and
    no token is needed to join. `address` is where it was named: with `--address`, if that is None."""
    address = address or Address(gcs)
    host = gcs.rpartition(":")[0].strip("[]")
    try:
        resolved = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError as error:
        raise address.refusal(f"the host {host} is not known here ({error.strerror or error})") from None
    if os.environ.get(environment.AUTH_MODE) == "token" or resolved.is_loopback:
        return
    raise address.refusal(
        f"the cluster at {gcs} runs code for anyone who can reach it; start it with "
        f"{environment.AUTH_MODE}=token and set that here too, or pass --insecure"
    )


def disconnect() -> None:
    import ray

    while _watches:
        _watches.pop().end()
    with contextlib.suppress(Exception):
        ray.shutdown()


def share_of(compute: Compute) -> Share:
    """How the cluster is divided; raises RequestError if not even one unit fits."""
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    gpus_per_trial = compute.gpus_per_trial if compute.gpus_per_trial is not None else (1.0 if gpus else 0.0)
    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    at_once = sum(_fit(node, compute.cpus_per_trial, gpus_per_trial) for node in nodes)
    if at_once < 1:
        raise RequestError(
            f"compute: a trial needs {compute.cpus_per_trial} CPUs and {gpus_per_trial:g} GPUs, "
            f"but the cluster has {cpus} CPUs and {gpus:g} GPUs"
        )
    if compute.precision == "tf32" and not gpus_per_trial:
        raise RequestError(
            "compute.precision: got tf32, which needs a GPU for each trial; allowed here: auto, fp32, bf16"
        )
    return Share(compute.cpus_per_trial, gpus_per_trial, min(at_once, compute.max_concurrent or at_once))


def _fit(node: Mapping[str, float], cpus_per_trial: int, gpus_per_trial: float) -> int:
    """How many trials a node has room for: a trial is on one node, and a fraction of a GPU on one GPU."""
    at_once = int(node.get("CPU", 0)) // cpus_per_trial
    if not gpus_per_trial:
        return at_once
    gpus = node.get("GPU", 0.0)
    on_gpus = int(gpus) * int(1 / gpus_per_trial + 1e-9) if gpus_per_trial < 1 else int(gpus / gpus_per_trial)
    return min(at_once, on_gpus)


def check_storage(root: Path) -> None:
    """Raises RequestError, naming the nodes, if a node cannot see what the driver writes under `root`, or cannot write
    there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    root.mkdir(parents=True, exist_ok=True)
    marker = root / f".seen_{uuid.uuid4().hex}"
    marker.write_text("")
    look = ray.remote(num_cpus=0, max_retries=0)(_sees_and_can_write)
    try:
        answers = {
            node["NodeManagerAddress"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(marker))
            for node in nodes
        }
        blind = [address for address, answer in answers.items() if not ray.get(answer, timeout=STORAGE_SECONDS)]
    except ray.exceptions.RayError as error:
        raise RequestError(f"storage.root: could not check whether a node sees {root} ({first_line(error)})") from None
    finally:
        marker.unlink()
    if blind:
        raise RequestError(
            f"storage.root: node {', '.join(blind)} cannot read and write {root}; use a folder that all nodes share"
        )


def _sees_and_can_write(marker: str) -> bool:
    """Runs on each node."""
    return Path(marker).is_file() and os.access(Path(marker).parent, os.W_OK)
