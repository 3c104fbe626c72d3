"""Kinds of site: the position-wise functions x -> y inside a transformer block.

In: nothing. Out: a table with one row for each kind. A new kind is a new row here, and a path in `models/blocks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Kind:
    """What sites of one kind read and write, as TransformerLens hook names inside `blocks.L`."""

    order: int
    """Place in a block's forward pass."""
    name: str
    """The kind in labels, folders and settings."""
    reads: str
    """The hook that holds x."""
    writes: tuple[str, ...]
    """The hooks that hold y, concatenated in this order."""
    parts: tuple[str, ...]
    """The bridge's components between x and y, whose weights the site owns; not every architecture has all of them."""
    in_stream: bool
    """Whether y is added to the residual stream."""
    words: str
    """The site in sentences."""
    at: tuple[tuple[str, ...], ...] = ()
    """For each of `writes`, alternative hooks; the first one that the model has is used. They are as close to the
    weights as possible, so that TransformerLens need not run the attention around them. Empty: `writes` themselves."""
    scaled: bool = False
    """Whether a transcoder reads x / sqrt(d_model) instead of x."""

    @property
    def reading(self) -> str:
        """What a transcoder reads, by its name in settings (`transcoders.convention`), tables and files."""
        return "resid_mid/sqrt(d_model)" if self.scaled else self.reads

    @property
    def taps(self) -> list[str]:
        """What a transcoder reads and writes, as stored in its config.json; the inverse of `kind_of_taps`."""
        return [self.reading, *self.writes]


QKV = Kind(
    *(0, "qkv", "ln1.hook_normalized", ("attn.hook_q", "attn.hook_k", "attn.hook_v")),
    *(("ln1", "attn.q", "attn.k", "attn.v", "attn.qkv"), False, "the queries, keys and values"),
)
"""x: after the norm, before its gain. y: queries, keys and values, concatenated as projected: before any norms of their
own and the rotary embedding, so that a change of weights is linear in x. Attention as a whole is not position-wise, but
its projections are."""
ATTENTION_OUT = Kind(
    *(1, "o", "attn.hook_z", ("hook_attn_out",), ("attn.o", "ln1_post"), True, "attention's output"),
    at=(("ln1_post.hook_out", "attn.o.hook_out"),),
)
"""x: the heads' outputs. y: what attention adds to the stream."""
MLP = Kind(2, "mlp", "ln2.hook_normalized", ("hook_mlp_out",), ("ln2", "mlp", "ln2_post"), True, "the MLP")
"""x: after RMS normalisation, before the norm's gain, as Gemma Scope reads it. y: as added to the residual stream."""
UNNORMALISED_MLP = replace(MLP, reads="hook_resid_mid", scaled=True)
"""The MLP, read before the norm and divided by a constant. Gemma Scope was not trained on this; it exists so that
checkpoints trained this way can be read and named in tables."""

KINDS = {kind.name: kind for kind in (QKV, ATTENTION_OUT, MLP)}
"""In the order of a block's forward pass."""
READINGS = {kind.reading: kind for kind in (MLP, UNNORMALISED_MLP)}
"""The MLP's kinds by what a base transcoder reads there."""


def kind_of_taps(taps: Sequence[str]) -> Kind:
    """The kind of a transcoder whose config.json has these taps; raises ValueError if there is none."""
    for kind in (*KINDS.values(), *READINGS.values()):
        if kind.taps == list(taps):
            return kind
    allowed = "; ".join(", ".join(kind.taps) for kind in dict.fromkeys([*KINDS.values(), *READINGS.values()]))
    raise ValueError(f"taps {', '.join(map(str, taps))} belong to no kind of site (there are {allowed})")
