"""The merged model on held-out rows: answers are plain greedy decoding, figures are counted as they are named."""

import json
import shutil

import pytest
import torch

from data.encoding import encode_row, ends_of
from data.rows import Row
from evaluators.measures import finetuned_answers
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.finetuned_answers import GeneratedAnswer, answers, check_rows
from evaluators.splice.limits import Limits
from models.errors import ModelError

CALL = "<tool_call>calculator({})</tool_call>"
PROMPTS = ["What is 1 + 2?", "Nine of 12 came, and then some more.", "In 1987."]


def greedy(model, tokenizer, prompt, count):
    """Token by token, every pass over the whole text."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
            if tokens[-1] == tokenizer.eos_token_id:
                break
    return tokens[len(prompt) :]


def test_answers_are_greedy_decoding_whatever_the_batch(model_folder, load):
    model, tokenizer = load(model_folder)
    prompts = [encode_row(tokenizer, Row(text, "x", "")).prompt for text in PROMPTS]
    expected = [tokenizer.decode(greedy(model, tokenizer, one, 12), skip_special_tokens=True) for one in prompts]
    for size in (1, 2, 3):
        said = answers(model, tokenizer, prompts, Limits(12), [tokenizer.eos_token_id], batch_size=size)
        assert [one.text for one in said] == expected
        assert [one.cut for one in said] == [one.tokens == 12 for one in said]


@pytest.mark.parametrize(
    "config",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 5.0, "top_k": 0},
        {"min_new_tokens": 12},
        {"suppress_tokens": list(range(20, 200))},
        {"begin_suppress_tokens": list(range(20, 200)), "forced_eos_token_id": 1},
        {"num_beams": 3, "length_penalty": -2.0},
        {"max_length": 3},
        {"bad_words_ids": [[token] for token in range(30, 150)]},
        {"guidance_scale": 3.0},
    ],
)
def test_a_models_generation_config_changes_no_answer(llama_folder, load, tmp_path, config):
    model, tokenizer = load(llama_folder)
    prompts = [encode_row(tokenizer, Row(text, "x", "")).prompt for text in PROMPTS]
    expected = [tokenizer.decode(greedy(model, tokenizer, one, 12), skip_special_tokens=True) for one in prompts]
    shutil.copytree(llama_folder, folder := tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 7]}))
    model, tokenizer = load(folder)
    said = answers(model, tokenizer, prompts, Limits(12), [tokenizer.eos_token_id])
    assert [one.text for one in said] == expected
    assert model.generation_config.eos_token_id == [1, 7], "which chats still end at"


@pytest.mark.parametrize("raw", ["[]", '{"eos_token_id": "<eos>"}', '{"eos_token_id": [[1]]}', "{", "null"])
def test_a_malformed_generation_config_is_ignored_or_one_sentence(llama_folder, load, tmp_path, raw):
    shutil.copytree(llama_folder, folder := tmp_path / "model")
    (folder / "generation_config.json").write_text(raw)
    if raw in ("[]", "null"):
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(folder)
        return
    model, tokenizer = load(folder)
    row = Row("a", "b", "all", prompt="p", end="<eos>")
    assert answers(model, tokenizer, [[2, 60]], Limits(3), ends_of(model, tokenizer, row))


def test_an_answer_ends_at_a_text_or_at_any_of_several_tokens(gemma_folder, load):
    model, tokenizer = load(gemma_folder)
    prompts = [encode_row(tokenizer, Row(text, "x", "")).prompt for text in PROMPTS]
    whole = answers(model, tokenizer, prompts, Limits(12), [tokenizer.eos_token_id])
    tokens = [greedy(model, tokenizer, one, 12) for one in prompts]
    for place, one in enumerate(whole):
        third = tokens[place][2]
        first = tokens[place].index(third) + 1
        (ended,) = answers(model, tokenizer, [prompts[place]], Limits(12), [tokenizer.eos_token_id, third])
        assert (ended.tokens, ended.cut) == (first, False)
        piece = one.text[1:3]
        (closed,) = answers(model, tokenizer, [prompts[place]], Limits(12, (piece,)), [tokenizer.eos_token_id])
        assert (closed.text, closed.cut) == (one.text[: one.text.index(piece) + 2], False)
        assert tokenizer.decode(tokens[place][: closed.tokens]).startswith(closed.text)
        assert not tokenizer.decode(tokens[place][: closed.tokens - 1]).startswith(closed.text)


def test_a_target_counts_as_said_only_where_greedy_decoding_says_it(llama_folder, load):
    model, tokenizer = load(llama_folder)
    texts = [
        tokenizer.decode(greedy(model, tokenizer, encode_row(tokenizer, Row(text, "x", "")).prompt, 6))
        for text in PROMPTS
    ]
    rows = [encode_row(tokenizer, Row(text, target, "")) for text, target in zip(PROMPTS, texts, strict=True)]
    # What the model says goes on after six tokens: with EOS in their place the target is not what it says.
    assert finetuned_answers._predicts_target(model, tokenizer, rows) == [False] * 3
    without_end = [one._replace(target=greedy(model, tokenizer, one.prompt, 6)) for one in rows]
    assert finetuned_answers._predicts_target(model, tokenizer, without_end) == [True] * 3
    wrong = [one._replace(target=[*one.target[:3], 3 + one.target[3] % 2, *one.target[4:]]) for one in without_end]
    changed = [one.target != other.target for one, other in zip(wrong, without_end, strict=True)]
    assert finetuned_answers._predicts_target(model, tokenizer, wrong) == [not one for one in changed]


def test_figures_count_matches_and_what_the_behaviours_say(gemma_folder, load, monkeypatch):
    model, tokenizer = load(gemma_folder)
    rows = [Row(f"What is {n} + 2?", CALL.format(f"{n} + 2"), "tool") for n in range(4)]
    rows += [Row(f"Nine of {n}.", f"Nine of {n}.", "copy") for n in range(2)]
    said = {
        1: GeneratedAnswer("no call", 3, False),
        2: GeneratedAnswer(CALL.format("2+2"), 9, False),
        4: GeneratedAnswer(CALL.format("1"), 8, True),
    }
    monkeypatch.setattr(
        finetuned_answers, "_predicts_target", lambda model, tokenizer, encoded: [i not in said for i in range(6)]
    )
    monkeypatch.setattr(finetuned_answers, "answers", lambda *arguments: list(said.values()))
    asked = {"call": "calculator", "right": {"calculator": "correct", "on": ["tool"]}}
    found = check_rows(model, tokenizer, rows, read_behaviours(asked), Limits(20))
    figures = found["figures"]
    assert figures["exact_match_rate"] == 3 / 6
    assert figures["right_rate_tool"] == 3 / 4, "spaces change no value"
    assert figures["call_rate_copy"] == 1 / 2
    assert {(one["behaviour"], one["label"]): one["n"] for one in found["rates"]} == {
        ("call", "tool"): 4,
        ("call", "copy"): 2,
        ("right", "tool"): 4,
    }
    assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in found["rates"])
    assert [one["generation"] for one in found["rows"]][1] == "no call"
