"""Sets of sites that are spliced at once, and their names in tables, files and settings.

In: sites and the names of sets. Out: tuples of sites, labels such as `6`, `6+12` or `0-29`, and their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from sites.kinds import KINDS, MLP
from sites.site import Site

NOTHING = "none"
"""The label of no sites: nothing is spliced."""


def sets_of(name: str | Sequence[int], sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """The sets of `sites` (which must be in order) that a name stands for: `all`, `thirds`, `each`, one of these for
    one kind (`qkv:all`), or a list of layers.

    A list gives no set if `sites` lack one of its layers, and neither does `thirds` with fewer than three layers.
    """
    all_sites = tuple(sites)
    if isinstance(name, str) and ":" in name:
        kind, _, name = name.partition(":")
        all_sites = tuple(site for site in all_sites if site.kind.name == kind)
    if name == "all":
        return [all_sites] if all_sites else []
    if name == "each":
        return [(site,) for site in all_sites]
    layers = sorted({site.layer for site in all_sites})
    if name == "thirds":
        ends = [round(len(layers) * share / 3) for share in range(4)]
        thirds = [layers[low:high] for low, high in pairwise(ends)] if len(layers) >= 3 else []
        return [tuple(site for site in all_sites if site.layer in third) for third in thirds]
    chosen = {int(layer) for layer in name}
    return [tuple(site for site in all_sites if site.layer in chosen)] if chosen <= set(layers) else []


def sites_label(sites: Iterable[Site], digits: int = 1) -> str:
    """`8`, `8+16`, `0-3+7`, `0-3+0-3.qkv`, or `none`; the inverse of `parse_sites`.

    >>> sites_label([Site(0), Site(1), Site(2), Site(7)])
    '0-2+7'
    """
    parts = []
    for kind, group in groupby(sorted(sites, key=lambda site: (-site.kind.order, site.layer)), lambda site: site.kind):
        runs: list[list[int]] = []
        for site in group:
            if runs and site.layer == runs[-1][-1] + 1:
                runs[-1].append(site.layer)
            else:
                runs.append([site.layer])
        suffix = "" if kind.name == MLP.name else f".{kind.name}"
        for run in runs:
            shown = [f"{layer:0{digits}d}" for layer in run]
            spans = [f"{shown[0]}-{shown[-1]}"] if len(run) > 2 else shown
            parts += [f"{span}{suffix}" for span in spans]
    return "+".join(parts) or NOTHING


def parse_sites(label: str) -> list[Site]:
    """The sites of a label, in order; raises ValueError for other text."""
    sites: list[Site] = []
    for part in [] if label == NOTHING else label.split("+"):
        span, _, name = part.partition(".")
        low, _, high = span.partition("-")
        if not (low.isdigit() and (high or low).isdigit() and (name or MLP.name) in KINDS):
            raise ValueError(f"{label!r} does not name sites, such as 8, 8+16 or 0-29")
        sites += [Site(layer, KINDS[name or MLP.name]) for layer in range(int(low), int(high or low) + 1)]
    return sorted(sites)


def label_of_keys(keys: Iterable[int | str]) -> str:
    """The label of sites given by their keys in JSON files."""
    return sites_label(Site.parse(key) for key in keys)


def label_order(label: str) -> tuple[int, list[Site]]:
    """Sort key of a label: nothing, single sites in order, then sets by size."""
    sites = parse_sites(label)
    return len(sites), sites


def is_set(label: str) -> bool:
    """Whether a label names several sites."""
    return len(parse_sites(label)) > 1
