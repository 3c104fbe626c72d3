"""What the command `graph` says of a graph, and how its files are named."""

import csv
from types import SimpleNamespace

import pytest

from evaluators.measures.direct_effects import Place
from evaluators.measures.graph import GraphOptions
from jobs.commands.graph import STRONGEST, Request, _cards, in_lines
from models.frozen import Frozen
from sites import QKV, Site


def described(correlation, frozen=(False, False)):
    def feature(number, kind="feature"):
        position = 0 if kind == "bos" else 1
        return {"kind": kind, "site": "3.o", "feature": number, "position": position, "promoted": ["a", " b"]}

    nodes = [feature(7, "bos"), *(feature(number) for number in range(9)), {"kind": "rest"}, {"kind": "output"}]
    return {
        "tokens": ["<bos>", "Sum", "?"],
        "output": {
            "words": "logit of '<'",
            "finetuned": "<",
            "unfinetuned": "The",
            "value": 12.0,
            "unfinetuned_value": -3.0,
        },
        "frozen": dict(zip(("patterns", "norms"), frozen, strict=True)),
        "counts": {"active": 900, "expanded": 64, "nodes": 12, "edges": 11},
        "nodes": nodes,
        "edges": [[number, 11, 0.1 * (-1) ** number * (number + 1)] for number in range(10)] + [[10, 11, -2.0]],
        "checks": {"correlation": correlation},
    }


GOOD = {"random": [0.99, 0.97, 1.0], "strongest": [0.95, 0.9, 0.98]}


def test_ten_lines():
    lines = in_lines(described(GOOD))
    assert lines[0] == "after '<bos>Sum?' the finetuned model says '<', the un-finetuned one 'The'"
    assert lines[1] == "logit of '<': +12 with all deltas, -3 without"
    assert "  -2 un-finetuned parts alone" in lines
    features = [line for line in lines if "layer 3.o" in line]
    assert len(features) == STRONGEST
    assert features[0] == "  -1 layer 3.o feature 8 on 'Sum' (position 1), promotes 'a' ' b'"
    assert lines[-1].endswith("random edges 0.99 (0.97 to 1.00), strongest edges 0.95 (0.90 to 0.98)")
    assert len(lines) <= 12


def test_the_bos_feature_is_named():
    few = described(GOOD)
    few["edges"] = few["edges"][:1]
    assert any("layer 3.o at BOS on '<bos>' (position 0)" in line for line in in_lines(few))


@pytest.mark.parametrize(
    ("frozen", "hint"), [((False, True), "; try --free-norms"), ((True, True), "--free-patterns --free-norms")]
)
def test_effects_that_do_not_hold_are_the_first_thing_said(frozen, hint):
    (first, *_) = in_lines(described({**GOOD, "random": [0.03, -0.2, 0.3]}, frozen))
    assert first.startswith("warning: do not trust the effects: over random edges they correlate by less than 0.8")
    assert first.endswith(hint)
    assert not in_lines(described(GOOD, frozen))[0].startswith("warning")
    assert "--free" not in in_lines(described({**GOOD, "random": [0.03, -0.2, 0.3]}))[0]


def test_without_checks_there_is_no_correlation():
    lines = in_lines(described({"random": None, "strongest": None}))
    assert lines[-1].endswith("too few edges")


def test_names_are_readable_and_distinct():
    one = Request(None, "What is 2 + 2?", None, GraphOptions())
    assert one.name.startswith("what-is-2-2-")
    others = [
        one._replace(prompt="What is 2 - 2?"),
        one._replace(token="4"),
        one._replace(options=GraphOptions(Frozen(norms=True))),
    ]
    assert len({one.name, *(other.name for other in others)}) == 4
    assert one._replace(prompt="請").name.startswith("prompt-")


def test_features_with_a_card_are_linked(tmp_path):
    """From wherever the graph is written."""
    report = tmp_path / "sweep/report"
    report.mkdir(parents=True)
    space = SimpleNamespace(report=report, folder=tmp_path / "sweep")
    request = Request(SimpleNamespace(space=space), "2 + 2", None, GraphOptions())
    place = Place(Site(1, QKV), 4, 2)
    assert _cards(request)(place) == ""
    (report / "features.html").write_text("")
    with (report / "features.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["target", "layer", "feature"], ["change", "1.qkv", 2], ["residual", "1.qkv", 3]])
    assert _cards(request)(place) == "../report/features.html#L1-qkvF002"
    assert _cards(request)(place._replace(feature=3)) == ""
    elsewhere = _cards(request._replace(out=tmp_path / "own"))
    assert elsewhere(place) == "../sweep/report/features.html#L1-qkvF002"
