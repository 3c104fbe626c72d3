"""Features chosen by name or group: the others never fire, and wrong names are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.commands.feature_choice import FeatureChoice, chosen_features
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.files import MANIFEST, write_json
from models.transcoder import with_bos
from search_spaces.load import load
from sites import QKV, Ground, Site

CHOSEN = (Ground("change"), 6)
GROUPS = [[["1", 0], ["2.qkv", 3]], [["1", 5]]]


@pytest.fixture(scope="module")
def deltas(random_transcoder):
    """Two sites of six features and one at BOS."""
    found = {}
    for site in (Site(1), Site(2, QKV)):
        plain = random_transcoder(8, 6, 1, seed=site.layer, bias=False)
        object.__setattr__(plain, "site", site)
        found[site] = with_bos(plain, torch.ones(8))
    return found


@pytest.fixture
def context(tmp_path: Path) -> Context:
    context = Context(load("tiny", [f"storage.root={tmp_path}"]))
    context.space.cells.mkdir(parents=True)
    groups = [{"number": number, "features": features} for number, features in enumerate(GROUPS, start=1)]
    cell = {"kind": "grouping", "target": "change", "d_new": 6, "groups": groups}
    write_json(context.space.cells / "grouping_x.json", cell)
    write_json(context.space.cells / "grouping_a.json", {**cell, "groups": []})  # left over from earlier settings
    write_json(context.space.cells / MANIFEST, {"cells": ["raw_tool", "grouping_x"]})
    return context


def test_a_residual_delta_is_named_like_any_other_of_an_mlp(tmp_path: Path, random_transcoder) -> None:
    convention = "transcoders.convention=resid_mid/sqrt(d_model)"
    context = Context(
        load("tiny", [f"storage.root={tmp_path}", convention, "deltas.targets=[residual]", "evaluate.controls=[]"])
    )
    plain, site = random_transcoder(8, 6, 1, seed=1, bias=False), Site(1, context.mlp_kind)
    object.__setattr__(plain, "site", site)
    choice = FeatureChoice(without=["L1F002"])
    chosen = chosen_features(context, {site: plain}, (Ground("residual", 0.5), 6), choice)
    assert firing(plain, torch.eye(8) * 9) - firing(chosen[site], torch.eye(8) * 9) == {2}


def firing(delta, x) -> set[int]:
    """The features that fire on some token, or at BOS."""
    acts = delta.encode(x)
    at_bos = torch.zeros(delta.d_sae) if delta.at_bos is None else delta.at_bos
    return set(torch.nonzero((acts > 0).any(0) | (at_bos > 0)).flatten().tolist())


@pytest.mark.parametrize(
    ("choice", "off"),
    [
        (FeatureChoice(), {}),
        (FeatureChoice(without=["L1F002", "l2-qkvf3"]), {"1": {2}, "2.qkv": {3}}),
        (FeatureChoice(without=["group 1", "L1F006"]), {"1": {0, 6}, "2.qkv": {3}}),
        (FeatureChoice(only=["Group 2"]), {"1": {0, 1, 2, 3, 4}, "2.qkv": {0, 1, 2, 3, 4, 5}}),
        (FeatureChoice(only=["L2-qkvF000", "L1-mlpF001"]), {"1": {0, 2, 3, 4, 5}, "2.qkv": {1, 2, 3, 4, 5}}),
    ],
    ids=str,
)
def test_the_others_never_fire_and_the_chosen_are_what_they_were(context, deltas, choice, off) -> None:
    x = 3 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    found = chosen_features(context, deltas, CHOSEN, choice)
    for site, delta in deltas.items():
        silent = off.get(site.label, set())
        assert firing(found[site], x) == firing(delta, x) - silent
        kept = [number for number in range(7) if number not in silent]
        assert torch.equal(found[site].encode(x)[:, kept], delta.encode(x)[:, kept])
        assert found[site].d_sae == delta.d_sae, "numbers stay"


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (FeatureChoice(without=["17"]), "--without: got '17'; a feature is written like L17F042"),
        (FeatureChoice(only=["L3F001"]), "--only: got L3F001, but the deltas that are spliced in are at 1, 2.qkv"),
        (FeatureChoice(only=["L1F007"]), "numbered from 0 to 6"),
        (FeatureChoice(only=["group 3"]), "--only: got group 3, but the sweep has groups 1 to 2"),
    ],
    ids=str,
)
def test_a_wrong_name_is_one_sentence(context, deltas, choice, sentence) -> None:
    with pytest.raises(RequestError) as caught:
        chosen_features(context, deltas, CHOSEN, choice)
    assert sentence in str(caught.value)


def test_without_groups_the_setting_that_makes_them_is_named(context, deltas) -> None:
    for path in context.space.cells.glob("*.json"):
        path.unlink()
    with pytest.raises(RequestError, match=r"evaluate\.groups"):
        chosen_features(context, deltas, CHOSEN, FeatureChoice(only=["group 1"]))


def test_both_ways_at_once_are_refused() -> None:
    with pytest.raises(RequestError, match="--only: cannot be combined with --without"):
        FeatureChoice(["L1F001"], ["L1F002"])
