"""How varied a file of texts is: `python -m data.requests.corpus_report FILE [FILE ...]`.

In: text files (one text per line, `#` lines skipped) or JSON-lines rows (their copy rows). Out: each file's rows,
vocabulary, distinct-trigram ratio and near-duplicate rate, over equal numbers of rows to make the figures comparable.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data.readers import Log, Reading, stream_rows, stream_texts

NEAR_DUPLICATE = 0.7

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


class Variety(NamedTuple):
    """`vocabulary`: distinct words regardless of case; `plain_vocabulary`: those without a digit.

    `distinct_trigrams`: fraction of the word trigrams that are distinct. `near_duplicates`: fraction of the rows whose
    word set has a Jaccard index of at least 0.7 with that of another row.
    """

    rows: int
    words: int
    vocabulary: int
    plain_vocabulary: int
    distinct_trigrams: float
    near_duplicates: float


def variety(texts: Sequence[str]) -> Variety:
    """How varied texts are; see `Variety`."""
    rows = [[word.casefold() for word in _WORD.findall(text)] for text in texts]
    vocabulary = {word for words in rows for word in words}
    trigrams = [trigram for words in rows for trigram in zip(words, words[1:], words[2:], strict=False)]
    return Variety(
        rows=len(rows),
        words=sum(map(len, rows)),
        vocabulary=len(vocabulary),
        plain_vocabulary=sum(not any(character.isdigit() for character in word) for word in vocabulary),
        distinct_trigrams=len(set(trigrams)) / max(1, len(trigrams)),
        near_duplicates=len(near_duplicates(set(words) for words in rows)) / max(1, len(rows)),
    )


def near_duplicates(sets: Iterable[set[str]], threshold: float = NEAR_DUPLICATE) -> set[int]:
    """Indices of the sets whose Jaccard index with some other set is at least `threshold`.

    Exact, by prefix filtering: with each set sorted from its rarest word on, two sets this similar share a word among
    the first `n - ceil(threshold * n) + 1` of each, so only sets that share such a word are compared.
    """
    sets = list(sets)
    frequency = Counter(word for words in sets for word in words)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    duplicates: set[int] = set()
    for index, words in enumerate(sets):
        least = -int(-threshold * len(words) // 1)  # ceiling
        prefix = sorted(words, key=lambda word: (frequency[word], word))[: len(words) - least + 1]
        for other in {other for word in prefix for other in holders[word]}:
            shared = len(words & sets[other])
            if shared >= threshold * (len(words) + len(sets[other]) - shared):
                duplicates |= {index, other}
        for word in prefix:
            holders[word].append(index)
    return duplicates


def read_texts(path: str) -> list[str]:
    """The texts of a file; for a `.jsonl` file, the inputs of its rows to copy."""
    if path.endswith(".jsonl"):
        return [row.input for row in stream_rows(Log(path), Reading()) if row.target == row.input]
    return [text for text in stream_texts(Log(path)) if not text.startswith("#")]


def main(paths: Sequence[str]) -> None:
    """Prints one line of figures per file."""
    files = {path: read_texts(path) for path in paths}
    rows = min(map(len, files.values()))
    print(f"{'rows':>6} {'words':>7} {'vocab':>6} {'plain':>6} {'trigrams':>8} {'near-dup':>8}  file")
    for path, texts in files.items():
        figures = variety(texts[:rows])
        print(
            f"{figures.rows:>6} {figures.words:>7} {figures.vocabulary:>6} {figures.plain_vocabulary:>6} "
            f"{figures.distinct_trigrams:>8.3f} {figures.near_duplicates:>8.2%}  {path}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
