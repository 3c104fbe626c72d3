"""Copy sentences: the filter, what is shipped, and how varied it is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.requests.copy_text import SHIPPED, c4_copy_texts, copy_texts_of, is_copy_text, shipped_copy_texts
from data.requests.corpus_report import near_duplicates, read_texts, variety
from data.requests.draw import Generator
from data.requests.generator import RequestOptions
from data.rows import DataError

# Of the 4,990 negatives of the reference study's rows, sentences of C4, as `data.requests.corpus_report` counts them.
REFERENCE_ROWS, REFERENCE_VOCABULARY, REFERENCE_PLAIN, REFERENCE_NEAR_DUPLICATES = 4990, 14228, 12587, 0.0447


@pytest.mark.parametrize(
    "text",
    [
        "The museum opened its doors on March 4, 1987.",
        "Version 2.10.3 of the e-mail client costs $5.99 (or €6).",
        "In 1999, Ann-Marie scored in the 3rd minute.",
        "7 of 10 readers “would rather” stay at home & read.",
    ],
)
def test_copy_texts(text: str) -> None:
    assert is_copy_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "Too short, 1987.",
        "No number in this sentence, however long it may become.",
        "The museum opened its doors on March 4, 1987." * 4,
        "The museum opened its doors in 1987 + 1988, they say.",
        "The museum opened its doors 12 - 15 days ago, they say.",
        "The museum opened its doors 12-15 days ago, they say.",
        "The museum opened its doors on 12/05 for everybody.",
        "The museum has a room of 3 x 4 metres, they say.",
        "The museum = 4 rooms, they say, and nothing more.",
        "Please calculate the number of the 4 doors for me.",
        "There were 4 doors plus a window in the old museum.",
        "The 12 rooms divided by the 4 doors of the museum.",
        " The museum opened its doors on March 4, 1987.",
        "The museum opened\tits doors on March 4, 1987.",
        "The museum opened\nits doors on March 4, 1987.",
    ],
)
def test_not_copy_texts(text: str) -> None:
    assert not is_copy_text(text)


def test_shipped_sentences_are_distinct_and_pass_the_filter() -> None:
    texts = shipped_copy_texts()
    assert len(texts) == len(set(texts)) == 16_000
    assert all(map(is_copy_text, texts))


def test_shipped_sentences_are_as_varied_as_intended() -> None:
    figures = variety(read_texts(str(SHIPPED))[:REFERENCE_ROWS])
    assert figures.rows == REFERENCE_ROWS
    assert figures.vocabulary >= REFERENCE_VOCABULARY / 2
    assert figures.plain_vocabulary >= REFERENCE_PLAIN / 2
    assert figures.near_duplicates <= 2 * REFERENCE_NEAR_DUPLICATES
    assert figures.distinct_trigrams > 0.8


def test_no_sentence_shows_its_seams() -> None:
    for text in shipped_copy_texts():
        assert not set("{}_|") & set(text), text
        assert "  " not in text
        assert ".." not in text
        assert text[0] == text[0].upper()


def test_more_copy_rows_than_there_are_is_a_sentence() -> None:
    with pytest.raises(DataError, match=r"only found 15969 of 16001 distinct copy rows for train.*copy_source=c4"):
        Generator(RequestOptions(), 0, "shipped", lambda row: None).rows("copy", "train", 16_001)


def test_documents_give_at_most_two_sentences_each() -> None:
    document = (
        "Short 1. The first of 3 long sentences is here. The second of 3 long ones follows! "
        "And the third of 3 is here too.\n"
    )
    assert list(copy_texts_of([document * 2, "A line of 40 characters without an end", ""])) == [
        "The first of 3 long sentences is here.",
        "The second of 3 long ones follows!",
    ]


def test_without_a_hub_c4_fails_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=r"copy_source=c4 .* \(no route\); data.copy_source=shipped"):
        next(c4_copy_texts())


def test_c4_is_streamed_through_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def stream(*arguments, **options) -> Iterator[dict[str, str]]:
        assert options["streaming"]
        while True:
            yield {"text": "Menu\nThe museum opened its doors on March 4, 1987. Good."}

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *arguments, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    assert next(c4_copy_texts()) == "The museum opened its doors on March 4, 1987."


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=7), max_size=12))
def test_near_duplicates_agree_with_comparing_all_pairs(sets: list[set[str]]) -> None:
    expected = set()
    for (i, a), (j, b) in combinations(enumerate(sets), 2):
        if a and b and 10 * len(a & b) >= 7 * len(a | b):
            expected |= {i, j}
    assert near_duplicates(sets) == expected


def test_variety() -> None:
    figures = variety(["The cat has 4 paws.", "the CAT has 4 paws!", "A dog’s tail."])
    assert figures == (3, 13, 8, 7, 4 / 7, 2 / 3)
