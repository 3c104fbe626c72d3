"""What sections of settings are made of: strict models, and the types that several of them use.

In: plain values. Out: checked ones, or a pydantic error that says what is allowed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from search_spaces.dimensions import STRICT, Finite

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _distinct(values: Any) -> Any:
    if isinstance(values, list) and len(set(values)) != len(values):
        raise ValueError(f"one is named twice in {values}")
    return values


Distinct = AfterValidator(_distinct)
"""No entry of a list twice: two groups or cells of one name would overwrite each other."""
Layers = Annotated[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"], Distinct]


def _as_layer_set(given: Any) -> Any:
    """`all` and `[1, 2]` are short for a set of these layers."""
    return given if isinstance(given, dict | LayerSet) else {"layers": given}


def _layers_of_set(given: Any) -> Any:
    whole = isinstance(given, list) and given and all(type(one) is int and one >= 0 for one in given)
    if given not in NAMED_SETS and not (whole and len(set(given)) == len(given)):
        raise ValueError(f"must be {', '.join(NAMED_SETS)} or a list of different layers, got {given!r}")
    return given


NAMED_SETS = ("all", "thirds", "each")
"""All layers of a target at once, its lower, middle and upper third, and each layer alone."""

Sampler = Literal["tpe", "gp", "random", "grid"]
"""How a study proposes: `grid` tries every combination of choices, so it needs choices alone."""


class Section(BaseModel):
    model_config = STRICT


class LayerSet(Section):
    """Layers that are spliced at once: a name or a list, and the alphas measured there (null: `evaluate.alphas`)."""

    layers: Annotated[Any, BeforeValidator(_layers_of_set)]
    alphas: Annotated[list[Finite], Distinct] | None = None


Sets = Annotated[list[Annotated[LayerSet, BeforeValidator(_as_layer_set)]], Field(min_length=1)]
