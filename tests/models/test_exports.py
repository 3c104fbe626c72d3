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
from models.transcoder import Taps

D_MODEL, N_LAYERS = 12, 5
L0 = {1: 20.6, 3: 33.0}
NOTES = {"alpha": 1.0, "sweep": "s"}
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
    return {1: alone, 3: fuse(random_transcoder(D_MODEL, 40, layer=3, seed=1), delta)}


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
    for layer, transcoder in transcoders.items():
        found = gemma_scope.candidates(str(tmp_path / "out"), layer, transcoder.d_sae)
        read = gemma_scope.read(str(tmp_path / "out"), gemma_scope.select_target_l0(found, 30), layer)
        torch.testing.assert_close(read(X), transcoder(X))
    config = json.loads((written[1].parent / "config.json").read_text())
    assert config["taps"] == ["ln2.hook_normalized", "hook_mlp_out"]
    assert (config["model_name"], config["average_l0"], config["deltascope"]) == ("org/model", 33.0, NOTES)


def test_saelens_weights_and_config(transcoders, model, tmp_path):
    written = write_saelens(transcoders, model, tmp_path / "out", NOTES)
    assert [path.parent.name for path in written] == ["layer_1", "layer_3"]
    for path, (layer, transcoder) in zip(written, transcoders.items(), strict=True):
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
        assert metadata["hook_name"] == f"blocks.{layer}.ln2.hook_normalized"
        assert metadata["hook_name_out"] == f"blocks.{layer}.hook_mlp_out"
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
        transcoder = transcoders.get(layer)
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
    written = writers({1: half}, model, tmp_path / "out")[name]()
    if name == "gemma_scope":
        read = gemma_scope.read_npz(written[0], 1)
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
        def __getitem__(self, layer):
            if layer == 3:
                raise OSError(28, os.strerror(28))
            return super().__getitem__(layer)

    with pytest.raises(ModelError, match=r"out: the export could not be written .*No space left"):
        writers(Failing(transcoders), model, tmp_path / "out")[name]()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda given: {}, "no transcoders were given"),
        (lambda given: {2: given[1]}, "given for layer 2 was made for layer 1"),
        (
            lambda given: {7: dataclasses.replace(given[1], layer=7)},
            "made for layer 7, but the model has layers 0 to 4",
        ),
        (lambda given: {1: dataclasses.replace(given[1], taps=Taps("a", "b"))}, "export, layer 1: reads a"),
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
    taps = Taps("resid_mid/sqrt(d_model)", "hook_mlp_out")
    given = {layer: dataclasses.replace(transcoder, taps=taps) for layer, transcoder in transcoders.items()}
    with pytest.raises(ModelError, match=r"resid_mid/sqrt\(d_model\) is .* not a hook"):
        writers(given, dataclasses.replace(model, taps=taps), tmp_path / "out")[name]()


@pytest.mark.parametrize("average_l0", [{1: 20.0}, {1: 20.0, 3: float("nan")}])
def test_gemma_scope_needs_the_l0_of_every_layer(average_l0, transcoders, model, tmp_path):
    with pytest.raises(ModelError, match="layer 3 has no average_l0"):
        write_gemma_scope(transcoders, model, tmp_path / "out", average_l0, NOTES)
