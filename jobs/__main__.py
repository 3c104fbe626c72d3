"""`python -m jobs COMMAND`, and `deltascope COMMAND`: the same program, the second one from any folder."""

import os
import sys

from jobs.cli import main


def command() -> None:
    """What `deltascope` runs: modules in the current folder can be imported too, for `python` checks of your own."""
    sys.path.append(os.getcwd())
    main()


if __name__ == "__main__":
    main()
