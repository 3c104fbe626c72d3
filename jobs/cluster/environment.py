"""Process-wide switches of the libraries, set before any of them is imported.

In: nothing. Out: environment variables (telemetry off, Ray on loopback, no pickles read from results, no progress bars)
and handlers for SIGINT and SIGTERM; no library may install packages. A user's own values win, except for telemetry and
pickles.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from typing import Any

from models.no_installs import forbid_installs

ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
}
DEFAULTS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune would swallow the first Ctrl-C and let the sweep continue.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    # A single raylet on one machine needs no interface but loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    # Otherwise the client of a server prints the address of every run that ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # An unreachable tracking server must not delay the end of a sweep for the minutes that MLflow would wait.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MPLBACKEND": "Agg",
}


STOPS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 1.0
END_SECONDS = 120.0
"""Seconds after a stop signal until the process ends in any case; no results on disk are lost."""
INTERRUPTED = 130
"""The exit status of a command that was stopped."""
STOPPED = "stopped; run the same command to continue from here"
_acknowledged = threading.Event()
_takes_long = threading.Event()

ADDRESS = "RAY_ADDRESS"
AUTH_MODE = "RAY_AUTH_MODE"
_USERS_AUTH_MODE = os.environ.get(AUTH_MODE)


def prepare(address: str | None = None) -> None:
    """Sets the variables. The driver and every worker call it before importing Ray. Idempotent.

    A Ray that we start requires a token; an existing cluster at `address` (or RAY_ADDRESS) has its own mode.
    """
    forbid_installs()
    os.environ.update(ALWAYS)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if (address or cluster_address() or "local") != "local":
        if _USERS_AUTH_MODE is None:
            os.environ.pop(AUTH_MODE, None)
    else:
        os.environ.setdefault(AUTH_MODE, "token")
    warnings.filterwarnings("ignore")


def cluster_address() -> str | None:
    """RAY_ADDRESS if it names a cluster: neither `local` (start a Ray) nor an http address (a jobs server)."""
    address = os.environ.get(ADDRESS, "").strip()
    return None if address in ("", "local") or address.startswith("http") else address


def install_stop_handlers() -> None:
    """Makes SIGINT and SIGTERM (`kill`, `ray job stop`) both raise KeyboardInterrupt.

    The driver calls it when it starts, because a shell's background jobs ignore SIGINT, and again once Ray has started,
    because Ray installs its own SIGTERM handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)


def repeat_stops_until_acknowledged() -> None:
    """After a stop signal, resends it every `REPEAT_SECONDS` until `acknowledge_stop` is called, and ends the process
    after `END_SECONDS`.

    Python drops an exception that a signal raises during a fork or garbage collection, and Ray forks as it starts: the
    sweep would carry on as if nobody had stopped it. Also, if Ray is interrupted while it starts on a busy machine, it
    occasionally waits for itself forever.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    main = threading.main_thread().ident
    assert main is not None

    def repeat() -> None:
        while (number := os.read(reading, 1)[0]) not in STOPS:
            pass
        end = time.monotonic() + END_SECONDS
        while not _acknowledged.wait(REPEAT_SECONDS) and time.monotonic() < end:
            signal.pthread_kill(main, number)  # the same signal, so that it is delivered once if still pending
        if _takes_long.wait(max(0.0, end - time.monotonic())):
            return
        print(STOPPED, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    def report(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt | SystemExit):
            sys.__unraisablehook__(dropped)

    sys.unraisablehook = report
    threading.Thread(target=repeat, name="signals", daemon=True).start()


def stop_may_take_long() -> None:
    """Lifts the limit of `END_SECONDS`: from here on a stopped process waits for other machines, not its own Ray."""
    _takes_long.set()


def acknowledge_stop() -> None:
    """Ends the resending: the stop is being handled, and the cleanup must not be interrupted."""
    _acknowledged.set()
