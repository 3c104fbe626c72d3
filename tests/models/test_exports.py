"""The three export formats read back by their formulas; `tests/compatibility/` reads them with the real loaders."""

import dataclasses
import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models import gemma_scope
from models.errors import ModelError
from models.exports import ExportedModel, write_circuit_tracer, write_gemma_scope, write_saelens
from models.fuse import fuse
from sites import MLP, READINGS, Site

D_MODEL, N_LAYERS = 12, 5
L0 = {Site(1): 20.6, Site(3): 33.0}
NOTES = {"alpha": 1.0, "sweep": "s"}
OTHER = dataclasses.replace(MLP, reads="a", writes=("b",))
X = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def model():
    return ExportedModel("org/model", n_layers=N_LAYERS, d_model=D_MODEL, context_size=128)


@pytest.fixture
def transcoders(random_transcoder):
    """Layer 1 is a base alone, layer 3 base and delta, so that widths differ; some thresholds are below 0."""
    alone = random_transcoder(D_MODEL, 40, layer=1, seed=0)
    alone.threshold[::3] = -0.7
    delta = random_transcoder(D_MODEL, 7, layer=3, seed=2, bias=False)
    return {Site(1): alone, Site(3): fuse(random_transcoder(D_MODEL, 40, layer=3, seed=1), delta)}


def writers(transcoders, model, folder):
    return {
        "gemma_scope": lambda: write_gemma_scope(transcoders, model, folder, L0, NOTES),
        "saelens": lambda: write_saelens(transcoders, model, folder, NOTES),
        "circuit_tracer": lambda: write_circuit_tracer(transcoders, model, folder, NOTES),
    }


FORMATS = ("gemma_scope", "saelens", "circuit_tracer")


def test_gemma_scope_is_found_selected_and_read_by_our_reader(transcoders, model, tmp_path):
    written = write_gemma_scope(transcoders, model, tmp_path / "out", L0, NOTES)
    assert [path.relative_to(tmp_path / "out").parts[:3] for path in written] == [
        ("layer_1", "width_40", "average_l0_21"),
        ("layer_3", "width_47", "average_l0_33"),
    ]
    for site, transcoder in transcoders.items():
        found = gemma_scope.candidates(str(tmp_path / "out"), site, transcoder.d_sae)
        read = gemma_scope.read(str(tmp_path / "out"), gemma_scope.select_target_l0(found, 30), site)
        torch.testing.assert_close(read(X), transcoder(X))
    config = json.loads((written[1].parent / "config.json").read_text())
    assert config["taps"] == ["ln2.hook_normalized", "hook_mlp_out"]
    assert (config["model_name"], config["average_l0"], config["deltascope"]) == ("org/model", 33.0, NOTES)


def test_saelens_weights_and_config(transcoders, model, tmp_path):
    written = write_saelens(transcoders, model, tmp_path / "out", NOTES)
    assert [path.parent.name for path in written] == ["layer_1", "layer_3"]
    for path, (site, transcoder) in zip(written, transcoders.items(), strict=True):
        weights = load_file(path)
        pre = X @ weights["W_enc"] + weights["b_enc"]
        acts = torch.relu(pre) * (pre > weights["threshold"])
        torch.testing.assert_close(acts @ weights["W_dec"] + weights["b_dec"], transcoder(X))
        config = json.loads((path.parent / "cfg.json").read_text())
        metadata = config.pop("metadata")
        assert config == {
            "architecture": "jumprelu_transcoder",
            "d_in": D_MODEL,
            "d_out": D_MODEL,
            "d_sae": transcoder.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }
        assert metadata["hook_name"] == f"blocks.{site.layer}.ln2.hook_normalized"
        assert metadata["hook_name_out"] == f"blocks.{site.layer}.hook_mlp_out"
        assert (metadata["model_name"], metadata["context_size"]) == ("org/model", 128)
        assert metadata["deltascope"] == NOTES


def test_circuit_tracer_has_every_layer_of_one_width(transcoders, model, tmp_path):
    written = write_circuit_tracer(transcoders, model, tmp_path / "out", NOTES)
    assert [path.name for path in written] == [f"layer_{layer}.safetensors" for layer in range(N_LAYERS)]
    for layer, path in enumerate(written):
        weights = load_file(path)
        assert weights["W_enc"].shape == weights["W_dec"].shape == (47, D_MODEL)
        pre = torch.nn.functional.linear(X, weights["W_enc"], weights["b_enc"])
        acts = pre * (pre > weights["activation_function.threshold"])  # circuit-tracer has no ReLU
        transcoder = transcoders.get(Site(layer))
        expected = torch.zeros_like(X) if transcoder is None else transcoder(X)
        torch.testing.assert_close(acts @ weights["W_dec"] + weights["b_dec"], expected)
        width = 0 if transcoder is None else transcoder.d_sae
        assert not acts[:, width:].any(), "padding must stay silent"
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text()) == {
        "model_name": "org/model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
        "deltascope": NOTES,
    }


@pytest.mark.parametrize("name", FORMATS)
def test_half_precision_and_a_missing_bias_become_fp32_and_zeros(name, random_transcoder, model, tmp_path):
    plain = random_transcoder(D_MODEL, 40, layer=1, seed=0, bias=False)
    keys = ("W_enc", "b_enc", "threshold", "W_dec")
    half = dataclasses.replace(plain, **{key: getattr(plain, key).bfloat16().requires_grad_() for key in keys})
    written = writers({Site(1): half}, model, tmp_path / "out")[name]()
    if name == "gemma_scope":
        read = gemma_scope.read_npz(written[0], Site(1))
        weights = {key: getattr(read, key) for key in gemma_scope.KEYS}
    else:
        weights = load_file(written[1] if name == "circuit_tracer" else written[0])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["b_dec"], torch.zeros(D_MODEL))
    assert torch.equal(weights["W_dec"], half.W_dec.detach().float())


@pytest.mark.parametrize("name", FORMATS)
def test_what_exists_is_not_replaced(name, transcoders, model, tmp_path):
    writers(transcoders, model, tmp_path / "out")[name]()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="already exists; an export needs a new or an empty folder"):
        writers(transcoders, model, tmp_path / "out")[name]()
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert all(path.is_file() for path in writers(transcoders, model, tmp_path / "empty")[name]())


@pytest.mark.parametrize("name", FORMATS)
def test_a_failed_export_leaves_nothing(name, transcoders, model, tmp_path):
    class Failing(dict):
        def __getitem__(self, site):
            if site.layer == 3:
                raise OSError(28, os.strerror(28))
            return super().__getitem__(site)

    with pytest.raises(ModelError, match=r"out: the export could not be written .*No space left"):
        writers(Failing(transcoders), model, tmp_path / "out")[name]()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda given: {}, "no transcoders were given"),
        (lambda given: {Site(2): given[Site(1)]}, "export, layer 2: made for layer 1"),
        (
            lambda given: {Site(7): dataclasses.replace(given[Site(1)], site=Site(7))},
            "export, layer 7: the model has layers 0 to 4",
        ),
        (lambda given: {Site(1, OTHER): dataclasses.replace(given[Site(1)], site=Site(1, OTHER))}, "layer 1: reads a"),
    ],
    ids=["none", "wrong key", "layer out of range", "other taps"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(name, damage, said, transcoders, model, tmp_path):
    with pytest.raises(ModelError) as raised:
        writers(damage(transcoders), model, tmp_path / "out")[name]()
    assert said in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["saelens", "circuit_tracer"])
def test_a_tap_that_is_no_hook_is_refused(name, transcoders, model, tmp_path):
    kind = READINGS["resid_mid/sqrt(d_model)"]
    given = {
        Site(at.layer, kind): dataclasses.replace(one, site=Site(at.layer, kind)) for at, one in transcoders.items()
    }
    with pytest.raises(ModelError, match=r"resid_mid/sqrt\(d_model\) is .* not a hook"):
        writers(given, dataclasses.replace(model, kind=kind), tmp_path / "out")[name]()


@pytest.mark.parametrize("average_l0", [{Site(1): 20.0}, {Site(1): 20.0, Site(3): float("nan")}])
def test_gemma_scope_needs_the_l0_of_every_layer(average_l0, transcoders, model, tmp_path):
    with pytest.raises(ModelError, match="layer 3 has no average_l0"):
        write_gemma_scope(transcoders, model, tmp_path / "out", average_l0, NOTES)


def test_widths_and_kinds_that_a_format_cannot_hold_are_refused(random_transcoder, model, tmp_path):
    """SAELens names two hooks and two widths; the others know MLPs of one width alone."""
    kind = dataclasses.replace(MLP, order=1, name="o", reads="attn.hook_z", writes=("hook_attn_out",))
    wide = random_transcoder(D_MODEL, 8, layer=1, seed=0)
    one = dataclasses.replace(wide, W_enc=torch.randn(2 * D_MODEL, 8), site=Site(1, kind))
    given, model = {Site(1, kind): one}, dataclasses.replace(model, kind=kind)
    for name in ("gemma_scope", "circuit_tracer"):
        with pytest.raises(ModelError, match="24 and writes 12 dimensions; this format holds only transcoders of MLPs"):
            writers(given, model, tmp_path / name)[name]()
    (written,) = writers(given, model, tmp_path / "saelens")["saelens"]()
    config = json.loads((written.parent / "cfg.json").read_text())
    assert (config["d_in"], config["d_out"]) == (24, 12)
    assert config["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_attn_out"
    two = dataclasses.replace(kind, writes=("hook_q", "hook_k"))
    several = {Site(1, two): dataclasses.replace(one, site=Site(1, two))}
    with pytest.raises(ModelError, match="writes 2 hooks; this format names one"):
        writers(several, dataclasses.replace(model, kind=two), tmp_path / "two")["saelens"]()
