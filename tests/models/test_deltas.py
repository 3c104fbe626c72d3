"""Delta files: what is written is read back to the last bit, and every bad folder is one sentence."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.deltas import WEIGHTS, read_delta, write_delta
from models.errors import ModelError
from sites import READINGS, Site


@pytest.fixture
def delta(random_transcoder):
    return random_transcoder(6, 4, layer=2, seed=0, bias=False)


@pytest.fixture
def folder(tmp_path, delta):
    write_delta(delta, tmp_path / "d", {"val_fvu": 0.5, "base": "layer_2/width_16k/average_l0_12"})
    return tmp_path / "d"


def test_round_trip(folder, delta):
    found = read_delta(folder)
    assert all(torch.equal(getattr(found, key), getattr(delta, key)) for key in WEIGHTS)
    assert (found.site, found.b_dec) == (delta.site, None)
    assert json.loads((folder / "config.json").read_text())["base"] == "layer_2/width_16k/average_l0_12"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "delta.safetensors"]


def test_taps_travel_and_bf16_becomes_fp32(tmp_path, delta):
    site = Site(2, READINGS["resid_mid/sqrt(d_model)"])
    other = dataclasses.replace(delta, site=site, W_dec=delta.W_dec.bfloat16())
    write_delta(other, tmp_path, {"layer": 77})
    found = read_delta(tmp_path)
    assert found.site == site
    assert found.W_dec.dtype == torch.float32
    assert torch.equal(found.W_dec, other.W_dec.float())


def test_writing_again_replaces(folder, delta):
    write_delta(dataclasses.replace(delta, W_dec=2 * delta.W_dec), folder, {})
    assert torch.equal(read_delta(folder).W_dec, 2 * delta.W_dec)


def test_a_decoder_bias_is_refused(tmp_path, random_transcoder):
    with pytest.raises(ModelError, match="must not have a decoder bias"):
        write_delta(random_transcoder(6, 4, layer=2, seed=0), tmp_path, {})
    assert not list(tmp_path.iterdir())


def edit(**instead):
    def damage(folder):
        tensors = load_file(folder / "delta.safetensors") | instead
        save_file({key: value for key, value in tensors.items() if value is not None}, folder / "delta.safetensors")

    return damage


def cut(folder):
    path = folder / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-16])


BAD = {
    "no weights": (lambda folder: (folder / "delta.safetensors").unlink(), "delta.safetensors is missing"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "cut short": (cut, "not a readable safetensors file"),
    "tensor missing": (edit(threshold=None), "lacks threshold; found W_dec, W_enc, b_enc"),
    "wrong shape": (edit(W_dec=torch.zeros(5, 6)), "W_dec has shape (5, 6), expected (4, 6)"),
    "flat matrix": (edit(W_enc=torch.zeros(24)), "W_enc has shape (24,)"),
    "whole numbers": (edit(b_enc=torch.zeros(4, dtype=torch.int64)), "b_enc has dtype torch.int64"),
    "config not json": (lambda folder: (folder / "config.json").write_text("{"), "not a transcoder's config"),
    "config without taps": (lambda folder: (folder / "config.json").write_text('{"layer": 2}'), "taps"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_sentence(folder, name):
    damage, said = BAD[name]
    damage(folder)
    with pytest.raises(ModelError) as raised:
        read_delta(folder)
    assert str(folder) in str(raised.value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
