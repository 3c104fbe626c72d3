"""The command line, and all the code that talks to Ray, Optuna or MLflow."""

import sys
from pathlib import Path

# Ray's workers search the current folder first, where a package `models` would shadow ours.
_HOME = str(Path(__file__).resolve().parents[1])
if sys.path[:1] != [_HOME]:
    sys.path.insert(0, _HOME)
