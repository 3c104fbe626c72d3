"""The special tokens of a tokenizer as text, and whether a text spells one out.

In: a tokenizer, texts. Out: token texts, such as `</s>`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=8)
def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every special token, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = dict.fromkeys([*added, *map(str, tokenizer.all_special_tokens)])
    return tuple(sorted((token for token in tokens if token), key=len, reverse=True))


def spelled_out(texts: Iterable[str], special: Iterable[str]) -> str | None:
    """The first special token that is spelled out in a text, or None."""
    tokens = tuple(special)
    return next((token for text in texts for token in tokens if token in text), None)
