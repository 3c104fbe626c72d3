"""On a GPU, steps of decoding are recorded as CUDA graphs, and write what they write as they are."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_subjects import random_delta
from data.encoding import Encoded, encode_row
from data.rows import Row
from evaluators.splice import slots
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Patch, Ranks
from evaluators.splice.limits import Limits
from evaluators.splice.passes import ALL, Passes
from evaluators.splice.slots import slots_agree
from evaluators.splice.teacher_forcing import Job
from models.architectures import kinds_of
from models.blocks import read_paths
from models.bridge import whole, wrap
from models.cuda_graphs import Graphed
from models.sources import load_model
from sites import Site
from tests.models.table import CONFIGS, build

SOME = ("llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "falcon", "opt")
WAITING = ("gpt_neo", "gpt_oss")
"""Architectures that wait for the device in every pass: their steps run as they are."""
AS_THEY_ARE = replace(ALL, record_steps=False)
TEXTS = ("12 + 30?", "Seven", "On page 44 of 1987.", "x", "What is 12 + 30 - 7?")
BUDGET = 10


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graphed]:
    """All that may record, in the order in which they were made."""
    made: list[Graphed] = []
    begin = Graphed.__init__
    monkeypatch.setattr(Graphed, "__init__", lambda self, *given: made.append(self) or begin(self, *given))
    return made


def subject(name: str, folder: Path, device: str) -> tuple[Any, list[Patch]]:
    """A random model, and deltas at all its sites over other weights."""
    build(name, folder / "after")
    model, tokenizer = load_model(folder / "after", torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "before")
    tokenizer.save_pretrained(folder / "before")
    bridge = wrap(*load_model(folder / "after", torch.float32, device))
    sites = [Site(layer, kind) for layer in range(bridge.cfg.n_layers) for kind in kinds_of(name)]
    paths = read_paths(bridge, folder / "before", sites)
    patches = []
    for number, (site, path) in enumerate(paths.items()):
        delta = random_delta(path, 6, device)
        ranks = torch.arange(6, device=device) * len(paths) + number
        patches.append(Patch(site, path, replace(delta, W_dec=3 * delta.W_dec), ranks=ranks))
    return bridge, patches


def jobs_of(bridge: Any, kept: bool = False) -> list[Job]:
    prompts = [encode_row(bridge.tokenizer, Row(text, "", "")).prompt for text in TEXTS]
    ranks = [Ranks(0, 0, outside=True), Ranks(0, 20), Ranks(5, 30, outside=True)] if kept else [Ranks(0, 0, True)]
    return [
        Job(Encoded(prompt, []), alpha, kept=one, hints=[*prompt, *prompt])
        for prompt in prompts
        for alpha in (0.0, 0.5, 1.5)
        for one in ranks
    ]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture_agrees(device: str, tmp_path: Path, graphs: list[Graphed], name: str) -> None:
    agrees = slots_agree(wrap(*load_model(build(name, tmp_path), torch.float32, device)))
    assert [one.graph is not None for one in graphs] == [agrees]
    assert agrees == (name not in WAITING)


@pytest.mark.parametrize("name", SOME)
def test_recorded_steps_write_the_same(device: str, tmp_path: Path, graphs: list[Graphed], name: str) -> None:
    bridge, patches = subject(name, tmp_path, device)
    assert slots_agree(bridge)
    stop = replace(Stop.of(bridge, Limits(BUDGET), Row("", "", "")), ends=frozenset([50, 60, 70]))
    for condition in ("raw", "alpha", "zero_ablation"):
        for kept in (False, True) if condition == "alpha" else (False,):
            jobs = jobs_of(bridge, kept)
            begun: list[list[int]] = [[] for _ in jobs]
            for batch_size in (3, 64):
                asked = Edit(patches, condition), jobs, begun, stop
                expected = decode(Passes(bridge, batch_size, AS_THEY_ARE), *asked)
                graphs.clear()
                assert decode(Passes(bridge, batch_size), *asked) == expected
                assert any(one.graph is not None for one in graphs)
                assert not any(one.refused for one in graphs)
            if name in ("llama", "gemma2") and condition != "zero_ablation":
                assert len(set(map(tuple, expected))) > len(TEXTS) - 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bridges_own_parts_can_be_recorded(device: str, tmp_path: Path, graphs: list[Graphed], name: str) -> None:
    bridge, patches = subject(name, tmp_path, device)
    stop, jobs = Stop.of(bridge, Limits(BUDGET), Row("", "", "")), jobs_of(bridge)
    with whole(bridge):
        asked = Edit(patches, "alpha"), jobs, [[] for _ in jobs], stop
        expected = decode(Passes(bridge, 64, AS_THEY_ARE), *asked)
        graphs.clear()
        assert decode(Passes(bridge, 64), *asked) == expected
    assert any(one.graph is not None for one in graphs)


def test_a_graph_that_becomes_garbage_breaks_no_recording(device: str) -> None:
    """A graph in a cycle is freed by the garbage collector, which here would run in the middle of a recording."""
    first = Graphed(lambda x: x + 1)
    for _ in range(2):
        first(torch.ones(3, device=device))
    assert first.graph is not None
    first.function = lambda x, cycle=first: x
    held, containers = [first], []
    del first

    def step(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            held.clear()
            containers.extend([] for _ in range(10_000))
        return x + 1

    graphed, before = Graphed(step), gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        results = [graphed(torch.full((3,), float(n), device=device)).tolist() for n in range(3)]
    finally:
        gc.set_threshold(*before)
    assert results == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert not held
    assert not graphed.refused
    assert graphed.graph is not None


def test_a_step_that_cannot_be_recorded_runs_as_it_is(device: str) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + x.sum().item()

    graphed = Graphed(step)
    assert [graphed(torch.full((2,), float(n), device=device)).tolist() for n in range(3)] == [[0, 0], [3, 3], [6, 6]]
    assert graphed.refused
    assert Graphed(lambda x: x + 1)(torch.ones(1, device=device)).item() == 2


def test_memory_is_given_back(device: str, tmp_path: Path) -> None:
    bridge, patches = subject("llama", tmp_path, device)
    stop, jobs = Stop.of(bridge, Limits(BUDGET), Row("", "", "")), jobs_of(bridge)

    def left() -> int:
        decode(Passes(bridge), Edit(patches, "alpha"), jobs, [[] for _ in jobs], stop)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = left()
    assert [left() for _ in range(3)] == [before] * 3


def test_a_model_that_waits_for_the_device_is_decoded_as_it_is(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be recorded is found out by the trial, and the device works on afterwards."""
    bridge, patches = subject("llama", tmp_path, device)
    stop, jobs = Stop.of(bridge, Limits(BUDGET), Row("", "", "")), jobs_of(bridge)
    asked = Edit(patches, "alpha"), jobs, [[] for _ in jobs], stop
    expected = decode(Passes(bridge, shortcuts=AS_THEY_ARE), *asked)
    block = bridge.original_model.model.layers[1]
    handle = block.register_forward_hook(lambda module, inputs, output: torch.cuda.synchronize())
    bridge.__dict__.pop(slots.TRIED, None)
    assert not slots_agree(bridge)
    assert decode(Passes(bridge), *asked) == expected
    handle.remove()
    bridge.__dict__.pop(slots.TRIED)
    assert slots_agree(bridge)
    assert decode(Passes(bridge), *asked) == expected
