"""JSON files know whether they hold what was written; seals know it of everything in a folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows import sha256_of
from jobs.errors import DamagedFileError
from jobs.files import SEAL, damage, read_json, require, seal, sealed_hash, write_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=5).filter(lambda key: key != "sha256"), VALUES, max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, value: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, value)
    assert read_json(path) == value


@given(place=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_is_damage(tmp_path_factory: pytest.TempPathFactory, place: int, flip: int, cut: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.json"
    write_json(path, {"key": "abc", "rows": [{"ce": 0.25, "text": "é"}, None]})
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] ^= flip
    path.write_bytes(data[:place] if cut else data)
    with pytest.raises(DamagedFileError, match=r"changed\.json does not hold what was written to it: .*damaged"):
        read_json(path)


def test_a_missing_file_is_none_and_the_error_travels(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DamagedFileError, match="cannot be read") as raised:
        read_json(tmp_path / "folder.json")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with another that has a seal of its own."""
    inner = tmp_path / "trial_0001"
    inner.mkdir()
    (inner / "weights").write_bytes(b"abcdef")
    (tmp_path / "plain").write_bytes(b"12345")
    (tmp_path / ".lock").write_text("")
    (tmp_path / "half.tmp").write_text("")
    seal(inner)
    seal(tmp_path)
    return tmp_path


def test_a_seal_lists_all_and_trusts_the_seals_within(folder: Path) -> None:
    known = read_json(folder / SEAL)["files"]
    assert set(known) == {"plain", "trial_0001/weights", "trial_0001/files.json"}
    assert known["plain"] == [5, sha256_of(folder / "plain")]
    assert list(damage(folder)) == []
    require(folder, folder / "plain", folder / "trial_0001" / "weights")
    (folder / "trial_0001" / "weights").write_bytes(b"uvwxyz")
    seal(folder)  # which takes the hash from the seal within
    assert [one.path.name for one in damage(folder)] == ["weights"]


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b""), "has 0 bytes instead of 6"),
        (change, "does not hold what was written to it"),
    ],
)
def test_damage_is_named(folder: Path, how, why: str) -> None:
    path = folder / "trial_0001" / "weights"
    how(path)
    assert list(damage(folder)) == [(path, why)]
    assert list(damage(folder / "trial_0001")) == [(path, why)]
    with pytest.raises(DamagedFileError, match=why):
        require(path)


def test_large_files_are_read_only_where_they_are_asked_for(folder: Path) -> None:
    change(folder / "plain")
    assert list(damage(folder, most_bytes=4)) == []
    assert [one.path.name for one in damage(folder, most_bytes=5)] == ["plain"]


def test_a_file_that_no_seal_lists_is_not_believed(folder: Path) -> None:
    (folder / "added").write_text("x")
    with pytest.raises(DamagedFileError, match="is not listed by what made it"):
        sealed_hash(folder / "added")
    (folder / SEAL).unlink()
    assert [(one.path.name, one.why) for one in damage(folder)] == [(SEAL, "is missing")]


def test_damage_of_one_file_whatever_its_kind(folder: Path) -> None:
    """A sealed one, JSON, a shard, the index of shards, and one that nothing knows of."""
    import torch

    from trainers.activations import write_index, write_shard

    shard, index, alone = folder / "shard.safetensors", folder / "index.json", folder / "alone.json"
    write_shard(shard, {"x": torch.zeros(4, 2)})
    write_index(folder, [{"file": shard.name, "tokens": 4}], {})
    write_json(alone, {"a": 1})
    kinds = (folder / "plain", alone, shard, index)
    assert [list(damage(path)) for path in kinds] == [[]] * 4
    shard.unlink()
    change(folder / "plain")
    change(alone)
    assert [broken.path for path in kinds for broken in damage(path)] == list(kinds)
    (folder / "added").write_text("x")
    assert [broken.why for broken in damage(folder / "added")] == ["is not listed by what made it"]
