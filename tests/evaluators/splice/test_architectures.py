"""Other architectures than the two that every test runs on: Qwen2 and Qwen3 shapes made on the spot, and bfloat16."""

import pytest
import torch

from data.encoding import Encoded, encode_row
from data.rows import Row
from evaluators.splice.decoding import Stop, decode, generate
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, Shortcuts
from evaluators.splice.teacher_forcing import Job, score
from models.sources import load_model
from sites import Site
from tests.models.table import build

BUDGET = 5


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    """A random model of three layers: biased queries and keys in Qwen2, normalised ones in Qwen3."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


def sites_of(random_transcoder, layers):
    return [
        Patch(
            Site(layer),
            random_transcoder(24, 48, layer, layer),
            random_transcoder(24, 6, layer, 50 + layer, bias=False),
        )
        for layer in layers
    ]


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_figures_and_tokens_are_those_of_the_splice_by_hand(folder, wrapped, random_transcoder, by_hand, layers):
    plain, tokenizer = load_model(folder, torch.float32)
    bridge, patches, alpha = wrapped(folder), sites_of(random_transcoder, layers), 0.7
    texts = ("12 + 30?", "Seven times a lot of words", "x")
    rows = [encode_row(tokenizer, Row(text, text[::-1], "")) for text in texts]
    reference = by_hand(plain, patches, "alpha", alpha)
    stop = Stop(tokenizer, Limits(BUDGET), frozenset([tokenizer.eos_token_id]))
    expected = [reference.greedy(row.prompt, {tokenizer.eos_token_id}, BUDGET) for row in rows]
    jobs = [Job(row, alpha, guess=output) for row, output in zip(rows, expected, strict=True)]
    for shortcuts in (Shortcuts(), Shortcuts.none()):
        scored = score(Passes(bridge, shortcuts=shortcuts), Edit(patches, "alpha"), jobs)
        for row, found in zip(rows, scored, strict=True):
            nll, argmax = reference.nll(row)
            assert found.nll == pytest.approx(nll, rel=1e-4)
            assert found.argmax == argmax.tolist()
        assert generate(Passes(bridge, shortcuts=shortcuts), Edit(patches, "alpha"), jobs, scored, stop) == expected


def test_bfloat16_runs_every_way(folder, wrapped, random_transcoder):
    """The transcoders stay in fp32; rounding differs between the ways, so the figures agree only roughly."""
    bridge, patches = wrapped(folder, torch.bfloat16), sites_of(random_transcoder, (1,))
    rows = [encode_row(bridge.tokenizer, Row(text, "abc", "")) for text in ("12 + 30?", "Seven")]
    jobs = [Job(row) for row in rows]
    fast, slow = (
        score(Passes(bridge, shortcuts=one), Edit(patches, "full"), jobs) for one in (Shortcuts(), Shortcuts.none())
    )
    for one, other in zip(fast, slow, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=0.05)
        assert one.base_acts == pytest.approx(other.base_acts, rel=0.05)
    starts = [Job(Encoded(row.prompt, [])) for row in rows]
    stop = Stop.of(bridge, Limits(BUDGET), Row("", "", ""))
    outputs = decode(Passes(bridge), Edit(patches, "full"), starts, [[], []], stop)
    assert all(len(output) >= 1 for output in outputs)
