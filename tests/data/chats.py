"""Tokenizers and chat templates for tests, each like those of a family of published models."""

from __future__ import annotations

import json
from pathlib import Path
from string import printable
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "[INST]", "[/INST]", "[CALLS]"),
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINK = (  # Qwen3: the last answer has a think block, empty if need be, and the generation prompt has none
    "{% for message in messages %}{% set content = message.content %}{% set thought = '' %}"
    "{% if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
TOOLS = (  # Qwen2.5
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}{% if message['tool_calls'] %}"
    "{% for call in message['tool_calls'] %}{{ '\n<call>\n' + (call['function'] | tojson) + '\n</call>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS = (  # Gemma 2: content is trimmed, the assistant is called model, and system messages are refused
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
NEWLINE = CHATML.replace("+ '<|im_end|>\n'", "+ '\n<|im_end|>\n'")
MARKED = (  # TRL's training templates: marks around what the loss is on
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (  # Llama 3
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (  # Mistral: no word for the assistant, a space before its answer, and calls in a form of their own
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['tool_calls'] %}"
    "{{ '[CALLS] ' + (message['tool_calls'] | map(attribute='function') | list | tojson) + eos_token }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level(template: str | dict[str, str], learn: bool = False, bos: str | None = "<bos>") -> Any:
    """A byte-level tokenizer, as of GPT-2; with `learn` it has merges, so that tokens are whole words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: place for place, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if learn:
        trainer = BpeTrainer(
            vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(_TEXTS, trainer)
    return _finished(tokenizer, template, bos)


def word_marks(template: str | dict[str, str]) -> Any:
    """A tokenizer that marks where words begin, as SentencePiece does: read alone, a text gets a space in front."""
    tokenizer = Tokenizer(BPE(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({character for text in _TEXTS for character in text})
    texts = [text.replace("\n", " ") for text in _TEXTS]  # a line break is a token of its own there
    trainer = BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer, template, "<bos>")


def _finished(tokenizer: Tokenizer, template: str | dict[str, str], bos: str | None) -> PreTrainedTokenizerBase:
    more = {"bos_token": bos} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", **more)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[3:])})
    fast.chat_template = template
    return fast


_WORDS = ["apple", "river", "stone", "cloud", "tiger", "violin", "marble", "copper", "lemon", "harbor"]
_TEXTS = [
    *(f"user\nSay {one}, {two}. assistant\n\n<think>\n\n</think>\n\n {one} {two}" for one in _WORDS for two in _WORDS),
    '"name": "lookup", "arguments": {"word": "x"} [] () ?!;:_=\'' + printable.strip(),
]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return str(path)
