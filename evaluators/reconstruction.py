"""Reconstruction: how well base and base + delta stand in for a layer's MLP on evaluation text.

In: a TransformerBridge of the finetuned model, rows, and the sites of one layer that share a base. Out: one
reconstruction cell for each delta.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import by_length, encode_row, pad_left
from data.rows import Row
from evaluators.decoding import forward
from evaluators.interventions import Site, spliced
from models.bridge import device_of, read_input, tap_names

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BATCH_TOKENS = 1024
"""Padded tokens a pass: every position is projected to the vocabulary, which is what fills memory."""


@torch.inference_mode()
def text_cross_entropy(
    bridge: TransformerBridge, rows: Sequence[Row], sites: Sequence[Site], condition: str
) -> tuple[float, int]:
    """Mean cross-entropy in nats of every token after BOS of `input + newline + target + EOS`, and their number."""
    total, count = 0.0, 0
    sequences = [encode_row(bridge.tokenizer, row.input, row.target).ids for row in rows]
    with spliced(bridge, sites, condition) as splice:
        for chosen in by_length([len(row) for row in sequences], BATCH_TOKENS):
            batch = pad_left([sequences[i] for i in chosen], bridge.tokenizer.pad_token_id)
            batch = batch.to(device_of(bridge))
            splice.reset(batch.editable, torch.ones(len(chosen), device=batch.ids.device))
            logits = forward(bridge, batch, batch.ids.shape[1])[:, :-1]
            labels = batch.ids[:, 1:].masked_fill(~batch.editable[:, 1:], -100)
            total += functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int((labels >= 0).sum())
    return total / count, count


@torch.inference_mode()
def site_activations(bridge: TransformerBridge, rows: Sequence[Row], site: Site) -> tuple[Tensor, Tensor]:
    """(tokens, d_model) fp32 input and output of the site's MLP on the evaluation text, without BOS and padding."""
    sequences = [encode_row(bridge.tokenizer, row.input, row.target).ids for row in rows]
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    kept = torch.zeros(0, 0, dtype=torch.bool)

    def reader(column: list[Tensor]):
        def read(activation: Tensor, hook: object) -> None:
            column.append(activation[kept].float())

        return read

    names = tap_names(site.base.taps, site.layer)
    hooks = [(name, reader(column)) for name, column in zip(names, columns, strict=True)]
    with bridge.hooks(fwd_hooks=hooks):
        for chosen in by_length([len(row) for row in sequences], BATCH_TOKENS):
            batch = pad_left([sequences[i] for i in chosen], bridge.tokenizer.pad_token_id)
            batch = batch.to(device_of(bridge))
            kept = batch.editable
            forward(bridge, batch, 1)
    return read_input(site.base.taps, torch.cat(columns[0])), torch.cat(columns[1])


@torch.inference_mode()
def evaluate_reconstruction(
    bridge: TransformerBridge, rows: Sequence[Row], sites: Sequence[Site], ce_raw: float
) -> list[dict[str, Any]]:
    """The figures of every site; all sites share layer and base and differ in their delta.

    `ce_recovered` is 1 - (ce - ce_raw) / (ce_zero - ce_raw), with the layer's MLP output zeroed as reference, and None
    where zeroing it changes nothing. Raises ValueError where the sites do not share layer and base, or lack a delta.
    """
    started = time.perf_counter()
    first = sites[0]
    if not all(site.layer == first.layer and torch.equal(site.base.W_dec, first.base.W_dec) for site in sites):
        raise ValueError(f"reconstruction of layer {first.layer}: the sites must share layer and base")
    x, y = site_activations(bridge, rows, first)
    variance = (y - y.mean(0)).pow(2).sum()
    ce_zero, tokens = text_cross_entropy(bridge, rows, [first], "zero_ablation")
    ce_base, _ = text_cross_entropy(bridge, rows, [first], "no_delta")
    base_acts = first.base.encode(x)
    base = first.base.decode(base_acts)
    shared = {
        **_fit("base", base, y, variance),
        "l0_base": (base_acts > 0).sum(1).float().mean().item(),
        "n_tokens": tokens,
        "ce_raw": ce_raw,
        "ce_base": ce_base,
        "dce_base": ce_base - ce_raw,
        "ce_zero": ce_zero,
        "ce_recovered_base": _recovered(ce_base, ce_raw, ce_zero),
    }
    shared_seconds = (time.perf_counter() - started) / len(sites)
    cells = []
    for site in sites:
        started = time.perf_counter()
        ce_full, _ = text_cross_entropy(bridge, rows, [site], "full")
        assert site.delta is not None  # else `full` has raised
        delta_acts = site.delta.encode(x)
        cells.append(
            {
                **shared,
                **_fit("full", base + site.delta.decode(delta_acts), y, variance),
                "l0_delta": (delta_acts > 0).sum(1).float().mean().item(),
                "ce_full": ce_full,
                "dce_full": ce_full - ce_raw,
                "ce_recovered_full": _recovered(ce_full, ce_raw, ce_zero),
                "seconds": shared_seconds + time.perf_counter() - started,
            }
        )
    return cells


def _fit(name: str, reconstruction: Tensor, y: Tensor, variance: Tensor) -> dict[str, float]:
    error = reconstruction - y
    return {
        f"mean_cos_{name}": torch.cosine_similarity(reconstruction, y, dim=1).mean().item(),
        f"mean_l2_{name}": (error.norm(dim=1) / y.norm(dim=1).clamp(min=1e-12)).mean().item(),
        f"fvu_{name}": (error.pow(2).sum() / variance).item(),
    }


def _recovered(ce: float, ce_raw: float, ce_zero: float) -> float | None:
    return 1 - (ce - ce_raw) / (ce_zero - ce_raw) if ce_zero != ce_raw else None
