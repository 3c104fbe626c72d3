"""The lens on the mean change, held to plain transformers."""

import pytest
import torch

from data.encoding import encode_text
from evaluators.measures.mean_difference_lens import FIRST, PROMOTED, mean_difference_lens
from evaluators.measures.parts import Changes
from evaluators.splice.passes import Passes
from models.comparison import compare
from models.weights import open_weights

TEXTS = [
    "The river bends twice.",
    "Snow fell.",
    "Glass is made from sand, which melts when it is hot.",
    "Bees",
    "A map",
]


def streams(model, texts):
    """What leaves each block at the tokens after BOS, (layer, position, d_model), text by text."""
    found = []
    for ids in texts:
        seen: list[torch.Tensor] = []

        def note(module, args, out, seen=seen):
            seen.append(out[0] if isinstance(out, tuple) else out)

        hooks = [block.register_forward_hook(note) for block in model.model.layers]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        found.append(torch.stack([one[0, 1:] for one in seen]))
    return found


def mean(parts, most):
    return torch.cat([part[:, :most] for part in parts], dim=1).mean(1)


def test_norms_and_tokens_are_those_of_the_two_plain_models(subject, load, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "")
    names = compare(open_weights(before), open_weights(subject.folder)).changed
    texts = [encode_text(subject.tokenizer, text) for text in TEXTS]
    found = mean_difference_lens(subject.passes, Changes.between(subject.bridge, before, names), texts)

    ours, theirs = streams(subject.plain, texts), streams(load(before)[0], texts)
    for span, most in (("first", FIRST), ("all", 10**6)):
        difference = mean(ours, most) - mean(theirs, most)
        control = mean(theirs[::2], most) - mean(theirs[1::2], most)
        size = mean(theirs, most).norm(dim=-1)
        with torch.no_grad():
            promoted, unread = (
                subject.plain.lm_head(subject.plain.model.norm(one)).topk(PROMOTED).indices
                for one in (difference, control)
            )
        readings = [reading for reading in found if reading.span == span]
        assert [reading.layer for reading in readings] == list(range(len(difference)))
        for layer, reading in enumerate(readings):
            assert reading.norm == pytest.approx((difference.norm(dim=-1) / size)[layer].item(), rel=1e-3)
            assert reading.control_norm == pytest.approx((control.norm(dim=-1) / size)[layer].item(), rel=1e-3)
            assert reading.promoted == tuple(promoted[layer].tolist())
            assert reading.control_promoted == tuple(unread[layer].tolist())


def test_a_model_in_bf16_reads_nearly_the_same(subject, wrapped, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "")
    names = compare(open_weights(before), open_weights(subject.folder)).changed
    texts = [encode_text(subject.tokenizer, text) for text in TEXTS]
    exact, coarse = (
        mean_difference_lens(Passes(bridge), Changes.between(bridge, before, names), texts)
        for bridge in (subject.bridge, wrapped(subject.folder, torch.bfloat16))
    )
    for one, other in zip(exact, coarse, strict=True):
        assert other.norm == pytest.approx(one.norm, rel=0.05)


def test_halves_need_two_texts(subject, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "")
    changes = Changes.between(subject.bridge, before, ["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="at least two texts"):
        mean_difference_lens(subject.passes, changes, [[1, 2, 3]])
