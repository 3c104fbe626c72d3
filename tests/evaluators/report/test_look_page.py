"""What a first look suggests: a narrower sweep where it could explain nearly all, and what each could at most."""

import pytest

from evaluators.report.look_page import _enough, _narrower
from evaluators.tables.recovery import EVERY_LAYER

TOKENS = [5, 7, 9, 4]
WOBBLE = (1.0, 1.2, 0.9, 1.1)
BEFORE, AFTER = 3.0, 0.5


def rows(ce: float) -> list[dict]:
    return [{"nll": ce * n * wobble, "n_tokens": n} for n, wobble in zip(TOKENS, WOBBLE, strict=True)]


def found(**lost: float) -> dict:
    """A pair whose parts lose these shares of the effect; names of layers have an underscore for the dash."""
    parts = []
    for name, share in lost.items():
        layers = name.removeprefix("layers_").replace("_", "-") if name.startswith("layers_") else EVERY_LAYER
        part = "all" if name.startswith("layers_") else name
        for way, ce in (("unfinetuned", AFTER + share * (BEFORE - AFTER)), ("finetuned", AFTER)):
            parts.append({"part": part, "layers": layers, "way": way, "rows": rows(ce)})
    cell = {"kind": "parts", "subset": "tool", "finetuned": rows(AFTER), "unfinetuned": rows(BEFORE), "parts": parts}
    return {"parts": [cell]}


def test_each_narrower_sweep_explains_at_most_what_its_sites_alone_lose() -> None:
    narrower = _narrower(
        found(patterns=0.1, values=0.2, output=0.3, mlp=0.99, layers_0_1=0.05, layers_2_3=0.98), seed=0
    )
    assert {setting: shares["share"].item() for setting, shares in narrower.items()} == pytest.approx(
        {"deltas.sites=[o]": 0.3, "deltas.sites=[mlp]": 0.99, "deltas.layers=[0,1]": 0.05, "deltas.layers=[2,3]": 0.98}
    )
    assert _enough(narrower) == ["deltas.sites=[mlp]"], "the first that could explain nearly all"


def test_nothing_narrower_is_suggested_where_parts_stand_in_for_each_other() -> None:
    assert _enough(_narrower(found(values=0.1, output=0.3, mlp=0.5), seed=0)) == []


def test_the_only_part_that_changed_is_no_narrower_sweep() -> None:
    assert _narrower(found(mlp=1.0), seed=0) == {}
