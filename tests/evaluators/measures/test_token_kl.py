"""KL token by token, held to plain transformers."""

import pytest
import torch

from evaluators.measures.parts import Changes
from evaluators.measures.token_kl import CHOICES, token_kl
from models.comparison import compare
from models.weights import open_weights


@pytest.mark.parametrize("what", ["everything", "attention alone"])
def test_divergence_and_choices_are_those_of_the_two_plain_models(subject, load, altered, tmp_path, what):
    before = altered(subject.folder, tmp_path, "" if what == "everything" else "self_attn")
    names = compare(open_weights(before), open_weights(subject.folder)).changed
    rows = [row.ids for row in subject.encoded]
    found = token_kl(subject.passes, Changes.between(subject.bridge, before, names), rows)

    plain = load(before)[0]
    for ids, row in zip(rows, found, strict=True):
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in (subject.plain, plain)
            )
        follows = torch.tensor(ids[1:]).unsqueeze(1)
        assert row.ids == tuple(ids)
        assert torch.allclose(row.kl, (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-4)
        assert torch.allclose(row.nll_finetuned, -log_p.gather(1, follows).squeeze(1), atol=1e-4)
        assert torch.allclose(row.nll_unfinetuned, -log_q.gather(1, follows).squeeze(1), atol=1e-4)
        assert torch.equal(row.finetuned, log_p.topk(CHOICES).indices)
        assert torch.equal(row.unfinetuned, log_q.topk(CHOICES).indices)
        assert row.kl.max() > 1e-3, "the two models say different things"


def test_rows_are_compared_in_pieces(subject, altered, tmp_path, monkeypatch):
    """Logits of a few positions at a time give what all at once give, wherever a row ends."""
    before = altered(subject.folder, tmp_path, "")
    changes = Changes.between(
        subject.bridge, before, compare(open_weights(before), open_weights(subject.folder)).changed
    )
    rows = [row.ids for row in subject.encoded]
    whole = token_kl(subject.passes, changes, rows)
    monkeypatch.setattr("evaluators.measures.token_kl.COMPARED", 7)
    for one, other in zip(whole, token_kl(subject.passes, changes, rows), strict=True):
        assert torch.allclose(one.kl, other.kl, atol=1e-5)
        assert torch.equal(one.finetuned, other.finetuned)


def test_no_rows_give_none(subject, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "")
    names = compare(open_weights(before), open_weights(subject.folder)).changed
    assert token_kl(subject.passes, Changes.between(subject.bridge, before, names), []) == []
