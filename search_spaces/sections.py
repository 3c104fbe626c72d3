"""Building blocks of the settings' sections: a strict base class, and types that several sections use.

In: plain values. Out: checked values, or a pydantic error that says what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_serializer, model_validator

from search_spaces.dimensions import STRICT, Finite
from sites import KINDS
from trainers.settings import Fraction


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


Name = Annotated[str, AfterValidator(_not_blank)]
"""A path, a URL or a name."""


def _distinct(values: Any) -> Any:
    if isinstance(values, list) and len(set(values)) != len(values):
        raise ValueError(f"an entry appears twice in {values}")
    return values


Distinct = AfterValidator(_distinct)
"""No entry may appear twice: two groups or cells with the same name would overwrite each other."""
Layers = Annotated[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | Literal["all"], Distinct]


def _as_layer_set(value: Any) -> Any:
    """Expands the short forms `all` and `[1, 2]` to {layers: ...}."""
    return value if isinstance(value, dict | LayerSet) else {"layers": value}


def _layers_of_set(value: Any) -> Any:
    is_layers = isinstance(value, list) and value and all(type(layer) is int and layer >= 0 for layer in value)
    kind, colon, name = value.rpartition(":") if isinstance(value, str) else ("", "", None)
    is_named = name in NAMED_SETS and (kind in KINDS if colon else True)
    if not is_named and not (is_layers and len(set(value)) == len(value)):
        raise ValueError(
            f"must be {', '.join(NAMED_SETS)}, one of these for a single kind of site, such as "
            f"{next(iter(KINDS))}:all, or a list of different layers"
        )
    return value


NAMED_SETS = ("all", "thirds", "each")
"""All sites of a target at once; its lower, middle and upper third of layers; each site alone."""

Sampler = Literal["tpe", "gp", "random", "grid"]
"""How a study proposes values; `grid` tries every combination, so it allows only choices, no ranges."""


class Section(BaseModel):
    model_config = STRICT
    FIRST: ClassVar[tuple[str, ...]] = ()
    """Settings written to a file before the ones that the section inherits from a trainer."""

    @model_serializer(mode="wrap")
    def _in_order(self, dump: Callable[[Section], dict[str, Any]]) -> dict[str, Any]:
        values = dump(self)
        return {name: values[name] for name in (*self.FIRST, *values) if name in values}


def _behaviour(entry: Any) -> Any:
    if isinstance(entry, dict):  # YAML 1.1 reads the key `on` as true
        entry = {"on" if key is True else key: value for key, value in entry.items()}
    if not (isinstance(entry, str) or (isinstance(entry, dict) and len(entry.keys() - {"on"}) == 1)):
        raise ValueError("must be the name of a check, or {CHECK: OPTION}, maybe with on: [SUBSETS]")
    return entry


Behaviours = dict[
    Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")],
    Annotated[str | dict[str, Any], BeforeValidator(_behaviour)],
]


class Expected(Section):
    """A bound that the finetuned model's rate of a behaviour must meet on a subset."""

    behaviour: str
    subset: str
    at_least: Fraction | None = None
    at_most: Fraction | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Expected:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("must have one of at_least and at_most")
        return self


class LayerSet(Section):
    """Layers spliced at once: a name or a list, the alphas measured there (null: `evaluate.alphas`), and whether to
    measure the controls."""

    layers: Annotated[Any, BeforeValidator(_layers_of_set)]
    alphas: Annotated[list[Finite], Distinct] | None = None
    controls: bool = True


Sets = Annotated[list[Annotated[LayerSet, BeforeValidator(_as_layer_set)]], Field(min_length=1)]
