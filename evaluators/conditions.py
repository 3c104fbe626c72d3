"""The conditions of an evaluation, by name: what replaces an MLP's output, in which model, compared with what.

In: a name. Out: its entry. A new condition is one entry of `CONDITIONS`; only its `combine` ever sees a tensor, so that
tables and plans read this registry without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """How an MLP's output y is replaced: `combine(y, base(x), delta(x), alpha)`, each (tokens, d_model) in fp32, alpha
    (tokens, 1).

    `model` is what is spliced into: the finetuned model, the base model it was finetuned from, or the finetuned model
    with the spliced layers' MLPs taken from the base model. With `substitute`, the site's delta is replaced by the one
    that `splice.sites.SUBSTITUTES` makes under the condition's name.
    """

    name: str
    answers: str
    combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    uses_delta: bool = True
    model: Literal["finetuned", "base", "swapped"] = "finetuned"
    substitute: bool = False
    control: bool = False
    baseline: str = "raw"
    """The condition that its differences are taken from."""


def _raw(y: Tensor, base: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return y


def _base(y: Tensor, base: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return base


def _full(y: Tensor, base: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return base + delta


def _zero(y: Tensor, base: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    return y.new_zeros(y.shape)


def _control(name: str, answers: str, combine: Callable[..., Tensor], **options: object) -> Condition:
    return Condition(name, answers, combine, control=True, **options)  # type: ignore[arg-type]


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("no_delta", "base alone", _base, uses_delta=False),
        Condition("full", "base and delta", _full),
        Condition("alpha", "dose-response", lambda y, base, delta, alpha: base + alpha * delta),
        Condition("true_output", "must equal raw exactly", _raw, uses_delta=False),
        Condition("zero_ablation", "the MLP's share", _zero, uses_delta=False),
        _control(
            "base_model_no_delta",
            "what the base's own reconstruction error does, without any finetuning",
            _base,
            uses_delta=False,
            model="base",
            baseline="base_model_raw",
        ),
        _control(
            "mlp_swap",
            "what the finetuning of this layer's own MLP carries",
            _raw,
            uses_delta=False,
            model="swapped",
        ),
        _control("random_delta", "any perturbation of that size", _full, substitute=True),
        _control("shuffled_delta", "a shift that does not depend on the token", _full, substitute=True),
        _control("dense_delta", "a linear map of the same rank", _full, substitute=True),
        _control("error_term", "must equal raw", lambda y, base, delta, alpha: base + (y - base), uses_delta=False),
    )
}
"""Every condition but those of `UNEDITED`."""
UNEDITED = ("raw", "base_model_raw")
"""Nothing is replaced: in the finetuned model, and in the model that it was finetuned from."""
CONTROLS = tuple(name for name, condition in CONDITIONS.items() if condition.control)
