"""Sets of layers that are spliced at once, and how tables and files call them.

In: layers and the names of sets. Out: tuples of layers, labels such as `6`, `6+12` or `0-29`, and their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

NO_LAYER = "none"
"""The label of raw: nothing is spliced."""


def layers_of(name: str | Sequence[int], layers: Sequence[int]) -> list[tuple[int, ...]]:
    """The sets that `all`, `thirds`, `each` or a list of layers stands for among `layers` (ascending).

    A list that `layers` does not hold whole gives none, and so does a set's name where it would repeat a smaller one:
    thirds of fewer than three layers, all of a single one beside `each`.
    """
    every = tuple(layers)
    if name == "all":
        return [every] if every else []
    if name == "each":
        return [(layer,) for layer in every]
    if name == "thirds":
        ends = [round(len(every) * share / 3) for share in range(4)]
        return [every[low:high] for low, high in pairwise(ends)] if len(every) >= 3 else []
    chosen = tuple(sorted(int(layer) for layer in name))
    return [chosen] if set(chosen) <= set(every) else []


def layer_label(layers: Iterable[int], digits: int = 1) -> str:
    """`[8]` -> `8`, `[16, 8]` -> `8+16`, `[0, 1, 2, 3, 7]` -> `0-3+7`, `[]` -> `none`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = []
    for run in runs:
        shown = [f"{layer:0{digits}d}" for layer in run]
        parts += [f"{shown[0]}-{shown[-1]}"] if len(run) > 2 else shown
    return "+".join(parts) or NO_LAYER


def layers_in(label: str) -> list[int]:
    """The reverse of `layer_label`."""
    layers: list[int] = []
    for part in [] if label == NO_LAYER else label.split("+"):
        low, _, high = part.partition("-")
        layers += range(int(low), int(high or low) + 1)
    return layers


def layer_order(label: str) -> tuple[int, list[int]]:
    """Sort key of a label: nothing, single layers by number, then sets by size."""
    layers = layers_in(label)
    return len(layers), layers


def is_set(label: str) -> bool:
    """Whether a label names several layers."""
    return len(layers_in(label)) > 1
