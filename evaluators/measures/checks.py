"""Exactness checks that run in every sweep, on the finetuned model itself.

In: a TransformerBridge, a few rows and sites. Out: named checks, passed or not, with what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.encoding import Encoded, encode_row, pad_left
from data.rows import Row
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Site, spliced
from evaluators.splice.passes import Passes, Shortcuts, forward
from evaluators.splice.teacher_forcing import Job, score
from models.bridge import device_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def exactness_checks(
    bridge: TransformerBridge, rows: Sequence[Row], sites: Sequence[Site], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Each check as {name, passed, detail}; logits are those of every position of `rows` in one batch."""
    encoded = [encode_row(bridge.tokenizer, row.input, row.target) for row in rows]
    zeroed = [replace(site, delta=_with_zero_decoder(site)) for site in sites]

    def logits(condition: str, alpha: float = 1.0, where: Sequence[Site] = sites) -> Tensor:
        return _logits(bridge, [row.ids for row in encoded], Edit(where, condition), alpha)

    raw = logits("raw")
    no_delta = logits("no_delta")
    full = logits("full")
    stop = Stop(bridge.tokenizer, max_new_tokens)
    prompts = [Job(Encoded(row.prompt, [])) for row in encoded]
    edit, plainly = Edit(sites, "full"), Shortcuts.none()
    cached = decode(Passes(bridge, len(prompts)), edit, prompts, [[] for _ in prompts], stop)
    # One pass over prompt and output without a cache chooses, at each place, what uncached decoding would.
    written = [Job(Encoded(row.prompt, output)) for row, output in zip(encoded, cached, strict=True)]
    plain = score(Passes(bridge, len(prompts), plainly), edit, written)
    same = sum(one.argmax == output for one, output in zip(plain, cached, strict=True))
    where = "+".join(str(site.layer) for site in sites)
    compare = [
        ("alpha = 0 gives the logits of no_delta", lambda: logits("alpha", 0.0), no_delta),
        ("alpha = 1 gives the logits of full", lambda: logits("alpha", 1.0), full),
        ("splicing the MLP's own output back gives raw's logits", lambda: logits("true_output"), raw),
        ("with the decoder at zero, full gives the logits of no_delta", lambda: logits("full", 1.0, zeroed), no_delta),
    ]
    checks = [_compare(f"{name} (layer {where})", make, other) for name, make, other in compare]
    changed = (full - raw).abs().max().item()
    checks.append(
        {
            "name": f"the splice does change the logits (layer {where})",
            "passed": changed > 0,
            "detail": f"largest difference of a logit between full and raw: {changed:.3g}",
        }
    )
    checks.append(
        {
            "name": f"cached and uncached greedy generation under full agree (layer {where})",
            "passed": same == len(cached),
            "detail": f"{same} of {len(cached)} prompts give the same tokens, {sum(map(len, cached))} tokens",
        }
    )
    return checks


def _with_zero_decoder(site: Site) -> Any:
    assert site.delta is not None
    return replace(site.delta, W_dec=torch.zeros_like(site.delta.W_dec))


def _compare(name: str, make: Callable[[], Tensor], other: Tensor) -> dict[str, Any]:
    difference = (make() - other).abs().max().item()
    return {"name": name, "passed": difference == 0.0, "detail": f"largest difference of a logit: {difference:.3g}"}


@torch.inference_mode()
def _logits(bridge: TransformerBridge, sequences: Sequence[Sequence[int]], edit: Edit, alpha: float) -> Tensor:
    """(tokens, vocabulary) of every real position."""
    batch = pad_left(sequences, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    with spliced(bridge, edit) as splice:
        splice.reset(batch.editable, torch.full((len(sequences),), alpha, device=batch.ids.device))
        return forward(bridge, batch, batch.ids.shape[1])[batch.mask]
