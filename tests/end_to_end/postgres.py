"""A PostgreSQL server of one test: its own data, loopback alone, a password for everyone.

In: nothing but the distribution's package. Out: addresses of its databases. Where the package is missing, the test is
skipped; under CI it fails.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.end_to_end.conftest import ends_with_us, free_port

USER = "sweeper"
PASSWORD = "s3cret-of-the-team"


class Postgres(NamedTuple):
    port: int

    def url(self, database: str, user: str = USER, password: str = PASSWORD) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url(database)) as connection:
            return connection.execute(query).fetchall()  # type: ignore[call-overload]


def programs() -> Path:
    """The folder with `initdb` and `postgres`; Debian keeps them off the PATH."""
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = max(versions, key=lambda path: float(path.parents[1].name), default=None)
    if found is None:
        missing = "no PostgreSQL in /usr/lib/postgresql (apt-get install postgresql)"
        raise pytest.fail.Exception(missing) if os.environ.get("CI") else pytest.skip.Exception(missing)
    return found.parent


@contextmanager
def running(databases: Sequence[str]) -> Iterator[Postgres]:
    """The server with these empty databases, stopped at the end."""
    folder = programs()
    as_user: dict[str, Any] = {}
    # A short path, for the socket, which another user can reach: PostgreSQL refuses to run as root.
    with tempfile.TemporaryDirectory(prefix="pg") as place:
        if os.geteuid() == 0:
            other = _other_user()
            os.chown(place, other.pw_uid, other.pw_gid)
            as_user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
        options: dict[str, Any] = {"cwd": place, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
        options |= as_user
        data, word = f"{place}/data", Path(place, "password")
        word.write_text(PASSWORD)
        make = [folder / "initdb", "-D", data, "-U", USER, f"--pwfile={word}", "--auth=scram-sha-256", "--no-sync"]
        made = subprocess.run([*make, "-E", "UTF8"], capture_output=True, text=True, timeout=120, **options)
        assert made.returncode == 0, made.stdout + made.stderr
        server = Postgres(free_port())
        start = [folder / "postgres", "-D", data, "-p", str(server.port), "-h", "127.0.0.1", "-k", place, "-F"]
        with Path(place, "log").open("w+") as log:
            process = subprocess.Popen(start, stdout=log, stderr=log, preexec_fn=ends_with_us, **options)
            try:
                _wait(server, process, Path(place, "log"))
                with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
                    for name in databases:
                        connection.execute(f"CREATE DATABASE {name}".encode())
                yield server
            finally:
                process.send_signal(signal.SIGINT)  # ends its connections, and then itself
                try:
                    process.wait(30)
                finally:
                    process.kill()


def _other_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _wait(server: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(server.url("postgres")).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
