"""Results are keyed by what a model's files hold, not by when they were written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from jobs.context import fingerprints, keys
from jobs.context.fingerprints import files_read, fingerprint
from search_spaces.load import load
from search_spaces.schema import Sweep
from sites import Site


@pytest.fixture
def base(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


@pytest.fixture
def other(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "other"))


def settings(base: Path, root: Path, *more: str) -> Sweep:
    return load("tiny", [f"model.source={base}", f"storage.root={root}", *more])


def flip(path: Path) -> None:
    """Another value in a file of the same size and time."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as tar and rsync set it


def test_a_base_that_was_written_anew_changes_every_key_that_depends_on_it(base: Path, tmp_path: Path) -> None:
    asked = settings(base, tmp_path)
    kinds = (keys.lora, keys.lora_group, keys.base_activations, keys.finetuned_activations, keys.finetuned_check)
    before = [key(asked) for key in kinds]
    assert [key(asked) for key in kinds] == before
    flip(base / "model.safetensors")
    assert not set(before) & {key(asked) for key in kinds}


def test_a_base_under_an_adopted_model_counts_too(base: Path, other: Path, tmp_path: Path) -> None:
    asked = settings(base, tmp_path, f"model.finetuned={other}")
    before = keys.lora(asked)
    flip(base / "model.safetensors")
    assert (second := keys.lora(asked)) != before
    flip(other / "model.safetensors")
    assert keys.lora(asked) not in (before, second)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_every_file_that_is_read_counts(base: Path, tmp_path: Path, name: str) -> None:
    asked = settings(base, tmp_path)
    before = keys.lora(asked)
    (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {"something": "else"}))
    assert keys.lora(asked) != before


def test_a_copy_and_a_touch_change_nothing_and_other_files_do_not_count(base: Path, tmp_path: Path) -> None:
    before = fingerprint(str(base), None, tmp_path)
    os.utime(base / "model.safetensors")
    (base / "trainer_state.json").write_text("{}")
    (base / "optimizer.safetensors").write_bytes(b"x")
    assert fingerprint(str(base), None, tmp_path) == before
    copy = shutil.copytree(base, tmp_path / "copy")
    assert fingerprint(str(copy), None, tmp_path) == before


def test_the_files_are_those_that_are_loaded(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    (base / "a.safetensors").write_bytes(b"x")
    assert {path.name for path in files_read(base)} >= {"config.json", "model.safetensors"}
    assert "a.safetensors" not in {path.name for path in files_read(base)}
    (base / "model.safetensors").unlink()
    assert "a.safetensors" in {path.name for path in files_read(base)}


def test_templates_and_weights_of_other_names_count(base: Path, tmp_path: Path) -> None:
    before = fingerprint(str(base), None, tmp_path)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    assert (second := fingerprint(str(base), None, tmp_path)) != before
    (base / "model.safetensors").rename(base / "mine.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    third = fingerprint(str(base), None, tmp_path)
    flip(base / "mine.safetensors")
    assert fingerprint(str(base), None, tmp_path) not in (second, third)


def test_a_folder_of_rows_counts_by_its_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "owner" / "name" / "train.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}")
    monkeypatch.chdir(tmp_path)
    asked = settings(base, tmp_path / "runs", "data.rows_file=owner/name")
    before = keys.data(asked)
    rows.write_text('{"input": "another"}')
    assert keys.data(asked) != before


def test_a_file_is_hashed_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "root" / "models"
    models.mkdir(parents=True)
    expected = fingerprint(str(base), None, models)
    monkeypatch.setattr(fingerprints, "_known", {})  # as in another process
    monkeypatch.setattr(fingerprints, "_read_from", set())
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert fingerprint(str(base), None, models) == expected
    (models / fingerprints.CACHE).write_text("[[")
    monkeypatch.undo()
    assert fingerprint(str(base), None, models) == expected


def test_a_snapshot_of_the_hub_counts_by_its_commit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert fingerprint("someone/model", None, tmp_path) is None
    held = cache / "models--someone--model"
    shutil.copytree(base, held / "snapshots" / "abc")
    flip(Path(shutil.copytree(base, held / "snapshots" / "def")) / "model.safetensors")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("abc")
    (held / "refs" / "v2").write_text("def")
    assert fingerprint("someone/model", None, tmp_path) == fingerprint(str(base), None, tmp_path)
    assert fingerprint("someone/model", "v2", tmp_path) != fingerprint("someone/model", None, tmp_path)
    assert fingerprint("someone/model", "def", tmp_path) == fingerprint("someone/model", "v2", tmp_path)


def test_published_bases_count_by_size_and_time(tmp_path: Path, base: Path) -> None:
    params = tmp_path / "scope" / "layer_1" / "width_64" / "average_l0_4" / "params.npz"
    params.parent.mkdir(parents=True)
    params.write_bytes(b"one")
    os.utime(params, ns=(1, 1))
    asked = settings(base, tmp_path, f"transcoders.source={tmp_path / 'scope'}")
    before = keys.base(asked, Site(1)), keys.base(asked, Site(2))
    params.write_bytes(b"two")
    assert keys.base(asked, Site(1)) != before[0]
    assert keys.base(asked, Site(2)) == before[1]


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF one")
    before = keys.lora(settings(path, tmp_path))
    path.touch()
    assert keys.lora(settings(path, tmp_path)) == before
    path.write_bytes(b"GGUF two")
    assert keys.lora(settings(path, tmp_path)) != before
