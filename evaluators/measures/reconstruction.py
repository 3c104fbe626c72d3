"""Reconstruction: how well base and base + delta stand in for a layer's MLP on evaluation text.

In: the finetuned model's passes, the patches of one layer, and rows. Out: one reconstruction cell per patch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.encoding import encode_row
from data.rows import Row
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, score
from models.transcoder import Transcoder

TOKENS = 4096
"""Tokens whose feature activations are in memory at once."""


def text_cross_entropy(passes: Passes, edit: Edit, rows: Sequence[Row]) -> tuple[float, int]:
    """Mean cross-entropy in nats of every token after BOS of `input + newline + target + EOS`, and their number."""
    jobs = [Job(encode_row(passes.bridge.tokenizer, row)) for row in rows]
    scored = score(passes, edit, jobs, whole_text=True)
    tokens = sum(row.n_act_tokens for row in scored)
    return sum(row.text_nll or 0.0 for row in scored) / tokens, tokens


@torch.inference_mode()
def site_activations(passes: Passes, patch: Patch, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """x (tokens, d_in), the input of the patch's transcoders, and y (tokens, d_out) in the raw model, without BOS."""
    prefixes = passes.with_prefixes(patch.site)
    encoded = [encode_row(passes.bridge.tokenizer, row).ids for row in rows]
    row_prefixes = prefixes.get(patch.site, encoded)
    x, y = (torch.cat([prefix[column][1:] for prefix in row_prefixes]) for column in (0, 1))
    return x, y


@torch.inference_mode()
def evaluate_reconstruction(
    passes: Passes, patches: Sequence[Patch], rows: Sequence[Row], ce_raw: float
) -> Iterator[dict[str, Any]]:
    """The figures of every patch, in order; all patches must be of one site.

    `ce_recovered` is 1 - (ce - ce_raw) / (ce_zero - ce_raw), with the site's output zeroed as reference, and None if
    zeroing it changes nothing. Raises ValueError if the patches do not share their site, or lack a delta.
    """
    started = time.perf_counter()
    site = patches[0].site
    if any(patch.site != site for patch in patches):
        labels = ", ".join(patch.site.label for patch in patches)
        raise ValueError(f"reconstruction: the patches must be of one layer, got {labels}")
    if any(patch.base is None for patch in patches):
        raise ValueError("reconstruction: the ground must be a base transcoder; a path leaves no error of its own")
    passes = replace(passes, prefixes=passes.with_prefixes(site))

    def cross_entropy(patch: Patch, condition: str) -> float:
        return text_cross_entropy(passes, Edit((patch,), condition), rows)[0]

    x, y = site_activations(passes, patches[0], rows)
    variance = (y.float() - y.float().mean(0)).pow(2).sum().item()
    ce_zero = cross_entropy(patches[0], "zero_ablation")
    bases: list[tuple[Transcoder, dict[str, Any]]] = []
    for patch in patches:
        assert patch.base is not None
        shared = next((figures for base, figures in bases if torch.equal(base.W_dec, patch.base.W_dec)), None)
        if shared is None:
            ce_base = cross_entropy(patch, "no_delta")
            shared = {"ce_base": ce_base, "dce_base": ce_base - ce_raw}
            shared["ce_recovered_base"] = _recovered(ce_base, ce_raw, ce_zero)
            bases.append((patch.base, shared))
        ce_full = cross_entropy(patch, "full")
        yield {
            **shared,
            **_fit(patch, x, y, variance),
            "n_tokens": len(x),
            "ce_raw": ce_raw,
            "ce_zero": ce_zero,
            "ce_full": ce_full,
            "dce_full": ce_full - ce_raw,
            "ce_recovered_full": _recovered(ce_full, ce_raw, ce_zero),
            "seconds": time.perf_counter() - started,
        }
        started = time.perf_counter()


def _fit(patch: Patch, x: Tensor, y: Tensor, variance: float) -> dict[str, float]:
    """Means over tokens: errors and similarities of base and base + delta to `y`, and numbers of active features."""
    assert patch.base is not None and patch.delta is not None  # noqa: PT018
    sums: dict[str, float] = {}
    for inputs, outputs in zip(x.split(TOKENS), y.float().split(TOKENS), strict=True):
        base_acts, delta_acts = patch.base.encode(inputs), patch.delta.encode(inputs)
        base = patch.base.decode(base_acts)
        length = outputs.norm(dim=1).clamp(min=1e-12)
        parts = {"l0_base": (base_acts > 0).sum(1), "l0_delta": (delta_acts > 0).sum(1)}
        for name, reconstructed in (("base", base), ("full", base + patch.delta.decode(delta_acts))):
            error = reconstructed - outputs
            parts[f"mean_cos_{name}"] = torch.cosine_similarity(reconstructed, outputs, dim=1)
            parts[f"mean_l2_{name}"] = error.norm(dim=1) / length
            parts[f"fvu_{name}"] = error.pow(2).sum(1) * (len(x) / variance)
        for name, values in parts.items():
            sums[name] = sums.get(name, 0.0) + values.sum(dtype=torch.float64).item()
    return {name: value / len(x) for name, value in sums.items()}


def _recovered(ce: float, ce_raw: float, ce_zero: float) -> float | None:
    return 1 - (ce - ce_raw) / (ce_zero - ce_raw) if ce_zero != ce_raw else None
