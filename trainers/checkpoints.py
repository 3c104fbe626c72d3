"""Checkpoints within a run: one safetensors file with tensors and, in its header, the rest of the state as JSON.

In: named tensors and JSON values. Out: a file written under a temporary name and renamed, and its contents read back. A
run interrupted at any moment finds either its last complete checkpoint or none.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from trainers import checked_files


class Checkpoint(NamedTuple):
    """What was passed to `write`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Saves both in one file; `state` must be JSON-able."""
    checked_files.save(path, tensors, {"state": json.dumps(state)})


def read(path: Path, run: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint at `path`; None if there is none, if it is damaged, or if its `state["run"]` is not `run`."""
    if not checked_files.is_intact(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            if state.get("run") != json.loads(json.dumps(run)):
                return None
            names = list(file.keys())  # a safe_open handle is not a mapping
            return Checkpoint({name: file.get_tensor(name) for name in names}, state)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def optimiser_tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `optimiser/INDEX/KEY`, INDEX being the parameter's position."""
    return {
        f"optimiser/{index}/{key}": value
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimiser(optimiser: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `optimiser_tensors` returned; the optimiser must have the same parameters in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, place = name.partition("/")
        if kind == "optimiser":
            index, _, key = place.partition("/")
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


@dataclass
class Keeper:
    """Where a run keeps its checkpoint, and how often (at most every `seconds`); without a path, never."""

    path: Path | None = None
    seconds: float = 30.0
    _last: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        return self.path is not None and time.monotonic() - self._last >= self.seconds

    def write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        assert self.path is not None
        write(self.path, tensors, state)
        self._last = time.monotonic()

    def read(self, run: dict[str, Any]) -> Checkpoint | None:
        return None if self.path is None else read(self.path, run)

    def forget(self) -> None:
        """Deletes the checkpoint: the run has ended and no longer needs it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
