"""What sections of settings are made of: strict models, and the types that several of them use.

In: plain values. Out: checked ones, or a pydantic error that says what is allowed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from search_spaces.dimensions import STRICT

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


Sampler = Literal["tpe", "gp", "random", "grid"]
"""How a study proposes: `grid` tries every combination of choices, so it needs choices alone."""


class Section(BaseModel):
    model_config = STRICT
