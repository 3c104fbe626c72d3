"""Mirrored results: in memory, in a folder, and on an S3 server in this process."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from jobs.context.workspace import START
from jobs.errors import RequestError
from jobs.files import write_json
from jobs.sweep import mirror as module
from jobs.sweep.mirror import LEDGER, Mirror, mirrored


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("mirrored")  # all servers of a process share one set of buckets
        yield "s3://mirrored/runs"
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("s3") + f"/{tmp_path.name}"
    else:
        yield f"file://{tmp_path / 'elsewhere'}" if request.param == "file" else f"memory://{tmp_path.name}/runs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep that has got as far as one trial."""
    one = tmp_path / "here" / "tiny"
    write_json(one / START, {"start": "abc"})
    write_json(one / "deltas/layer_01/key.json", {"key": "1"})
    write_json(one / "deltas/layer_01/trial_0000/result.json", {"value": 1})
    write_json(one / "deltas/layer_01/residual/manifest.json", {"key": "1"})
    write_json(one / "activations/base/manifest.json", {"key": "1"})
    (one / ".lock").touch()
    return one


SENT = {START, "deltas/layer_01/key.json", "deltas/layer_01/trial_0000/result.json"}


def names(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def fetched(url: str, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name / "tiny"
    Mirror(url, folder).open()
    return folder


def opened(url: str, folder: Path) -> Mirror:
    one = Mirror(url, folder)
    one.open()
    return one


def test_a_machine_that_has_nothing_gets_everything_that_cannot_be_recomputed(
    url: str, folder: Path, tmp_path: Path
) -> None:
    opened(url, folder).send()
    there = fetched(url, tmp_path, "there")
    assert names(there) == SENT
    for name in SENT:
        assert (there / name).read_bytes() == (folder / name).read_bytes()


def test_files_removed_here_are_removed_at_the_url(url: str, folder: Path, tmp_path: Path) -> None:
    """Trials of earlier settings must not come back into this folder."""
    one = opened(url, folder)
    one.send()
    (folder / "deltas/layer_01/trial_0000/result.json").unlink()
    write_json(folder / "deltas/layer_01/key.json", {"key": "2"})
    again = opened(url, folder)  # and after a restart
    again.send()
    there = fetched(url, tmp_path, "there")
    assert names(there) == SENT - {"deltas/layer_01/trial_0000/result.json"}
    assert (there / "deltas/layer_01/key.json").read_text() == (folder / "deltas/layer_01/key.json").read_text()


def test_a_run_killed_after_it_deleted_files_is_continued(url: str, folder: Path, tmp_path: Path) -> None:
    """The ledger, written last, still lists a file that the URL has no more."""
    opened(url, folder).send()
    before = json.loads((folder / LEDGER).read_text())["sent"]
    (folder / "deltas/layer_01/trial_0000/result.json").unlink()
    opened(url, folder).send()
    writer = json.loads((folder / LEDGER).read_text())["writer"]
    write_json(folder / LEDGER, {"writer": writer, "sent": before})
    write_json(folder / "deltas/layer_01/key.json", {"key": "2"})
    opened(url, folder).send()
    there = fetched(url, tmp_path, "there")
    assert (there / "deltas/layer_01/key.json").read_text() == (folder / "deltas/layer_01/key.json").read_text()


def test_a_run_killed_while_it_registers_is_not_taken_for_another_machine(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(url, folder).send()
    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "_note", lambda self: None)  # killed after the URL has the new name
        opened(url, folder)
    opened(url, folder).send()


def test_files_arrive_in_the_order_they_were_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    kind = type(fsspec.filesystem("memory"))
    put = kind.put_file

    def note(self: fsspec.AbstractFileSystem, path: str, target: str, **options: object) -> None:
        order.append(path)
        put(self, path, target, **options)

    monkeypatch.setattr(kind, "put_file", note)
    for number, name in enumerate(["deltas/layer_01/trial_0000/result.json", START, "deltas/layer_01/key.json"]):
        os.utime(folder / name, ns=(number, number))
    opened("memory://ordered", folder).send()
    assert [Path(name).name for name in order] == ["result.json", START, "key.json"]


def test_results_of_another_machine_are_not_overwritten(url: str, folder: Path, tmp_path: Path) -> None:
    opened(url, folder).send()
    there = tmp_path / "there" / "tiny"
    opened(url, there).send()
    with pytest.raises(RequestError, match=r"storage\.mirror: .* holds newer results .* sent by another machine"):
        opened(url, folder)
    opened(url, there).send()  # the machine that sent last continues
    fresh = Mirror(url, folder)
    fresh.open(fresh=True)
    for path in sorted(folder.rglob("*.json")):
        path.unlink()
    write_json(folder / START, {"start": "new"})
    fresh.send()
    assert names(fetched(url, tmp_path, "third")) == {START}


def test_an_interrupted_fetch_is_repeated(url: str, folder: Path, tmp_path: Path) -> None:
    opened(url, folder).send()
    there = fetched(url, tmp_path, "there")
    for name in (START, ".mirror.json", "deltas/layer_01/key.json"):
        (there / name).unlink()
    opened(url, there)
    assert names(there) == SENT


def test_a_url_that_stops_answering_does_not_stop_the_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PASS_SECONDS", 0.05)
    said: list[str] = []
    failing = threading.Event()
    put = Mirror.send

    def send(self: Mirror) -> None:
        if failing.is_set():
            raise OSError("no route")
        put(self)

    monkeypatch.setattr(Mirror, "send", send)
    failing.set()
    with mirrored("memory://gone", folder, False, said.append):
        while not said:
            threading.Event().wait(0.05)
        failing.clear()
    assert len(said) == 1
    assert "no route" in said[0]
    assert fsspec.filesystem("memory").exists("/gone/tiny/start.json")
    failing.set()
    with mirrored("memory://gone", folder, False, said.append):
        pass
    assert "the next run of the same command will send them" in said[-1]


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "http://127.0.0.1:9/x"])
def test_a_url_that_cannot_be_used_is_a_sentence(url: str, folder: Path) -> None:
    with pytest.raises(RequestError, match=r"storage\.mirror: "), mirrored(url, folder, False, print):
        pass


def test_without_a_url_nothing_happens(folder: Path) -> None:
    before = threading.active_count()
    with mirrored(None, folder, False, print):
        assert threading.active_count() == before
    assert not (folder / ".mirror.json").exists()
