"""Running a command from outside the cluster: `--address ray://HOST:PORT` submits it as a Ray job and follows it here.

In: the address, a command and its arguments. Out: the job's output as it arrives, and its exit status. Ctrl-C stops the
job; a broken connection does not. Ray Client, the usual meaning of such an address, is not used, because it would send
every decision of a search over the network.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jobs.cluster import environment
from jobs.cluster.address import check_answers
from jobs.cluster.connection import NOT_UPLOADED, REPOSITORY, check_closed
from jobs.errors import RequestError, WorkFailed, first_line, without_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = "RAY_API_SERVER_ADDRESS"
JOBS_PORT = 8265
"""Ray's default port for the dashboard and its jobs API."""
STOP_SECONDS = 60
"""Time a stopped job gets to close its runs before Ray kills it."""


def run_there(
    address: str, command: str, config: str, overrides: Sequence[str], options: Sequence[str], insecure: bool
) -> int:
    """Runs `python -m jobs COMMAND CONFIG ... OPTIONS` as a job on the cluster; returns its exit status.

    Raises RequestError if the address does not answer, if others can use the cluster without a token (unless
    `insecure`), if the settings file is not part of the upload, or if `overrides` holds a password; WorkFailed if it
    is unknown how the job ended.
    """
    for override in overrides:
        if without_secrets(override) != override:
            raise RequestError(
                f"{override.partition('=')[0]}: everyone who sees the cluster's jobs can read a job's command; "
                "with --address ray:// give an address without a password"
            )
    arguments = [command, uploaded(config), *overrides, *options]
    host = urlsplit(address).hostname
    if not host:
        raise RequestError(f"--address: {address!r} is not ray://HOST:PORT")
    # Ray prefers RAY_ADDRESS over the address we pass, but this variable over both.
    server = os.environ.setdefault(JOBS, f"http://{host}:{JOBS_PORT}")
    check_answers(urlsplit(server).netloc)
    if not insecure:
        check_closed(f"{host}:{JOBS_PORT}")
    client = _client(server)
    job = client.submit_job(
        entrypoint=shlex.join(["python", "-m", "jobs", *arguments]),
        runtime_env={
            "working_dir": str(REPOSITORY),
            "excludes": NOT_UPLOADED,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        },
    )
    print(f"job {job} on {client.get_address()}", flush=True)
    return _follow(client, job)


def uploaded(config: str) -> str:
    """A preset's name as it is, or a settings file's path within the upload. Raises RequestError for a file outside."""
    path = Path(config)
    if not path.is_file():
        return config
    try:
        return str(path.resolve().relative_to(REPOSITORY))
    except ValueError:
        raise RequestError(
            f"CONFIG: with --address ray:// a settings file must be under {REPOSITORY}, which is uploaded; "
            f"{path} is not"
        ) from None


def _client(server: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(server)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"--address: {server} does not accept jobs ({first_line(error)}); set {JOBS} to the jobs server"
        ) from None


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Prints the job's output until it ends; returns its exit status."""
    from ray.job_submission import JobStatus

    messages: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
    # In a separate thread, because an interrupt would break the connection.
    threading.Thread(target=_listen, args=(client, job, messages), daemon=True).start()
    while True:
        try:
            message = messages.get()
        except KeyboardInterrupt:
            environment.acknowledge_stop()
            environment.stop_may_take_long()  # the job cleans up first
            client.stop_job(job)
            continue
        if message is None:
            break
        if isinstance(message, Exception):
            raise WorkFailed(
                f"lost the connection to job {job} ({first_line(message)}); the job keeps running, and once it has "
                "ended, the same command continues from there"
            )
        print(message, end="", flush=True)
    details = client.get_job_info(job)
    if details.status == JobStatus.STOPPED:
        raise KeyboardInterrupt
    if details.driver_exit_code is None:
        raise WorkFailed(f"job {job} ended as {details.status} ({details.message})")
    return details.driver_exit_code


def _listen(client: JobSubmissionClient, job: str, messages: queue.SimpleQueue[str | Exception | None]) -> None:
    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            messages.put(lines)

    try:
        asyncio.run(tail())
        messages.put(None)
    except Exception as error:  # from any layer of the connection
        messages.put(error)
