"""Pictures of a first look: where the weights changed, and how far the mean change of the residual stream stands out.

In: the plain values of `measures.look`. Out: matplotlib Figures in the report's style.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluators.report.figures import finish, look, panels

SMALLEST = 1e-6
"""Relative changes below this are drawn as this, since the scale is logarithmic."""


def weights_by_layer(changed: Sequence[Mapping[str, Any]]) -> Figure:
    """|W' - W| / |W| of each module of the blocks, modules down, layers across, on a logarithmic scale. White: did not
    change."""
    inside = [change for change in changed if change["layer"] is not None]
    modules = list(dict.fromkeys(change["module"] for change in inside))
    n_layers = max(change["layer"] for change in inside) + 1
    grid = np.full((len(modules), n_layers), np.nan)
    for change in inside:
        grid[modules.index(change["module"]), change["layer"]] = max(change["relative"], SMALLEST)
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    figure, (axes,) = panels(1, width=7.5, height=0.9 + 0.3 * len(modules))
    image = axes.imshow(
        grid, cmap="cividis", aspect="auto", norm=LogNorm(low * 0.9, high * 1.1), interpolation="nearest"
    )
    axes.grid(False)
    axes.set_yticks(range(len(modules)), modules, fontsize=8)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="|W' - W| / |W|")
    return finish(figure, axes, f"{len(inside)} tensors of the blocks that changed")


def lens_by_layer(lens: Sequence[Mapping[str, Any]], spans: Mapping[str, str]) -> Figure:
    """The norm of the mean difference against layer, and that of the control, a panel per span of tokens; both are
    relative to the un-finetuned model's mean stream."""
    figure, grid = panels(len(spans), columns=len(spans), width=4.4, height=2.7)
    for axes, (span, title) in zip(grid, spans.items(), strict=True):
        rows = [reading for reading in lens if reading["span"] == span]
        layers = [reading["layer"] for reading in rows]
        for number, (column, label) in enumerate(
            (("norm", "finetuned - un-finetuned"), ("control_norm", "control: one half of the texts - the other"))
        ):
            colour, marker = look(number)
            values = [reading[column] for reading in rows]
            axes.plot(layers, values, color=colour, marker=marker, markersize=3.5, label=label)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=title, xlabel="layer")
    grid[0].set_ylabel("norm of the mean difference\nover that of the mean stream")
    return finish(figure, grid[0], "unrelated text; residual stream after each block")
