"""JumpReLU transcoders as objects, and the config.json with a transcoder's layer and taps.

In: weights. Out: feature activations and reconstructions of an MLP's output. A base transcoder has a decoder bias; a
delta transcoder has none, so that a strength can scale it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.files import replacing
from models.errors import ModelError


class Taps(NamedTuple):
    """Where a transcoder reads and writes, as TransformerLens hook names inside `blocks.L`."""

    input: str
    output: str


GEMMA_SCOPE_TAPS = Taps("ln2.hook_normalized", "hook_mlp_out")
"""Input: after RMS normalisation, before the norm's gain. Output: as added to the residual stream."""
RESID_MID_TAPS = Taps("resid_mid/sqrt(d_model)", "hook_mlp_out")
"""Input: the un-normalised residual divided by a constant. Gemma Scope was not trained on this; it exists so that
checkpoints made with it can be read, and tables name it."""
CONVENTIONS = {taps.input: taps for taps in (GEMMA_SCOPE_TAPS, RESID_MID_TAPS)}
"""Taps by the name that settings and tables use, which is the name of the input."""


@dataclass(frozen=True)
class Transcoder:
    """`acts = relu(pre) * (pre > threshold)`, `pre = x @ W_enc + b_enc`, `output = acts @ W_dec + b_dec`.

    W_enc (d_model, d_sae), W_dec (d_sae, d_model), b_enc and threshold (d_sae,), b_dec (d_model,) or None.
    The decoder bias is not subtracted from the input. Source: Gemma Scope (arXiv 2408.05147), section 2 and
    appendix on transcoders. The last feature of a change delta has an infinite threshold: it is active at BOS, where no
    other is read, and nowhere else (`with_bos`).
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor | None
    layer: int
    taps: Taps = GEMMA_SCOPE_TAPS

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 2:
            raise ModelError(f"W_enc has shape {tuple(self.W_enc.shape)}, expected (d_model, d_sae)")
        d_model, d_sae = self.W_enc.shape
        expected = {"W_dec": (d_sae, d_model), "b_enc": (d_sae,), "threshold": (d_sae,), "b_dec": (d_model,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} to match W_enc {(d_model, d_sae)}"
                )

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @cached_property
    def at_bos(self) -> Tensor | None:
        """The activations (d_sae,) at BOS, 1 for the feature that belongs there; None without such a feature."""
        own = torch.isinf(self.threshold)
        return own.to(self.W_enc.dtype) if own.any() else None

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., d_sae) of `x` (..., d_model)."""
        return jump_relu(x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc, self.threshold)

    def decode(self, acts: Tensor) -> Tensor:
        """Output (..., d_model) of `acts` (..., d_sae)."""
        output = acts @ self.W_dec
        return output if self.b_dec is None else output + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def to(self, device: str | torch.device) -> Transcoder:
        """The same transcoder on `device`."""
        moved = {
            name: tensor.to(device)
            for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def with_bos(delta: Transcoder, direction: Tensor) -> Transcoder:
    """`delta` and one more feature, which adds `direction` (d_model,) at BOS and is silent at every other token."""
    return replace(
        delta,
        W_enc=torch.cat([delta.W_enc, torch.zeros_like(delta.W_enc[:, :1])], dim=1),
        b_enc=torch.cat([delta.b_enc, delta.b_enc.new_zeros(1)]),
        threshold=torch.cat([delta.threshold, delta.threshold.new_full((1,), math.inf)]),
        W_dec=torch.cat([delta.W_dec, direction.to(delta.W_dec).unsqueeze(0)]),
    )


def without_bos(delta: Transcoder) -> Transcoder:
    """`delta` without a feature at BOS."""
    if delta.at_bos is None:
        return delta
    kept = delta.at_bos == 0
    b_enc, threshold, W_dec = (one[kept] for one in (delta.b_enc, delta.threshold, delta.W_dec))
    return replace(delta, W_enc=delta.W_enc[:, kept], b_enc=b_enc, threshold=threshold, W_dec=W_dec)


def jump_relu(pre: Tensor, threshold: Tensor) -> Tensor:
    """`relu(pre) * (pre > threshold)`."""
    return torch.relu(pre) * (pre > threshold)


def check_fits(transcoder: Transcoder, *, d_model: int, n_layers: int, taps: Taps, origin: str) -> None:
    """Raises ModelError if a transcoder and a model do not belong together; nothing is rescaled silently."""
    if transcoder.d_model != d_model:
        raise ModelError(f"{origin}: made for d_model {transcoder.d_model}, but the model has d_model {d_model}")
    if not 0 <= transcoder.layer < n_layers:
        raise ModelError(f"{origin}: made for layer {transcoder.layer}, but the model has layers 0 to {n_layers - 1}")
    if transcoder.taps != taps:
        raise ModelError(
            f"{origin}: reads {transcoder.taps.input} and replaces {transcoder.taps.output}, "
            f"but the sweep uses {taps.input} and {taps.output}"
        )


class Config(NamedTuple):
    """What a transcoder's config.json must contain."""

    layer: int
    taps: Taps


def write_config(path: Path, transcoder: Transcoder, facts: dict[str, Any]) -> None:
    """Writes `facts`, layer and taps as JSON, under a temporary name and then renamed to `path`."""
    config = {**facts, "layer": transcoder.layer, "taps": list(transcoder.taps)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def read_config(path: Path) -> Config:
    """Layer and taps from a config.json; raises ModelError if `write_config` did not write it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        layer, (tap_in, tap_out) = config["layer"], config["taps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a transcoder's config with layer and taps ({error!r})") from None
    if not isinstance(layer, int) or not isinstance(tap_in, str) or not isinstance(tap_out, str):
        raise ModelError(f"{path}: layer must be a number and taps two names, got {layer!r}, {tap_in!r}, {tap_out!r}")
    return Config(layer, Taps(tap_in, tap_out))
