"""JumpReLU transcoders as objects, and the config.json that says which site a transcoder is for.

In: weights. Out: feature activations and reconstructions of what a site writes. A base transcoder has a decoder bias; a
delta transcoder has none, so that a strength can scale it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data.files import replacing
from models.errors import ModelError
from sites import Site, kind_of_taps


@dataclass(frozen=True)
class Transcoder:
    """`acts = relu(pre) * (pre > threshold)`, `pre = x @ W_enc + b_enc`, `output = acts @ W_dec + b_dec`.

    W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_enc and threshold (d_sae,), b_dec (d_out,) or None.
    The decoder bias is not subtracted from the input. Source: Gemma Scope (arXiv 2408.05147), section 2 and
    appendix on transcoders. The last feature of a change delta has an infinite threshold: it is active at BOS, where
    the others are not used, and nowhere else (`with_bos`).
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor | None
    site: Site

    def __post_init__(self) -> None:
        for name, expected_shape in (("W_enc", "(d_in, d_sae)"), ("W_dec", "(d_sae, d_out)")):
            if getattr(self, name).ndim != 2:
                raise ModelError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {expected_shape}")
        d_sae, d_out = self.d_sae, self.d_out
        expected = {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "threshold": (d_sae,), "b_dec": (d_out,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} to match "
                    f"W_enc {tuple(self.W_enc.shape)} and W_dec {tuple(self.W_dec.shape)}"
                )

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_new(self) -> int:
        """Number of features that read x: all except the BOS feature."""
        return self.d_sae - (self.at_bos is not None)

    @cached_property
    def at_bos(self) -> Tensor | None:
        """The activations (d_sae,) at BOS, 1 for the BOS feature; None if there is none."""
        at_bos = torch.isinf(self.threshold)
        return at_bos.to(self.W_enc.dtype) if at_bos.any() else None

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., d_sae) of `x` (..., d_in)."""
        return jump_relu(x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc, self.threshold)

    def decode(self, acts: Tensor) -> Tensor:
        """Output (..., d_out) of `acts` (..., d_sae)."""
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
    """`delta` and one more feature, which adds `direction` (d_out,) at BOS and is silent at every other token."""
    return replace(
        delta,
        W_enc=torch.cat([delta.W_enc, torch.zeros_like(delta.W_enc[:, :1])], dim=1),
        b_enc=torch.cat([delta.b_enc, delta.b_enc.new_zeros(1)]),
        threshold=torch.cat([delta.threshold, delta.threshold.new_full((1,), math.inf)]),
        W_dec=torch.cat([delta.W_dec, direction.to(delta.W_dec).unsqueeze(0)]),
    )


def without_bos(delta: Transcoder) -> Transcoder:
    """`delta` without its BOS feature."""
    if delta.at_bos is None:
        return delta
    elsewhere = delta.at_bos == 0
    b_enc, threshold, W_dec = (tensor[elsewhere] for tensor in (delta.b_enc, delta.threshold, delta.W_dec))
    return replace(delta, W_enc=delta.W_enc[:, elsewhere], b_enc=b_enc, threshold=threshold, W_dec=W_dec)


def silenced(delta: Transcoder, off: Tensor) -> Transcoder:
    """`delta` whose features `off` (d_sae,) never fire, at BOS neither; the others keep their numbers."""
    off = off.to(delta.W_enc.device)
    return replace(
        delta,
        W_enc=torch.where(off, 0.0, delta.W_enc),
        b_enc=torch.where(off, -1.0, delta.b_enc),
        threshold=torch.where(off, 0.0, delta.threshold),
    )


def jump_relu(pre: Tensor, threshold: Tensor) -> Tensor:
    """`relu(pre) * (pre > threshold)`."""
    return torch.relu(pre) * (pre > threshold)


class HasSite(Protocol):
    """A transcoder, or a substitute for one."""

    @property
    def site(self) -> Site: ...

    @property
    def d_in(self) -> int: ...

    @property
    def d_out(self) -> int: ...


def check_fits(transcoder: HasSite, site: Site, *, d_in: int, d_out: int, origin: str) -> None:
    """Raises ModelError if a transcoder was not made for `site`, or has other widths; nothing is rescaled silently."""
    made_for, (reading, *writes) = transcoder.site, site.kind.taps
    if made_for.kind != site.kind:
        raise ModelError(
            f"{origin}: reads {made_for.kind.reading} and replaces {', '.join(made_for.kind.writes)}, "
            f"not {reading} and {', '.join(writes)}"
        )
    if made_for != site:
        raise ModelError(f"{origin}: made for layer {made_for.layer}, not for layer {site.layer}")
    for side, width, expected in (("reads", transcoder.d_in, d_in), ("writes", transcoder.d_out, d_out)):
        if width != expected:
            raise ModelError(f"{origin}: {side} {width} dimensions, but {site.words} of the model {side} {expected}")


def write_config(path: Path, transcoder: Transcoder, facts: dict[str, Any]) -> None:
    """Writes `facts`, layer and taps as JSON, under a temporary name and then renamed to `path`."""
    config = {**facts, "layer": transcoder.site.layer, "taps": transcoder.site.kind.taps}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def read_config(path: Path) -> Site:
    """The site of a transcoder, by the layer and taps in its config.json; raises ModelError if `write_config` did not
    write it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        layer, taps = config["layer"], config["taps"]
        if not isinstance(layer, int) or not all(isinstance(tap, str) for tap in taps):
            raise TypeError(f"layer {layer!r}, taps {taps!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a transcoder's config with layer and taps ({error!r})") from None
    try:
        return Site(layer, kind_of_taps(taps))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
