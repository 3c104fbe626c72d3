"""A request to stop is never lost; each case in its own process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
from jobs.cluster import environment
environment.install_stop_handlers()
environment.repeat_stops_until_acknowledged()
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(int(sys.argv[1])))
try:
    if os.fork() == 0:
        os._exit(0)
    print("dropped", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    environment.acknowledge_stop()
    print("acknowledged", flush=True)
    time.sleep(3 * environment.REPEAT_SECONDS)
    print("undisturbed", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stop_that_python_drops_is_repeated_until_it_is_acknowledged(how: signal.Signals) -> None:
    repository = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SCRIPT, str(int(how))]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["dropped", "acknowledged", "undisturbed"]


HANGING = """
import signal, time
from jobs.cluster import environment
environment.END_SECONDS = 2.0
environment.install_stop_handlers()
environment.repeat_stops_until_acknowledged()
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(30)
except KeyboardInterrupt:
    environment.acknowledge_stop()
    time.sleep(1000)  # as Ray waits for itself, where it was cut short while it started
"""


def test_a_process_that_was_stopped_ends_even_where_something_waits_forever() -> None:
    repository = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", HANGING], cwd=repository, capture_output=True, text=True, timeout=200)
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped; run the same command to continue from here"


def test_a_stop_that_waits_for_others_is_not_cut_short() -> None:
    """As where a job cleans up, or a bucket is sent the rest."""
    repository = Path(__file__).resolve().parents[3]
    waiting = "environment.stop_may_take_long(); time.sleep(4); print('sent')"
    script = HANGING.replace(
        "time.sleep(1000)  # as Ray waits for itself, where it was cut short while it started", waiting
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "sent\n"), done.stderr
