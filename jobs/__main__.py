"""`python -m jobs COMMAND` and `deltascope COMMAND`: the same program, but the latter runs from any folder."""

import os
import sys

from jobs.cli import main


def command() -> None:
    """Entry point of `deltascope`. Modules in the current folder can be imported, for your own `python` checks."""
    sys.path.append(os.getcwd())
    main()


if __name__ == "__main__":
    main()
