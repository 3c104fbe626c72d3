"""A command from outside its cluster: with `--address ray://HOST:PORT` it becomes a Ray job, which is followed here.

In: the address, a command and its arguments. Out: the job's lines as they come, and its exit status. Ctrl-C stops the
job; a connection that breaks does not. Ray Client, whose address this is, is not used: every decision of a search would
travel the wire.
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

from jobs.addresses import without_secrets
from jobs.cluster import environment
from jobs.cluster.connection import NOT_UPLOADED, REPOSITORY, check_answers, check_closed, first_line
from jobs.errors import RequestError, WorkFailed

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SCHEME = "ray://"
JOBS = "RAY_API_SERVER_ADDRESS"
JOBS_PORT = 8265
"""Ray's default, of the dashboard and its jobs."""
STOP_SECONDS = 60
"""What a stopped job has to put its runs away, after which Ray kills it."""


def run_there(address: str, command: str, config: str, overrides: Sequence[str], fresh: bool, insecure: bool) -> int:
    """Runs `python -m jobs COMMAND CONFIG ...` as a job of the cluster; returns its exit status.

    Raises RequestError where the address does not answer, where it is one that others reach without a token, unless
    `insecure`, for a settings file that is not uploaded with the code, and for a password among `overrides`; WorkFailed
    where the job's end stays unknown.
    """
    for override in overrides:
        if without_secrets(override) != override:
            raise RequestError(
                f"{override.partition('=')[0]}: a job's command is shown to whoever sees the cluster's jobs; "
                "with --address ray:// give an address without a password"
            )
    arguments = [command, uploaded(config), *overrides, *(["--fresh"] if fresh else [])]
    host = urlsplit(address).hostname
    if not host:
        raise RequestError(f"--address: {address!r} is not ray://HOST:PORT")
    # Ray would prefer RAY_ADDRESS to what it is given, but to this.
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
    """A preset as it is, a settings file as its path in the upload; raises RequestError for one outside of it."""
    path = Path(config)
    if not path.is_file():
        return config
    try:
        return str(path.resolve().relative_to(REPOSITORY))
    except ValueError:
        raise RequestError(
            f"CONFIG: with --address ray:// a settings file must lie under {REPOSITORY}, which is uploaded; "
            f"{path} does not"
        ) from None


def _client(server: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(server)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(f"--address: {server} takes no jobs ({first_line(error)}); name it in {JOBS}") from None


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Prints what the job says until it ends; returns its exit status."""
    from ray.job_submission import JobStatus

    said: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
    # In a thread of its own, for an interrupt would tear the connection.
    threading.Thread(target=_listen, args=(client, job, said), daemon=True).start()
    while True:
        try:
            heard = said.get()
        except KeyboardInterrupt:
            environment.heard()
            client.stop_job(job)
            continue
        if heard is None:
            break
        if isinstance(heard, Exception):
            raise WorkFailed(
                f"the connection to job {job} is lost ({first_line(heard)}); it goes on without, and the same command "
                "goes on from where it ends"
            )
        print(heard, end="", flush=True)
    details = client.get_job_info(job)
    if details.status == JobStatus.STOPPED:
        raise KeyboardInterrupt
    if details.driver_exit_code is None:
        raise WorkFailed(f"job {job} ended as {details.status} ({details.message})")
    return details.driver_exit_code


def _listen(client: JobSubmissionClient, job: str, said: queue.SimpleQueue[str | Exception | None]) -> None:
    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            said.put(lines)

    try:
        asyncio.run(tail())
        said.put(None)
    except Exception as error:  # of whichever layer of the connection
        said.put(error)
