"""Plots of an Optuna study: history, importances, parallel coordinates.

In: a stored study. Out: PNGs by name, without plots for which the study is too small.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import TrialState

LEAST_TRIALS = 2
DPI = 130


def study_pictures(name: str, storage: optuna.storages.BaseStorage, prefix: str, loss: str) -> dict[str, bytes]:
    """`{prefix_history, prefix_importances, prefix_parallel}` as PNGs; `loss` is the label of the value axis.

    Importances compare finished trials by PED-ANOVA (arXiv 2304.10255), which needs no extra package. A study that no
    longer exists has no plots.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return {}
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < LEAST_TRIALS or len(study.directions) > 1:
        return {}
    import matplotlib
    from optuna.visualization import matplotlib as draw

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    plots: dict[str, Callable[[], Any]] = {
        "history": lambda: draw.plot_optimization_history(study, target_name=loss),
        "importances": lambda: draw.plot_param_importances(study, evaluator=evaluator, target_name=loss),
        "parallel": lambda: draw.plot_parallel_coordinate(study, target_name=loss),
    }
    pictures = {}
    for name, make in plots.items():
        with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna changes the global style
            warnings.simplefilter("ignore")
            try:
                axes = make()
            except (ValueError, RuntimeError, ZeroDivisionError):  # for example, all values equal
                continue
            for panel in axes.figure.axes:
                panel.set_facecolor("white")
            pictures[f"{prefix}_{name}"] = _png(axes)
    return pictures


def _png(axes: Any) -> bytes:
    from matplotlib import pyplot

    figure = axes.figure
    figure.set_size_inches(6.4, 4.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
