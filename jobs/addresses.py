"""Addresses of stores, made safe to show.

In: a URL. Out: the same URL without user, password and query. Kept apart from `tracking` so that using it imports
nothing heavy.
"""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)\S*@")
_QUERY = re.compile(r"(://[^\s?]*)\?\S*")


def without_secrets(text: str) -> str:
    """`text` with `user:password@` and `?...` removed from every URL in it."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))
