"""What lies in no site, at a strength: the model put together by hand, and everything back in its place afterwards."""

import pytest
import torch

from data.encoding import pad_left
from evaluators.splice.passes import forward
from models import rest as rest_module
from models.rest import finetuned_rest, read_rest

ROWS = [[2, 50, 60, 70, 80], [2, 90]]


@pytest.fixture(scope="module")
def other_folder(model_folder, altered, tmp_path_factory):
    return altered(model_folder, tmp_path_factory.mktemp("other"), "")


@pytest.fixture(scope="module")
def bridge(model_folder, wrapped):
    return wrapped(model_folder)


def names(model):
    """Embeddings, the unembedding where it is another tensor, and the last norm."""
    found = ["model.embed_tokens.weight", "model.norm.weight"]
    return found if model.config.tie_word_embeddings else [*found, "lm_head.weight"]


def logits(model_or_bridge):
    batch = pad_left(ROWS, 0)
    model = getattr(model_or_bridge, "original_model", model_or_bridge)
    with torch.no_grad():
        found = model(**batch.inputs).logits
    return found[batch.mask]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_rest_at_a_strength_is_a_model_put_together_by_hand(bridge, model_folder, other_folder, load, alpha):
    before = logits(bridge)
    model, _ = load(model_folder)
    theirs, _ = load(other_folder)
    with torch.no_grad():
        for name in names(model):
            own, start = model.get_parameter(name), theirs.get_parameter(name)
            own.copy_(start + alpha * (own - start))
    with read_rest(other_folder, names(model)).at(bridge, alpha):
        inside = logits(bridge)
        with finetuned_rest(bridge):
            assert torch.equal(logits(bridge), before)
        assert torch.equal(logits(bridge), inside)
    torch.testing.assert_close(inside, logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(inside, before) == (alpha == 1.0)
    assert torch.equal(logits(bridge), before), "the values go back"


def test_the_values_go_back_after_an_error(bridge, other_folder, load, model_folder):
    before = logits(bridge)
    model, _ = load(model_folder)
    with pytest.raises(ZeroDivisionError), read_rest(other_folder, names(model)).at(bridge, 0.0):
        raise ZeroDivisionError
    assert torch.equal(logits(bridge), before)
    with finetuned_rest(bridge):  # nothing is displaced
        assert torch.equal(logits(bridge), before)


def test_the_values_go_back_if_memory_runs_out_on_the_way(bridge, other_folder, load, model_folder, monkeypatch):
    before, calls, between = logits(bridge), [], rest_module._between
    model, _ = load(model_folder)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return between(*arguments)

    monkeypatch.setattr(rest_module, "_between", full)
    with pytest.raises(torch.OutOfMemoryError), read_rest(other_folder, names(model)).at(bridge, 0.0):
        pass
    assert len(calls) == 2
    assert torch.equal(logits(bridge), before)


def test_outputs_in_between_are_those_of_weights_in_between(bridge, other_folder):
    """Of an embedding alone: row by row."""
    batch = pad_left(ROWS, 0)
    rest = read_rest(other_folder, ["model.embed_tokens.weight"])
    embedded = []
    for alpha in (0.0, 0.5, 1.0):
        with rest.at(bridge, alpha), torch.no_grad():
            embedded.append(bridge.original_model.get_input_embeddings()(batch.ids))
            forward(bridge, batch, 1)
    torch.testing.assert_close(embedded[1], (embedded[0] + embedded[2]) / 2)
