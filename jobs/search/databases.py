"""Optuna's studies in a database: whether its driver is installed, and whether it can be opened.

In: `storage.optuna_url`. Out: an open storage, or a RequestError in one sentence that shows no user and no password.
"""

from __future__ import annotations

import re
from typing import Any

import optuna
import sqlalchemy

from jobs.errors import RequestError, first_line, without_secrets

KEY = "storage.optuna_url"
EXAMPLE = "postgresql://USER:PASSWORD@HOST/DATABASE"
CONNECT_SECONDS = 10
"""Without a limit, drivers wait for minutes if the server's machine does not answer."""
WITH_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb")
"""SQLAlchemy's names of the drivers that take `connect_timeout`."""
PACKAGES = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "PyMySQL",
    "mysql": "mysql-connector-python",
}
"""Packages whose name differs from that of the driver's module, by module."""


def open_database(url: str) -> optuna.storages.RDBStorage:
    """Raises RequestError if the URL is not one, its driver is missing, or the database cannot be opened."""
    address, driver = _read(url)
    options: dict[str, Any] = {}
    if driver in WITH_TIMEOUT and "connect_timeout" not in address.query:
        options["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except Exception as error:  # each driver has its own exceptions
        reason = _reason(error, address)
    raise RequestError(f"{KEY}: {without_secrets(url)} cannot be opened ({reason})")


def is_file(url: str) -> bool:
    """Whether the database is a file, which is created if missing."""
    return _read(url)[0].get_backend_name() == "sqlite"


def _read(url: str) -> tuple[sqlalchemy.URL, str]:
    """The URL's parts and its driver's name. Raises RequestError for a bad URL or a driver that is not installed."""
    if re.search(r"\s", url):
        raise RequestError(f"{KEY}: a URL has no spaces; write %20 for a space in a password")
    try:
        address = sqlalchemy.make_url(url)
        dialect = address.get_dialect()
        dialect.import_dbapi()
        return address, dialect.driver
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise RequestError(
            f"{KEY}: {address.drivername}:// needs the Python module {name}; run `pip install "
            f"'{PACKAGES.get(name, name)}'`"
        ) from None
    except sqlalchemy.exc.NoSuchModuleError:
        raise RequestError(
            f"{KEY}: {address.drivername}:// is not a kind of database that SQLAlchemy knows; give a URL such as "
            f"{EXAMPLE}"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError):  # their messages may quote part of the password
        raise RequestError(f"{KEY}: this is not the URL of a database, such as {EXAMPLE}") from None


def _reason(error: Exception, address: sqlalchemy.URL) -> str:
    """The driver's own message, without user and password."""
    text = without_secrets(" ".join(first_line(getattr(error, "orig", None) or error).split()))
    for secret in filter(None, (str(address.password or ""), address.username)):
        text = re.sub(rf"(?<!\w)[\"']?{re.escape(secret)}[\"']?(?!\w)", "...", text)
    return text[:300]
