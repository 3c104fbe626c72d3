"""The leak check: no text and no request may appear on two sides of a sweep's data.

In: the texts of each side (training, validation, evaluation). Out: for each pair of sides, how many texts and how many
(template, operands) pairs they share, with examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

from data.rows import request_identity
from data.selection import fingerprint

EXAMPLES = 5


def text_key(text: str) -> str:
    """A text with case and spacing normalised."""
    return " ".join(text.split()).casefold()


def request_key(text: str) -> str:
    """A text's (template, operands) as one string; see `data.rows.request_identity`."""
    return "\n".join(request_identity(text))


def find_leaks(
    sides: Mapping[str, Iterable[str]], key: Callable[[str], str] = request_key
) -> dict[str, dict[str, Any]]:
    """`{"training and evaluation": {"same_text": 0, "same_request": 0, "examples": []}, ...}` for each pair.

    Counts are of distinct texts and distinct requests, which `key` identifies. Equal texts are equal requests, so
    `same_request` is zero only if `same_text` is.
    """
    texts: dict[str, set[int]] = {}
    requests: dict[str, dict[int, str]] = {}
    for side, lines in sides.items():
        texts[side], requests[side] = set(), {}
        for line in lines:
            texts[side].add(fingerprint(text_key(line)))
            requests[side].setdefault(fingerprint(key(line)), line)
    leaks = {}
    for first, second in combinations(sides, 2):
        shared = requests[first].keys() & requests[second].keys()
        leaks[f"{first} and {second}"] = {
            "same_text": len(texts[first] & texts[second]),
            "same_request": len(shared),
            "examples": sorted(requests[second][key] for key in shared)[:EXAMPLES],
        }
    return leaks
