"""Copy sentences: the filter, the grammar, what is shipped, and how varied it is."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.requests import copy_grammar
from data.requests.copy_grammar import copy_sentences, expand, load_grammar
from data.requests.copy_text import SHIPPED, c4_copy_texts, copy_texts_of, is_copy_text, shipped_copy_texts
from data.requests.corpus_report import near_duplicates, read_texts, variety
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


def test_shipped_sentences_are_what_the_program_writes() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "data.requests.copy_grammar", "6000", "0"],
        capture_output=True,
        check=True,
        cwd=SHIPPED.parents[2],
    )
    assert run.stdout == SHIPPED.read_bytes()


def test_shipped_sentences_are_distinct_and_pass_the_filter() -> None:
    texts = shipped_copy_texts()
    assert len(texts) == len(set(texts)) >= 5000
    assert all(map(is_copy_text, texts))


def test_shipped_sentences_are_as_varied_as_intended() -> None:
    figures = variety(read_texts(str(SHIPPED))[:REFERENCE_ROWS])
    assert figures.rows == REFERENCE_ROWS
    assert figures.vocabulary >= REFERENCE_VOCABULARY / 2
    assert figures.plain_vocabulary >= REFERENCE_PLAIN / 2
    assert figures.near_duplicates <= 2 * REFERENCE_NEAR_DUPLICATES
    assert figures.distinct_trigrams > 0.8


def test_every_rule_is_used() -> None:
    grammar = load_grammar()
    reached, open_rules = {"sentence"}, ["sentence"]
    while open_rules:
        for text in grammar[open_rules.pop()]:
            for slot in copy_grammar._SLOT.findall(text):
                name = slot.partition(":")[0]
                if name in grammar and name not in reached:
                    reached.add(name)
                    open_rules.append(name)
    assert reached == set(grammar)


def test_no_rule_repeats_a_word_by_mistake() -> None:
    """A sentence frame may stand twice to be drawn twice as often; a word list has no reason to."""
    for name, texts in load_grammar().items():
        if not any("{" in text for text in texts):
            assert len(texts) == len(set(texts)), (name, sorted(text for text in texts if texts.count(text) > 1))


def test_no_sentence_shows_its_seams() -> None:
    for text in islice(copy_sentences(random.Random("seams")), 3000):
        assert not set("{}_|") & set(text), text
        assert "  " not in text
        assert ".." not in text
        assert text[0] == text[0].upper()


def test_slots(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(
        "# head\nsentence:\n  {2..2} {animal:s} of {a|a} {place:c}, the {21..21th}, {1,000..1,000}: {title:t}\n\n"
        "animal: mountain_goose\n",
        encoding="utf-8",
    )
    (tmp_path / "two.txt").write_text("place: york\ntitle: a_note_on_the_sea\n", encoding="utf-8")
    grammar = load_grammar(tmp_path)
    assert (
        expand("sentence", random.Random(0), grammar)
        == "2 mountain geese of a York, the 21st, 1,000: A Note on the Sea"
    )


def test_a_slot_that_nothing_fills_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("sentence:\n  {absent} 1\n", encoding="utf-8")
    with pytest.raises(DataError, match="rule 'sentence' uses 'absent'"):
        load_grammar(tmp_path)


@pytest.mark.parametrize(
    ("noun", "plural"),
    [
        ("otter", "otters"),
        ("fox", "foxes"),
        ("finch", "finches"),
        ("pony", "ponies"),
        ("donkey", "donkeys"),
        ("wolf", "wolves"),
        ("bookshelf", "bookshelves"),
        ("sheep", "sheep"),
        ("field mouse", "field mice"),
        ("compass", "compasses"),
        ("lens", "lenses"),
        ("thesis", "theses"),
        ("ottoman", "ottomans"),
        ("barracks", "barracks"),
        ("octopus", "octopuses"),
        ("iris", "irises"),
        ("sideboard", "sideboards"),
    ],
)
def test_plurals(noun: str, plural: str) -> None:
    assert copy_grammar._plural(noun) == plural


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a owl", "an owl"),
        ("A 8 year old", "An 8 year old"),
        ("a 18th", "an 18th"),
        ("a 80th", "an 80th"),
        ("a 180", "a 180"),
        ("a uniform", "a uniform"),
        ("a unusual uncle", "an unusual uncle"),
        ("a umbrella", "an umbrella"),
        ("a user", "a user"),
        ("a ukulele", "a ukulele"),
        ("a European", "a European"),
        ("a one-off", "a one-off"),
        ("a honest heirloom", "an honest heirloom"),
        ("a house", "a house"),
        ("a otter and a ibis", "an otter and an ibis"),
        ("extra owl", "extra owl"),
    ],
)
def test_articles(text: str, expected: str) -> None:
    assert copy_grammar._ARTICLE.sub(copy_grammar._article, text) == expected


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
