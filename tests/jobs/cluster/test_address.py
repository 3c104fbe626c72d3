"""A wrong cluster address is refused before any work, in a sentence that says where the address came from."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cluster import address as addresses
from jobs.cluster import connection, environment
from jobs.cluster.address import Address, chosen
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.progress import Progress
from jobs.sweep.sweep import run_sweep
from search_spaces.load import load
from tests.end_to_end.conftest import environment as variables
from tests.end_to_end.conftest import run


@pytest.fixture(autouse=True)
def no_other_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine may run other tests' clusters, which `auto` would find."""
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [
        (None, None, Address("local")),
        (None, "", Address("local")),
        (None, "  ", Address("local")),
        (None, "local", Address("local")),
        (None, "http://127.0.0.1:8265", Address("local")),
        (None, "10.0.0.1:6379", Address("10.0.0.1:6379", "RAY_ADDRESS")),
        (None, "auto", Address("auto", "RAY_ADDRESS")),
        ("10.0.0.2:6379", "10.0.0.1:6379", Address("10.0.0.2:6379")),
        ("local", "10.0.0.1:6379", Address("local")),
        ("auto", "local", Address("auto")),
        ("auto", "10.0.0.1:6379", Address("10.0.0.1:6379", "RAY_ADDRESS")),  # as Ray reads it
    ],
)
def test_the_option_comes_before_the_variable(
    option: str | None, variable: str | None, expected: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert chosen(option) == expected


@pytest.mark.parametrize("variable", ["", "local", "http://127.0.0.1:8265", "10.0.0.1:6379"])
def test_a_ray_of_ones_own_needs_a_token(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_USERS_AUTH_MODE", None)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", variable)
    environment.prepare()
    assert os.environ.get("RAY_AUTH_MODE") == (None if variable.startswith("10.") else "token")


WRONG = {
    "127.0.0.1:1": ["no Ray cluster answers at 127.0.0.1:1", "refused"],
    "no-such-host.invalid:6379": ["no Ray cluster answers at no-such-host.invalid:6379"],
    "a..b:6379": ["no Ray cluster answers at a..b:6379"],
    "127.0.0.1:99999": ["127.0.0.1:99999", "HOST:PORT"],
    "nonsense": ["'nonsense'", "HOST:PORT"],
    "two words": ["'two words'", "HOST:PORT"],
    "auto": ["auto", "no Ray cluster on this machine", "ray start"],
}


@pytest.mark.parametrize("value", [*WRONG, "ray://127.0.0.1:10001"])
def test_a_wrong_variable_is_named(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    context = Context(load("tiny", [f"storage.root={tmp_path / 'runs'}"]), Progress())
    with pytest.raises(RequestError) as caught:
        run_sweep(context)
    said = str(caught.value)
    assert said.startswith("RAY_ADDRESS")
    assert "unset RAY_ADDRESS" in said
    for fact in WRONG.get(value, ["--address ray://127.0.0.1:10001"]):
        assert fact in said
    assert said.replace("--address ray://", "").count("--address") == 0
    assert "\n" not in said
    assert not (tmp_path / "runs").exists(), "nothing is done before"


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_option_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("", "local", "http://127.0.0.1:8265"):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        with pytest.raises(RequestError) as caught:
            addresses.check(chosen(value))
        assert str(caught.value).startswith("--address: ")
        assert "RAY_ADDRESS" not in str(caught.value)


def test_a_cluster_that_has_ended_is_not_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray remembers the last one in a file."""
    (tmp_path / "ray/ray").mkdir(parents=True)
    (tmp_path / "ray/ray/ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(RequestError, match=r"--address: no Ray cluster answers at 127\.0\.0\.1:1"):
        addresses.check(chosen("auto"))


def test_an_address_that_answers_is_good(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses.check(chosen(listening))
    monkeypatch.setenv("RAY_ADDRESS", listening)
    addresses.check(chosen(None))


@pytest.mark.parametrize(("option", "lines"), [(None, 1), ("127.0.0.1:6379", 0)])
def test_a_cluster_that_the_variable_names_is_said(
    option: str | None, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    joined: list[Address] = []
    said: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "_join", joined.append)
    monkeypatch.setattr(environment, "install_stop_handlers", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connection.connect(option, insecure=True, say=said.append)
    assert [one.value for one in joined] == [option or "10.0.0.1:6379"]
    assert len(said) == lines
    assert all("10.0.0.1:6379" in line and "RAY_ADDRESS" in line for line in said)


def test_the_command_ends_with_one_sentence(tmp_path: Path) -> None:
    done = run("lora", "tiny", f"storage.root={tmp_path / 'runs'}", env={**variables(), "RAY_ADDRESS": "127.0.0.1:1"})
    (line,) = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("error: RAY_ADDRESS")
    assert not (tmp_path / "runs").exists()
