"""How much finetuning changed each site, and how much of that the deltas leave unexplained, on evaluation text.

In: the finetuned model's passes, patches on un-finetuned paths, and rows. Out: for each patch, sums over the tokens of
every row, separately for prompts and targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.encoding import Encoded, encode_row
from data.rows import Row
from evaluators.splice.interventions import Patch
from evaluators.splice.passes import Passes, read_prefixes
from models.blocks import BlockPath
from sites import Site


@torch.inference_mode()
def evaluate_change(
    passes: Passes,
    patches: Sequence[Patch],
    rows: Sequence[Row],
    exact: tuple[Mapping[Site, BlockPath], Mapping[Site, BlockPath]] | None = None,
) -> list[list[dict[str, Any]]]:
    """For each patch one entry per row and part (`prompt`, `target`), in the order of the rows.

    `change`: sum of |c|^2 over the part's tokens after BOS, c = y - y_un(x) at the raw model's own x; `left`: sum of
    |c - delta(x)|^2; `active`: features that fire, summed over tokens; `n_tokens`. With `exact`, the fp32 paths of the
    un-finetuned and the finetuned model, c is computed by these: at lower precision, a small change would be mostly
    rounding. Raises ValueError for a patch whose ground is not a path, or without a delta.
    """
    for patch in patches:
        if patch.path is None or patch.delta is None:
            raise ValueError(
                f"layer {patch.site.label}: a change is read where the ground is a path, and a delta is there"
            )
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    rows_of: list[dict[int, list[dict[str, Any]]]] = [{} for _ in patches]
    for start in range(0, len(order), passes.batch_size):
        chosen = order[start : start + passes.batch_size]
        batch = [encoded[i].ids for i in chosen]
        captured = read_prefixes(passes.bridge, batch, [patch.site for patch in patches])
        for number, patch in enumerate(patches):
            for i, prefix in zip(chosen, captured[patch.site], strict=True):
                x, y = prefix.x[1:], prefix.y[1:].float()
                before = patch.path
                if exact is not None:
                    before, after = (paths[patch.site] for paths in exact)
                    y = after(x).float()
                assert before is not None
                rows_of[number][i] = _row(patch, rows[i], encoded[i], x, y - before(x).float())
    return [[entry for i in range(len(rows)) for entry in by_row[i]] for by_row in rows_of]


def _row(patch: Patch, row: Row, encoded: Encoded, x: torch.Tensor, change: torch.Tensor) -> list[dict[str, Any]]:
    assert patch.delta is not None
    acts = patch.delta.encode(x)
    unexplained = change - patch.delta.decode(acts)
    parts = {"prompt": slice(0, len(encoded.prompt) - 1), "target": slice(len(encoded.prompt) - 1, None)}
    return [
        {
            "subset": row.label,
            "part": part,
            "change": change[tokens].pow(2).sum().item(),
            "left": unexplained[tokens].pow(2).sum().item(),
            "active": (acts[tokens] > 0).sum().item(),
            "n_tokens": len(x[tokens]),
        }
        for part, tokens in parts.items()
    ]
