"""Limits of a generation that the model does not end itself.

In: nothing. Out: a plain value, for settings and workers alike; no heavy imports.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Stop after `max_new_tokens`, or once the text contains one of `texts`."""

    max_new_tokens: int
    texts: tuple[str, ...] = ()
