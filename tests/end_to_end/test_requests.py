"""Invalid requests: exit status 2, and one sentence that names the key, what was given and what is allowed; no
traceback."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Jobs, free_port, together

WRONG = [
    (["lora.trails=3"], ["lora.trails", "did you mean trials"]),
    (["transcoders.layers=[1, 9]"], ["transcoders.layers", "9", "layers 0 to 3"]),
    (["data.rows_file=nowhere.jsonl"], ["data.rows_file", "nowhere.jsonl"]),
    (["data.rows_file=README.md"], ["data.rows_file", "README.md", ".jsonl", ".parquet", "OWNER/NAME"]),
    (["data.rows_file=owner/none"], ["the dataset owner/none", "split train"]),
    (["data.evaluation_file=README.md"], ["data.evaluation_file", "README.md"]),
    (["data.columns={prompt: question}"], ["data.columns", "prompt", "messages"]),
    (["data.format=chat"], ["data.format", "chat template", "tiny-gemma2"]),
    (["data.format=html"], ["data.format", "html", "plain"]),
    (["evaluate.subsets=[tools]"], ["evaluate.subsets", "'tools'", "tool, copy, tool_ood"]),
    (["evaluate.behaviours.it={contains: a, on: [tools]}"], ["evaluate.behaviours.it: on", "'tools'", "tool_ood"]),
    (["evaluate.expected=[{behaviour: it, subset: tool, at_least: 1}]"], ["evaluate.expected", "'it'", "tool_call"]),
    (["evaluate.expected=[{behaviour: tool_call, subset: tool}]"], ["evaluate.expected", "at_least", "at_most"]),
    (["data.text_train_file=tests"], ["data.text_train_file", "tests"]),
    (["model.source=./nowhere"], ["model.source", "nowhere"]),
    (["model.source=tests"], ["model.source", "tests", "config.json"]),
    (["transcoders.source=./nowhere"], ["transcoders.source", "nowhere"]),
    (["storage.root=/proc/none"], ["storage.root", "/proc/none"]),
    (["activations.train_tokens=900000000000"], ["storage.root", "GB"]),
]
WRONG_ONCE_STARTED = [
    (["compute.cpus_per_trial=4096"], ["compute", "4096"]),
    (["storage.tracking_uri=http://127.0.0.1:9"], ["storage.tracking_uri", "127.0.0.1:9"]),
]
"""One starts Ray, the other waits for a server: each in its own process."""


def check(done, words: list[str]) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()
    assert len(message) == 1, done.stderr
    for word in words:
        assert word in message[0]


def arguments(root: Path, overrides: list[str]) -> list[str]:
    own = [] if any(one.startswith("storage.root") for one in overrides) else [f"storage.root={root}"]
    return ["sweep", "tiny", *own, *overrides]


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each of the wrong settings gets, from one process for all of them."""
    asked = {str(one): arguments(tmp_path_factory.mktemp("runs"), one) for one, _ in WRONG}
    return dict(zip(asked, together(*asked.values()), strict=True))


def named(cases: list) -> list[str]:
    return [" ".join(overrides) for overrides, _ in cases]


@pytest.mark.parametrize(("overrides", "words"), WRONG, ids=named(WRONG))
def test_a_wrong_setting(answered, overrides: list[str], words: list[str]) -> None:
    check(answered[str(overrides)], words)


@pytest.mark.parametrize(("overrides", "words"), WRONG_ONCE_STARTED, ids=["cpus", "server"])
def test_a_setting_that_this_machine_cannot_follow(
    jobs: Jobs, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    check(jobs(*arguments(tmp_path, overrides), timeout=120), words)


def test_a_missing_settings_file(jobs: Jobs) -> None:
    check(jobs("sweep", "nowhere.yaml"), ["nowhere.yaml", "quickstart"])


def test_an_address_that_does_not_answer(jobs: Jobs, tmp_path: Path) -> None:
    port = free_port()
    done = jobs("sweep", "tiny", f"storage.root={tmp_path}", "--address", f"127.0.0.1:{port}", timeout=200)
    check(done, ["--address", f"127.0.0.1:{port}"])


def test_an_unknown_command_and_option(jobs: Jobs) -> None:
    check(jobs("swep"), ["swep"])
    check(jobs("sweep", "tiny", "--quick"), ["--quick"])


def test_gemma_without_the_hub_fails_at_once(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs("sweep", "gemma2_2b", f"storage.root={tmp_path}", timeout=200)
    check(done, ["model.source", "google/gemma-2-2b"])
    assert list(tmp_path.iterdir()) == []


ON_A_FINISHED_SWEEP = [
    (["chat", "tiny", "--layer", "1"], "--layer: needs --alpha too"),
    (["chat", "tiny", "--deltas", "change"], "--deltas: needs --alpha too"),
    (["chat", "tiny", "--alpha", "1", "--deltas", "other"], "--deltas: got other, but the sweep has change and"),
    (["chat", "tiny", "--alpha", "nan"], "--alpha: got nan, must be a finite number"),
    (["probe", "tiny", "--prompt", "2 + 2", "--alpha", "inf"], "--alpha: got inf, must be a finite number"),
    (["export", "tiny", "--to", "nowhere", "--alpha", "nan"], "--alpha: got nan, must be a finite number"),
    (["plan", "tiny", "--measured", "nowhere"], "--measured: there is no folder nowhere"),
]


def test_options_that_cannot_be_followed_on_a_finished_sweep(finished) -> None:
    asked = [[*words, f"storage.root={finished[0]}"] for words, _ in ON_A_FINISHED_SWEEP]
    for done, (_, sentence) in zip(together(*asked), ON_A_FINISHED_SWEEP, strict=True):
        check(done, [sentence])


def test_behaviours_are_read_from_whole_settings_files(tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("evaluate: {behaviours: {polite: {contains: please}}}\n")
    (done,) = together(["score", str(tmp_path / "texts.jsonl"), "--behaviours", str(bare)])
    check(done, [f"--behaviours {bare}: name is missing"])


def test_without_a_command_there_is_help_and_no_empty_error(jobs: Jobs) -> None:
    done = jobs()
    assert done.returncode == 2
    assert "Usage: deltascope" in done.stdout
    assert "error" not in done.stderr


def test_status_counts_what_was_made_with_these_settings(finished) -> None:
    root = f"storage.root={finished[0]}"
    these, others, planned = together(
        ["status", "tiny", root], ["status", "tiny", root, "lora.steps=5"], ["plan", "tiny", root]
    )
    cells = re.search(r"(\d+) cells", planned.stdout)
    assert cells is not None, planned.stdout
    for counted in ("4 of 4 (", "64 of 64 (", f"{cells[1]} on disk"):
        assert counted in these.stdout
    for counted in ("LoRA trials   0 of 4", "delta trials  0 of 64"):
        assert counted in others.stdout
