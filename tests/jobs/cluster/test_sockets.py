"""A temporary folder in which Ray could not create its sockets is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.cluster import sockets
from jobs.cluster.sockets import check_temporary_folder
from jobs.context.context import Context
from jobs.errors import RequestError
from search_spaces.load import load


def use(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in sockets.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("process", [7, 4321, 4_194_303])
def test_the_limit_is_rays_own(process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own check accepts the socket of the longest folder that is accepted here, and not one byte more."""
    from ray._private.utils import validate_socket_filepath

    monkeypatch.setattr(os, "getpid", lambda: process)
    socket = f"/ray/session_2026-01-01_00-00-00_000000_{process}/sockets/plasma_store"
    longest = "/tmp/".ljust(107 - len(socket), "x")
    use(monkeypatch, TMPDIR=longest)
    check_temporary_folder()
    validate_socket_filepath(longest + socket)
    use(monkeypatch, TMPDIR=longest + "x")
    with pytest.raises(RequestError, match=f"TMPDIR: .*{longest}x .*{len(longest) + 1} bytes.* at most 39"):
        check_temporary_folder()
    with pytest.raises(OSError, match="107"):
        validate_socket_filepath(longest + "x" + socket)


@pytest.mark.parametrize(
    "folder", ["/tmp/" + "scratch-directory-of-a-user/" * 3, "/tmp/" + "ü" * 30, "/data/" + "0123456789/" * 20]
)
@pytest.mark.parametrize("variable", sockets.VARIABLES)
def test_what_is_too_long_is_named_with_what_to_set(
    folder: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, **{variable: folder})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    context = Context(load("tiny", [f"storage.root={tmp_path / 'runs'}"]))
    with pytest.raises(RequestError) as caught:
        context.check_request()
    for fact in (variable, folder, "at most 39", "at most 107", "`export RAY_TMPDIR=/tmp`"):
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_what_to_set_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TMPDIR="/tmp/" + "x" * 90, RAY_TMPDIR="/tmp")
    check_temporary_folder()


@pytest.mark.parametrize("folder", ["", "relative", "./here", "~/tmp"])
def test_a_relative_path_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would look for its sockets in several places, and end or hang."""
    use(monkeypatch, TMPDIR=folder)
    with pytest.raises(RequestError, match=r"TMPDIR: got .*absolute path.*export RAY_TMPDIR=/tmp"):
        check_temporary_folder()


def test_a_folder_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TMPDIR="/dev/null")
    with pytest.raises(RequestError, match=r"TMPDIR: .*/dev/null is not a folder"):
        check_temporary_folder()
    use(monkeypatch, TMPDIR="/dev/null/below")
    with pytest.raises(RequestError, match=r"TMPDIR: .*/dev/null is not a folder"):
        check_temporary_folder()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root, everything can be written
    use(monkeypatch, TMPDIR="/usr")
    with pytest.raises(RequestError, match=r"TMPDIR: .*/usr cannot be written.*export RAY_TMPDIR=/tmp"):
        check_temporary_folder()
    use(monkeypatch)
    with pytest.raises(RequestError, match=r"the temporary folder: .* cannot be written; set RAY_TMPDIR to another"):
        check_temporary_folder()


@pytest.mark.parametrize("folder", ["/tmp", "/tmp/", "/tmp/not-made-yet/deeper"])
def test_a_folder_that_ray_can_make_is_good(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TMPDIR=folder)
    check_temporary_folder()


def test_a_cluster_that_is_joined_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, TMPDIR="/tmp/" + "x" * 90)
    context = Context(load("tiny", [f"storage.root={tmp_path / 'runs'}"]), address="127.0.0.1:1")
    with pytest.raises(RequestError, match="--address"):
        context.check_request()
