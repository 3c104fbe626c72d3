"""Conversations as a chat model reads them.

In: a tokenizer with a chat template, and messages. Out: the prompt as text, special tokens spelled out, up to where the
answer begins, and the token that ends an answer. A conversation is rendered once, when the data is made: a template may
put today's date in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from data.rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "deltascope"
"""An answer that no template contains."""


class Message(NamedTuple):
    """Who says what; `role` is system, user, assistant, or another that the template knows."""

    role: str
    content: str


class Chat:
    """The chat template of a tokenizer.

    Raises DataError if it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        if not tokenizer.chat_template:
            raise DataError(f"data.format: chat needs a chat template, and the tokenizer of {where} has none")
        self._tokenizer: Any = tokenizer
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.end = self._end()

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation, and what opens the assistant's answer.

        Raises DataError where the template refuses it, or a message spells out a special token: it could end its turn.
        """
        for message in messages:
            spelled = next((token for token in self._special if token in message.content), None)
            if spelled is not None:
                raise DataError(f"a message contains the special token {spelled}")
        return self._render(messages, True)

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        turns = [message._asdict() for message in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
        except Exception as error:  # a template is a program: what it raises is its own
            raise DataError(f"the chat template refuses it ({' '.join(str(error).split())[:120]})") from None

    def _end(self) -> str:
        """The special token that follows an answer in a conversation; EOS where the template has none."""
        whole = self._render([Message("user", "?"), Message("assistant", _ANSWER)], False)
        after = whole.rpartition(_ANSWER)[2].lstrip()
        found = [token for token in self._special if after.startswith(token)]
        return max(found, key=len, default=str(self._tokenizer.eos_token))
