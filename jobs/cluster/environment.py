"""Process-wide switches of the libraries, set before any of them is imported.

In: nothing. Out: environment variables: telemetry off, Ray on loopback, no pickles read from results, quiet bars.
Values that a user has set win, but for telemetry. And what SIGINT and SIGTERM do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from typing import Any

ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
}
UNLESS_SET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune would swallow the first Ctrl-C and let the sweep go on.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    # One raylet on one machine needs no other interface than loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    # A server's client prints the address of every run that ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A tracking server that is away must not hold a sweep's end for MLflow's own minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MPLBACKEND": "Agg",
}


STOPS = (signal.SIGINT, signal.SIGTERM)
AGAIN_SECONDS = 1.0
_heard = threading.Event()

TOKENS = "RAY_AUTH_MODE"
_USERS_TOKENS = os.environ.get(TOKENS)


def prepare(address: str | None = None) -> None:
    """Idempotent; called first by the driver and by every worker, before Ray is imported.

    A Ray of our own asks for a token; the cluster at `address` (or RAY_ADDRESS) has a mode of its own.
    """
    os.environ.update(ALWAYS)
    for name, value in UNLESS_SET.items():
        os.environ.setdefault(name, value)
    if address or cluster_address():
        if _USERS_TOKENS is None:
            os.environ.pop(TOKENS, None)
    else:
        os.environ.setdefault(TOKENS, "token")
    warnings.filterwarnings("ignore")


def cluster_address() -> str | None:
    """RAY_ADDRESS where it names a cluster; for job submission it holds an http address."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if not address or address.startswith("http") else address


def take_signals() -> None:
    """SIGINT and SIGTERM (`kill`, `ray job stop`) both raise KeyboardInterrupt.

    Called by the driver at its start, because a shell's background jobs ignore SIGINT, and after Ray has started,
    because Ray takes SIGTERM for itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for one in STOPS:
        signal.signal(one, signal.default_int_handler)


def insist_on_signals() -> None:
    """A stop that has come is sent again every `AGAIN_SECONDS` until someone says `heard`.

    Python drops an exception that a signal raises while it forks or tidies up, and forks are what Ray starts with: the
    sweep would go on as if nobody had asked.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    main = threading.main_thread().ident
    assert main is not None

    def insist() -> None:
        while (number := os.read(reading, 1)[0]) not in STOPS:
            pass
        while not _heard.wait(AGAIN_SECONDS):
            signal.pthread_kill(main, number)  # the same one: while it waits to be handled it counts once

    def tell(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt | SystemExit):
            sys.__unraisablehook__(dropped)

    sys.unraisablehook = tell
    threading.Thread(target=insist, name="signals", daemon=True).start()


def heard() -> None:
    """The stop has been taken up: what is left is to put everything away, undisturbed."""
    _heard.set()
