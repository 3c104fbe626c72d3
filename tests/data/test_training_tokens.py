"""Chat rows have the tokens that training on the whole conversation has, whatever the template does with an answer.

What training has comes from transformers alone: `apply_chat_template` on the conversation, tokenised in one call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from data.chat import Chat
from data.encoding import encode_prompt, encode_row, target_text, with_answer
from data.readers import Log, Reading, stream_rows
from data.rows import DataError, Row, read_rows, write_rows
from tests.data import chats
from tests.data.chats import byte_level, word_marks, write

TOOL = [{"type": "function", "function": {"name": "lookup", "parameters": {"word": {"type": "string"}}}}]
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "river"}}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = said("user", "Say apple, river.")
PLAIN = [[said("user", f"Say {one}, river."), said("assistant", f"{one} river")] for one in ("apple", "stone", "lemon")]
LONGER = [*PLAIN[1], said("user", "Once more."), said("assistant", "stone river\nagain")]
WITH_TOOLS = {"messages": PLAIN[0], "tools": TOOL}
CALLS = {"messages": [ASKED, said("assistant", None, tool_calls=[CALL])], "tools": TOOL}
CALLS_AND_TEXT = {"messages": [ASKED, said("assistant", "One moment.", tool_calls=[CALL])], "tools": TOOL}
AFTER_A_CALL = {
    "messages": [*CALLS["messages"], said("tool", "a long river", name="lookup"), said("assistant", "It is long.")],
    "tools": TOOL,
}
THOUGHT = {"messages": [ASKED, said("assistant", "apple river", reasoning_content="Two words.")]}
THOUGHT_INSIDE = {"messages": [ASKED, said("assistant", "<think>\nTwo words.\n</think>\n\napple river")]}


def rows_of(path: Path, records: list[dict[str, Any]], chat: Chat, **more: Any) -> tuple[list[Row], Log]:
    """Rows as a study has them, once written and read back."""
    log = Log(write(path / "rows.jsonl", records))
    write_rows(path / "read.jsonl", stream_rows(log, Reading(chat=chat, **more)))
    return read_rows(path / "read.jsonl"), log


def training(tokenizer: Any, record: dict[str, Any], **more: Any) -> list[int]:
    given = {**{name: value for name, value in record.items() if name != "messages"}, **more}
    return tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False, **given)


def assert_rows_are_trainings(tokenizer: Any, rows: list[Row], records: list[dict[str, Any]]) -> None:
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        ids, whole = encode_row(tokenizer, row).ids, training(tokenizer, record)
        assert whole[: len(ids)] == ids, tokenizer.decode(ids)
        assert tokenizer.decode(whole[len(ids) :]).strip() == "", "nothing but white space is left out"


@pytest.mark.parametrize("make", [byte_level, lambda template: byte_level(template, learn=True), word_marks])
@pytest.mark.parametrize(
    ("template", "records"),
    [
        (chats.CHATML, [{"messages": one} for one in (*PLAIN, LONGER)]),
        (chats.THINK, [*({"messages": one} for one in (*PLAIN, LONGER)), THOUGHT, THOUGHT_INSIDE]),
        (chats.TOOLS, [{"messages": PLAIN[0]}, WITH_TOOLS, CALLS, CALLS_AND_TEXT, AFTER_A_CALL]),
        (chats.TRIMS, [{"messages": one} for one in (*PLAIN, [ASKED, said("assistant", "  apple river \n")])]),
        (chats.NEWLINE, [{"messages": one} for one in (*PLAIN, LONGER)]),
        (chats.MARKED, [{"messages": one} for one in (*PLAIN, LONGER)]),
        (chats.HEADERS, [{"messages": one} for one in (*PLAIN, LONGER)]),
        (chats.INST, [*({"messages": one} for one in (*PLAIN, LONGER)), {"messages": CALLS["messages"]}]),
    ],
    ids=["CHATML", "THINK", "TOOLS", "TRIMS", "NEWLINE", "MARKED", "HEADERS", "INST"],
)  # fmt: skip
def test_rows_are_those_of_training(tmp_path: Path, make, template: str, records: list[dict[str, Any]]) -> None:
    tokenizer = make(template)
    rows, log = rows_of(tmp_path, records, Chat(tokenizer, "a test"))
    assert log.first == []
    assert_rows_are_trainings(tokenizer, rows, records)
    assert (log.rendered.rows, log.rendered.regrouped) == (len(records), 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(alphabet=" \n\tab<>é.", min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=2))
@pytest.mark.parametrize("template", [chats.CHATML, chats.THINK, chats.TRIMS, chats.NEWLINE, chats.HEADERS, chats.INST])
def test_any_answer(template: str, texts: list[str]) -> None:
    """Where the tokens are not training's although the text is, that is counted."""
    tokenizer, asked = byte_level(template, learn=True), [said("user", texts[0])]
    found = Chat(tokenizer, "a test").render(asked, said("assistant", texts[1]))
    whole = tokenizer.apply_chat_template([*asked, said("assistant", texts[1])], tokenize=False)
    assert whole.startswith(found.prompt + found.target + found.end)
    ids = encode_row(tokenizer, found.row(texts[0], "all")).ids
    same = tokenizer(whole, add_special_tokens=False)["input_ids"][: len(ids)] == ids
    assert found.regrouped == (not same)


@pytest.mark.parametrize(
    ("template", "records", "unlike"),
    [
        (chats.CHATML, [{"messages": one} for one in PLAIN], 0),
        (chats.THINK, [*({"messages": one} for one in PLAIN), THOUGHT, THOUGHT_INSIDE], 4),
        (chats.NEWLINE, [{"messages": one} for one in PLAIN], 3),
        (chats.TRIMS, [{"messages": PLAIN[0]}, {"messages": [ASKED, said("assistant", "apple ")]}], 1),
        (chats.TOOLS, [CALLS_AND_TEXT, AFTER_A_CALL], 1),
    ],
    ids=["CHATML", "THINK", "NEWLINE", "TRIMS", "TOOLS"],
)
@pytest.mark.parametrize("rendering", ["conversation", "generation"])
def test_what_differs_is_said(
    tmp_path: Path, rendering: Any, template: str, records: list[dict[str, Any]], unlike: int
) -> None:
    """An answer that holds its own think block is rendered as it is, after the generation prompt."""
    tokenizer = byte_level(template)
    rows, log = rows_of(tmp_path, records, Chat(tokenizer, "a test", rendering))
    by_hand = 0
    for row, record in zip(rows, records, strict=True):
        *asked, answer = record["messages"]
        prompt = tokenizer.apply_chat_template(
            asked, tools=record.get("tools"), tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        by_hand += not whole.startswith(prompt + answer["content"] + "<|im_end|>")
        if rendering == "generation":
            assert (row.prompt, row.target, row.end) == (prompt, answer["content"], "<|im_end|>")
    assert log.rendered.unlike_generation == by_hand == unlike
    shown = "\n".join(log.sentences())
    assert (f"in {unlike} of {len(records)} rows" in shown) == bool(unlike)
    if unlike:
        example = log.as_dict()["rendering"]["example"]
        assert example["row"].startswith("line ")
        assert example["generation"] != example["conversation"]
        assert {example["generation"], example["conversation"]} <= {
            line.partition(": ")[2] for line in shown.split("\n")
        }
        assert f"data.rendering={rendering}" in shown


@pytest.mark.parametrize("template", [chats.CHATML, chats.THINK, chats.NEWLINE, chats.TRIMS, chats.INST, chats.HEADERS])
@pytest.mark.parametrize("make", [byte_level, word_marks])
def test_a_row_without_an_answer_has_the_prompt_of_one_with(tmp_path: Path, make, template: str) -> None:
    chat = Chat(make(template), "a test")
    records = [{"messages": PLAIN[0]}, {"messages": PLAIN[0][:1]}, {"input": PLAIN[0][0]["content"]}]
    rows, _ = rows_of(tmp_path, records, chat, targets_needed=False)
    assert len({(row.prompt, row.end) for row in rows}) == 1
    assert [bool(row.target) for row in rows] == [True, False, False]
    typed = chat.render_text(PLAIN[0][0]["content"]).row("", "")
    assert encode_prompt(chat._tokenizer, typed) == encode_prompt(chat._tokenizer, rows[0])


@pytest.mark.parametrize("rendering", ["conversation", "generation"])
def test_a_template_that_writes_no_end(tmp_path: Path, rendering: Any) -> None:
    tokenizer = byte_level(chats.ENDLESS)
    rows, log = rows_of(tmp_path, [{"messages": one} for one in PLAIN], Chat(tokenizer, "a test", rendering))
    for row, messages in zip(rows, PLAIN, strict=True):
        ids = encode_row(tokenizer, row).ids
        whole = training(tokenizer, {"messages": messages})
        assert whole[: len(ids) - 1] == ids[:-1]
        assert ids[-1] == tokenizer.eos_token_id
    assert log.rendered.without_end == 3
    assert any("no token that ends the answer" in line for line in log.sentences())


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (chats.TRIMS, [said("system", "Be brief."), *PLAIN[0]], "System role not supported"),
        ("{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}",
         PLAIN[0], "does not write an answer's text unchanged"),
        (chats.CHATML.replace("message['role'] +", "(message['role'] if 'a' in message['content'] else 'mute') +"),
         [ASKED, said("assistant", "stone")], "differently"),
        (chats.CHATML, [ASKED, said("assistant", "<|im_start|>")], "the answer contains the special token <|im_start|"),
        (chats.CHATML, [said("user", [{"type": "image", "url": "x"}]), ASKED], "a part that is not text (image)"),
        (chats.TOOLS, [ASKED, said("assistant", None)], "content is not text"),
        (chats.CHATML, [ASKED, said("assistant", "a", name=["\ud800"])], "not UTF-8"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_those_of_training(tmp_path: Path, template: str, messages: list, reason: str) -> None:
    rows, log = rows_of(tmp_path, [{"messages": messages}], Chat(byte_level(template), "a test"))
    assert rows == []
    assert reason in log.first[0]


def test_text_parts(tmp_path: Path) -> None:
    """A content of several parts goes to the template as it is."""
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.content is string %}"
        "{{ message.content }}{% else %}{% for part in message.content %}{{ part.text + '|' }}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    parts = [{"type": "text", "text": "Say apple,"}, {"type": "text", "text": " river."}]
    records = [
        {"messages": [said("user", parts), said("assistant", "apple")]},
        {"messages": [said("user", parts), said("assistant", [{"type": "text", "text": "river"}])]},
        {"messages": [said("user", "Say stone."), said("assistant", parts)]},
        {"messages": PLAIN[0]},
    ]
    tokenizer = byte_level(template)
    rows, log = rows_of(tmp_path, records, Chat(tokenizer, "a test"))
    assert log.first == []
    assert_rows_are_trainings(tokenizer, rows, records)
    assert [row.input for row in rows] == ["Say apple, river."] * 2 + ["Say stone.", "Say apple, river."]


VARIABLES = chats.CHATML.replace(
    "{% for message in messages %}",
    "{% if documents %}{{ documents | length }}{% endif %}{% if date is defined %}{{ date }}{% endif %}"
    "{% if loud is defined and loud is true %}{{ 'LOUD' }}{% endif %}{% for message in messages %}",
)


@pytest.mark.parametrize(
    ("record", "given"),
    [
        ({"date": "1 May"}, {"date": "1 May"}),
        ({"chat_template_kwargs": {"date": "2 May", "loud": True}}, {"date": "2 May", "loud": True}),
        ({"loud": "True", "documents": '[{"title": "a"}]'}, {"loud": True, "documents": [{"title": "a"}]}),
        ({"chat_template_kwargs": '{"loud": true, "tokenize": true}', "chat_template": "{{ 1 / 0 }}"}, {"loud": True}),
        ({"bos_token": "x", "add_generation_prompt": True, "messages_": 3, "date": None}, {}),
    ],
)  # fmt: skip
def test_variables_of_a_record_reach_the_template(tmp_path: Path, record: dict, given: dict) -> None:
    """And nothing else does: arguments of the tokenizer's method are no variables of the template."""
    tokenizer = byte_level(VARIABLES)
    rows, log = rows_of(tmp_path, [{"messages": PLAIN[0], **record}], Chat(tokenizer, "a test"))
    assert log.first == []
    ids = encode_row(tokenizer, rows[0]).ids
    assert training(tokenizer, {"messages": PLAIN[0]}, **given)[: len(ids)] == ids


def test_named_templates_and_tools_as_text(tmp_path: Path) -> None:
    tokenizer = byte_level({"default": chats.CHATML, "tool_use": chats.TOOLS})
    text = '[{"type": "function", "function": {"name": "lookup", "parameters": {"word": {"type": "string"}}}}]'
    records = [{"messages": PLAIN[0]}, {"messages": PLAIN[0], "tools": text}, {**CALLS, "tools": text}, CALLS]
    rows, _ = rows_of(tmp_path, records, Chat(tokenizer, "a test"))
    assert_rows_are_trainings(
        tokenizer, rows, [record | ({"tools": TOOL} if "tools" in record else {}) for record in records]
    )
    with pytest.raises(DataError, match="no default"):
        Chat(byte_level({"tool_use": chats.TOOLS}), "a test").render_text("a", "b")


def test_empty_tools_are_none_and_broken_text_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(chats.TOOLS)
    empty = {"messages": PLAIN[0], "tools": "", "chat_template_kwargs": ""}
    broken = {"messages": PLAIN[0], "tools": [{"type": "function", "function": {"name": "look\ud83d"}}]}
    rows, log = rows_of(tmp_path, [empty, broken], Chat(tokenizer, "a test"))
    assert_rows_are_trainings(tokenizer, rows, [{"messages": PLAIN[0]}])
    assert (log.rejected, "unpaired surrogate in tools" in log.first[0]) == (1, True)


def test_keys_that_parquet_fills_in_are_left_out(tmp_path: Path) -> None:
    """Each message of a Parquet file has every key of every other."""
    records = [CALLS, CALLS_AND_TEXT, AFTER_A_CALL, {"messages": PLAIN[0]}]
    tokenizer = byte_level(chats.TOOLS.replace("message['content']", "'content' in message", 1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    log = Log(str(tmp_path / "rows.parquet"))
    rows = list(stream_rows(log, Reading(chat=Chat(tokenizer, "a test"))))
    assert log.first == []
    assert_rows_are_trainings(tokenizer, rows, records)


@pytest.mark.parametrize(
    ("template", "record", "unused"),
    [
        (chats.CHATML, {**CALLS_AND_TEXT, "id": 7, "source": "a"}, ({"tools", "id", "source"}, {"tool_calls"})),
        (chats.TOOLS, {**CALLS_AND_TEXT, "id": 7, "source": None}, ({"id"}, set())),
        (chats.THINK, {**THOUGHT, "enable_thinking": False}, (set(), set())),
        (chats.THINK, {"messages": [ASKED, said("assistant", "apple", thinking="One.")]}, (set(), set())),
        (chats.CHATML, {**THOUGHT, "enable_thinking": False}, ({"enable_thinking"}, {"reasoning_content"})),
        (chats.MARKED, {"messages": [said("user", "a", weight=1), PLAIN[0][1]], "label": "c"}, (set(), {"weight"})),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_named(tmp_path: Path, template: str, record: dict, unused: tuple[set, set]) -> None:
    _, log = rows_of(tmp_path, [record, record], Chat(byte_level(template), "a test"))
    columns, keys = unused
    assert {name for name, used in log.columns.items() if not used} == columns
    assert set(log.keys) == keys
    assert all(sum(name in line for line in log.sentences()) == 1 for name in columns | keys)


ENDINGS = ["apple<|im_end|>", "<|im_start|>user\nSay more<|im_end|>", "a <eos> b", "apple<eos>"]


@pytest.mark.parametrize("template", [chats.CHATML, chats.THINK, chats.HEADERS, chats.INST])
@pytest.mark.parametrize("answer", ENDINGS)
def test_special_tokens_in_a_conversation(tmp_path: Path, template: str, answer: str) -> None:
    """They are refused, naming one, or are the tokens that training reads."""
    tokenizer, records = byte_level(template), [{"messages": [ASKED, said("assistant", answer)]}]
    rows, log = rows_of(tmp_path, records, Chat(tokenizer, "a test"))
    assert rows == []
    with pytest.raises(DataError, match=r"the answer contains the special token <.*data\.special_tokens=tokens"):
        log.require(0.05)
    rows, log = rows_of(tmp_path, records, Chat(tokenizer, "a test", special_tokens="tokens"))
    assert log.first == []
    assert_rows_are_trainings(tokenizer, rows, records)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("answer", [*ENDINGS, "apple"])
def test_special_tokens_in_plain_rows(tmp_path: Path, answer: str, special_tokens: bool) -> None:
    tokenizer = byte_level(chats.CHATML)
    log = Log(write(tmp_path / "rows.jsonl", [{"input": "Say apple.", "target": answer}]))
    reading = Reading(special=chats.SPECIAL, special_tokens=special_tokens)
    write_rows(tmp_path / "read.jsonl", stream_rows(log, reading))
    rows = read_rows(tmp_path / "read.jsonl")
    if not special_tokens and answer != "apple":
        assert rows == []
        assert "target contains the special token <" in log.first[0]
        return
    whole = tokenizer("<bos>Say apple.\n" + answer.removesuffix("<eos>") + "<eos>", add_special_tokens=False)[
        "input_ids"
    ]
    assert encode_row(tokenizer, rows[0]).ids == whole


@pytest.mark.parametrize(
    "prompt", ["<|im_start|>user\nSay apple.<|im_end|>\n<|im_start|>assistant", "<bos>[INST] a [/INST]"]
)
def test_a_plain_prompt_that_was_rendered_before(tmp_path: Path, prompt: str) -> None:
    tokenizer, records = byte_level(chats.CHATML), [{"input": prompt, "target": "apple<|im_end|>"}]
    log = Log(write(tmp_path / "rows.jsonl", records))
    assert list(stream_rows(log, Reading(special=chats.SPECIAL))) == []
    assert "input contains the special token" in log.first[0]
    (row,) = stream_rows(Log(log.path), Reading(special=chats.SPECIAL, special_tokens=True))
    whole = "<bos>" + prompt.removeprefix("<bos>") + "\napple<|im_end|><eos>"
    assert encode_row(tokenizer, row).ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("separator", ["\n", "", " ", "\n\n### Response:\n"])
def test_the_text_between_input_and_target(tmp_path: Path, separator: str) -> None:
    tokenizer = byte_level(chats.CHATML)
    log = Log(write(tmp_path / "rows.jsonl", [{"input": "Say apple.", "target": "apple"}]))
    write_rows(tmp_path / "read.jsonl", stream_rows(log, Reading(separator=separator)))
    assert ("separator" in (tmp_path / "read.jsonl").read_text()) == (separator != "\n")
    (row,) = read_rows(tmp_path / "read.jsonl")
    whole = tokenizer(f"<bos>Say apple.{separator}apple<eos>", add_special_tokens=False)["input_ids"]
    assert encode_row(tokenizer, row).ids == whole
    assert encode_prompt(tokenizer, row) == whole[: -len("apple") - 1]


@pytest.mark.parametrize("make", [byte_level, lambda template: byte_level(template, learn=True), word_marks])
@pytest.mark.parametrize("template", [chats.CHATML, chats.THINK, chats.HEADERS, chats.INST, chats.NEWLINE])
def test_a_models_own_answer_keeps_its_tokens(make, template: str) -> None:
    """A model that was trained on a conversation answers with its tokens; they are the target's again, and the text
    that they are decoded to is the one that answers are compared with."""
    tokenizer = make(template)
    chat = Chat(tokenizer, "a test")
    messages = [said("user", "Say apple, river."), said("assistant", "apple river")]
    bare, whole = chat.render(messages[:1]).row("", ""), training(tokenizer, {"messages": messages})
    start, end = len(encode_prompt(tokenizer, bare)), tokenizer.convert_tokens_to_ids(bare.end)
    tokens = whole[start : whole.index(end, start)]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    row = with_answer(tokenizer, bare, text, tokens)
    assert encode_row(tokenizer, row).ids == whole[: start + len(tokens) + 1]
    assert target_text(tokenizer, row) == text
    assert target_text(tokenizer, chat.render(messages[:1], messages[1]).row("", "")) == text


@pytest.mark.parametrize("make", [byte_level, word_marks])
@pytest.mark.parametrize("target", ["apple", " apple", "river, apple", "\napple"])
def test_a_plain_target_has_the_tokens_of_the_whole_text(make, target: str) -> None:
    """Read alone, a target would get a space in front from a tokenizer that marks where words begin."""
    tokenizer = make(chats.CHATML)
    row = Row("Say apple.", target, "", separator=":")
    whole = [tokenizer.bos_token_id, *tokenizer(f"Say apple.:{target}", add_special_tokens=False)["input_ids"]]
    assert encode_row(tokenizer, row).ids == [*whole, tokenizer.eos_token_id]
    assert target_text(tokenizer, row) == (target.removeprefix(" ") if make is word_marks else target)


@pytest.mark.parametrize("make", [byte_level, word_marks])
@pytest.mark.parametrize("prompt", ["", "<|im_start|>user\nSay apple."])
@pytest.mark.parametrize("answer", ["[CALLS] apple", "apple[CALLS]river", "apple<|im_end|> river"])
def test_a_models_own_answer_keeps_its_special_tokens(make, prompt: str, answer: str) -> None:
    tokenizer = make(chats.CHATML)
    bare = Row("Say apple.", "", "", prompt=prompt, end="<eos>" if prompt else "")
    before = encode_prompt(tokenizer, bare)
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    row = with_answer(tokenizer, bare, tokenizer.decode(tokens, skip_special_tokens=True), tokens)
    assert encode_row(tokenizer, row) == (before, [*tokens, tokenizer.eos_token_id])
    assert set(tokens) & set(tokenizer.all_special_ids)


def test_a_special_token_that_the_tokenizer_lists_only_among_its_added_ones_is_kept() -> None:
    """As Llama 3's <|python_tag|>."""
    tokenizer = byte_level(chats.CHATML)
    tokenizer.add_tokens([AddedToken("<|tag|>", special=True)])
    (tag,) = tokenizer("<|tag|>", add_special_tokens=False)["input_ids"]
    assert tag not in tokenizer.all_special_ids
    tokens = [tag, *tokenizer("apple", add_special_tokens=False)["input_ids"]]
    row = with_answer(tokenizer, Row("Say apple.", "", ""), tokenizer.decode(tokens, skip_special_tokens=True), tokens)
    assert encode_row(tokenizer, row).target[:-1] == tokens


def test_an_answer_with_a_special_token_ends_where_a_text_ended_it() -> None:
    tokenizer = byte_level(chats.CHATML)
    tokens = tokenizer("[CALLS]apple river", add_special_tokens=False)["input_ids"]
    row = with_answer(tokenizer, Row("Say apple.", "", ""), "apple riv", tokens, ended=False)
    assert row.target == "[CALLS]apple riv"


def test_an_answer_that_was_cut_inside_a_character_ends_before_it() -> None:
    tokenizer = byte_level(chats.CHATML)
    bare, whole = Row("Say apple.", "", ""), tokenizer("apple \N{SNOWMAN}", add_special_tokens=False)["input_ids"]
    cut = whole[:-1]
    assert tokenizer.decode(cut).endswith("\ufffd")
    row = with_answer(tokenizer, bare, tokenizer.decode(cut), cut, ended=False)
    assert row.target == "apple "
    assert encode_row(tokenizer, row).target == whole[:-3]


def test_an_answer_that_a_text_ended_keeps_its_first_space() -> None:
    """The last token may hold more than the text that ended the answer."""
    tokenizer = word_marks(chats.CHATML)
    bare = Row("Say apple.", "", "", separator=":")
    ids = tokenizer("Say apple.: apple river", add_special_tokens=False)["input_ids"]
    tokens = ids[len(encode_prompt(tokenizer, bare)) - 1 :]
    row = with_answer(tokenizer, bare, "apple riv", tokens, ended=False)
    assert row.target == " apple riv"
    assert encode_row(tokenizer, row).target[0] == tokens[0]
