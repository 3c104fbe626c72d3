"""How a trial ended, as its `result.json` says it.

In: what the trial reported to Tune, and whether its worker died. Out: its state, value, figures and reason.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jobs.search.studies import COMPLETE, FAILED, STOPPED


class End(NamedTuple):
    """The last figures of a trial, those of its validations, whether it ran to its end, and whether its worker died."""

    figures: dict[str, Any]
    history: list[dict[str, Any]]
    ended: bool
    error: bool

    def record(self) -> dict[str, Any]:
        """What it comes to."""
        figures = dict(self.figures)
        value, reason = figures.get("val_loss"), figures.pop("failed", None)
        if self.error or reason or value is None or not math.isfinite(value):
            state, reason = FAILED, reason or ("its worker died" if self.error else f"val_loss is {value}")
        else:
            state = COMPLETE if self.ended else STOPPED
        return {
            "state": state,
            "value": None if state == FAILED else value,
            "figures": figures,
            "history": self.history,
            "reason": reason,
        }


def figures_of(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result of Tune that the trial itself reported."""
    return {key: value for key, value in result.items() if key not in _TUNE_KEYS and not key.startswith("config/")}


_TUNE_KEYS = {
    "timestamp", "time_this_iter_s", "time_total_s", "training_iteration", "pid", "hostname", "node_ip", "date",
    "trial_id", "time_since_restore", "iterations_since_restore", "done", "final", "checkpoint_dir_name",
    "should_checkpoint", "experiment_tag",
}  # fmt: skip
