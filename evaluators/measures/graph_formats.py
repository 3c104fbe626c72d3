"""Attribution graphs as JSON: our own format, and that of circuit-tracer's viewer.

In: a `Graph` and the model's tokenizer, and the cards of its features. Out: plain values. circuit-tracer's formats
are those of its `frontend/graph_models.py`, schema version 1, which Neuronpedia reads too, and of its
`frontend/feature_models.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from evaluators.measures.direct_effects import Place
from evaluators.measures.graph import Graph, Node
from evaluators.measures.single_features import Feature
from sites import KINDS, Site

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 6
"""Significant digits of the numbers stored."""
SCAN = "./data/features"
"""Where the viewer asks its own server for features; it looks for any other set of transcoders on the internet."""
NO_CARD = "No contexts: this feature has no card in the sweep's report"
NO_TOKENS = "(none: it writes queries, keys and values)"
_VISIBLE = str.maketrans("\n\t\r", "⏎→↵")
"""As circuit-tracer writes whitespace in tokens."""


def as_json(
    graph: Graph,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    facts: Mapping[str, str],
    card: Callable[[Place], str] = lambda place: "",
) -> dict[str, Any]:
    """Our own format; docs/graphs.md describes it. `card` gives the link to a feature's card, or an empty text."""
    output, last = graph.output, len(graph.output.ids) - 1
    finetuned_text, unfinetuned_text, _ = (str(tokenizer.decode([token])) for token in graph.next_tokens)
    samples = {sample: graph.correlation(sample) for sample in ("random", "strongest")}
    return {
        "title": title,
        "tokens": [str(tokenizer.decode([token])) for token in output.ids],
        "n_layers": graph.n_layers,
        "output": {
            "position": last,
            "words": words_of(graph, tokenizer),
            "finetuned": finetuned_text,
            "unfinetuned": unfinetuned_text,
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
                sample: None if ends is None or not all(map(math.isfinite, ends)) else [_short(end) for end in ends]
                for sample, ends in samples.items()
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
    """The JSON that circuit-tracer's viewer reads. `scan` is where it finds files of features, or the name of the set
    of transcoders.

    Its nodes have one row a layer. Each kind of site with features in the graph gets a row of its own here, so that all
    edges point upwards: row `layer * kinds + place of the kind`, the layer itself if there is one kind. `rest` becomes
    an error node in the embeddings' row: both stand for what no feature explains. Every token has an embedding without
    edges, as the viewer writes the prompt below these. A node's influence is cumulative: the share that it and all
    larger ones make up.
    """
    kinds, cumulative = _kinds(graph), _cumulative(graph)
    last, top = len(graph.output.ids) - 1, graph.n_layers * len(kinds) + 1
    names, nodes = [], []
    for number, node in enumerate(graph.nodes):
        if node.place is not None:
            (site, position, feature), row = node.place, _row(node.place, kinds)
            promoted = f" ({', '.join(map(repr, node.promoted))})" if node.promoted else ""
            fields: dict[str, Any] = {
                "node_id": f"{row}_{feature}_{position}",
                "jsNodeId": f"{row}_{feature}-{position}",
                "feature": _index(row, feature),
                "layer": str(row),
                "ctx_idx": position,
                "feature_type": "cross layer transcoder",
                "activation": node.activation,
                "clerp": f"layer {site.label} {'at BOS' if node.kind == 'bos' else f'feature {feature}'}{promoted}",
            }
        elif node.kind == "rest":
            fields = {
                "node_id": "0_E_0",
                "jsNodeId": "E_rest-0",
                "feature": -1,
                "layer": "E",
                "ctx_idx": 0,
                "feature_type": "mlp reconstruction error",
                "clerp": "un-finetuned parts",
            }
        else:
            # The viewer writes what stands between double quotes above the graph, where there is room for a few words.
            decoded = [
                tokenizer.decode([token]) for token in (graph.output.plus, graph.output.minus) if token is not None
            ]
            token = " - ".join(map(repr, decoded)).replace('"', "'")
            fields = {
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
        nodes.append(_viewer_node(fields, cumulative.get(number)))
        names.append(fields["node_id"])
    tokens = [str(tokenizer.decode([token])) for token in graph.output.ids]
    nodes += [
        _viewer_node(
            {
                "node_id": f"E_{token}_{position}",
                "jsNodeId": f"E_{token}-{position}",
                "feature": position,
                "layer": "E",
                "ctx_idx": position,
                "feature_type": "embedding",
                "clerp": "",  # the viewer writes its own
            }
        )
        for position, token in enumerate(graph.output.ids)
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": tokens,
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


def _viewer_node(fields: Mapping[str, Any], influence: float | None = None) -> dict[str, Any]:
    """A node with all of its fields; `fields` are those that depend on its kind."""
    shared = {"run_idx": 0, "reverse_ctx_idx": 0, "token_prob": 0.0, "is_target_logit": False, "activation": None}
    return {**shared, "influence": influence, **fields}


def viewer_list(tracer: Mapping[str, Any], scan: str) -> dict[str, Any]:
    """`graph-metadata.json`, the viewer's list of graphs, with one graph in circuit-tracer's format. `scan` is shown.

    The viewer hides nodes whose influence is above the list's threshold. In its own graphs that drops the last node
    that was kept; here it is just above all of them.
    """
    largest = max((node["influence"] for node in tracer["nodes"] if node["influence"] is not None), default=1.0)
    threshold = min(1.0, (math.floor(100 * largest) + 1) / 100)  # the viewer's slider has two decimals
    return {"graphs": [{**tracer["metadata"], "scan": scan, "node_threshold": threshold}]}


def feature_files(
    graph: Graph, scan: str, cards: Mapping[Feature, Mapping[str, Any]], rates: Mapping[Feature, float]
) -> dict[str, dict[str, Any]]:
    """By file name, what the viewer shows of each feature of a graph, from its card (`read_features`) and the share of
    tokens on which it fires.

    A feature without a card has a file too, with the tokens that its node promotes, and so has one that moves no
    tokens a line that says so: where there is nothing, the viewer goes on showing the last feature's.
    """
    kinds, files = _kinds(graph), {}
    for node in graph.nodes:
        if node.place is None:
            continue
        feature: Feature = (node.place.site, node.place.feature)
        card = cards.get(feature, {"contexts": [], "promoted": node.promoted, "suppressed": []})
        histogram = card.get("histogram", {"top": 0.0, "counts": []})
        files[f"{_index(_row(node.place, kinds), node.place.feature)}.json"] = {
            "transcoder_id": scan,
            "index": node.place.feature,
            "examples_quantiles": _examples(card["contexts"]) or [{"quantile_name": NO_CARD, "examples": []}],
            "top_logits": [token.translate(_VISIBLE) for token in card["promoted"]] or [NO_TOKENS],
            "bottom_logits": [token.translate(_VISIBLE) for token in card["suppressed"]],
            "act_min": 0.0,
            "act_max": _short(histogram["top"] or 1.0),
            "quantile_values": _percentiles(histogram["top"], histogram["counts"]),
            "histogram": [float(count) for count in histogram["counts"]],
            **({"activation_frequency": _short(rates[feature])} if feature in rates else {}),
        }
    return files


def _examples(contexts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Contexts by subset, each with its strongest first."""
    return [
        {
            "quantile_name": f"Strongest contexts: {subset}",
            "examples": [
                {
                    "tokens": [token.translate(_VISIBLE) for token in context["tokens"]],
                    "tokens_acts_list": list(context["acts"]),
                    "train_token_ind": context["peak"],
                    "is_repeated_datapoint": False,
                }
                for context in contexts
                if context["subset"] == subset
            ],
        }
        for subset in dict.fromkeys(context["subset"] for context in contexts)
    ]


def _percentiles(top: float, counts: Sequence[int]) -> list[float]:
    """The 1st to 100th percentile of activations above 0, from a histogram of equal bars between 0 and `top`."""
    total, bar = sum(counts), top / max(1, len(counts))
    below = list(accumulate(counts, initial=0))
    values = []
    for percent in range(1, 101 if total else 1):
        needed = percent * total / 100
        index = next(index for index in range(len(counts)) if below[index + 1] >= needed)
        values.append(_short(bar * (index + (needed - below[index]) / counts[index])))
    return values


def _kinds(graph: Graph) -> list[str]:
    """Kinds of site with features in the graph, in their order within a layer."""
    used = {node.place.site.kind.name for node in graph.nodes if node.place is not None}
    return [name for name in KINDS if name in used] or ["mlp"]


def _index(row: int, feature: int) -> int:
    """One number for both, Cantor's pairing, as circuit-tracer has it."""
    return (row + feature) * (row + feature + 1) // 2 + feature


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
