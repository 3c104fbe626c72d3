"""The seeded program that writes copy sentences from a grammar: `python -m data.requests.copy_grammar COUNT SEED`.

In: the files in `grammar/` beside this one. Out: an endless iterator of sentences that pass `is_copy_text`,
byte-identical for a given seed on any machine.

Grammar: `name: a b_c` adds words to a rule (`b_c` means "b c"); a line `name:` starts a rule whose alternatives are the
indented lines below it. All alternatives of a rule are equally likely. In an alternative, `{name}` expands a rule,
`{a|b}` picks a word, `{3..40}` draws a whole number, `{3,000..90,000}` one with thousands separators and `{2..40th}`
an ordinal. `{name:s}` is the plural, `{name:c}` starts with a capital, `{name:t}` is in title case; `a` becomes `an`
before a vowel.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.requests.copy_text import is_copy_text
from data.rows import DataError

FOLDER = Path(__file__).with_name("grammar")

Grammar = Mapping[str, Sequence[str]]

_SLOT = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"([\d,]+)\.\.([\d,]+)(th)?")
_ARTICLE = re.compile(r"\b([Aa]) (?=(\w+))")
_AN = re.compile(r"(?i)(?:[aeio]|u(?!k|ku|ni[^mn]|rology|s[aeu]|til)|hour|heir|honest|8|1[18](?!\d))")
_SMALL = frozenset(["a", "an", "and", "for", "in", "of", "on", "or", "the", "to"])
_UNCHANGED = frozenset(
    ["bagpipes", "barracks", "bison", "cymbals", "deer", "foothills", "grouse", "moose", "rapids", "reindeer", "sheep"]
)
_IRREGULAR = {"dormouse": "dormice", "goose": "geese", "mouse": "mice", "ox": "oxen"}


@functools.cache
def load_grammar(folder: Path = FOLDER) -> Grammar:
    """Maps rule names to alternatives, for all files in a folder. Raises `DataError` if nothing can fill a slot."""
    rules: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.txt")):
        alternatives: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                alternatives.append(line.strip())
            elif line and not line.startswith("#"):
                name, words = line.split(":", 1)
                alternatives = rules.setdefault(name, [])
                alternatives += [word.replace("_", " ") for word in words.split()]
    for name, texts in rules.items():
        for slot in (slot for text in texts for slot in _SLOT.findall(text)):
            if slot.partition(":")[0] not in rules and "|" not in slot and not _NUMBER.fullmatch(slot):
                raise DataError(f"{folder.name}: rule {name!r} uses {slot!r}, which is neither a rule nor a range")
    return {name: tuple(texts) for name, texts in rules.items()}


def expand(rule: str, rng: random.Random, grammar: Grammar) -> str:
    """One random expansion of a rule."""

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if number := _NUMBER.fullmatch(slot):
            return _number(number, rng)
        if "|" in slot:
            return rng.choice(slot.split("|"))
        name, _, form = slot.partition(":")
        return _inflect(expand(name, rng, grammar), form)

    return _SLOT.sub(fill, rng.choice(grammar[rule]))


def copy_sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences; they can repeat by chance, so a caller who needs distinct ones must keep a set."""
    grammar = load_grammar()
    while True:
        text = _ARTICLE.sub(_article, expand("sentence", rng, grammar))
        text = text[0].upper() + text[1:].replace("..", ".")
        if is_copy_text(text):
            yield text


def _number(bounds: re.Match[str], rng: random.Random) -> str:
    low, high, ordinal = bounds.groups()
    number = rng.randint(int(low.replace(",", "")), int(high.replace(",", "")))
    if ordinal:
        ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
        return f"{number}{ending}"
    return f"{number:,}" if "," in high else str(number)


def _article(match: re.Match[str]) -> str:
    article, word = match.groups()
    vowel = _AN.match(word) and not word.lower().startswith(("eu", "one"))
    return f"{article}n " if vowel else f"{article} "


def _inflect(text: str, form: str) -> str:
    if form == "c":
        return text[0].upper() + text[1:]
    if form == "t":
        words = [word if word in _SMALL else word[0].upper() + word[1:] for word in text.split()]
        return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])
    return _plural(text) if form == "s" else text


def _plural(noun: str) -> str:
    """A noun with its last word in the English plural."""
    head, space, last = noun.rpartition(" ")
    if last in _UNCHANGED:
        return noun
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif re.search(r"(?:lf|eaf|oaf)$", last) and last != "golf":
        last = last[:-1] + "ves"
    elif last.endswith("sis"):
        last = last[:-2] + "es"
    else:
        last += "es" if re.search(r"(?:s|x|z|ch|sh)$", last) else "s"
    return head + space + last


def main(count: int, seed: int) -> None:
    """Print a comment line and `count` distinct sentences."""
    print(
        f"# Made by `python -m data.requests.copy_grammar {count} {seed}`; written for this project, under its licence."
    )
    seen: set[str] = set()
    for text in copy_sentences(random.Random(f"{seed}/copy")):
        if text not in seen:
            seen.add(text)
            print(text)
        if len(seen) == count:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
