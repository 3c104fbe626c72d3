"""Fuses a base and a delta transcoder into one.

In: both, and the strength of the delta. Out: one JumpReLU transcoder that can be used without knowing about deltas.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from models.errors import ModelError
from models.transcoder import Transcoder, check_fits


def scaled(delta: Transcoder, alpha: float) -> Transcoder:
    """The delta at a strength: `alpha` scales its decoder rows. Raises ModelError where `alpha` is not finite."""
    if not math.isfinite(alpha):
        raise ModelError(f"alpha is {alpha}, expected a finite number")
    return replace(delta, W_dec=alpha * delta.W_dec)


def fuse(base: Transcoder, delta: Transcoder, alpha: float = 1.0) -> Transcoder:
    """One transcoder of `base.d_sae + delta.d_sae` features whose output is `base(x) + alpha * delta(x)`.

    The base's features come first and keep their indices. `alpha` scales the delta's decoder rows, so activations and
    thresholds stay as trained; at 0 the delta's features still fire but write nothing. The result is on the base's
    device. Raises ModelError if sites or widths differ, `alpha` is not finite, or the delta has a decoder bias.
    """
    check_fits(delta, base.site, d_in=base.d_in, d_out=base.d_out, origin="fuse: the delta")
    if delta.b_dec is not None:
        raise ModelError("fuse: the delta has a decoder bias, which a strength would scale as if it were a feature")
    if not math.isfinite(alpha):
        raise ModelError(f"fuse: alpha is {alpha}, but must be a finite number")
    delta = delta.to(base.W_enc.device)
    return Transcoder(
        W_enc=torch.cat([base.W_enc, delta.W_enc], dim=1),
        b_enc=torch.cat([base.b_enc, delta.b_enc]),
        threshold=torch.cat([base.threshold, delta.threshold]),
        W_dec=torch.cat([base.W_dec, alpha * delta.W_dec]),
        b_dec=base.b_dec,
        site=base.site,
    )
