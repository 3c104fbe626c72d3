"""Conversations as a chat model reads them.

In: a tokenizer with a chat template, and messages. Out: a row's prompt, target and end as text, with special tokens
spelled out, and how they compare with what training on the whole conversation reads. A conversation is rendered once,
when the data is made, because a template may insert today's date.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from string import ascii_letters
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data.conversations import Message, from_json, strings_in, text_of, without_none
from data.rows import DataError, Row, make_row, one_line
from data.special import special_tokens_of, spelled_out
from data.templates import Reads, reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "deltascope-answer"
"""An answer that no template contains."""
_FIRST_WORDS = (*ascii_letters, "The", "Yes", "Here", _ANSWER)
_LISTS = ("tools", "documents")
"""Variables of a template that apply_chat_template takes as arguments."""
KWARGS = "chat_template_kwargs"
"""A column with further variables of the template, as a dictionary."""
_NOTHING_SAID = {
    "conversation": "the chat template writes nothing of this answer",
    "generation": "the answer has no text; data.rendering=conversation reads what else the template writes of it",
}


class Rendered(NamedTuple):
    """A conversation in one of the two renderings, and how it compares with what training reads.

    `special_tokens` is True if the target contains special tokens that are read as such. `unlike` is set if the
    generation prompt, the answer and its end are not the beginning of the whole conversation: that text, and the
    conversation. `regrouped` is True if the texts agree but the tokens do not, because one spans the end of the prompt.
    `ends` is False if the template writes no token after an answer, so that EOS was added.
    """

    prompt: str
    target: str
    end: str
    special_tokens: bool = False
    unlike: tuple[str, str] | None = None
    regrouped: bool = False
    ends: bool = True

    def row(self, text: str, label: str) -> Row:
        """As a row with the input `text`, the text of its messages."""
        return make_row(text, self.target, label, self.prompt, self.end, special_tokens=self.special_tokens)


class _Parts(NamedTuple):
    """What the template writes around an answer: the text before and after it, and the token that ends it (empty:
    none)."""

    before: str
    after: str
    end: str


class Chat:
    """The chat template of a tokenizer.

    `rendering` says which prompt a row has. With `conversation` prompt, target and end begin the template's rendering
    of the whole conversation, answer included: what training on conversations reads. With `generation` the prompt is
    what the template gives to start an answer, and the target the answer's text.

    Raises DataError if there is no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        rendering: Literal["conversation", "generation"] = "conversation",
        special_tokens: Literal["refuse", "tokens"] = "refuse",
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(f"data.format: chat needs a chat template, and the tokenizer of {where} has none")
        self.rendering = rendering
        self._tokenizer: Any = tokenizer
        self._special = special_tokens_of(tokenizer)
        self._refuses = special_tokens == "refuse"
        reserved = set(inspect.signature(self._tokenizer.apply_chat_template).parameters) - set(_LISTS)
        self._reserved = {*reserved, *tokenizer.special_tokens_map, "messages", "raise_exception", "strftime_now"}
        self._given = 0
        self._given = self._given_to_answers()

    def variables(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a record that the template reads, such as `tools` or `enable_thinking`, including those in a
        dictionary under `chat_template_kwargs`."""
        more = from_json(record.get(KWARGS), KWARGS)
        given = {**record, **(more if isinstance(more, dict) else {})}
        known = self._reads(given).variables - self._reserved
        found = {name: without_none(value) for name, value in given.items() if name in known and value is not None}
        in_csv = all(value is None or isinstance(value, str) for value in record.values())
        for name, value in found.items():
            if name in _LISTS:
                found[name] = without_none(from_json(value, name))
            elif in_csv and isinstance(value, str) and value.casefold() in ("true", "false"):
                found[name] = value.casefold() == "true"
        return found

    def unread_keys(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[str]:
        """Keys of these messages that the template does not read."""
        known = self._reads(variables).keys | {"role", "content"}
        return [key for key in dict.fromkeys(key for message in messages for key in message) if key not in known]

    def render(
        self, asked: Sequence[Message], answer: Message | None = None, variables: Mapping[str, Any] | None = None
    ) -> Rendered:
        """A row's prompt, target and end; without an answer the target is empty.

        Raises DataError where the template refuses the conversation or renders this answer in a way of its own, and
        where a message spells out a special token, unless those are read as tokens.
        """
        given = variables or {}
        self._check(asked, answer, given)
        generation = self._render(asked, True, given)
        parts = self._parts(asked, answer, given)
        end = parts.end or str(self._tokenizer.eos_token)
        if answer is None:
            prompt = generation if self.rendering == "generation" else parts.before
            unlike = None if generation.rstrip() == parts.before.rstrip() else (generation, parts.before)
            return Rendered(prompt, "", end, unlike=unlike, ends=bool(parts.end))
        whole = self._render([*asked, answer], False, given)
        spelled = self._rendered(generation, text_of(answer), end)
        begun = generation + spelled.target + parts.end
        found = spelled if self.rendering == "generation" else self._cut(whole, generation, parts)
        if not found.target.strip():
            raise DataError(_NOTHING_SAID[self.rendering])
        return found._replace(
            unlike=None if whole.startswith(begun) else (begun, whole),
            regrouped=whole.startswith(found.prompt + found.target) and not self._has_tokens_of(whole, found),
            ends=bool(parts.end) or whole.startswith(found.prompt + found.target + found.end),
        )

    def render_text(self, text: str, target: str = "") -> Rendered:
        """A conversation of one message, and an answer if there is a target; raises DataError as `render`."""
        answer = {"role": "assistant", "content": target} if target else None
        return self.render([{"role": "user", "content": text}], answer)

    def _rendered(self, prompt: str, target: str, end: str) -> Rendered:
        return Rendered(prompt, target, end, spelled_out([target], self._special) is not None)

    def _cut(self, whole: str, generation: str, parts: _Parts) -> Rendered:
        """The whole conversation as prompt, target and end."""
        prompt = next((one for one in (parts.before, generation) if whole.startswith(one)), None)
        if prompt is None:
            raise DataError("the chat template renders the beginning of this answer differently from that of others")
        tail = whole[len(prompt) :]
        target, end, _ = tail.rpartition(parts.end) if parts.end else ("", "", "")
        if not end:
            bare = tail.rstrip()
            end = next((token for token in self._special if bare.endswith(token)), "")
            target = bare.removesuffix(end) if end else tail.removesuffix(parts.after)
        return self._rendered(prompt, target, end or str(self._tokenizer.eos_token))

    def _has_tokens_of(self, whole: str, row: Rendered) -> bool:
        from data.encoding import encode_row  # loads torch, which a command's driver may not need

        kept = Row("", row.target, "", prompt=row.prompt, end=row.end, special_tokens=row.special_tokens)
        ids = encode_row(self._tokenizer, kept).ids
        if not whole.startswith(row.prompt + row.target + row.end):  # then the end was added
            ids = ids[:-1]
        return self._ids(whole)[: len(ids)] == ids

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _parts(self, asked: Sequence[Message], answer: Message | None, variables: Mapping[str, Any]) -> _Parts:
        """What the template writes around any answer to this, found by rendering one that no template contains."""
        known = answer or {}
        flags = {key: one for key, one in known.items() if key in ("role", "name") or isinstance(one, bool | int)}
        content: Any = [{"type": "text", "text": _ANSWER}] if isinstance(known.get("content"), list) else _ANSWER
        sample = {"role": "assistant", **flags, "content": content}
        before, found, after = self._render([*asked, sample], False, variables).rpartition(_ANSWER)
        if not found:
            raise DataError("the chat template does not write an answer as it is given")
        closing = after.lstrip()
        end = next((token for token in self._special if closing.startswith(token)), "")
        given = min(self._given, len(before) - len(before.rstrip()))
        return _Parts(before[: len(before) - given], after, end)

    def _given_to_answers(self) -> int:
        """How many of the spaces and line breaks at the end of a prompt belong to the first token of most answers: in
        training they are not read without it, so they are made part of the target."""
        try:
            before = self._parts([{"role": "user", "content": "?"}], None, {}).before
        except DataError:  # a template may refuse so short a conversation
            return 0
        whole = [self._ids(before + answer) for answer in _FIRST_WORDS]

        def disagreeing(count: int) -> int:
            prompt = self._ids(before[: len(before) - count])
            return sum(ids[: len(prompt)] != prompt for ids in whole)

        return min(range(len(before) - len(before.rstrip()) + 1), key=lambda count: (disagreeing(count), count))

    def _check(self, asked: Sequence[Message], answer: Message | None, variables: Mapping[str, Any]) -> None:
        if not self._refuses:
            return
        for name, value in (("a message", asked), ("the answer", answer), ("a template variable", variables)):
            if (token := spelled_out(strings_in(value), self._special)) is not None:
                raise DataError(f"{name} contains the special token {token}")

    def _reads(self, variables: Mapping[str, Any]) -> Reads:
        try:
            return reads(self._tokenizer.get_chat_template(tools=variables.get("tools")))
        except ValueError as error:  # several templates, and none of them is the default
            raise DataError(f"data.format: {one_line(error, 10_000)}") from None

    def _render(self, messages: Sequence[Message], generation: bool, variables: Mapping[str, Any]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **variables
            )
        except Exception as error:  # a template is a program: what it raises is its own
            raise DataError(f"the chat template refuses it ({one_line(error, 120)})") from None
