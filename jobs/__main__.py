"""`deltascope COMMAND` is the same program as `python -m jobs COMMAND`, but runs from any folder."""

import os
import sys

from jobs.cli import main


def command() -> None:
    """Entry point of `deltascope`. Modules in the current folder can be imported, for your own `python` checks."""
    sys.path.append(os.getcwd())
    main()


if __name__ == "__main__":
    main()
