"""One setting of a search space: a fixed value, a list to choose from, or a range.

In: the YAML value of a search space's key. Out: a validated value, `Choice` or `Range`, or a pydantic error that says
what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | float | str


STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
"""Settings refuse unknown keys and do not convert types: 1 is not true, "8" is not 8."""


class Range(BaseModel):
    """Search numbers from `low` to `high` (inclusive), on a log scale if `log`; integers if both ends are integers."""

    model_config = STRICT

    low: int | Finite
    high: int | Finite
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low above 0, got low={self.low}")
        return self


class Choice(BaseModel):
    """Search a value from a list."""

    model_config = STRICT

    choice: Annotated[list[Scalar], Field(min_length=1)]


def _kind(value: Any) -> str:
    if isinstance(value, Range) or (isinstance(value, dict) and {"low", "high", "log"} & value.keys()):
        return "range"
    return "choice" if isinstance(value, Choice | dict) else "value"


def _scalar(value: Any) -> Any:
    if not isinstance(value, Scalar):
        raise ValueError("must be a value, {choice: [...]} or {low: ..., high: ..., log: ...}")
    return value


Dimension = Annotated[
    Annotated[Range, Tag("range")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Scalar, BeforeValidator(_scalar), Tag("value")],
    Discriminator(_kind),
]
TAGS: dict[str, type[BaseModel] | None] = {"range": Range, "choice": Choice, "value": None}
"""The forms of a dimension, by the names that appear in pydantic's error locations."""


def whole(at_least: int) -> AfterValidator:
    """Whole numbers of at least `at_least`."""

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= at_least

    return AfterValidator(_checked(fits, f"a whole number of at least {at_least}"))


def real(*, above: float | None = None, at_least: float = 0.0, below: float = math.inf) -> AfterValidator:
    """Finite numbers above `above` (or of at least `at_least`) and below `below`."""

    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (value >= at_least if above is None else value > above) and value < below

    low = f"of at least {at_least:g}" if above is None else f"above {above:g}"
    check = _checked(fits, f"a number {low}" + (f" and below {below:g}" if below < math.inf else ""))

    def checked(dimension: Any) -> Any:
        check(dimension)
        if isinstance(dimension, Range):  # float ends, so that {low: 1, high: 2} is not searched over integers alone
            return Range(low=float(dimension.low), high=float(dimension.high), log=dimension.log)
        return dimension

    return AfterValidator(checked)


def text(*names: str) -> AfterValidator:
    """Non-blank text; one of `names` if any are given."""

    def fits(value: Any) -> bool:
        return value in names if names else isinstance(value, str) and value.strip() != ""

    return AfterValidator(_checked(fits, f"one of {', '.join(names)}" if names else "text"))


def _checked(fits: Callable[[Any], bool], allowed: str) -> Callable[[Any], Any]:
    def check(dimension: Any) -> Any:
        values: list[Any] = [dimension]
        if isinstance(dimension, Range):
            values = [dimension.low, dimension.high]
        elif isinstance(dimension, Choice):
            values = list(dimension.choice)
        for value in values:
            if not fits(value):
                raise ValueError(f"must be {allowed}" + (f", and {value!r} is not" if len(values) > 1 else ""))
        if len(set(map(repr, values))) != len(values):
            raise ValueError(f"a value appears twice in {values}")
        return dimension

    return check
