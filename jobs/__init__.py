"""The command line, and all the code that talks to Ray, Optuna or MLflow."""

import sys
from pathlib import Path

# Ray's workers look first in the folder that a command is run from: a package `models` in it is not ours.
_HOME = str(Path(__file__).resolve().parents[1])
if sys.path[:1] != [_HOME]:
    sys.path.insert(0, _HOME)
