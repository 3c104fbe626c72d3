"""Where a generation is cut if the model does not end it.

In: nothing. Out: a plain value, for settings and workers alike; nothing heavy is imported.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """After so many tokens, or once the text holds one of these."""

    max_new_tokens: int
    texts: tuple[str, ...] = ()
