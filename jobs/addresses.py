"""Addresses of stores, as they may be shown.

In: a URL. Out: the same without user and password. Apart from `tracking`, so that nothing heavy is imported for it.
"""

from __future__ import annotations


def without_secrets(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
