"""No library installs packages: neither the one that would, nor any other that comes to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformer_lens.model_bridge.sources.transformers import helpers

from models.no_installs import InstallRefused, installs, nothing_installed


@pytest.fixture
def stubs(tmp_path, monkeypatch) -> Path:
    """`uv` and `pip` that only write down that they were called; returns where."""
    log = tmp_path / "called"
    for name in ("uv", "pip"):
        stub = tmp_path / name
        stub.write_text(f"#!/bin/sh\necho {name} $* >> {log}\nexit 1\n")
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return log


BRIDGE_INSTALLS = (
    "import sys; sys.modules['torchvision'] = None\n"  # not installed, whatever else is
    "from transformer_lens.model_bridge.sources.transformers import helpers\n"
    "print(helpers._ensure_torchvision())"
)
"""For a process of its own: in this one, an earlier test may have forbidden installs for good."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_the_bridge_would_install(stubs):
    run(BRIDGE_INSTALLS)
    assert "pip install torchvision" in stubs.read_text(), "else the other tests guard against nothing"


def test_the_bridge_may_not(stubs, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with nothing_installed():
        assert not helpers._ensure_torchvision()
    assert not stubs.exists()


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-m", "pip", "install", "x"]),
        lambda: subprocess.check_call("pip install x", shell=True),
        lambda: os.system("uv pip install x"),
        lambda: subprocess.Popen(["uv", "add", "x"]),
        lambda: os.posix_spawn(sys.executable, [sys.executable, "-m", "pip", "install", "x"], os.environ),
    ],
)
def test_every_way_to_start_an_installer_is_refused(stubs, start):
    with nothing_installed(), pytest.raises(InstallRefused):
        start()
    assert not stubs.exists()


@pytest.mark.parametrize(
    ("command", "does"),
    [
        (["pip3.11", "install", "x"], True),
        ("conda install x", True),
        (["sh", "-c", "pip install x"], True),
        (["pip", "list"], False),
        (["git", "commit", "-m", "install pip"], False),
        (["ray", "start"], False),
        ("", False),
    ],
)
def test_what_counts_as_an_installer(command, does):
    assert installs(command) is does


def test_other_programs_start_as_ever():
    with nothing_installed():
        assert subprocess.run(["true"]).returncode == 0


def test_a_process_of_ours_refuses_for_good(stubs):
    said = run(f"from jobs.cluster import environment; environment.prepare(); environment.prepare()\n{BRIDGE_INSTALLS}")
    assert said.endswith("False")
    assert not stubs.exists()
