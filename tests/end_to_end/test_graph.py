"""`graph` on a finished sweep: its files, the lines on the terminal, and requests that cannot be followed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.conftest import together


def test_a_graph_of_a_finished_sweep(finished, tmp_path: Path) -> None:
    asked = ["graph", "tiny", f"storage.root={finished[0]}", "--max-expanded", "6", "--out"]
    drawn, printed, frozen, unknown = together(
        [*asked, str(tmp_path / "a"), "--prompt", "What is 12 plus 30?"],
        [*asked, str(tmp_path / "b"), "--prompt", "What is 12 plus 30?", "--json", "--token", "7"],
        [*asked, str(tmp_path / "c"), "--prompt", "2 + 2", "--token", "7", "--frozen-patterns", "--frozen-norms"],
        [*asked, str(tmp_path / "d"), "--prompt", "2 + 2", "--token", "seven"],
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "6/6 nodes expanded" in drawn.stdout
    assert "checks, correlation with removing single features" in drawn.stdout
    (page,) = (tmp_path / "a").glob("*.html")
    ours, folder = page.with_suffix(".json"), page.with_suffix(".circuit-tracer")
    assert {*(tmp_path / "a").iterdir()} == {page, ours, folder}
    graph, viewed = json.loads(ours.read_text()), json.loads((folder / ours.name).read_text())
    assert str(page) in drawn.stdout
    assert f"circuit-tracer start-server --graph_file_dir {folder}" in drawn.stdout
    assert graph["output"]["finetuned"] != graph["output"]["unfinetuned"]
    assert len(viewed["nodes"]) - len(graph["tokens"]) == len(graph["nodes"]) == graph["counts"]["nodes"]
    assert len(viewed["links"]) == len(graph["edges"])
    assert viewed["metadata"]["slug"] == ours.stem
    listed = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert [(one["slug"], one["scan"]) for one in listed] == [(ours.stem, "deltascope-tiny")]
    files = {path.name: json.loads(path.read_text()) for path in (folder / "features" / ours.stem).iterdir()}
    of_features = [one for one in viewed["nodes"] if one["feature_type"] == "cross layer transcoder"]
    assert set(files) == {f"{one['feature']}.json" for one in of_features}
    assert all(0 < one["activation_frequency"] <= 1 for one in files.values())
    assert any(quantile["examples"] for one in files.values() for quantile in one["examples_quantiles"])
    assert {"sweep": "tiny", "prompt": "What is 12 plus 30?"}.items() <= graph["facts"].items()

    found = json.loads(printed.stdout)
    assert found["output"]["words"] == "logit of '7'"
    assert found["tokens"][0] == "<bos>"
    assert "nodes expanded" in printed.stderr

    assert frozen.returncode == 0, frozen.stderr
    (held,) = (tmp_path / "c").glob("*.json")
    assert json.loads(held.read_text())["frozen"] == {"patterns": True, "norms": True}

    assert unknown.returncode == 2
    assert "--token: got 'seven', which must be one token of the model" in unknown.stderr
    assert not (tmp_path / "d").exists()


def test_requests_that_cannot_be_followed(finished, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    asked = ["graph", "tiny", f"storage.root={finished[0]}", "--prompt"]
    wrong = {
        ("  ",): "--prompt: got",
        ("7 " * 2000,): "context holds 1024",
        ("2 + 2", "--out", str(file)): f"--out: {file} is a file, must be a folder",
        ("2 + 2", "--node-threshold", "2"): "--node-threshold",
        ("2 + 2", "deltas.targets=[residual]", "evaluate.controls=[]"): "deltas.targets",
    }
    for done, sentence in zip(together(*[[*asked, *words] for words in wrong]), wrong.values(), strict=True):
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
