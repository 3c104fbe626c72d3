"""A pair of models made outside the tool, with rows, labels, behaviours and a chat template of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

from models.tiny import build_tiny_gemma2
from tests.end_to_end.conftest import REPOSITORY, Jobs, environment, read, together

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALLER = (
    "data.train_rows=40", "data.validation_rows=9", "data.eval_rows=4", "activations.train_tokens=1500",
    "activations.validation_tokens=400", "activations.batch_tokens=1024", "deltas.d_new=[4]", "deltas.trials=1",
    "deltas.epochs=1", "evaluate.alphas=[0.0, 1.0]", "evaluate.sets=[all]", "evaluate.controls=[random_delta]",
    "evaluate.max_new_tokens=8", "compute.max_concurrent=1",
)  # fmt: skip
ODD = "_Q&A [/en] $x^2"
"""A label that file names, metrics, formulas and the terminal's markup could all stumble over."""
KINDS = ["polite", "neutral", "lookalike"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """What `examples/pair/finetune.py` makes of a tiny chat model."""
    folder = tmp_path_factory.mktemp("pair")
    build_tiny_gemma2(folder / "base", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    script = [sys.executable, "examples/pair/finetune.py", str(folder), "--model", str(folder / "base")]
    made = subprocess.run(
        [*script, "--rows", "80", "--steps", "4"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def settings(pair: Path, *more: str) -> tuple[str, ...]:
    return (
        "examples/pair/pair.yaml",
        f"model.source={pair / 'base'}",
        f"model.finetuned={pair / 'adapter'}",
        f"data.rows_file={pair / 'train.csv'}",
        f"data.evaluation_file={pair / 'held_out.csv'}",
        f"storage.root={pair / 'runs'}",
        *SMALLER,
        *more,
    )


def test_the_example_runs_and_its_rows_need_no_targets(pair: Path, jobs: Jobs) -> None:
    done = jobs("sweep", *settings(pair))
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = pair / "runs" / "sweeps" / "pair"
    assert read(sweep / "data" / "report.json")["labels"] == KINDS
    gaps = pd.read_csv(sweep / "report" / "gaps.csv")
    assert list(gaps["subset"].unique()) == KINDS
    conditions = pd.read_csv(sweep / "report" / "exp2A_metrics.csv")
    assert {"signed_rate", "exact_rate", "agrees_with_raw_rate"} <= set(conditions.columns)
    page = re.sub(r"base64,[^\"]*", "", (sweep / "report" / "report.html").read_text())
    assert "tool" not in page.lower().replace("tooltip", "")
    talked = jobs("chat", *settings(pair), "--max-new-tokens", "4", input="Please repeat: river.\n<eos>\n")
    assert talked.returncode == 2, "the second line spells out a special token"
    assert talked.stdout.startswith("> Please repeat: river.\n")
    assert "special token <eos>" in talked.stderr

    bare = pd.read_csv(pair / "train.csv").drop(columns="answer").replace({"kind": {"polite": ODD}})
    bare.to_parquet(pair / "bare.parquet")
    columns = "data.columns={input: request, label: kind}"
    own = settings(pair, "name=own", f"data.rows_file={pair / 'bare.parquet'}", "data.evaluation_file=null", columns)
    without, own = ("lora", *own, "model.finetuned=null"), (*own, "evaluate.expected=[]")
    refused, answered, sent, again = together(without, ("sweep", *own), ("track", *own), ("sweep", *own))
    assert refused.returncode == 2
    assert "row 1: no target" in refused.stderr
    assert answered.returncode == 0, answered.stdout + answered.stderr
    assert ODD.split()[0] in answered.stdout
    assert sent.returncode == 0, sent.stdout + sent.stderr
    made = read(pair / "runs" / "sweeps" / "own" / "lora" / "validation.json")["answered"]
    assert made["made"] == 4 * len(KINDS) + 9 + 40
    assert f"{made['made']} rows without a target were given its answers" in answered.stdout
    assert again.returncode == 0, again.stdout + again.stderr
    assert "everything is done already" in again.stdout
    metrics = pd.read_csv(pair / "runs" / "sweeps" / "own" / "report" / "exp2A_metrics.csv")
    raw = metrics[metrics["condition"] == "raw"]
    assert set(raw["subset"]) == {ODD, *KINDS[1:]}
    longer = jobs("lora", *own, "evaluate.max_new_tokens=9")
    assert "rows without a target were given its answers" in longer.stdout, "they end later now"
    assert (raw["exact_rate"] == 1).all(), "what it says is its own answer"
