"""One prompt under every condition: cross-entropy, next tokens, and which features are active where.

In: a TransformerBridge, a row (with or without a target), and patches. Out: plain values for a terminal or JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Encoded, encode_prompt, encode_row, pad_left
from data.rows import Row
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Patch, RowEdits, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import ALL, Passes, forward
from evaluators.splice.teacher_forcing import Job
from models.blocks import hooks_at
from models.bridge import device_of, hooked
from models.transcoder import Transcoder
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from models.rest import Rest


@torch.inference_mode()
def probe(
    bridge: TransformerBridge,
    row: Row,
    patches: Sequence[Patch],
    alphas: Sequence[float],
    *,
    top: int,
    limits: Limits,
    rest: Rest | None = None,
) -> dict[str, Any]:
    """`conditions`: for raw, no_delta, full and each further alpha its `ce` (nats per target token; without a target,
    per token of raw's own greedy output), `delta_ce`, the `top` next tokens with their probabilities, and the greedy
    `output`. What finetuning changed outside all sites has the deltas' strength, if it is given as `rest`.
    `features`: for each patch and token the `top` active base and delta features, strongest first, in the raw run."""
    passes, stop = Passes(bridge, shortcuts=replace(ALL, share_prefix=rest is None)), Stop.of(bridge, limits, row)
    prompt = encode_prompt(bridge.tokenizer, row)
    start = [Job(Encoded(prompt, []))]
    if not row.target:
        (answer,) = decode(passes, Edit(), start, [[]], stop)
        encoded = Encoded(prompt, answer)
    else:
        encoded = encode_row(bridge.tokenizer, row)
    asks = [("raw", "raw", 1.0), ("no_delta", "no_delta", 0.0), ("full", "full", 1.0)]
    asks += [(f"alpha {alpha:g}", "alpha", alpha) for alpha in alphas]
    conditions: list[dict[str, Any]] = []
    for name, condition, alpha in asks:
        edit = Edit(patches, condition)
        with rest.at(bridge, alpha) if rest else nullcontext():
            logits = _logits(bridge, encoded, edit, alpha)
            (output,) = decode(passes, edit, [Job(Encoded(prompt, []), alpha)], [[]], stop)
        ce = functional.cross_entropy(logits[:-1], torch.tensor(encoded.target, device=logits.device)).item()
        chances = logits[0].softmax(-1).topk(min(top, logits.shape[-1]))
        conditions.append(
            {
                "condition": name,
                "ce": ce,
                "delta_ce": ce - (conditions[0]["ce"] if conditions else ce),
                "next_tokens": [
                    {"token": bridge.tokenizer.decode([index]), "probability": chance}
                    for chance, index in zip(chances.values.tolist(), chances.indices.tolist(), strict=True)
                ],
                "output": stop.text(output),
            }
        )
    return {
        "target": stop.text(encoded.target),
        "conditions": conditions,
        "features": _features(bridge, encoded, patches, top),
    }


def _logits(bridge: TransformerBridge, encoded: Encoded, edit: Edit, alpha: float) -> Tensor:
    """(target tokens + 1, vocabulary): the logits that predict each target token, and the token after them."""
    batch = pad_left([encoded.ids], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    with spliced(bridge, edit) as splice:
        strengths = torch.tensor([alpha], device=batch.ids.device)
        splice.reset(batch.editable, strengths, RowEdits(bos=batch.bos))
        return forward(bridge, batch, len(encoded.target) + 1)[0]


def _features(bridge: TransformerBridge, encoded: Encoded, patches: Sequence[Patch], top: int) -> list[dict[str, Any]]:
    batch = pad_left([encoded.ids], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    inputs: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            inputs[site] = x[0].float()

        return read

    with hooked(bridge, [hook for patch in patches for hook in hooks_at(bridge, patch.site, reader(patch.site))]):
        forward(bridge, batch, 1)
    tokens = [bridge.tokenizer.decode([index]) for index in encoded.ids]
    features = []
    for patch in patches:
        x = inputs[patch.site][1:]  # transcoders are not applied at BOS
        transcoders = (patch.base, patch.transcoder if patch.delta is not None else None)
        base, delta = (
            [[], *(_strongest(transcoder, x, top) if transcoder else [[] for _ in x])] for transcoder in transcoders
        )
        at_bos = None if patch.delta is None else patch.delta.at_bos
        if at_bos is not None:  # but a delta may have a BOS feature
            active = at_bos.nonzero()[:, 0].tolist()
            delta[0] = [{"feature": feature, "strength": at_bos[feature].item()} for feature in active]
        features += [
            {"layer": patch.site.key, "position": index, "token": token, "base": base[index], "delta": delta[index]}
            for index, token in enumerate(tokens)
            if index > 0 or delta[0]
        ]
    return features


def _strongest(transcoder: Transcoder, x: Tensor, top: int) -> list[list[dict[str, Any]]]:
    """For each token its `top` active features as {feature, strength}."""
    values, indices = transcoder.encode(x).topk(min(top, transcoder.d_sae), dim=1)
    return [
        [{"feature": feature, "strength": value} for value, feature in zip(row, place, strict=True) if value > 0]
        for row, place in zip(values.tolist(), indices.tolist(), strict=True)
    ]
