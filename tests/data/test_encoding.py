"""Tokens and batches: one prefix for training and generation, left padding that positions and masks agree with."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encoding import by_length, encode_prompt, encode_row, encode_text, ends_of, pad_left, with_answer
from data.rows import Row
from models.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@given(st.text(), st.text())
@settings(max_examples=100, deadline=None)
def test_a_row_is_its_prompt_and_its_target(text, target):
    row = encode_row(TOKENIZER, Row(text, target, ""))
    assert row.prompt == encode_prompt(TOKENIZER, Row(text, "", "")) == encode_text(TOKENIZER, text + "\n")
    assert row.target == [*encode_text(TOKENIZER, target)[1:], TOKENIZER.eos_token_id]
    assert row.ids == row.prompt + row.target
    assert row.prompt[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(row.prompt[1:]) == text + "\n"
    assert TOKENIZER.decode(row.target[:-1]) == target
    assert row.ids.count(TOKENIZER.bos_token_id) == row.ids.count(TOKENIZER.eos_token_id) == 1


def test_an_answer_that_was_cut_has_no_end_token():
    for row in (Row("a", "b c", ""), Row("a", "b c", "", prompt="<user>a", end="<eos>")):
        whole = encode_row(TOKENIZER, row)
        tokens = whole.target[:-1]
        ended, cut = (with_answer(TOKENIZER, row, "b c", tokens, ended) for ended in (True, False))
        assert encode_row(TOKENIZER, ended) == whole
        assert encode_row(TOKENIZER, cut) == whole._replace(target=tokens)
        assert encode_row(TOKENIZER, with_answer(TOKENIZER, row, "", [], ended=False)).target == whole.target[-1:]


def test_a_chat_ends_at_every_end_of_turn_of_the_generation_config():
    eos = TOKENIZER.eos_token_id
    plain, chat = Row("a", "b", ""), Row("a", "b", "", prompt="<user>a", end="<eos>")
    for config, ends in ((None, {eos}), (70, {eos, 70}), ([70, 80], {eos, 70, 80})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=config))
        assert ends_of(model, TOKENIZER, chat) == ends
        assert ends_of(model, TOKENIZER, plain) == {eos}
    assert encode_row(TOKENIZER, chat).prompt == TOKENIZER("<user>a", add_special_tokens=False)["input_ids"]
    assert encode_row(TOKENIZER, chat).target[-1] == eos


@given(LENGTHS)
def test_left_padding(lengths):
    rows = [[2, *range(10, 9 + length)] for length in lengths]
    batch = pad_left(rows, pad_id=0)
    assert batch.ids.shape == (len(rows), max(lengths))
    for row, ids, mask, positions, editable in zip(
        rows, batch.ids, batch.mask, batch.positions, batch.editable, strict=True
    ):
        pad = max(lengths) - len(row)
        assert ids.tolist() == [0] * pad + row
        assert mask.tolist() == [False] * pad + [True] * len(row)
        assert positions.tolist() == [0] * pad + list(range(len(row)))
        assert editable.tolist() == [False] * (pad + 1) + [True] * (len(row) - 1)


def test_a_batch_needs_rows():
    with pytest.raises(ValueError, match="at least one row"):
        pad_left([], 0)


def test_a_pad_token_inside_a_row_is_a_token_like_any_other():
    batch = pad_left([[2, 0, 0, 5], [2, 7]], pad_id=0)
    assert batch.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert torch.equal(batch.to("cpu").editable, batch.editable)


@given(LENGTHS, st.integers(1, 200))
def test_batches_by_length_hold_every_row_once_within_the_budget(lengths, budget):
    batches = list(by_length(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(order)


def test_no_rows_are_no_batches():
    assert list(by_length([], 10)) == []
