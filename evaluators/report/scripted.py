"""What the pages with a script share: the script with its hash, data that it reads, and tokens made visible.

In: the name of a script in this folder; values; tokens. Out: text for `scripted.html.jinja`, whose content policy lets
this one script run and no other, and forbids every request.
"""

import base64
import hashlib
import json
import math
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
"""Categories of characters that show nothing, or that change how others are shown."""
JOINER = "\u200d"
"""Joins emojis to one; escaped, they would fall apart."""


class Script(NamedTuple):
    policy: str
    """Its hash, as the content policy names it."""
    text: Markup


def script(name: str) -> Script:
    """A script of this folder."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(f"sha256-{digest}", Markup(text))


def data(value: Any) -> Markup:
    """What a script reads, as JSON that ends no element."""
    text = json.dumps(value, default=lambda scalar: scalar.item(), allow_nan=True)
    return Markup(json.dumps(_rounded(json.loads(text)), separators=(",", ":")).replace("<", "\\u003c"))


def visible(token: str) -> str:
    """A token with white space and control characters made visible."""
    shown = token.replace("\n", "\u23ce").replace("\t", "\u21e5")
    shown = "".join(
        _escaped(char) if unicodedata.category(char) in UNSEEN and char != JOINER else char for char in shown
    )
    return "\u2423" + shown[1:] if shown.startswith(" ") else shown


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _rounded(value: Any) -> Any:
    """Numbers to four digits, and null for none."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
