"""Keys, keyed folders, manifests and the lock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.context import keys
from jobs.context.workspace import Workspace, storage_root
from jobs.errors import RequestError
from jobs.files import finish, is_finished, key_of, keyed_folder
from search_spaces.load import load
from search_spaces.schema import Sweep
from sites import Address, Ground, Site, mlp_sites


def test_equal_values_give_equal_keys() -> None:
    assert key_of({"a": 1, "b": [2.0]}) == key_of({"b": [2.0], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_only_another_key_empties_a_keyed_folder(tmp_path: Path) -> None:
    folder = keyed_folder(tmp_path / "results", "one")
    (folder / "result").write_text("kept")
    assert (keyed_folder(folder, "one") / "result").is_file()
    assert not (keyed_folder(folder, "two") / "result").exists()


def test_a_manifest_counts_for_its_key(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, "one")
    finish(tmp_path, "one", {"seconds": 1.0})
    assert is_finished(tmp_path, "one")
    assert not is_finished(tmp_path, "two")


def test_the_second_driver_is_refused(tmp_path: Path) -> None:
    space = Workspace(tmp_path, "one")
    space.create()
    with space.locked(), pytest.raises(RequestError, match="another process"), Workspace(tmp_path, "one").locked():
        pass
    with Workspace(tmp_path, "one").locked():
        pass


def test_too_little_room_is_a_sentence(tmp_path: Path) -> None:
    space = Workspace(tmp_path, "one")
    space.create()
    with pytest.raises(RequestError, match="GB are free"):
        space.check_space(10**18)


def test_a_job_keeps_its_results_out_of_the_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    upload = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    assert storage_root("mlruns") == tmp_path / "home" / "deltascope" / "mlruns"
    assert storage_root("/shared/runs") == Path("/shared/runs")
    monkeypatch.chdir(tmp_path)
    assert storage_root("mlruns") == tmp_path / "mlruns"


SITES = mlp_sites([1, 2])


def groups(settings: Sweep) -> list[Address]:
    """A group of each target at every site and width."""
    grounds = Ground("change"), Ground("residual", 0.25)
    return [Address(site, one, d_new) for one in grounds for site in SITES for d_new in settings.deltas.d_new]


def changed(*overrides: str) -> set[str]:
    """The stages that have to be redone with `overrides`."""
    one, other = load("tiny"), load("tiny", overrides)
    stages: dict[str, Callable[[Sweep], str]] = {
        "data": keys.data,
        "lora": keys.lora,
        "lora trials": keys.lora_group,
        "base activations": keys.base_activations,
        "transcoders": lambda settings: keys.transcoders(settings, SITES),
        "change group": lambda settings: keys.delta_group(settings, Address(Site(1), Ground("change"), 4)),
        "residual group": lambda settings: keys.delta_group(settings, Address(Site(1), Ground("residual", 0.25), 4)),
        "deltas": lambda settings: keys.deltas(settings, groups(settings)),
        "evaluate": lambda settings: keys.evaluate(settings, groups(settings)),
        "report": lambda settings: keys.report(settings, groups(settings)),
    }
    return {name for name, key in stages.items() if key(one) != key(other)}


def test_a_changed_setting_redoes_exactly_what_depends_on_it() -> None:
    late = {"evaluate", "report"}
    either = {"deltas", "change group", "residual group", *late}
    assert changed("evaluate.alphas=[0.0, 2.0]") == late
    assert changed("deltas.trials=9") == {"deltas", *late}
    assert changed("deltas.d_new=[4, 8, 16]") == {"deltas", *late}
    assert changed("deltas.epochs=9") == either
    assert changed("transcoders.epochs=9") == {"transcoders", "residual group", "deltas", *late}
    assert changed("lora.trials=9") == {"lora", *either}
    assert changed("lora.steps=9") == {"lora", "lora trials", *either}
    assert len(changed("data.train_rows=121")) == 10
    assert changed("compute.max_concurrent=1") == set()
    assert changed("storage.root=elsewhere") == set()
