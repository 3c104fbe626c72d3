"""A first look measures all subsets at once: the ceiling by parts of each is the one it has by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.rows import make_row
from evaluators.measures.look import Inputs, look_at
from evaluators.measures.parts import Changes, parts_ceiling
from models.comparison import compare
from models.weights import open_weights


def test_each_subset_has_the_ceiling_that_it_has_alone(subject, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "")
    changes = Changes.between(
        subject.bridge, before, compare(open_weights(before), open_weights(subject.folder)).changed
    )
    rows = [
        make_row(f"Say {'so ' * number}{number}.", f"{number} it is", label)
        for number in range(1, 6)
        for label in ("plain", "odd")
    ]
    inputs = Inputs(rows, [], limits=None, behaviours={}, steps=("parts",))
    for few in (32, 3):
        cells = look_at(replace(subject.passes, batch_size=few), changes, inputs)["parts"]
        assert [cell["subset"] for cell in cells] == ["plain", "odd"]
        for cell in cells:
            alone = parts_ceiling(subject.passes, changes, [row for row in rows if row.label == cell["subset"]])
            for model in ("finetuned", "unfinetuned"):
                assert nats(cell[model]) == pytest.approx(nats(alone[model]), rel=1e-4)
            for part, other in zip(cell["parts"], alone["parts"], strict=True):
                assert [part[name] for name in ("part", "layers", "way")] == [
                    other[name] for name in ("part", "layers", "way")
                ]
                assert nats(part["rows"]) == pytest.approx(nats(other["rows"]), rel=1e-4)
                assert [(row["index"], row["n_tokens"]) for row in part["rows"]] == [
                    (row["index"], row["n_tokens"]) for row in other["rows"]
                ]


def nats(rows):
    return [row["nll"] for row in rows]
