"""A block's own path: what the model computes between the taps, and weights that come and go."""

from importlib import import_module

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from data.encoding import pad_left
from evaluators.splice.passes import forward
from models import blocks
from models.blocks import BlockPath, exchanged, interpolated, read_paths, sites_with
from models.errors import ModelError
from models.weights import load_config
from sites import Site, mlp_sites

ROWS = [[2, 50, 60, 70, 80], [2, 90]]
LAYERS = [0, 2]


@pytest.fixture(scope="module")
def other_folder(model_folder, altered, tmp_path_factory):
    """The same architecture with other weights everywhere, norm gains included."""
    return altered(model_folder, tmp_path_factory.mktemp("other"), "")


@pytest.fixture(scope="module")
def bridge(model_folder, wrapped):
    return wrapped(model_folder)


def logits(bridge):
    batch = pad_left(ROWS, bridge.tokenizer.pad_token_id)
    with torch.no_grad():
        return forward(bridge, batch, batch.ids.shape[1])[batch.mask]


def plain_logits(model):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


def test_a_path_gives_the_models_own_output_at_its_tap(bridge, model_folder, load, plain_taps):
    batch = pad_left(ROWS, bridge.tokenizer.pad_token_id)
    model, _ = load(model_folder)
    for site, path in read_paths(bridge, model_folder, mlp_sites(LAYERS)).items():
        x, y, gained = plain_taps(model, batch, site.layer)
        with torch.no_grad():
            torch.testing.assert_close(x * path.gain, gained, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(path(x)[batch.mask], y[batch.mask], rtol=1e-4, atol=1e-4)


def test_exchanged_weights_are_those_of_a_model_put_together_by_hand(bridge, model_folder, other_folder, grafted):
    before = logits(bridge)
    paths = read_paths(bridge, other_folder, mlp_sites(LAYERS))
    held = [parameter.clone() for path in paths.values() for parameter in path.parameters().values()]
    with exchanged(bridge, list(paths.values())):
        swapped = logits(bridge)
    expected = plain_logits(grafted(model_folder, other_folder, LAYERS))
    torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-3)
    assert (swapped - before).abs().max() > 0.1
    assert torch.equal(logits(bridge), before), "the weights go back"
    after = [parameter for path in paths.values() for parameter in path.parameters().values()]
    assert all(torch.equal(one, other) for one, other in zip(held, after, strict=True))


def test_weights_go_back_after_an_error(bridge, other_folder):
    before = logits(bridge)
    paths = list(read_paths(bridge, other_folder, mlp_sites(LAYERS)).values())
    for change in (lambda: exchanged(bridge, paths), lambda: interpolated(bridge, paths, 0.5)):
        with pytest.raises(ZeroDivisionError), change():
            raise ZeroDivisionError
        assert torch.equal(logits(bridge), before)


def test_weights_go_back_if_memory_runs_out_on_the_way(bridge, other_folder, monkeypatch):
    before, calls, lerp = logits(bridge), [], torch.lerp

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return lerp(*arguments)

    monkeypatch.setattr(torch, "lerp", full)
    paths = list(read_paths(bridge, other_folder, mlp_sites(LAYERS)).values())
    with pytest.raises(torch.OutOfMemoryError), interpolated(bridge, paths, 0.5):
        pass
    assert torch.equal(logits(bridge), before)


@pytest.mark.parametrize(
    ("of", "name"),
    [
        *(("llama", "LlamaRMSNorm"), ("gemma2", "Gemma2RMSNorm"), ("gemma3", "Gemma3RMSNorm")),
        *(("gemma3n", "Gemma3nRMSNorm"), ("qwen3_next", "Qwen3NextRMSNorm"), ("nemotron", "NemotronLayerNorm1P")),
    ],
)
def test_the_gain_of_a_norm_is_what_it_multiplies_with(of, name):
    """Whatever its name says: Gemma 2 multiplies with 1 + weight, Gemma 3n with the weight."""
    kind = getattr(import_module(f"transformers.models.{of}.modeling_{of}"), name)
    norm, x = kind(32), torch.randn(5, 32)
    x = x - x.mean(-1, keepdim=True)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    path = BlockPath(Site(0), {"ln2": norm})
    with torch.no_grad():
        normalised = x / x.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(path._normed(normalised), norm(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, Gemma2RMSNorm])
def test_a_gain_is_seen_in_coarse_weights_too(kind, monkeypatch):
    """Of Gemma some are above a hundred, where bf16 has no half."""
    monkeypatch.setattr(blocks, "_ADDS_ONE", {})
    norm = kind(32).bfloat16()
    torch.nn.init.normal_(norm.weight, 2.0)
    with torch.no_grad():
        norm.weight[:4] = torch.tensor([31.125, 70.0, 127.5, 300.0])
    gain = BlockPath(Site(0), {"ln2": norm}).gain
    assert torch.equal(gain, norm.weight + (kind is Gemma2RMSNorm))


def test_a_norm_that_computes_something_else_is_refused():
    class Doubled(torch.nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    norm = Doubled(8)
    torch.nn.init.normal_(norm.weight)
    with pytest.raises(ModelError, match=r"Doubled multiplies with neither its weight nor 1 \+ weight"):
        _ = BlockPath(Site(0), {"ln2": norm}).gain


def test_a_module_that_holds_a_sites_parts_is_that_site(llama_folder):
    config = load_config(llama_folder)
    sites, rest = sites_with(config, ["model.layers.0.self_attn", "model.layers.1.mlp", "model.embed_tokens"])
    assert [site.label for site in sites] == ["0.qkv", "0.o", "1"]
    assert rest == ["model.embed_tokens"]


def test_interpolated_weights_end_at_both_models(bridge, other_folder):
    before = logits(bridge)
    paths = list(read_paths(bridge, other_folder, mlp_sites(LAYERS)).values())
    with exchanged(bridge, paths):
        swapped = logits(bridge)
    found = {}
    for alpha in (0.0, 0.5, 1.0):
        with interpolated(bridge, paths, alpha):
            found[alpha] = logits(bridge)
    torch.testing.assert_close(found[0.0], swapped)
    torch.testing.assert_close(found[1.0], before)
    assert (found[0.5] - before).abs().max() > 0.01
    assert (found[0.5] - swapped).abs().max() > 0.01


def test_a_model_of_another_shape_is_refused(bridge, gemma_folder, llama_folder, model_folder):
    wrong = llama_folder if model_folder == gemma_folder else gemma_folder
    with pytest.raises((ModelError, AttributeError)):
        read_paths(bridge, wrong, mlp_sites([1]))
