"""Building blocks of the settings' sections: a strict base model, and types that several sections use.

In: plain values. Out: checked values, or a pydantic error that says what is allowed.
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
        raise ValueError(f"an entry appears twice in {values}")
    return values


Distinct = AfterValidator(_distinct)
"""No entry may appear twice: two groups or cells with the same name would overwrite each other."""
Layers = Annotated[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"], Distinct]


Sampler = Literal["tpe", "gp", "random", "grid"]
"""How a study proposes values; `grid` tries every combination of choices, so it allows only choices."""


class Section(BaseModel):
    model_config = STRICT
