"""Architectures: each line of docs/architectures.md is what is found when it is tried, and the others are refused."""

import json
from pathlib import Path

import pytest

from models.architectures import MISSING, WITHOUT_MLP, check_architecture, check_mlps
from models.errors import ModelError
from tests.models.table import CONFIGS, GPT, LLAMA, build, page, tried

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_says_what_holds(name, tmp_path):
    line = tried(name, tmp_path)
    assert line in PAGE.splitlines(), f"{line}: write the page anew with python -m tests.models.table"
    assert "no" not in line.split(" | ")[2:]


def test_the_page_is_whole():
    lines = [
        line
        for line in PAGE.splitlines()
        if any(line.startswith(f"| `{name}` | {CONFIGS[name][0]}") for name in CONFIGS)
    ]
    assert page(lines) == PAGE


@pytest.mark.parametrize("name", sorted(MISSING))
def test_an_architecture_that_cannot_be_had_is_refused_by_name(name, tmp_path):
    own = {"bloom": {"hidden_size": 24, "n_layer": 3}}.get(name, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **own}))
    with pytest.raises(ModelError, match=f"of the architecture {name}, which is not supported: "):
        check_architecture(tmp_path, "some/model")


@pytest.mark.parametrize("name", sorted(WITHOUT_MLP))
def test_mlps_that_are_no_sites_are_refused_with_what_can_be_had(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **(GPT if name == "gptj" else LLAMA)}))
    check_architecture(tmp_path, "some/model")
    with pytest.raises(
        ModelError, match=r"deltas.sites: mlp needs the MLPs of some/model.*; change deltas of qkv, o are possible"
    ):
        check_mlps(tmp_path, "some/model", "deltas.sites: mlp")


def test_a_bridge_that_changes_the_model_is_noticed(tmp_path, monkeypatch, load):
    """StableLM is refused before it is loaded; this is what would happen to another one."""
    from models.bridge import wrap

    monkeypatch.setitem(CONFIGS, "stablelm", ("StableLM 2", LLAMA))
    with pytest.raises(ModelError, match="bridge changes what a model of the architecture stablelm computes"):
        wrap(*load(build("stablelm", tmp_path)))
