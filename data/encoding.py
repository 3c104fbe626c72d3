"""Text to tokens, in the same way for training, capture, scoring and generation.

In: a tokenizer, texts and rows. Out: token lists that start with BOS, and left-padded batches of them. Training text is
`BOS + input + separator + target + EOS`; the prefix `BOS + input + separator` is tokenised on its own, so that it has
the same tokens with and without a target. The target's tokens are those that follow the prefix's in the whole text;
where a token of the whole text spans the end of the prefix, the target is tokenised on its own too. A text that spells
out a special token, such as `</s>`, is read as plain characters, unless its row has `special_tokens` set: then BOS and
EOS are added only if the text lacks them. In a chat, the conversation rendered by `data.chat` replaces the prefix, and
the token that ends a turn replaces EOS; the first token of the conversation is then called BOS here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data.rows import Row
from data.special import special_tokens_of, spelled_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """A prompt and its target (with EOS) as token ids."""

    prompt: list[int]
    target: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.target


class Batch(NamedTuple):
    """Left-padded rows. ids, mask, positions: (batch, length); mask is False on padding, positions count from BOS."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    @property
    def editable(self) -> Tensor:
        """(batch, length): True where a transcoder may be spliced in or trained, which excludes padding and BOS."""
        return self.mask & (self.positions > 0)

    @property
    def bos(self) -> Tensor:
        """(batch, length): True at the first token of each row."""
        return self.mask & (self.positions == 0)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model of transformers is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask.long(), "position_ids": self.positions}

    def to(self, device: str | torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`BOS + text`."""
    return [tokenizer.bos_token_id, *_plain(tokenizer, text)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """What the model reads before it answers: `BOS + input + separator`, or the conversation of a chat row."""
    if row.prompt:
        return _with_special(tokenizer, row.prompt)
    if not row.special_tokens:
        return encode_text(tokenizer, row.input + row.separator)
    ids, bos = _with_special(tokenizer, row.input + row.separator), tokenizer.bos_token_id
    return ids if ids[:1] == [bos] else [bos, *ids]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> Encoded:
    """A whole training row. The target ends with the end token, unless it is a model's answer that did not."""
    prompt, end = encode_prompt(tokenizer, row), end_of(tokenizer, row)
    if row.prompt:
        target = _answer(tokenizer, row, prompt)
    else:
        encode = _with_special if row.special_tokens else _plain
        before, whole = (encode(tokenizer, row.input + row.separator + text) for text in ("", row.target))
        continued = whole[: len(before)] == before
        target = whole[len(before) :] if continued else encode(tokenizer, row.target)
        if row.special_tokens and target[-1:] == [end]:
            return Encoded(prompt, target)
    return Encoded(prompt, target if row.unfinished and target else [*target, end])


def _answer(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: list[int]) -> list[int]:
    """A chat row's target, tokenised after its prompt, as in training: alone, its first token may differ. If a token
    spans the end of the prompt, the target is tokenised alone."""
    if not row.special_tokens and spelled_out([row.target], special_tokens_of(tokenizer)) is not None:
        return _plain(tokenizer, row.target)
    ids, end = _with_special(tokenizer, row.prompt + row.target + row.end), end_of(tokenizer, row)
    if ids[: len(prompt)] == prompt and ids[len(prompt) :][-1:] == [end]:
        return ids[len(prompt) : -1]
    return _with_special(tokenizer, row.target)


def target_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """The row's target as a decoded answer would read, for comparison with answers: without special tokens and, for a
    tokenizer that marks word beginnings, without the first word's space."""
    text = _decoded(tokenizer, encode_row(tokenizer, row).target)
    return text if row.prompt or row.special_tokens or row.target == f" {text}" else row.target


def with_answer(
    tokenizer: PreTrainedTokenizerBase, row: Row, text: str, tokens: Sequence[int], ended: bool = True
) -> Row:
    """The row with a model's answer as its target, written such that it is encoded as `tokens` again, or as many of
    them as any spelling gives. `text` is the decoded `tokens`, which lacks a leading space and special tokens. `ended`:
    the model ended it with an end token; if it was cut inside a character, that character's tokens are left out."""
    tokens = list(tokens)
    while not ended and tokens and text.endswith(_PARTIAL):
        tokens = tokens[:-1]
        text = _decoded(tokenizer, tokens)
    spelled = [replace(row, target=text), replace(row, target=f" {text}")]
    special = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens_of(tokenizer)}
    if special.intersection(tokens):
        whole = str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        whole = whole.removesuffix(_decoded(tokenizer, tokens)[len(text) :])  # of a token that a stop text ends in
        spelled += [replace(row, target=f"{space}{whole}", special_tokens=True) for space in ("", " ")]
        spelled = [one for one in spelled if encode_prompt(tokenizer, one) == encode_prompt(tokenizer, row)]

    def kept(one: Row) -> tuple[int, bool]:
        again = encode_row(tokenizer, one).target[:-1]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(again, tokens, strict=False))
        return sum(1 for _ in same), again == tokens

    return replace(max(spelled, key=kept), unfinished=not ended)


_PARTIAL = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


def end_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
    """The token that ends the row's answer."""
    token: Any = tokenizer.convert_tokens_to_ids(row.end) if row.end else tokenizer.eos_token_id
    return token


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Row) -> frozenset[int]:
    """The tokens that end an answer to rows like this one: EOS, and in a chat also those of the generation config."""
    if not row.prompt:
        return frozenset([end_of(tokenizer, row)])
    eos: Any = model.generation_config.eos_token_id if model.generation_config else None
    listed = eos if isinstance(eos, list) else [eos]
    ends = (*listed, tokenizer.eos_token_id, end_of(tokenizer, row))
    return frozenset(token for token in ends if isinstance(token, int))


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """Rows of token ids, each starting with BOS, as one batch padded on the left to the longest.

    Padding gets position 0 and is masked; a row's positions count from its BOS. Raises ValueError if there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.arange(longest).unsqueeze(0) - (longest - lengths).unsqueeze(1)
    return Batch(ids, positions >= 0, positions.clamp(min=0))


def pad_right(rows: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int) -> Batch:
    """Continuations of rows, as one batch padded on the right to the longest; row i continues at position `starts[i]`.
    Padding is masked. Raises ValueError if there are no rows."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_id] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    columns = torch.arange(longest).unsqueeze(0)
    return Batch(ids, columns < lengths, torch.tensor(starts).unsqueeze(1) + columns)


def join_columns(left: Batch, right: Batch) -> Batch:
    """Joins two batches of the same rows, column-wise."""
    return Batch(*(torch.cat(pair, dim=1) for pair in zip(left, right, strict=True)))


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row indices in batches of similar length, each at most `batch_tokens` padded tokens (or one row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
