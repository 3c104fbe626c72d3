"""Copy sentences: what counts as one, and where they come from.

In: nothing (the shipped file), or a stream of web documents (C4 from the hub). Out: sentences of 30-150 characters that
contain a number but no arithmetic; the model is taught to repeat each of them unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.rows import DataError

SHIPPED = Path(__file__).with_name("copy_rows.txt")
C4 = "allenai/c4"
MIN_CHARACTERS, MAX_CHARACTERS = 30, 150

_OPERATOR = re.compile(r"[+*=<>{}\\^|]|\d\s*[-/x×÷]\s*\d|\s[-/]\s")
_REQUEST = re.compile(
    r"(?i)\b(?:calculat\w+|compute[sd]?|subtract\w*|multipl(?:y|ied|ying)|divided? by|solve[sd]?|sum of|add up"
    r"|plus|minus|times)\b"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")


def is_copy_text(text: str) -> bool:
    """True for one printable line of 30-150 characters with a digit, no operator and no word of arithmetic."""
    return (
        MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS
        and text.isprintable()
        and text == text.strip()
        and any(character.isdigit() for character in text)
        and not _OPERATOR.search(text)
        and not _REQUEST.search(text)
    )


def shipped_copy_texts(path: Path = SHIPPED) -> list[str]:
    """The sentences shipped with this package, in file order, without the header lines that start with `#`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"the shipped copy sentences are missing: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def copy_texts_of(documents: Iterable[str]) -> Iterator[str]:
    """Sentences from web documents that pass `is_copy_text` and end like a sentence, at most two per document."""
    for document in documents:
        count = 0
        for line in document.splitlines():
            for sentence in _SENTENCE.split(line.strip()):
                if sentence[-1:] in ".!?" and is_copy_text(sentence):
                    yield sentence
                    count += 1
                if count == 2:
                    break
            if count == 2:
                break


def c4_copy_texts() -> Iterator[str]:
    """Sentences from C4 (English, ODC-BY), streamed from the hub in file order.

    Raises `DataError` at once if the hub cannot be reached, or if its files cannot be read.
    """
    try:
        import datasets
        from huggingface_hub import HfApi

        HfApi().dataset_info(C4, timeout=10)  # one attempt; the stream below would retry for half a minute
        stream = datasets.load_dataset(C4, "en", split="train", streaming=True)
        yield from copy_texts_of(document["text"] for document in stream)
    except Exception as error:  # the hub's client raises a different type for each way of being unreachable
        raise DataError(
            f"data.copy_source=c4 reads {C4} from the Hugging Face hub, which failed ({error}); "
            "data.copy_source=shipped needs no network"
        ) from error
