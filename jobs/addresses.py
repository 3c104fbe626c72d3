"""Addresses of stores, as they may be shown.

In: a URL. Out: the same without user and password. Apart from `tracking`, so that nothing heavy is imported for it.
"""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)\S*@")
_QUERY = re.compile(r"(://[^\s?]*)\?\S*")


def without_secrets(text: str) -> str:
    """`text` with `user:password@` and `?...` taken out of every URL in it."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))
