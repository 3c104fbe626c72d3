"""Runs inside an environment of circuit-tracer: whether its own data models accept a folder written for its viewer.

In: the folder. Out: circuit-tracer's version on standard output; an error for a file that is not as it must be.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from circuit_tracer.frontend import feature_models, graph_models

FOLDER = Path(sys.argv[1])


def main() -> None:
    listed = json.loads((FOLDER / "graph-metadata.json").read_text(encoding="utf-8"))
    assert list(listed) == ["graphs"], list(listed)
    for entry in listed["graphs"]:
        metadata = graph_models.Metadata.model_validate(entry, strict=True)
        given = json.loads((FOLDER / f"{metadata.slug}.json").read_text(encoding="utf-8"))
        graph = graph_models.Model.model_validate(given, strict=True)
        check_nothing_left_out(given, graph.model_dump())
        features = FOLDER / "features" / metadata.slug
        for node in graph.nodes:
            if node.feature_type == "cross layer transcoder":
                given = json.loads((features / f"{node.feature}.json").read_text(encoding="utf-8"))
                feature = feature_models.Model.model_validate(given, strict=True)
                check_nothing_left_out(given, feature.model_dump())
                layer, number = int(node.layer), feature.index
                assert node.feature == graph_models._cantor_pairing(layer, number), node
                assert graph_models.Node.feature_node(layer, node.ctx_idx, number).node_id == node.node_id, node
    print(version("circuit-tracer"))


def check_nothing_left_out(given, read) -> None:
    """The models drop fields that they do not know."""
    assert given == read, "a file has fields that circuit-tracer does not know"


main()
