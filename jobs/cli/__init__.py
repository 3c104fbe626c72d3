"""The command line: `deltascope COMMAND` or `python -m jobs COMMAND`, each with `--help`.

In: arguments. Out: an exit status: 0 done, 1 some trials or cells failed, 2 invalid request, 130 interrupted. The
commands that run a sweep are in `sweep`, those that read finished ones in `results`.
"""

from __future__ import annotations

import atexit
import os
import sys

import typer

from jobs.cli import results, sweep
from jobs.cluster import environment

environment.prepare()

THEN = "once that is fixed, run the same command to continue from here"

app = typer.Typer(
    name="deltascope",
    help="Sweeps of delta transcoders: find what finetuning changed in a model, splice it in and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sweep.commands)
app.add_typer(results.commands)


def main() -> None:
    """Runs a command and turns its errors into one line and an exit status."""
    from data.rows import DataError
    from jobs.errors import DISK_ERRORS, RequestError, WorkFailed, disk_errno
    from models.errors import ModelError
    from search_spaces.load import SettingsError

    environment.install_stop_handlers()
    environment.repeat_stops_until_acknowledged()
    try:
        status = app(prog_name="deltascope", standalone_mode=False)  # a status if the command raised an exit
    except (typer.Abort, KeyboardInterrupt):
        status = environment.INTERRUPTED
    except (RequestError, ModelError, DataError, SettingsError) as error:
        _say(str(error))
        sys.exit(2)
    except WorkFailed as error:
        _say(str(error))
        sys.exit(1)
    except Exception as error:
        if (number := disk_errno(error)) is not None:
            _say(f"{DISK_ERRORS[number]}; {THEN}")
            sys.exit(1)
        if type(error).__module__.startswith(("click", "typer")):
            _say(error.format_message() if hasattr(error, "format_message") else str(error))
            sys.exit(2)
        raise
    if status == environment.INTERRUPTED:
        environment.acknowledge_stop()
        _say(environment.STOPPED)
        # Everything is cleaned up. A full interpreter shutdown occasionally segfaults, because Ray's threads were
        # interrupted.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(environment.INTERRUPTED)
    sys.exit(status or 0)


def _say(text: str) -> None:
    if not text:
        return  # no command was given, so the help has been shown
    print(f"error: {text}" if not text.startswith("stopped") else text, file=sys.stderr)
