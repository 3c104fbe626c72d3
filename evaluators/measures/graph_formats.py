"""Attribution graphs as JSON: our own format, and that of circuit-tracer's viewer.

In: a `Graph` and the model's tokenizer. Out: plain values. circuit-tracer's format is that of its
`frontend/graph_models.py`, schema version 1; Neuronpedia reads it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from evaluators.measures.direct_effects import Place
from evaluators.measures.graph import Graph, Node
from sites import KINDS, Site

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 6
"""Significant digits of the numbers stored."""


def as_json(
    graph: Graph,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    facts: Mapping[str, str],
    card: Callable[[Place], str] = lambda place: "",
) -> dict[str, Any]:
    """Our own format; docs/graphs.md describes it. `card` gives the link to a feature's card, or an empty text."""
    output, last = graph.output, len(graph.output.ids) - 1
    ours, theirs, _ = (str(tokenizer.decode([token])) for token in graph.said)
    samples = {sample: graph.correlation(sample) for sample in ("random", "strongest")}
    return {
        "title": title,
        "tokens": [str(tokenizer.decode([token])) for token in output.ids],
        "n_layers": graph.n_layers,
        "output": {
            "position": last,
            "words": words_of(graph, tokenizer),
            "finetuned": ours,
            "unfinetuned": theirs,
            "value": _short(graph.value),
            "unfinetuned_value": _short(graph.value_without),
        },
        "frozen": graph.options.frozen._asdict(),
        "thresholds": {"nodes": graph.options.node_threshold, "edges": graph.options.edge_threshold},
        "counts": {
            "active": graph.active,
            "expanded": graph.expanded,
            "nodes": len(graph.nodes),
            "edges": len(graph.edges),
        },
        "nodes": [_node(node, graph, card) for node in graph.nodes],
        "edges": [[edge.source, edge.target, _short(edge.weight)] for edge in graph.edges],
        "groups": [],
        "checks": {
            "rows": [
                {
                    "source": check.edge.source,
                    "target": check.edge.target,
                    "predicted": _short(check.edge.weight),
                    "measured": _short(check.measured),
                    "sample": check.sample,
                }
                for check in graph.checks
            ],
            "correlation": {
                sample: None if found is None or not all(map(math.isfinite, found)) else [_short(one) for one in found]
                for sample, found in samples.items()
            },
        },
        "facts": dict(facts),
    }


def words_of(graph: Graph, tokenizer: PreTrainedTokenizerBase) -> str:
    """The output in words, such as `logit of '<' minus logit of 'The'`."""
    plus, minus = graph.output.plus, graph.output.minus
    words = f"logit of {tokenizer.decode([plus])!r}"
    return words if minus is None else f"{words} minus logit of {tokenizer.decode([minus])!r}"


def _node(node: Node, graph: Graph, card: Callable[[Place], str]) -> dict[str, Any]:
    place, layer = node.place, graph.n_layers if node.kind == "output" else -1
    return {
        "kind": node.kind,
        "site": "" if place is None else place.site.label,
        "layer": layer if place is None else place.site.layer,
        "site_kind": "" if place is None else place.site.kind.name,
        "feature": None if place is None else place.feature,
        "position": (len(graph.output.ids) - 1 if node.kind == "output" else 0) if place is None else place.position,
        "activation": _short(node.activation),
        "influence": _short(node.influence),
        "group": None,
        "promoted": list(node.promoted),
        "card": "" if place is None else card(place),
    }


def as_circuit_tracer(graph: Graph, slug: str, tokenizer: PreTrainedTokenizerBase, scan: str) -> dict[str, Any]:
    """The JSON that circuit-tracer's viewer reads. `scan` names the set of transcoders.

    Its nodes have one row a layer. Each kind of site with features in the graph gets a row of its own here, so that all
    edges point upwards: row `layer * kinds + place of the kind`, the layer itself if there is one kind. `rest` becomes
    an embedding, which is what has no causes there, and a node's influence is cumulative: the share that it and all
    larger ones make up.
    """
    used = {node.place.site.kind.name for node in graph.nodes if node.place is not None}
    kinds = [name for name in KINDS if name in used] or ["mlp"]
    last, top = len(graph.output.ids) - 1, graph.n_layers * len(kinds) + 1
    cumulative, names, nodes = _cumulative(graph), [], []
    for number, node in enumerate(graph.nodes):
        shared: dict[str, Any] = {
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "token_prob": 0.0,
            "is_target_logit": False,
            "influence": cumulative.get(number),
            "activation": None,
        }
        if node.place is not None:
            (site, position, feature), row = node.place, _row(node.place, kinds)
            promoted = f" ({', '.join(map(repr, node.promoted))})" if node.promoted else ""
            own: dict[str, Any] = {
                "node_id": f"{row}_{feature}_{position}",
                "jsNodeId": f"{row}_{feature}-{position}",
                "feature": (row + feature) * (row + feature + 1) // 2 + feature,  # Cantor's pairing
                "layer": str(row),
                "ctx_idx": position,
                "feature_type": "cross layer transcoder",
                "activation": node.activation,
                "clerp": f"{site.label} {'at BOS' if node.kind == 'bos' else f'feature {feature}'}{promoted}",
            }
        elif node.kind == "rest":
            first = graph.output.ids[0]
            own = {
                "node_id": f"E_{first}_0",
                "jsNodeId": f"E_{first}-0",
                "feature": 0,
                "layer": "E",
                "ctx_idx": 0,
                "feature_type": "embedding",
                "clerp": "un-finetuned parts",
            }
        else:
            token = words_of(graph, tokenizer).replace('"', "'")  # the viewer reads what stands between double quotes
            own = {
                "node_id": f"{top}_{graph.output.plus}_{last}",
                "jsNodeId": f"L_{graph.output.plus}-{last}",
                "feature": graph.output.plus,
                "layer": str(top),
                "ctx_idx": last,
                "feature_type": "logit",
                "token_prob": graph.probability,
                "is_target_logit": True,
                "clerp": f'Output "{token}" (p={graph.probability:.3f})',
            }
        nodes.append({**shared, **own})
        names.append(own["node_id"])
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": [str(tokenizer.decode([token])) for token in graph.output.ids],
            "prompt": str(tokenizer.decode(list(graph.output.ids))),
            "node_threshold": graph.options.node_threshold,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [
            {"source": names[edge.source], "target": names[edge.target], "weight": edge.weight} for edge in graph.edges
        ],
    }


def _row(place: Place, kinds: list[str]) -> int:
    return place.site.layer * len(kinds) + kinds.index(place.site.kind.name)


def _cumulative(graph: Graph) -> dict[int, float]:
    """By node, without the output, the share of influence that it and all larger nodes of the graph make up."""
    order = [number for number, node in enumerate(graph.nodes) if node.kind != "output"]
    order.sort(key=lambda number: -graph.nodes[number].influence)
    shares, total = {}, 0.0
    for number in order:
        total += graph.nodes[number].influence / graph.total_influence
        shares[number] = min(total, 1.0)
    return shares


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def with_groups(described: dict[str, Any], grouping: Mapping[str, Any] | None) -> dict[str, Any]:
    """A graph in our own format with the number of each node's group, from a cell of kind `grouping`, if there is
    one."""
    numbers = {
        (Site.parse(layer).label, feature): group["number"]
        for group in (grouping or {"groups": []})["groups"]
        for layer, feature in group["features"]
    }
    nodes = [{**node, "group": numbers.get((node["site"], node["feature"]))} for node in described["nodes"]]
    shown = {node["group"] for node in nodes}
    groups = [
        {
            "number": group["number"],
            "fires_on": [token for token, _ in group["fires_on"]],
            "size": len(group["features"]),
        }
        for group in (grouping or {"groups": []})["groups"]
        if group["number"] in shown
    ]
    return {**described, "nodes": nodes, "groups": groups}
