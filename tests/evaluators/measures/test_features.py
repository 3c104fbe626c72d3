"""What features read and write: every figure against a loop over texts, or against the unembedding by hand."""

import dataclasses

import pytest
import torch

from evaluators.measures import features
from evaluators.measures.features import counted_pieces, firing_rates, read_features, strongest
from evaluators.measures.reconstruction import site_activations


@pytest.fixture(scope="module")
def found(subject):
    (patch,) = subject.patch
    every = [(patch.site, feature) for feature in range(patch.delta.d_sae)]
    return read_features(subject.passes, subject.patch, subject.rows, every)


def test_firing_rates_are_those_of_a_loop(subject):
    (patch,) = subject.patch
    rates = firing_rates(subject.passes, subject.patch, subject.rows)
    assert set(rates) == {patch.site}
    for label in ("tool", "copy", "tool_ood"):
        rows = [row for row in subject.rows if row.label == label]
        acts = patch.delta.encode(site_activations(subject.passes, patch, rows)[0])
        assert rates[patch.site][label] == pytest.approx((acts > 0).float().mean(0).tolist())


def test_a_feature_at_bos_fires_once_a_text(subject, path_sites):
    rates = firing_rates(subject.passes, path_sites, subject.rows)
    for patch in path_sites:
        if patch.delta.at_bos is not None:
            assert all(of_subset[-1] == 1.0 for of_subset in rates[patch.site].values())
            last = (patch.site, patch.delta.d_sae - 1)
            (one,) = read_features(subject.passes, path_sites, subject.rows, [last]).values()
            assert one["at_bos"]
            assert [context["peak"] for context in one["contexts"]] == [0] * len(subject.rows)


def test_contexts_hold_the_strongest_token_of_each_text(subject, found):
    (patch,) = subject.patch
    texts = []
    for row in subject.rows:
        texts.append(patch.delta.encode(site_activations(subject.passes, patch, [row])[0]))
    for (_, feature), one in found.items():
        strongest = sorted((acts[:, feature].max().item() for acts in texts), reverse=True)
        peaks = [context["acts"][context["peak"]] for context in one["contexts"]]
        assert peaks == pytest.approx([value for value in strongest if value > 0], rel=1e-3)
        for context in one["contexts"]:
            assert len(context["tokens"]) == len(context["acts"]) <= 2 * features.WINDOW + 1
            assert context["acts"][context["peak"]] == max(context["acts"])
        active = sum(int((acts[:, feature] > 0).sum()) for acts in texts)
        assert sum(one["histogram"]["counts"]) == active


def test_the_marked_token_is_the_one_that_fires(subject):
    """A feature that reads one token's input fires there and nowhere else as strongly."""
    (patch,) = subject.patch
    x, _ = site_activations(subject.passes, patch, subject.rows[:1])
    place = 7
    W_enc = torch.zeros_like(patch.delta.W_enc)
    W_enc[:, 0] = x[place - 1] / x[place - 1].norm()
    zeros = torch.zeros_like(patch.delta.b_enc)
    delta = dataclasses.replace(patch.delta, W_enc=W_enc, b_enc=zeros, threshold=zeros)
    changed = [dataclasses.replace(patch, delta=delta)]
    (one, other) = read_features(subject.passes, changed, subject.rows[:1], [(patch.site, 0), (patch.site, 1)]).values()
    (context,) = one["contexts"]
    assert context["tokens"][context["peak"]] == subject.tokenizer.decode([subject.encoded[0].ids[place]])
    assert other["contexts"] == []
    assert other["histogram"] == {"top": 0.0, "counts": []}


def test_promoted_tokens_gain_most_along_the_decoder_direction(subject, found):
    """On a model whose last block is the patch's own, a larger step along the direction moves the same tokens."""
    patch = subject.patch[0]
    weights = subject.plain.get_output_embeddings().weight
    assert all(len(one["promoted"]) == len(one["suppressed"]) == features.TOKENS for one in found.values())
    gain = subject.plain.model.norm.weight + (1 if subject.plain.config.model_type == "gemma2" else 0)
    agreed = 0
    for (_, feature), one in found.items():
        through = weights.detach() @ (patch.delta.W_dec[feature] * gain.detach())
        named = {subject.tokenizer.decode([token]) for token in through.topk(3 * features.TOKENS).indices.tolist()}
        agreed += len(named & set(one["promoted"]))
    assert agreed / (len(found) * features.TOKENS) > 0.5


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [("abc", ["a", "b", "c"]), ("aéb", ["a", "é", "b"]), ("日", ["日"]), ("x\n", ["x", "\n"])],
)
def test_parts_of_one_character_are_one_piece(text, pieces):
    ids = list(text.encode())
    counted = counted_pieces(Bytes(), ids)
    strengths = strongest(counted, [float(place) for place in range(len(ids))])
    assert [piece for piece, _ in counted] == pieces
    assert len(strengths) == len(pieces)
    assert strengths[-1] == len(ids) - 1


def test_what_never_becomes_a_character_is_shown_too():
    counted = counted_pieces(Bytes(), [0x80, 0x81, 0x61])
    assert "".join(piece for piece, _ in counted).endswith("a")
    assert max(strongest(counted, [1.0, 3.0, 2.0])) == 3.0
