"""The seeded program that writes copy sentences from a grammar: `python -m data.copy_grammar COUNT SEED`.

In: `copy_grammar.txt` beside this file. Out: an endless iterator of sentences that pass `is_copy_text`,
byte-identical for a seed on any machine.

Grammar: a line `name:` opens a rule, the indented lines under it are its alternatives, each drawn as often as
any other. In an alternative `{name}` expands a rule, `{a|b}` picks one, `{3..40}` draws a whole number,
`{3,000..90,000}` one with thousands separators, and `a(n)` becomes `a` or `an`.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data.copy_text import is_copy_text
from data.rows import DataError

GRAMMAR = Path(__file__).with_name("copy_grammar.txt")

_SLOT = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=([\"'(]?[\w]))")
_RANGE = re.compile(r"([\d,]+)\.\.([\d,]+)")


@functools.cache
def load_grammar(path: Path = GRAMMAR) -> dict[str, tuple[str, ...]]:
    """Rule name to alternatives. Raises `DataError` for an unknown rule in a slot or an empty rule."""
    rules: dict[str, list[str]] = {}
    alternatives: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            alternatives = rules.setdefault(line.rstrip().removesuffix(":"), [])
        elif ";" in line:
            alternatives += [word.strip() for word in line.split(";") if word.strip()]
        else:
            alternatives.append(line.strip())
    for name, texts in rules.items():
        if not texts:
            raise DataError(f"{path.name}: rule {name!r} has no alternatives")
        for slot in _SLOT.findall(" ".join(texts)):
            if slot not in rules and "|" not in slot and not _RANGE.fullmatch(slot):
                raise DataError(f"{path.name}: rule {name!r} asks for the unknown rule {slot!r}")
    return {name: tuple(texts) for name, texts in rules.items()}


def expand(text: str, rng: random.Random, rules: dict[str, tuple[str, ...]]) -> str:
    """Fill every slot of `text`, outermost first, then settle the articles."""

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in rules:
            return rng.choice(rules[slot])
        if "|" in slot:
            return rng.choice(slot.split("|"))
        low, high = _RANGE.fullmatch(slot).groups()  # type: ignore[union-attr]  # load_grammar checked it
        number = rng.randint(int(low.replace(",", "")), int(high.replace(",", "")))
        return f"{number:,}" if "," in high else str(number)

    while "{" in text:
        text = _SLOT.sub(fill, text)
    text = _ARTICLE.sub(lambda match: match[1] + ("n " if match[2].lower()[-1] in "aeiou8" else " "), text)
    return text[:1].upper() + text[1:]


def copy_sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences; texts repeat by chance, so a caller who needs distinct ones keeps a set."""
    rules = load_grammar()
    while True:
        text = expand("{sentence}", rng, rules)
        if is_copy_text(text):
            yield text


def main(count: int, seed: int) -> None:
    """Print `count` distinct sentences."""
    seen: set[str] = set()
    for text in copy_sentences(random.Random(f"{seed}/copy")):
        if text not in seen:
            seen.add(text)
            print(text)
        if len(seen) == count:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
