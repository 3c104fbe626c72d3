"""Commands one after the other in one process, which imports the libraries once.

In: a JSON list of argument lists on standard input. Out: a JSON list of [exit status, standard output, standard error].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback

from jobs.cli import main


def run(arguments: list[str]) -> tuple[int, str, str]:
    sys.argv = ["python -m jobs", *arguments]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            status = -1
            traceback.print_exc()
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    json.dump([run(one) for one in json.load(sys.stdin)], sys.stdout)
