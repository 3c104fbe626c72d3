"""What circuit-tracer's viewer is given: the fields of its data models, and what it would hide or mix up."""

from __future__ import annotations

import json
import math

import pytest

from evaluators.measures.direct_effects import Output, Place
from evaluators.measures.graph import Edge, Graph, GraphOptions, Node
from evaluators.measures.graph_formats import (
    NO_CARD,
    NO_TOKENS,
    SCAN,
    as_circuit_tracer,
    feature_files,
    viewer_list,
)
from models.tiny import byte_tokenizer
from sites import QKV, Site

IDS = [2, 75, 111, 13]
FIRST, SECOND, AT_BOS = (Site(0), 3), (Site(1, QKV), 2), (Site(1), 0)
CARD = {
    "at_bos": False,
    "contexts": [
        {"subset": "copy", "tokens": ["a", "\n", "b"], "acts": [0.0, 2.0, 0.5], "peak": 1},
        {"subset": "tool", "tokens": ["c"], "acts": [1.5], "peak": 0},
        {"subset": "copy", "tokens": ["\td"], "acts": [1.0], "peak": 0},
    ],
    "histogram": {"top": 2.0, "counts": [0, 50, 0, 50]},
    "promoted": ["x", "\n"],
    "suppressed": ["y"],
}
RATES = {FIRST: 0.25, SECOND: 0.5, AT_BOS: 1.0}


@pytest.fixture(scope="module")
def graph() -> Graph:
    nodes = [
        Node("feature", Place(FIRST[0], 2, FIRST[1]), 1.25, 0.3, ("x", "\n")),
        Node("bos", Place(AT_BOS[0], 0, AT_BOS[1]), 1.0, 0.05, ("z",)),
        Node("feature", Place(SECOND[0], 3, SECOND[1]), 0.5, 0.2),
        Node("rest", None, 0.0, 0.4),
        Node("output", None, 0.0, 1.0),
    ]
    edges = [Edge(0, 2, 0.5), Edge(0, 4, -0.25), Edge(1, 4, 0.1), Edge(2, 4, 1.0), Edge(3, 4, 2.0)]
    return Graph(
        output=Output(IDS, 70, 37),
        options=GraphOptions(),
        nodes=nodes,
        edges=edges,
        checks=[],
        value=1.0,
        value_without=0.0,
        probability=0.5,
        next_tokens=(70, 37, 70),
        active=9,
        expanded=3,
        total_influence=1.0,
        n_layers=2,
    )


@pytest.fixture(scope="module")
def tracer(graph: Graph) -> dict:
    return as_circuit_tracer(graph, "a-slug", byte_tokenizer(), f"{SCAN}/a-slug")


def test_fields_of_its_data_models(tracer):
    kinds = {
        **dict.fromkeys(("node_id", "layer", "feature_type", "jsNodeId", "clerp"), str),
        **dict.fromkeys(("feature", "ctx_idx", "run_idx", "reverse_ctx_idx"), int),
        "token_prob": float,
        "is_target_logit": bool,
    }
    for node in tracer["nodes"]:
        assert set(node) == {*kinds, "influence", "activation"}
        assert all(type(node[name]) is kind for name, kind in kinds.items())
        assert all(node[name] is None or type(node[name]) is float for name in ("influence", "activation"))
    for name in ("node_id", "jsNodeId"):
        assert len({node[name] for node in tracer["nodes"]}) == len(tracer["nodes"])
    assert set(tracer["metadata"]) == {
        *("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version")
    }
    assert json.loads(json.dumps(tracer)) == tracer


def test_what_no_feature_explains_is_an_error_and_every_token_an_embedding(graph, tracer):
    of_graph, tokens = tracer["nodes"][: len(graph.nodes)], tracer["nodes"][len(graph.nodes) :]
    assert [node["feature_type"] for node in of_graph[-2:]] == ["mlp reconstruction error", "logit"]
    assert of_graph[-2]["clerp"] == "un-finetuned parts"  # the viewer would call an embedding by its token
    assert [(node["feature_type"], node["ctx_idx"], node["layer"]) for node in tokens] == [
        ("embedding", position, "E") for position in range(len(IDS))
    ]
    names = [node["node_id"] for node in of_graph]
    assert [(link["source"], link["target"], link["weight"]) for link in tracer["links"]] == [
        (names[edge.source], names[edge.target], edge.weight) for edge in graph.edges
    ]


def test_the_output_has_a_name_that_the_viewer_can_read(tracer):
    (logit,) = (node for node in tracer["nodes"] if node["is_target_logit"])
    token = byte_tokenizer()
    assert logit["clerp"].split('"')[1] == f"{token.decode([70])!r} - {token.decode([37])!r}"
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == 0.5


def test_the_list_hides_no_node(tracer):
    listed = viewer_list(tracer, "deltascope-tiny")
    (entry,) = listed["graphs"]
    assert entry == {**tracer["metadata"], "scan": "deltascope-tiny", "node_threshold": entry["node_threshold"]}
    influences = [node["influence"] for node in tracer["nodes"] if node["influence"] is not None]
    assert max(influences) <= entry["node_threshold"] <= 1
    for influence, threshold in {0.123: 0.13, 0.83: 0.84, 1.0: 1.0}.items():
        one = {"metadata": {}, "nodes": [{"influence": influence}, {"influence": None}]}
        assert viewer_list(one, "")["graphs"][0]["node_threshold"] == threshold


def test_a_feature_has_the_contexts_of_its_card_by_subset(graph, tracer):
    files = feature_files(graph, "a-scan", {FIRST: CARD}, RATES)
    of_features = [node for node in tracer["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert list(files) == [f"{node['feature']}.json" for node in of_features]
    file = files[f"{of_features[0]['feature']}.json"]
    assert (file["transcoder_id"], file["index"], file["activation_frequency"]) == ("a-scan", 3, 0.25)
    assert (file["top_logits"], file["bottom_logits"]) == (["x", "⏎"], ["y"])
    assert [one["quantile_name"] for one in file["examples_quantiles"]] == [
        "Strongest contexts: copy",
        "Strongest contexts: tool",
    ]
    first, second = file["examples_quantiles"][0]["examples"]
    assert first == {
        "tokens": ["a", "⏎", "b"],
        "tokens_acts_list": [0.0, 2.0, 0.5],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    }
    assert second["tokens"] == ["→d"]
    assert (file["act_min"], file["act_max"], file["histogram"]) == (0.0, 2.0, [0.0, 50.0, 0.0, 50.0])


def test_percentiles_are_read_off_the_histogram(graph):
    values = next(iter(feature_files(graph, "", {FIRST: CARD}, RATES).values()))["quantile_values"]
    assert len(values) == 100
    assert values == sorted(values)
    assert [values[place - 1] for place in (1, 25, 50, 51, 100)] == [0.51, 0.75, 1.0, 1.51, 2.0]


def test_a_feature_without_a_card_says_so(graph):
    first, at_bos, second = feature_files(graph, "", {}, {}).values()
    for file in (first, at_bos, second):
        assert file["examples_quantiles"] == [{"quantile_name": NO_CARD, "examples": []}]
        assert (file["histogram"], file["quantile_values"]) == ([], [])
        assert file["act_max"] > 0
        assert "activation_frequency" not in file
    assert [one["top_logits"] for one in (first, at_bos, second)] == [["x", "⏎"], ["z"], [NO_TOKENS]]


def test_numbers_are_plain(graph):
    for file in feature_files(graph, "", {FIRST: CARD}, RATES).values():
        assert all(type(one) is float and math.isfinite(one) for one in file["quantile_values"] + file["histogram"])
