"""The conditions of an evaluation, by name: what replaces a site's output, in which model, compared with what.

In: a name. Out: its entry. A new condition is one entry of `CONDITIONS`; only its `combine` touches tensors, so
settings, tables, reports and plans use this registry without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


TARGETS = ("change", "residual")
"""What a delta is trained on: the site's own change, or a base transcoder's residual."""


@dataclass(frozen=True)
class Condition:
    """How a site's output y is replaced: `combine(y, ground(x), delta(x), alpha)`, each (tokens, d_out) in fp32,
    alpha (tokens, 1). The ground is a base transcoder or the un-finetuned path, depending on the delta's target.

    `model` is the model that is spliced into: the finetuned one, the base model it was finetuned from, or the finetuned
    one whose spliced sites have the base model's weights (`swapped`) or weights between the two (`scaled`). With
    `substitute`, `splice.substitutes.SUBSTITUTES` has a function, under the condition's name, that replaces the site's
    delta. `targets` are the deltas' targets for which the condition makes sense.
    """

    name: str
    answers: str
    combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    uses_delta: bool = True
    uses_ground: bool = True
    model: Literal["finetuned", "base", "swapped", "scaled"] = "finetuned"
    substitute: bool = False
    control: bool = False
    dosed: bool = False
    """Measured at every alpha."""
    ranked: bool = False
    """Has the rank of the delta that it replaces, so it is measured for every width of deltas."""
    targets: tuple[str, ...] = TARGETS
    baseline: str = "raw"
    """The condition that its differences are taken from."""
    label: str = ""
    """Its name in figures; if empty, `name`."""


def _raw(y: Tensor, ground: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return y


def _ground(y: Tensor, ground: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return ground


def _full(y: Tensor, ground: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return ground + delta


def _alpha(y: Tensor, ground: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return ground + alpha * delta


def _zero(y: Tensor, ground: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return y.new_zeros(y.shape)


def _error(y: Tensor, ground: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return ground + (y - ground)


def _control(name: str, answers: str, combine: Callable[..., Tensor], **options: object) -> Condition:
    return Condition(name, answers, combine, control=True, **options)  # type: ignore[arg-type]


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("no_delta", "the ground alone", _ground, uses_delta=False),
        Condition("full", "ground and delta", _full, label="sparse deltas"),
        Condition("alpha", "dose-response", _alpha, dosed=True, label="sparse delta"),
        Condition("true_output", "must equal raw exactly", _raw, uses_delta=False, uses_ground=False),
        Condition("zero_ablation", "the MLP's share", _zero, uses_delta=False, uses_ground=False),
        _control("random_delta", "any perturbation of that size", _full, substitute=True),
        _control(
            "scaled_weights",
            "the dense knob: weights between un-finetuned and finetuned",
            _raw,
            uses_delta=False,
            uses_ground=False,
            model="scaled",
            dosed=True,
            targets=("change",),
            label="scaled weights (dense)",
        ),
        _control("shuffled_delta", "a shift that does not depend on the token", _full, substitute=True),
        _control(
            "dense_delta",
            "a linear map of the same rank",
            _full,
            substitute=True,
            ranked=True,
            label="linear map of that rank",
        ),
        _control(
            "pca_delta",
            "the change along as many principal directions",
            _full,
            substitute=True,
            ranked=True,
            targets=("change",),
            label="principal directions",
        ),
        _control(
            "mlp_swap",
            "what the finetuning of these MLPs carries",
            _raw,
            uses_delta=False,
            uses_ground=False,
            model="swapped",
            targets=("residual",),
        ),
        _control(
            "base_model_no_delta",
            "what the base's own reconstruction error does, without any finetuning",
            _ground,
            uses_delta=False,
            model="base",
            baseline="base_model_raw",
            targets=("residual",),
        ),
        _control("error_term", "must equal raw", _error, uses_delta=False, targets=("residual",)),
    )
}
"""Every condition except those of `UNEDITED`."""
UNEDITED = ("raw", "base_model_raw")
"""Nothing is replaced, in the finetuned model and in the model that it was finetuned from."""
CONTROLS = tuple(name for name, condition in CONDITIONS.items() if condition.control)
CHANGE_CONTROLS = {name: CONDITIONS[name] for name in CONTROLS if "change" in CONDITIONS[name].targets}
"""The controls that the report compares with change deltas."""
