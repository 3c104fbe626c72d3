"""Renders conversations with a model's chat template.

In: a tokenizer with a chat template, and messages. Out: a row's prompt, target and end as text that contains special
tokens by name; and how they differ from the text that training on the whole conversation reads. A conversation is
rendered once, when the data is made, because a template may insert today's date.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from string import ascii_letters
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data.conversations import REASONING, Message, check_unicode, from_json, strings_in, text_of, without_none
from data.rows import DataError, Row, make_row, one_line
from data.special import special_tokens_of, spelled_out
from data.templates import Reads, reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "deltascope-answer"
"""A placeholder for an answer; no template contains this text."""
_FIRST_WORDS = (*ascii_letters, "The", "Yes", "Here", _ANSWER)
_LISTS = ("tools", "documents")
"""Template variables that apply_chat_template takes as named arguments."""
KWARGS = "chat_template_kwargs"
"""A column that holds more template variables, as a dictionary."""
_EMPTY_TARGET = {
    "conversation": "the chat template writes nothing for this answer",
    "generation": "the answer has no text; with data.rendering=conversation, other parts such as tool calls count too",
}


class Rendered(NamedTuple):
    """A conversation in one of the two renderings, and how it compares with what training reads.

    `special_tokens` is True if the target contains special tokens, to be encoded as such. `mismatch` is set if the
    rendered conversation does not begin with generation prompt + answer + end: the pair (that text, the conversation).
    `regrouped` is True if the texts agree but the tokens do not, because a token spans the end of the prompt.
    `has_end` is False if the template writes no token after an answer, so that EOS was added.
    """

    prompt: str
    target: str
    end: str
    special_tokens: bool = False
    mismatch: tuple[str, str] | None = None
    regrouped: bool = False
    has_end: bool = True

    def row(self, text: str, label: str) -> Row:
        """Converts it to a row. `text`, the text of its messages, becomes the row's input."""
        return make_row(text, self.target, label, self.prompt, self.end, special_tokens=self.special_tokens)


class _Frame(NamedTuple):
    """What the template writes around an answer: the text before and after it, and the token that ends it (empty if
    there is none)."""

    before: str
    after: str
    end: str


class Chat:
    """The chat template of a tokenizer.

    `rendering` decides where a row's text comes from. With `conversation`, prompt + target + end is the beginning of
    the whole rendered conversation, answer included, as training on conversations reads it. With `generation`, the
    prompt is the template's generation prompt and the target is the answer's text.

    Raises DataError if there is no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        rendering: Literal["conversation", "generation"] = "conversation",
        special_tokens: Literal["refuse", "tokens"] = "refuse",
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(f"data.format: chat needs a chat template, and the tokenizer of {source} has none")
        self.rendering = rendering
        self._tokenizer: Any = tokenizer
        self._special = special_tokens_of(tokenizer)
        self._refuses = special_tokens == "refuse"
        reserved = set(inspect.signature(self._tokenizer.apply_chat_template).parameters) - set(_LISTS)
        self._reserved = {*reserved, *tokenizer.special_tokens_map, "messages", "raise_exception", "strftime_now"}
        self._moved = 0
        self._moved = self._moved_to_answers()

    def variables(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a record that the template reads, such as `tools` or `enable_thinking`, including those in a
        dictionary under `chat_template_kwargs`."""
        more = from_json(record.get(KWARGS) or None, KWARGS)
        fields = {**record, **(more if isinstance(more, dict) else {})}
        names = self._reads(fields).variables - self._reserved
        given = ((name, value) for name, value in fields.items() if name in names and value is not None)
        values = {name: without_none(value) for name, value in given if not (name in _LISTS and value == "")}
        in_csv = all(value is None or isinstance(value, str) for value in record.values())
        for name, value in values.items():
            if name in _LISTS:
                values[name] = without_none(from_json(value, name))
            elif in_csv and isinstance(value, str) and value.casefold() in ("true", "false"):
                values[name] = value.casefold() == "true"
        for name, value in values.items():
            for string in strings_in(value):
                check_unicode(string, name)
        return values

    def unread_keys(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[str]:
        """Keys of these messages that the template does not read."""
        keys_read = self._reads(variables).keys | {"role", "content"}
        if keys_read & REASONING:
            keys_read |= REASONING  # transformers copies one to the other
        return [key for key in dict.fromkeys(key for message in messages for key in message) if key not in keys_read]

    def render(
        self, messages: Sequence[Message], answer: Message | None = None, variables: Mapping[str, Any] | None = None
    ) -> Rendered:
        """Renders a row's prompt, target and end; without an answer, the target is empty.

        Raises DataError if the template refuses the conversation or begins this answer unlike others, or if a message
        contains the text of a special token while `special_tokens` is `refuse`.
        """
        variables = variables or {}
        self._check(messages, answer, variables)
        generation = self._render(messages, True, variables)
        frame = self._frame(messages, answer, variables)
        end = frame.end or str(self._tokenizer.eos_token)
        if answer is None:
            prompt = generation if self.rendering == "generation" else frame.before
            mismatch = None if generation.rstrip() == frame.before.rstrip() else (generation, frame.before)
            return Rendered(prompt, "", end, mismatch=mismatch, has_end=bool(frame.end))
        conversation = self._render([*messages, answer], False, variables)
        generated = self._rendered(generation, text_of(answer), end)
        start = generation + generated.target + frame.end
        row = generated if self.rendering == "generation" else self._cut(conversation, generation, frame)
        if not row.target.strip():
            raise DataError(_EMPTY_TARGET[self.rendering])
        return row._replace(
            mismatch=None if conversation.startswith(start) else (start, conversation),
            regrouped=conversation.startswith(row.prompt + row.target) and not self._same_tokens(conversation, row),
            has_end=bool(frame.end) or conversation.startswith(row.prompt + row.target + row.end),
        )

    def render_text(self, text: str, target: str = "") -> Rendered:
        """Renders a conversation of one message, and an answer if there is a target; raises DataError like `render`."""
        answer = {"role": "assistant", "content": target} if target else None
        return self.render([{"role": "user", "content": text}], answer)

    def _rendered(self, prompt: str, target: str, end: str) -> Rendered:
        return Rendered(prompt, target, end, spelled_out([target], self._special) is not None)

    def _cut(self, conversation: str, generation: str, frame: _Frame) -> Rendered:
        """Cuts the whole rendered conversation into prompt, target and end."""
        prompt = next((text for text in (frame.before, generation) if conversation.startswith(text)), None)
        if prompt is None:
            raise DataError("the chat template begins this answer differently from other answers")
        tail = conversation[len(prompt) :]
        target, end, _ = tail.rpartition(frame.end) if frame.end else ("", "", "")
        if not end:
            stripped = tail.rstrip()
            end = next((token for token in self._special if stripped.endswith(token)), "")
            target = stripped.removesuffix(end) if end else tail.removesuffix(frame.after)
        return self._rendered(prompt, target, end or str(self._tokenizer.eos_token))

    def _same_tokens(self, conversation: str, row: Rendered) -> bool:
        """Whether the row's tokens are the first tokens of the whole conversation."""
        from data.encoding import encode_row  # imports torch, which commands that only read settings do not need

        encoded = Row("", row.target, "", prompt=row.prompt, end=row.end, special_tokens=row.special_tokens)
        ids = encode_row(self._tokenizer, encoded).ids
        if not conversation.startswith(row.prompt + row.target + row.end):  # the end is not from the template
            ids = ids[:-1]
        return self._ids(conversation)[: len(ids)] == ids

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _frame(self, messages: Sequence[Message], answer: Message | None, variables: Mapping[str, Any]) -> _Frame:
        """What the template writes around an answer to these messages, found by rendering a placeholder as answer."""
        answer = answer or {}
        flags = {
            key: value for key, value in answer.items() if key in ("role", "name") or isinstance(value, bool | int)
        }
        content: Any = [{"type": "text", "text": _ANSWER}] if isinstance(answer.get("content"), list) else _ANSWER
        placeholder = {"role": "assistant", **flags, "content": content}
        before, marker, after = self._render([*messages, placeholder], False, variables).rpartition(_ANSWER)
        if not marker:
            raise DataError("the chat template does not write an answer's text unchanged")
        closing = after.lstrip()
        end = next((token for token in self._special if closing.startswith(token)), "")
        moved = min(self._moved, len(before) - len(before.rstrip()))
        return _Frame(before[: len(before) - moved], after, end)

    def _moved_to_answers(self) -> int:
        """Number of spaces and line breaks at the end of the prompt that most answers' first token includes. Training
        never reads them as tokens of their own, so they are moved to the target."""
        try:
            before = self._frame([{"role": "user", "content": "?"}], None, {}).before
        except DataError:  # a template may refuse so short a conversation
            return 0
        answered = [self._ids(before + answer) for answer in _FIRST_WORDS]

        def disagreeing(count: int) -> int:
            prompt = self._ids(before[: len(before) - count])
            return sum(ids[: len(prompt)] != prompt for ids in answered)

        return min(range(len(before) - len(before.rstrip()) + 1), key=lambda count: (disagreeing(count), count))

    def _check(self, messages: Sequence[Message], answer: Message | None, variables: Mapping[str, Any]) -> None:
        if not self._refuses:
            return
        for name, value in (("a message", messages), ("the answer", answer), ("a template variable", variables)):
            if (token := spelled_out(strings_in(value), self._special)) is not None:
                raise DataError(f"{name} contains the special token {token}")

    def _reads(self, variables: Mapping[str, Any]) -> Reads:
        try:
            return reads(self._tokenizer.get_chat_template(tools=variables.get("tools")))
        except ValueError as error:  # the tokenizer has several templates and no default
            raise DataError(f"data.format: {one_line(error, 10_000)}") from None

    def _render(self, messages: Sequence[Message], generation: bool, variables: Mapping[str, Any]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **variables
            )
        except Exception as error:  # a template is a program and can raise anything
            raise DataError(f"the chat template refuses it ({one_line(error, 120)})") from None
