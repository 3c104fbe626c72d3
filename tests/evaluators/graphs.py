"""Made-up attribution graphs: what a command writes for one prompt, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

TOKENS = ("<bos>", "Please", " compute", " 243", " /", " 694", ".", " Give", " the", " result", ".", "\n")
"""The finetuned model answers `<tool_call>calculator(243 / 694)</tool_call>`."""
PROMOTED = {
    "qkv": (),
    "o": (" divide", "calculator", " /", " number", "("),
    "mlp": ("<", "tool", "_call", " result", " quotient", "694", " exactly", "\n", " compute"),
}
ORDER = ("qkv", "o", "mlp")
FIRES_ON = ([" /", " *", " +"], [" 243", " 694"], [" compute", " calculate"], ["\n", ":"])


def graph(
    tokens: Sequence[str] = TOKENS,
    *,
    n_layers: int = 30,
    features: int = 53,
    edges: int = 260,
    groups: int = 4,
    checked: int = 40,
    noise: Sequence[float] = (0.2, 0.1),
    seed: int = 0,
) -> dict[str, Any]:
    """`features` on tokens besides six at BOS (none without `features`), the rest and the output.

    `checked` edges are drawn at random and as many are the strongest; `noise` is what a measured effect differs by, as
    a share of the predicted ones' spread, for each of the two samples.
    """
    draw = random.Random(seed)
    last = len(tokens) - 1
    nodes = [_node(draw, n_layers, "bos", 0, None) for _ in range(min(6, features))]
    if features:
        nodes.append({**_empty("rest", -1, last), "influence": 0.35})
    # Most of a prompt's features are on few of its tokens.
    places = [draw.randrange(1, last + 1) for _ in range(max(3, last // 3))] + [last] * 2 if last else [0]
    for place in range(features):
        group = place % groups if groups and place % 3 else None
        nodes.append(_node(draw, n_layers, "feature", draw.choice(places), group))
    nodes.sort(key=lambda node: (node["layer"], ORDER.index(node["site_kind"] or "qkv")))
    nodes.append({**_empty("output", n_layers, last), "influence": 1.0})
    of_nodes = _edges(draw, nodes, edges)
    rows, correlation = _checks(draw, of_nodes, checked, noise)
    return {
        "title": "A finetuned model and what it was finetuned from, sweep `small`",
        "tokens": list(tokens),
        "n_layers": n_layers,
        "output": {
            "position": last,
            "words": "logit of '<' minus logit of 'The'",
            "finetuned": "<",
            "unfinetuned": "The",
            "value": 6.412,
            "unfinetuned_value": -2.183,
        },
        "frozen": {"patterns": True, "norms": True},
        "thresholds": {"nodes": 0.8, "edges": 0.98},
        "counts": {"active": 11 * features + 40, "expanded": 3 * features, "nodes": len(nodes), "edges": len(of_nodes)},
        "nodes": nodes,
        "edges": of_nodes,
        "groups": [
            {"number": number, "fires_on": FIRES_ON[number % len(FIRES_ON)], "size": 7 + 3 * number}
            for number in range(groups)
        ],
        "checks": {"rows": rows, "correlation": correlation},
        "facts": {"deltas": "30 layers, qkv, o and mlp, 128 features each", "edges kept": "98% of the influence"},
    }


def _empty(kind: str, layer: int, position: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "site": "",
        "layer": layer,
        "site_kind": "",
        "feature": None,
        "position": position,
        "activation": 0.0,
        "influence": 0.0,
        "group": None,
        "promoted": [],
        "card": "",
    }


def _node(draw: random.Random, n_layers: int, kind: str, position: int, group: int | None) -> dict[str, Any]:
    layer, site_kind, feature = draw.randrange(n_layers), draw.choice(ORDER), draw.randrange(128)
    site = str(layer) if site_kind == "mlp" else f"{layer}.{site_kind}"
    promoted = draw.sample(PROMOTED[site_kind], k=min(4, len(PROMOTED[site_kind])))
    return {
        **_empty(kind, layer, position),
        "site": site,
        "site_kind": site_kind,
        "feature": feature,
        "group": group,
        "promoted": promoted,
        "activation": 1.0 if kind == "bos" else round(draw.lognormvariate(0, 0.8), 3),
        "influence": round(min(0.4, 0.02 * draw.lognormvariate(0, 1.1)), 5),
        "card": f"features.html#L{site.replace('.', '-')}F{feature:03d}" if draw.random() < 0.7 else "",
    }


def _edges(draw: random.Random, nodes: Sequence[dict[str, Any]], wanted: int) -> list[list[Any]]:
    """From lower sites to higher ones at the same place, and at a later place into attention and the output."""
    possible = [
        (source, target)
        for source, one in enumerate(nodes)
        for target, other in enumerate(nodes)
        if other["kind"] not in ("bos", "rest")
        and (one["layer"], ORDER.index(one["site_kind"] or "qkv"))
        < (other["layer"], ORDER.index(other["site_kind"] or "qkv"))
        and one["position"] <= other["position"]
    ]
    last = len(nodes) - 1
    chosen = set(draw.sample(possible, k=min(wanted, len(possible))))
    # Nothing ends below the output.
    chosen |= {(source, last) for source in range(last) if source not in {one for one, _ in chosen}}
    return [
        [source, target, round(draw.choice((1, 1, -1)) * draw.lognormvariate(-1.5, 1.0), 4)]
        for source, target in sorted(chosen)
    ]


def _checks(
    draw: random.Random, edges: Sequence[Sequence[Any]], checked: int, noise: Sequence[float]
) -> tuple[list[dict[str, Any]], dict[str, list[float] | None]]:
    if not checked or len(edges) < 2:
        return [], {"random": None, "strongest": None}
    strongest = sorted(edges, key=lambda edge: -abs(edge[2]))[:checked]
    rows, correlation = [], {}
    for (sample, taken), off in zip(
        {"random": draw.sample(list(edges), k=min(checked, len(edges))), "strongest": strongest}.items(),
        noise,
        strict=True,
    ):
        spread = max(abs(weight) for _, _, weight in taken)
        for source, target, weight in taken:
            measured = round(weight + off * spread * draw.gauss(0, 0.5), 4)
            rows.append(
                {"source": source, "target": target, "predicted": weight, "measured": measured, "sample": sample}
            )
        value = round(max(0.0, 1 - off), 3)
        correlation[sample] = [value, round(value - 0.06, 3), round(min(1.0, value + 0.04), 3)]
    return rows, correlation
