"""The attribution graph of one prompt as a page: which features lead to the next token, and through which others.

In: a graph as plain values. Out: the text of one self-contained page. Its only script draws the graph and lets a reader
walk through it; without it the strongest edges are a table. Nothing is requested, and no other script may run.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from evaluators.report.findings import number
from evaluators.report.page import template
from evaluators.report.scripted import data, script, visible
from sites import KINDS

Graph = Mapping[str, Any]
TRUSTED = 0.8
"""Correlation between predicted and measured effects below which the page opens with a warning."""
SUMMED = 6
"""Terms of the output's value in words."""
LISTED = 20
"""Strongest edges in each of the two tables."""
SAMPLES = {"random": "{} drawn at random", "strongest": "the {} of largest effect"}
HALF = 100
"""Pixels from the middle of a scatter to its edge."""


class Sample(NamedTuple):
    """One sample of checked edges: its correlation in words, and its points in pixels around the middle."""

    words: str
    title: str
    correlation: str
    trusted: bool
    limit: str
    points: list[tuple[float, float, str]]


class Edge(NamedTuple):
    """A line of a table; `share` is that of all effects on the target, without regard to sign."""

    source: str
    target: str
    effect: str
    share: str


class Checked(NamedTuple):
    source: str
    target: str
    predicted: str
    measured: str
    sample: str


def graph_page(graph: Graph) -> str:
    """The page of a graph in the form that `graph.json` has."""
    samples = _samples(graph)
    output = graph["output"]
    after = output["value"] - output["unfinetuned_value"]
    kinds = [node["kind"] for node in graph["nodes"]]
    tokens = [visible(token) for token in graph["tokens"]]
    return template("graph.html.jinja").render(
        title=graph["title"],
        samples=samples,
        warned=[sample for sample in samples if not sample.trusted],
        trusted=TRUSTED,
        before=_text(graph["tokens"][: output["position"]]),
        asked=tokens[output["position"]],
        rest=_text(graph["tokens"][output["position"] + 1 :]),
        says={"The finetuned model says": output["finetuned"], "The un-finetuned model says": output["unfinetuned"]},
        visible=visible,
        words=output["words"],
        value=number(output["value"], signed=True),
        unfinetuned=number(output["unfinetuned_value"], signed=True),
        change=number(after, signed=True),
        shown=_shown(graph, kinds),
        sums=_sums(graph),
        frozen=_frozen(graph["frozen"]),
        features_page=next((node["card"].partition("#")[0] for node in graph["nodes"] if _link(node["card"])), ""),
        tables={
            "Into the output": _strongest(graph, into_output=True),
            "Between features": _strongest(graph, into_output=False),
        },
        checked=_checked(graph),
        facts=graph["facts"],
        kinds={kind.name: kind.words.removeprefix("the ") for kind in KINDS.values()},
        has={kind: kind in kinds for kind in ("bos", "rest")},
        grouped=any(node["group"] is not None for node in graph["nodes"]),
        script=script("graph.js"),
        data=_data(graph, tokens),
    )


def name(node: Mapping[str, Any]) -> str:
    """`MLP of layer 12, feature 42`."""
    if node["kind"] == "output":
        return "Output"
    if node["kind"] == "rest":
        return "Un-finetuned rest"
    words = KINDS[node["site_kind"]].words.removeprefix("the ")
    tail = "" if node["feature"] is None or node["kind"] == "bos" else f", feature {node['feature']}"
    return f"{words[:1].upper()}{words[1:]} of layer {node['layer']}{' at BOS' if node['kind'] == 'bos' else ''}{tail}"


def _place(graph: Graph, number: int) -> str:
    """A node in a table: its name, its token and where that is."""
    node = graph["nodes"][number]
    if node["kind"] in ("output", "rest"):
        return name(node)
    return f"{name(node)}, on {visible(graph['tokens'][node['position']])} ({node['position']})"


def _text(tokens: Sequence[str]) -> str:
    """Tokens as text: line breaks stay, other characters that show nothing become visible."""
    lines = "".join(tokens).split("\n")
    return "\n".join(line[: len(line) - len(line.lstrip(" "))] + visible(line.lstrip(" ")) for line in lines)


def _samples(graph: Graph) -> list[Sample]:
    samples = []
    for key, form in SAMPLES.items():
        rows = [row for row in graph["checks"]["rows"] if row["sample"] == key]
        words = form.format("1 edge" if len(rows) == 1 else f"{len(rows) or ''} edges".strip())
        value, low, high = graph["checks"]["correlation"].get(key) or (math.nan, math.nan, math.nan)
        if not rows and math.isnan(_plain(value)):
            continue
        limit = max((abs(row[key]) for row in rows for key in ("predicted", "measured")), default=0.0)
        scale = (HALF - 6) / limit if limit else 0.0
        points = [
            (
                round(row["predicted"] * scale, 1),
                round(-row["measured"] * scale, 1),
                f"{_place(graph, row['source'])} to {_place(graph, row['target'])}: "
                f"predicted {number(row['predicted'], signed=True)}, measured {number(row['measured'], signed=True)}",
            )
            for row in rows
        ]
        text = "not known" if math.isnan(_plain(value)) else number(value)
        if not math.isnan(_plain(low)):
            text += f" [{number(low)}, {number(high)}]"
        # An unknown correlation is not a reason to trust the graph.
        trusted = _plain(value) >= TRUSTED
        samples.append(Sample(words, words[:1].upper() + words[1:], text, trusted, f"{limit:.2g}", points))
    return samples


def _plain(value: float | None) -> float:
    return math.nan if value is None else value


def _shown(graph: Graph, kinds: Sequence[str]) -> str:
    """How many of the active features are in the graph, and by which rule."""
    counts, thresholds = graph["counts"], graph["thresholds"]
    features, at_bos = kinds.count("feature"), kinds.count("bos")
    besides = f", besides {at_bos:,} at BOS" if at_bos else ""
    return (
        f"{features:,} of {counts['active']:,} active features are in the graph{besides}: those that carry "
        f"{thresholds['nodes']:.0%} of the influence on the output, with the {counts['edges']:,} edges that carry "
        f"{thresholds['edges']:.0%} of it. Influence is the share of what reaches the output through a node, over all "
        f"paths. Incoming edges were computed for the {counts['expanded']:,} most influential features; paths end at "
        "the others."
    )


def _sums(graph: Graph) -> str:
    """The output's value as a sum of the direct effects on it: by group, of the other features, and of the rest."""
    nodes, fires_on = graph["nodes"], {group["number"]: group["fires_on"] for group in graph["groups"]}
    sums: dict[str, float] = {}
    for source, target, weight in graph["edges"]:
        node = nodes[source]
        if nodes[target]["kind"] != "output":
            continue
        key = {"rest": "the un-finetuned rest", "bos": "features at BOS"}.get(node["kind"], "single features")
        if node["kind"] == "feature" and node["group"] is not None:
            tokens = " ".join(visible(token) for token in fires_on.get(node["group"], [])[:2])
            key = f"group {node['group']}" + (f" (on {tokens})" if tokens else "")
        sums[key] = sums.get(key, 0.0) + weight
    if not sums:
        return ""
    order = sorted(sums, key=lambda key: -abs(sums[key]))
    named, others_sum = order[:SUMMED], sum(sums[key] for key in order[SUMMED:])
    left_out = graph["output"]["value"] - sum(sums.values())
    words = [f"{key} {number(sums[key], signed=True)}" for key in named]
    words += [f"others {number(others_sum, signed=True)}"] if len(order) > SUMMED else []
    words.append(f"edges that are not in the graph {number(left_out, signed=True)}")
    value = number(graph["output"]["value"], signed=True)
    return (
        f"{value} is the sum of direct effects: {', '.join(words)}. Edges are slopes; what they do not explain "
        "counts as the rest's."
    )


def _frozen(frozen: Mapping[str, bool]) -> str:
    names = {"patterns": "attention patterns", "norms": "the scales of norms"}
    constant = [names[key] for key in names if frozen[key]]
    free = [names[key] for key in names if not frozen[key]]
    parts = []
    if constant:
        parts.append(f"{' and '.join(constant)} are held at their values in this run")
    if free:
        parts.append(f"{' and '.join(free)} may change with a feature, to first order")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _strongest(graph: Graph, *, into_output: bool) -> list[Edge]:
    """The edges of largest effect; effects on the output and on a feature have different units. The effect of
    the un-finetuned rest on a feature is left out, as it is not that of another feature."""
    nodes, arriving = graph["nodes"], _arriving(graph)
    edges = [
        edge
        for edge in graph["edges"]
        if (nodes[edge[1]]["kind"] == "output") == into_output and (into_output or nodes[edge[0]]["kind"] != "rest")
    ]
    return [
        Edge(
            _place(graph, source),
            _place(graph, target),
            number(weight, signed=True),
            f"{abs(weight) / arriving[target]:.1%}" if arriving[target] else "-",
        )
        for source, target, weight in sorted(edges, key=lambda edge: -abs(edge[2]))[:LISTED]
    ]


def _arriving(graph: Graph) -> list[float]:
    """For each node the sum of the sizes of the effects on it."""
    arriving = [0.0] * len(graph["nodes"])
    for _, target, weight in graph["edges"]:
        arriving[target] += abs(weight)
    return arriving


def _checked(graph: Graph) -> list[Checked]:
    return [
        Checked(
            _place(graph, row["source"]),
            _place(graph, row["target"]),
            number(row["predicted"], signed=True),
            number(row["measured"], signed=True),
            row["sample"],
        )
        for row in graph["checks"]["rows"]
    ]


def _link(card: str) -> str:
    """The link to a card next to the page; empty for anything else."""
    return "" if ":" in card or card.startswith("/") else card


def _data(graph: Graph, tokens: Sequence[str]) -> Markup:
    """What the script draws: tokens and nodes with their texts ready to be shown."""
    output = graph["output"]
    nodes = [
        {
            **{key: node[key] for key in ("kind", "layer", "position", "activation", "influence", "group")},
            "site": node["site_kind"],
            "feature": node["feature"],
            "name": name(node),
            "promoted": [visible(token) for token in node["promoted"]],
            "card": _link(node["card"]),
        }
        for node in graph["nodes"]
    ]
    groups = [
        {"number": group["number"], "size": group["size"], "fires_on": [visible(token) for token in group["fires_on"]]}
        for group in graph["groups"]
    ]
    shown = {"position": output["position"], "words": output["words"], "value": output["value"]}
    return data({"tokens": tokens, "output": shown, "nodes": nodes, "edges": graph["edges"], "groups": groups})
