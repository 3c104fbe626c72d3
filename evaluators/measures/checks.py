"""Exactness checks that run in every sweep, on the finetuned model itself.

In: a TransformerBridge, a few rows and patches. Out: named checks, passed or not, with the observed differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from data.encoding import Batch, Encoded, encode_row, pad_left
from data.rows import Row
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Patch, RowEdits, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, forward
from evaluators.splice.substitutes import TrueChange
from evaluators.splice.teacher_forcing import Job
from models.blocks import BlockPath, exchanged
from models.bridge import device_of
from sites import Site, sites_label

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


FED_ALONE = 3
"""Tokens that are fed one by one to compare cached with uncached logits."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Tolerance, relative to the largest logit and by the model's dtype, for summing the same terms in another order in all
layers. In bf16, on a CPU, logits differed by 0.014 in a tiny random Gemma-2 and not at all in SmolLM2-135M."""


def exactness_checks(
    bridge: TransformerBridge, rows: Sequence[Row], patches: Sequence[Patch], limits: Limits
) -> list[dict[str, Any]]:
    """Each check as {name, passed, detail}; logits are those of every position of `rows` in one batch."""
    encoded = [encode_row(bridge.tokenizer, row) for row in rows]
    zeroed = [replace(patch, delta=_with_zero_decoder(patch)) for patch in patches]

    def logits(condition: str, alpha: float = 1.0, chosen: Sequence[Patch] = patches) -> Tensor:
        return _logits(bridge, [row.ids for row in encoded], Edit(chosen, condition), alpha)

    raw = logits("raw")
    no_delta = logits("no_delta")
    full = logits("full")
    stop = Stop.of(bridge, limits, rows[0])
    prompts = [Job(Encoded(row.prompt, [])) for row in encoded]
    edit = Edit(patches, "full")
    cached = decode(Passes(bridge, len(prompts)), edit, prompts, [[] for _ in prompts], stop)
    # One pass over prompt and output without a cache chooses the same token at each place as uncached decoding; in bf16
    # a token whose logit differs only by rounding counts as the same.
    within = _rounding(bridge, raw) if _dtype(bridge) != torch.float32 else 0.0
    written = [[*row.prompt, *output] for row, output in zip(encoded, cached, strict=True)]
    plain = _logits(bridge, written, edit, 1.0).split([len(tokens) for tokens in written])
    agreeing = sum(_logit_gap(row_logits, output) <= within for row_logits, output in zip(plain, cached, strict=True))
    place = sites_label(patch.site for patch in patches)
    compare = [
        ("alpha = 0 gives the logits of no_delta", lambda: logits("alpha", 0.0), no_delta),
        ("alpha = 1 gives the logits of full", lambda: logits("alpha", 1.0), full),
        ("splicing a site's own output back gives raw's logits", lambda: logits("true_output"), raw),
        ("with the decoder at zero, full gives the logits of no_delta", lambda: logits("full", 1.0, zeroed), no_delta),
    ]
    checks = [_compare(f"{name} (layer {place})", make, expected) for name, make, expected in compare]
    changed = (full - raw).abs().max().item()
    checks.append(
        {
            "name": f"the splice does change the logits (layer {place})",
            "passed": changed > 0,
            "detail": f"largest difference of a logit between full and raw: {changed:.3g}",
        }
    )
    checks.append(
        {
            "name": f"cached and uncached greedy generation under full agree (layer {place})",
            "passed": agreeing == len(cached),
            "detail": f"{agreeing} of {len(cached)} prompts give the same tokens, {sum(map(len, cached))} tokens"
            + (f", or others within {within:.3g} of the largest logit" if within else ""),
        }
    )
    return checks


def change_checks(
    bridge: TransformerBridge,
    rows: Sequence[Row],
    patches: Sequence[Patch],
    unfinetuned: Mapping[Site, BlockPath],
    finetuned: Mapping[Site, BlockPath],
) -> list[dict[str, Any]]:
    """Checks that the ground equals the un-finetuned sites, and that deltas are added in the right place: with alpha 0
    the logits are those of the swapped model, and with the true change instead of a delta they are raw's, within
    rounding. The paths must be separate copies: those of the patches hold the model's weights while it runs with
    theirs."""
    sequences = [encode_row(bridge.tokenizer, row).ids for row in rows]
    sites = [patch.site for patch in patches]
    true = [replace(patch, delta=TrueChange(unfinetuned[patch.site], finetuned[patch.site])) for patch in patches]
    raw = _logits(bridge, sequences, Edit(), 1.0)
    checks = []
    place = sites_label(sites)
    within = _rounding(bridge, raw)
    for way, cached in (("in one pass", False), ("token by token with a cache", True)):
        with exchanged(bridge, [unfinetuned[site] for site in sites]):
            swapped = _logits(bridge, sequences, Edit(), 1.0, cached=cached)
        name = f"alpha = 0 gives the logits of the model with un-finetuned weights there, {way} (layer {place})"
        make = partial(_logits, bridge, sequences, Edit(patches, "alpha"), 0.0, cached=cached)
        checks.append(_compare(name, make, swapped))
        name = f"the true change in a delta's place gives raw's logits, {way} (layer {place})"
        make = partial(_logits, bridge, sequences, Edit(true, "full"), 1.0, bos=True, cached=cached)
        checks.append(_compare(name, make, raw, within))
    return checks


def _dtype(bridge: TransformerBridge) -> torch.dtype:
    return next(bridge.original_model.parameters()).dtype


def _rounding(bridge: TransformerBridge, logits: Tensor) -> float:
    """The tolerance for logits like these."""
    return ROUNDING[_dtype(bridge)] * logits.abs().max().item()


def _logit_gap(logits: Tensor, output: Sequence[int]) -> float:
    """The largest gap between a token's logit and the maximum at its place, over the tokens of `output`; `logits`
    (tokens, vocabulary) are those of prompt and output."""
    before = logits[len(logits) - len(output) - 1 : -1]
    chosen = before.gather(1, torch.tensor(output, dtype=torch.long, device=logits.device).unsqueeze(1))
    return (before.max(dim=1, keepdim=True).values - chosen).max().item() if output else 0.0


def _with_zero_decoder(patch: Patch) -> Any:
    return replace(patch.transcoder, W_dec=torch.zeros_like(patch.transcoder.W_dec))


def _compare(name: str, make: Callable[[], Tensor], expected: Tensor, within: float = 0.0) -> dict[str, Any]:
    difference = (make() - expected).abs().max().item()
    allowed = f", allowed {within:.3g}" if within else ""
    detail = f"largest difference of a logit: {difference:.3g}{allowed}"
    return {"name": name, "passed": difference <= within, "detail": detail}


@torch.inference_mode()
def _logits(
    bridge: TransformerBridge,
    sequences: Sequence[Sequence[int]],
    edit: Edit,
    alpha: float,
    *,
    bos: bool = False,
    cached: bool = False,
) -> Tensor:
    """The logits (tokens, vocabulary) at every real position; with `bos`, BOS is edited like all other tokens; with
    `cached`, the last tokens are fed one by one."""
    batch = pad_left(sequences, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    length = batch.ids.shape[1]
    chunks = [slice(0, length - FED_ALONE), *(slice(at, at + 1) for at in range(length - FED_ALONE, length))]
    model: Any = bridge.original_model
    cache = DynamicCache(config=model.config) if cached else None
    parts = []
    with spliced(bridge, edit) as splice:
        for chunk in chunks if cached else [slice(0, length)]:
            part = Batch(*(column[:, chunk] for column in batch))
            strengths = torch.full((len(sequences),), alpha, device=batch.ids.device)
            splice.reset(part.mask if bos else part.editable, strengths, RowEdits(bos=part.bos))
            visible = batch.mask[:, : chunk.stop]
            parts.append(forward(bridge, part, part.ids.shape[1], cache=cache, mask=visible))
    return torch.cat(parts, dim=1)[batch.mask]
