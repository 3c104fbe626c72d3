"""What is written under a temporary name appears whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from data.files import replacing
from jobs.files import files_in


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert list(files_in(tmp_path)) == [path]  # nobody takes the other for a result
        assert list(tmp_path.glob("*.json")) == [path]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replacing(folder) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "weights").write_text("1")
        assert not folder.exists()
    assert (folder / "inner" / "weights").read_text() == "1"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_failure_leaves_all_as_it_was(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    path = tmp_path / "result"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            if kind == "file":
                temporary.write_text("half")
            elif kind == "folder":
                temporary.mkdir()
                (temporary / "half").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_folder_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("theirs")
    with pytest.raises(OSError, match="not empty"), replacing(folder) as temporary:
        temporary.mkdir()
    assert (folder / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


def test_two_may_write_the_same_file(tmp_path: Path) -> None:
    path, both = tmp_path / "result.json", threading.Barrier(2)

    def write(text: str) -> None:
        with replacing(path) as temporary:
            temporary.write_text(text)
            both.wait(timeout=10)  # each has written its file before either is renamed

    threads = [threading.Thread(target=write, args=(text,)) for text in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("first", "second")
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "result") as temporary:
        temporary.write_text("new")
