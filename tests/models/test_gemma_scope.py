"""Gemma Scope's layout: a round trip, the documented selection rule, and one sentence for every bad file."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
import torch

from models import gemma_scope
from models.errors import ModelError
from models.gemma_scope import Candidate, candidates, select_percentile, select_target_l0
from models.transcoder import Transcoder
from sites import READINGS, Site

D_MODEL, D_SAE = 6, 10


@pytest.fixture
def published(tmp_path, random_transcoder):
    """A folder as the hub has it, without config.json: layers 3 and 7, one width, several L0 listed out of order."""
    for layer, l0s in {3: (90, 12, 41), 7: (8,)}.items():
        for l0 in l0s:
            folder = tmp_path / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
            folder.mkdir(parents=True)
            write_plain(folder / "params.npz", random_transcoder(D_MODEL, D_SAE, layer, seed=l0))
    (tmp_path / "layer_3" / "width_16k" / "average_l0_99").mkdir()  # a download that never finished
    return tmp_path


def write_plain(path, transcoder, **instead):
    arrays = {key: getattr(transcoder, key).numpy() for key in gemma_scope.KEYS} | instead
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})


def same(one: Transcoder, other: Transcoder) -> bool:
    return one.site == other.site and all(
        torch.equal(getattr(one, key), getattr(other, key)) for key in gemma_scope.KEYS
    )


def test_candidates_by_ascending_l0(published):
    found = candidates(str(published), Site(3), "16k")
    assert [candidate.average_l0 for candidate in found] == [12, 41, 90]
    assert found[0].path == "layer_3/width_16k/average_l0_12"


def test_reading_what_is_published(published, random_transcoder):
    chosen = select_target_l0(candidates(str(published), Site(3), "16k"), 40)
    found = gemma_scope.read(str(published), chosen, Site(3))
    assert same(found, random_transcoder(D_MODEL, D_SAE, 3, seed=41))
    assert found.site == Site(3)


def test_round_trip_with_taps(tmp_path, random_transcoder):
    site = Site(5, READINGS["resid_mid/sqrt(d_model)"])
    transcoder = dataclasses.replace(random_transcoder(D_MODEL, D_SAE, 5, seed=1), site=site)
    folder = tmp_path / "layer_5" / "width_10" / "average_l0_4.5"
    gemma_scope.write(transcoder, folder, {"val_fvu": 0.25, "layer": 99})
    (found,) = candidates(str(tmp_path), Site(5), 10)
    assert found.average_l0 == 4.5
    assert same(gemma_scope.read(str(tmp_path), found, Site(5)), transcoder)
    assert json.loads((folder / "config.json").read_text()) == {
        "layer": 5,
        "taps": ["resid_mid/sqrt(d_model)", "hook_mlp_out"],
        "val_fvu": 0.25,
    }
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "params.npz"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_percentile_is_the_index_by_ascending_l0(count):
    found = [Candidate(float(l0), f"l0_{l0}") for l0 in range(10, 10 + count)]
    shuffled = found[::-1]
    for percentile in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0):
        assert select_percentile(shuffled, percentile) == found[min(count - 1, int(count * percentile))]
    assert select_percentile(shuffled, 0.0).average_l0 == 10, "0.0 is the sparsest"


def test_target_l0_is_the_nearest_and_of_two_the_sparser():
    found = [Candidate(l0, str(l0)) for l0 in (64.0, 16.0, 32.0)]
    assert [select_target_l0(found, target).average_l0 for target in (1, 24, 25, 48, 1000)] == [16, 16, 32, 32, 64]


@pytest.mark.parametrize(
    ("layer", "width", "said"),
    [
        (3, "65k", "no layer_3/width_65k/average_l0_*/params.npz; layer_3 has width_16k"),
        (4, "16k", "no layer_4/width_16k/average_l0_*/params.npz; the top folder has layer_3, layer_7"),
    ],
)
def test_a_missing_layer_or_width_says_what_there_is(published, layer, width, said):
    with pytest.raises(ModelError) as raised:
        candidates(str(published), Site(layer), width)
    assert str(raised.value).startswith("transcoders.source: ")
    assert said in str(raised.value)


BAD_ARRAYS = [
    ({"threshold": None}, "lacks threshold; found W_enc, W_dec, b_enc, b_dec"),
    ({"W_dec": np.zeros((D_SAE + 1, D_MODEL), np.float32)}, "W_dec has shape (11, 6), expected (10, 6)"),
    ({"b_enc": np.zeros((D_SAE, 1), np.float32)}, "b_enc has shape (10, 1), expected a vector"),
    ({"W_enc": np.zeros(D_SAE, np.float32)}, "W_enc has shape (10,), expected a matrix"),
    ({"b_dec": np.zeros(D_MODEL, np.int64)}, "b_dec has dtype int64, expected floating point"),
    ({"b_dec": np.full(D_MODEL, np.nan, np.float32)}, "b_dec has values that are not finite"),
]


@pytest.mark.parametrize(("instead", "said"), BAD_ARRAYS, ids=[said[:12] for _, said in BAD_ARRAYS])
def test_bad_arrays(tmp_path, random_transcoder, instead, said):
    path = tmp_path / "params.npz"
    write_plain(path, random_transcoder(D_MODEL, D_SAE, 3, seed=0), **instead)
    with pytest.raises(ModelError) as raised:
        gemma_scope.read_npz(path, Site(3))
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)


def test_half_precision_is_read_as_fp32(tmp_path, random_transcoder):
    transcoder = random_transcoder(D_MODEL, D_SAE, 3, seed=0)
    write_plain(tmp_path / "params.npz", transcoder, W_enc=transcoder.W_enc.half().numpy())
    assert torch.equal(gemma_scope.read_npz(tmp_path / "params.npz", Site(3)).W_enc, transcoder.W_enc.half().float())


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def pickled_array(path, transcoder):
    write_plain(path, transcoder, b_enc=np.array([Bomb()], dtype=object))


def pickled_file(path, transcoder):
    path.write_bytes(pickle.dumps(Bomb()))


def truncated(path, transcoder):
    write_plain(path, transcoder)
    path.write_bytes(path.read_bytes()[:-200])


def flipped_byte(path, transcoder):
    write_plain(path, transcoder)
    data = bytearray(path.read_bytes())
    data[300] ^= 255
    path.write_bytes(data)


def one_array(path, transcoder):
    np.save(path.with_suffix(".npy"), transcoder.W_enc.numpy())
    path.with_suffix(".npy").rename(path)


def empty(path, transcoder):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [pickled_array, pickled_file, truncated, flipped_byte, one_array, empty])
def test_unreadable_files(tmp_path, random_transcoder, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.npz"
    damage(path, random_transcoder(D_MODEL, D_SAE, 3, seed=0))
    with pytest.raises(ModelError) as raised:
        gemma_scope.read_npz(path, Site(3))
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "unpickled").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        gemma_scope.read_npz(tmp_path / "params.npz", Site(3))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not a transcoder's config"),
        ("[]", "not a transcoder's config"),
        ('{"layer": 3}', "not a transcoder's config"),
        ('{"layer": 3, "taps": ["a"]}', "taps a belong to no kind of site"),
        ('{"layer": "3", "taps": ["ln2.hook_normalized", "hook_mlp_out"]}', "not a transcoder's config"),
        (
            '{"layer": 4, "taps": ["ln2.hook_normalized", "hook_mlp_out"]}',
            "layer 4, but found in the folder of layer 3",
        ),
    ],
)
def test_a_bad_config_is_refused(tmp_path, random_transcoder, config, said):
    write_plain(tmp_path / "params.npz", random_transcoder(D_MODEL, D_SAE, 3, seed=0))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as raised:
        gemma_scope.read_npz(tmp_path / "params.npz", Site(3))
    assert said in str(raised.value)


@pytest.fixture
def hub_cache(published, tmp_path_factory, monkeypatch):
    """`published` as the hub client's cache holds it after a download."""
    from huggingface_hub import constants

    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--owner--scope"
    commit = "0" * 40
    (repository / "snapshots").mkdir(parents=True)
    published.rename(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
def test_offline_the_cached_repository_is_read(monkeypatch, tmp_path_factory, random_transcoder):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    found = candidates("owner/scope", Site(3), "16k")
    assert [candidate.average_l0 for candidate in found] == [12, 41, 90]
    with pytest.raises(ModelError, match="layer_3 has width_16k"):
        candidates("owner/scope", Site(3), "1m")
    with pytest.raises(ModelError, match=r"transcoders\.source: owner/other is not on this machine"):
        candidates("owner/other", Site(3), "16k")
    with pytest.raises(ModelError, match=r"transcoders\.source"):
        gemma_scope.read("owner/other", found[0], Site(3))
