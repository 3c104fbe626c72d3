"""Commands one after the other, each in a process forked from one that has imported the libraries.

In: a JSON list of argument lists on standard input. Out: a JSON list of [exit status, standard output, standard error];
the status of a process that a signal ended is minus the signal's number.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile

from jobs.cli import main


def run(arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            faulthandler.enable()  # a crash says where
            sys.argv = ["python -m jobs", *arguments]
            main()
            os._exit(0)  # not reached: `main` exits
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    import mlflow  # noqa: F401  what most commands import; none of it starts threads of Python
    import ray  # noqa: F401

    import jobs.sweep.sweep  # noqa: F401

    json.dump([run(one) for one in asked], sys.stdout)
