"""The merged model on held-out rows: answers are plain greedy decoding, figures are counted as they are named."""

import torch

from data.encoding import encode_row
from data.rows import Row
from evaluators.measures import finetuned
from evaluators.measures.finetuned import answers, check_rows

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
    prompts = [encode_row(tokenizer, text, "x").prompt for text in PROMPTS]
    expected = [tokenizer.decode(greedy(model, tokenizer, one, 12), skip_special_tokens=True) for one in prompts]
    for size in (1, 2, 3):
        assert answers(model, tokenizer, prompts, 12, batch_size=size) == expected


def test_a_target_counts_as_said_only_where_greedy_decoding_says_it(llama_folder, load):
    model, tokenizer = load(llama_folder)
    texts = [tokenizer.decode(greedy(model, tokenizer, encode_row(tokenizer, text, "x").prompt, 6)) for text in PROMPTS]
    rows = [encode_row(tokenizer, text, target) for text, target in zip(PROMPTS, texts, strict=True)]
    # What the model says goes on after six tokens: with EOS in their place the target is not what it says.
    assert finetuned._says_target(model, tokenizer, rows) == [False] * 3
    without_end = [one._replace(target=greedy(model, tokenizer, one.prompt, 6)) for one in rows]
    assert finetuned._says_target(model, tokenizer, without_end) == [True] * 3
    wrong = [one._replace(target=[*one.target[:3], 3 + one.target[3] % 2, *one.target[4:]]) for one in without_end]
    changed = [one.target != other.target for one, other in zip(wrong, without_end, strict=True)]
    assert finetuned._says_target(model, tokenizer, wrong) == [not one for one in changed]


def test_figures_count_matches_calls_and_false_calls(gemma_folder, load, monkeypatch):
    model, tokenizer = load(gemma_folder)
    rows = [Row(f"What is {n} + 2?", CALL.format(f"{n} + 2"), "tool") for n in range(4)]
    rows += [Row(f"Nine of {n}.", f"Nine of {n}.", "copy") for n in range(2)]
    said = {1: "no call", 2: CALL.format("2+2"), 4: CALL.format("1")}
    monkeypatch.setattr(finetuned, "_says_target", lambda model, tokenizer, encoded: [i not in said for i in range(6)])
    monkeypatch.setattr(finetuned, "answers", lambda *arguments: list(said.values()))
    found = check_rows(model, tokenizer, rows)
    figures = found["figures"]
    assert figures["exact_match_rate"] == 3 / 6
    assert figures["math_correct_rate"] == 3 / 4, "spaces change no value"
    assert figures["false_call_rate"] == 1 / 2
    assert (figures["tool_call_precision"], figures["tool_call_recall"]) == (3 / 4, 3 / 4)
    assert figures["tool_call_f1"] == 3 / 4
    assert [one["generation"] for one in found["rows"]][1] == "no call"
    assert 0 < figures["false_call_rate_low"] < 0.5 < figures["false_call_rate_high"] < 1
