"""KL(raw || spliced) against the plain sum over the vocabulary."""

import pytest
import torch

from data.encoding import Encoded
from evaluators.splice import teacher_forcing as module
from evaluators.splice.interventions import Edit, spliced
from evaluators.splice.passes import forward
from evaluators.splice.teacher_forcing import Job, Reference, score


def log_probabilities(subject, row, edit):
    """(target token, vocabulary)."""
    from data.encoding import pad_left

    batch = pad_left([row.ids], subject.tokenizer.pad_token_id)
    with torch.no_grad(), spliced(subject.bridge, edit) as splice:
        splice.reset(batch.editable, torch.ones(1))
        return forward(subject.bridge, batch, len(row.target) + 1)[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("held", [1 << 30, 1])
def test_it_is_the_sum_over_the_vocabulary(subject, monkeypatch, held):
    """Also where no row's probabilities stay in memory, and where chunks of logits end inside a row."""
    monkeypatch.setattr(module, "PREDICTED_BYTES", held)
    monkeypatch.setattr("evaluators.splice.passes.PROJECTED", 7)
    edit, jobs = Edit(subject.patches, "full"), [Job(row) for row in subject.encoded]
    reference = Reference(subject.bridge, 3)
    reference.add(subject.encoded)
    found = [one.kl for one in score(subject.passes, edit, jobs, reference=reference)]
    for row, kl in zip(subject.encoded, found, strict=True):
        raw, other = log_probabilities(subject, row, Edit()), log_probabilities(subject, row, edit)
        assert kl == pytest.approx((raw.exp() * (raw - other)).sum().item(), rel=1e-3, abs=1e-4)
        assert kl > 0


def test_raws_own_pass_gives_the_same_bits_as_one_for_the_reference(subject):
    ours, theirs = Reference(subject.bridge, subject.passes.batch_size), Reference(subject.bridge)
    ours.add(subject.encoded)
    jobs = [Job(row) for row in subject.encoded]
    scored = score(subject.passes, Edit(), jobs, whole_text=True, reference=theirs)
    assert all(one.kl is None for one in scored)
    for row in subject.encoded:
        assert torch.equal(ours.predicted(row).probabilities, theirs.predicted(row).probabilities)


def test_the_same_tokens_may_be_divided_elsewhere(subject):
    """A prompt that is longer by a token of its target: the text is the same, the targets are not."""
    row = subject.encoded[0]
    other = Encoded([*row.prompt, row.target[0]], row.target[1:])
    reference = Reference(subject.bridge)
    reference.add([row, other])
    whole, later = (reference.predicted(each).probabilities for each in (row, other))
    assert torch.equal(whole[1:], later)
    edit = Edit(subject.patches, "true_output")
    found = score(subject.passes, edit, [Job(row), Job(other)], reference=reference)
    assert [each.kl for each in found] == pytest.approx([0.0, 0.0], abs=1e-3)


def test_of_the_true_output_spliced_it_is_zero(subject):
    reference = Reference(subject.bridge)
    reference.add(subject.encoded)
    jobs = [Job(row) for row in subject.encoded]
    found = score(subject.passes, Edit(subject.patches, "true_output"), jobs, reference=reference)
    assert [one.kl for one in found] == pytest.approx([0.0] * len(found), abs=1e-3)


def test_without_a_reference_there_is_none(subject):
    assert score(subject.passes, Edit(subject.patches, "full"), [Job(subject.encoded[0])])[0].kl is None
