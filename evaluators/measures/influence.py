"""Influence on the output of a graph, and pruning by it, as circuit-tracer does (Ameisen et al. 2025).

In: direct effects into some nodes. Out: the influence of every node on the output, and the nodes and edges that make up
most of it. No model is involved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 1e-10
"""A sum of |effects| below this is not normalised."""


class Link(NamedTuple):
    """An edge by its nodes' numbers in `Incoming`: its weight, and the share of all influence that runs through it."""

    source: int
    target: int
    weight: float
    score: float


class Incoming:
    """Direct effects into the expanded nodes.

    Features are numbered 0 to `n` - 1 so that each comes after all that can affect it. `rest`, number `n`, is what is
    left of a target's value: what un-finetuned parts do without any feature. `output` is number `n` + 1.
    """

    def __init__(self, n: int) -> None:
        self.n, self.rest, self.output = n, n, n + 1
        self.effects: dict[int, Tensor] = {}
        """By target, effects (n + 1,) of the features and of `rest`; they sum to the target's value."""

    def add(self, target: int, value: float, effects: Tensor) -> None:
        """Adds an expanded node, its value and the effects (n,) of the features on it."""
        effects = effects.double().cpu()
        self.effects[target] = torch.cat([effects, value - effects.sum().reshape(1)])

    def value(self, target: int) -> float:
        return float(self.effects[target].sum())

    def influence(self, among: Tensor | None = None) -> Tensor:
        """(n + 2,): each node's influence on the output, whose own is 1: the sum over all paths of the product of
        normalised |effects|. Put differently, the probability that a walk from the output to its causes, which takes
        each edge in proportion to its |effect|, comes through the node. `among` (n + 2,), if given, is True for the
        nodes that the graph consists of."""
        influence = torch.zeros(self.n + 2, dtype=torch.float64)
        influence[self.output] = 1.0
        for target in sorted(self.effects, reverse=True):  # a node's own influence is complete before it is passed on
            if influence[target] > 0:
                influence[: self.n + 1] += influence[target] * self.shares(target, among)
        return influence

    def shares(self, target: int, among: Tensor | None = None) -> Tensor:
        """(n + 1,): |effects| into a node, normalised to sum to 1."""
        sizes = self.effects[target].abs()
        if among is not None:
            sizes = sizes * among[: self.n + 1]
        return sizes / sizes.sum().clamp(min=SMALL)


def prune(incoming: Incoming, node_threshold: float, edge_threshold: float) -> tuple[list[int], list[Link]]:
    """The features, in order, and the edges that remain.

    The features kept are the fewest that make up `node_threshold` of all features' influence; `rest` and the output
    always stay. Of the edges between these nodes, normalised anew, those are kept that make up `edge_threshold` of what
    runs through edges, and then the features that still affect a kept node.
    """
    n, influence = incoming.n, incoming.influence()
    among = torch.ones(n + 2, dtype=torch.bool)
    among[:n] = most_of(influence[:n], node_threshold)
    within = incoming.influence(among)
    links = []
    for target, effects in incoming.effects.items():
        if among[target]:
            scores = incoming.shares(target, among) * within[target]
            links += [
                Link(source, target, float(effects[source]), float(scores[source]))
                for source in scores.nonzero()[:, 0].tolist()
            ]
    strong = most_of(torch.tensor([link.score for link in links], dtype=torch.float64), edge_threshold)
    links = [link for link, is_kept in zip(links, strong.tolist(), strict=True) if is_kept]
    links.sort(key=lambda link: -link.target)  # from the output down, so that dropping a node drops what only feeds it
    reached, kept_links = {incoming.output}, []
    for link in links:
        if link.target in reached:
            reached.add(link.source)
            kept_links.append(link)
    return sorted(node for node in reached if node < n), kept_links


def most_of(scores: Tensor, threshold: float) -> Tensor:
    """True for the fewest, largest scores whose sum is at least `threshold` of all; never for a score of 0."""
    order = scores.argsort(descending=True)
    before = scores[order].cumsum(0) - scores[order]
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order] = (before < threshold * scores.sum()) & (scores[order] > 0)
    return chosen
