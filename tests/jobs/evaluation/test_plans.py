"""Which cells small settings ask for, kind by kind, by name: what is measured, in which model, with which deltas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluators.conditions import CONDITIONS
from jobs.context.context import Context
from jobs.evaluation.behaviour import Behaviour, Raw, Width
from jobs.evaluation.features import Cards, Curve, GroupEffects, Grouping, Ranking
from jobs.evaluation.graphs import Graphs
from jobs.evaluation.kinds import KINDS, Change, Exactness, Look, Parts, Reconstruction
from jobs.evaluation.work import ExpectedPlanInputs, SitePlan, Work
from search_spaces.load import load
from sites import KINDS as SITE_KINDS
from sites import Address, Site

CHANGE = (
    "deltas.targets=[change]",
    "deltas.layers=[1, 2]",
    "deltas.sites=[mlp]",
    "deltas.d_new=[4, 8]",
    "evaluate.d_new=4",
    "evaluate.subsets=[tool]",
    "evaluate.sets=[all]",
    "evaluate.controls=[random_delta, dense_delta, scaled_weights]",
    "evaluate.cards=2",
)
RESIDUAL = (
    "deltas.targets=[residual]",
    "deltas.d_new=[4]",
    "evaluate.percentile=0.25",
    "evaluate.subsets=[tool]",
    "evaluate.sets=[[1]]",
    "evaluate.controls=[mlp_swap, base_model_no_delta]",
    "evaluate.cards=2",
)
BOTH = "layer_01+02_change_d004"
ONE = "layer_01_p0.25_d004"
OF_CHANGE = {
    Raw: {"raw_tool", "base_model_raw_tool"},
    Look: {"look"},
    Parts: {"parts_tool"},
    Ranking: {f"ranking_{BOTH}"},
    Change: {f"change_{BOTH}", "change_layer_01+02_change_d008"},
    Reconstruction: set(),
    Exactness: set(),
    Behaviour: {
        f"{BOTH}_tool_{name}"
        for name in (
            *("no_delta", "full", "alpha0.0", "alpha0.5", "alpha1.0", "random_delta", "dense_delta"),
            "scaled_weights0.5",  # at 0 and 1 the weights are those of no_delta and raw
        )
    },
    Width: {f"width_layer_01+02_change_d008_tool_{name}" for name in ("full", "dense_delta")},
    Curve: {f"curve_{BOTH}_tool"},
    Cards: {f"cards_{BOTH}_0"},
    Grouping: {f"grouping_{BOTH}"},
    GroupEffects: {f"groups_{BOTH}_tool"},
    Graphs: {f"graph_{BOTH}_tool"},
}
OF_RESIDUAL = {
    Raw: {"raw_tool", "base_model_raw_tool"},
    Look: set(),
    Parts: set(),
    Ranking: {"ranking_layer_01_p0.25_d004", "ranking_layer_02_p0.25_d004"},
    Change: set(),
    Reconstruction: {f"reconstruction_layer_0{layer}_p0.{part}_d004" for layer in (1, 2) for part in (25, 75)},
    Exactness: set(),
    Behaviour: {
        f"{ONE}_tool_{name}"
        for name in ("no_delta", "full", "alpha0.0", "alpha0.5", "alpha1.0", "mlp_swap", "base_model_no_delta")
    },
    Width: set(),
    Curve: set(),
    Cards: {"cards_layer_01_p0.25_d004_0", "cards_layer_02_p0.25_d004_0"},
    Grouping: set(),
    GroupEffects: set(),
    Graphs: set(),
}


class Incomplete(ExpectedPlanInputs):
    """As if no trial of the change deltas of 8 features at layer 2 had succeeded."""

    def site_plan(self, group: Address) -> SitePlan:
        missing = (group.site.layer, group.ground.target, group.d_new) == (2, "change", 8)
        return None if missing else SitePlan(group)  # type: ignore[return-value]


def context_of(root: Path, *settings: str) -> Context:
    return Context(load("tiny", [f"storage.root={root}", *settings]))


def planned(kind: type[Any], root: Path, *settings: str) -> list[Any]:
    return list(kind.plan(ExpectedPlanInputs(context_of(root, *settings))))


def names_of(works: Sequence[Work]) -> list[str]:
    return [name for work in works for name in work.cells()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("settings", "expected"), [(CHANGE, OF_CHANGE), (RESIDUAL, OF_RESIDUAL)], ids=["change", "residual"]
)
def test_the_cells_of_each_kind(
    kind: type[Work], settings: tuple[str, ...], expected: dict[Any, set[str]], tmp_path: Path
) -> None:
    names = names_of(planned(kind, tmp_path, *settings))
    assert sorted(names) == sorted(expected[kind])


def test_the_unfinetuned_model_is_measured_only_if_something_is_compared_with_it(tmp_path: Path) -> None:
    assert names_of(planned(Raw, tmp_path, *RESIDUAL, "evaluate.controls=[mlp_swap]")) == ["raw_tool"]
    raw, before = planned(Raw, tmp_path, *CHANGE, "evaluate.controls=[]")
    assert (raw.condition, before.condition) == ("raw", "base_model_raw")
    assert raw.model.folder == "finetuned"
    assert before.model.folder == before.shared.base_model != raw.model.folder


def test_conditions_in_another_model_are_work_of_their_own(tmp_path: Path) -> None:
    finetuned, before = planned(Behaviour, tmp_path, *RESIDUAL)
    assert before.conditions == ("base_model_no_delta",)
    assert before.model.folder == before.shared.base_model
    assert (before.doses, before.strengths) == ((), ())
    assert finetuned.model.folder == "finetuned"
    assert {CONDITIONS[name].model for name in finetuned.conditions} == {"finetuned", "swapped"}


def test_each_target_gets_the_controls_that_suit_it(tmp_path: Path) -> None:
    controls = ("evaluate.controls=[scaled_weights, mlp_swap, random_delta]", "evaluate.conditions=[raw, full]")
    works = planned(Behaviour, tmp_path, *CHANGE, "deltas.targets=[change, residual]", *controls)
    assert {work.sites[0].ground.target: work.conditions for work in works} == {
        "change": ("full", "scaled_weights", "random_delta"),
        "residual": ("full", "mlp_swap", "random_delta"),
    }


def test_a_replica_has_the_cells_that_use_its_delta(tmp_path: Path) -> None:
    first, other = planned(Behaviour, tmp_path, *CHANGE, "evaluate.replicas=2")
    assert set(other.cells()) == {
        f"{BOTH}_tool_s1_{name}" for name in ("full", "alpha0.5", "alpha1.0", "random_delta", "dense_delta")
    }
    assert other.seed == first.seed + 1
    assert all(plan.delta.endswith("replica_1") for plan in other.sites)
    assert set(first.cells().values()).isdisjoint(other.cells().values()), "and a key of its own"


def test_the_rest_of_the_change_goes_with_all_changed_sites_and_with_no_fewer(tmp_path: Path) -> None:
    context = context_of(tmp_path, *CHANGE, "evaluate.sets=[all, [1]]", "evaluate.controls=[]")
    vars(context)["pair"] = {"sites": [1, 2], "rest": ["model.norm.weight"], "exact": True, "rounded": ""}
    rest = {work.sites: work.rest for work in Behaviour.plan(ExpectedPlanInputs(context))}
    assert {len(sites): names for sites, names in rest.items()} == {2: ("model.norm.weight",), 1: ()}
    vars(context)["pair"]["sites"] = [1, 2, 3]
    assert {work.rest for work in Behaviour.plan(ExpectedPlanInputs(context))} == {()}


def test_sites_that_finetuning_left_alone_get_no_cells(tmp_path: Path) -> None:
    context = context_of(tmp_path, *CHANGE)
    vars(context)["pair"] = {"sites": [1], "rest": [], "exact": True, "rounded": ""}
    for kind in (Ranking, Change, Behaviour, Curve, Cards, Grouping, GroupEffects, Graphs, Exactness):
        for work in kind.plan(ExpectedPlanInputs(context)):
            assert [plan.site for plan in work.sites] == [Site(1)], kind


@pytest.mark.parametrize("kind", [Curve, GroupEffects], ids=lambda kind: kind.__name__)
def test_all_deltas_and_none_are_taken_from_the_cells_of_these_deltas_alone(kind: Any, tmp_path: Path) -> None:
    def ends(*settings: str, rest: Sequence[str] = ()) -> dict[str, str]:
        context = context_of(tmp_path, *CHANGE, "evaluate.sets=[all, [1]]", "evaluate.replicas=2", *settings)
        vars(context)["pair"] = {"sites": [1, 2], "rest": rest, "exact": True, "rounded": ""}
        (work,) = kind.plan(ExpectedPlanInputs(context))
        return {end.condition: end.cell for end in work.ends}

    assert ends() == {"no_delta": f"{BOTH}_tool_no_delta", "full": f"{BOTH}_tool_full"}
    assert ends("evaluate.conditions=[raw, full]") == {
        "no_delta": f"{BOTH}_tool_alpha0.0",
        "full": f"{BOTH}_tool_full",
    }
    assert ends("evaluate.conditions=[raw]", "evaluate.alphas=[0.5, 1.0]") == {"full": f"{BOTH}_tool_alpha1.0"}
    assert ends("evaluate.sets=[[1]]") == {}, "of other sites"
    assert ends(rest=["model.norm.weight"]) == {}, "their cells change this parameter too"


def test_a_width_that_lacks_a_site_is_fitted_but_not_compared(tmp_path: Path) -> None:
    inputs = Incomplete(context_of(tmp_path, *CHANGE))
    assert Width.plan(inputs) == []
    widths = {work.sites[0].d_new: [plan.site.layer for plan in work.sites] for work in Change.plan(inputs)}
    assert widths == {4: [1, 2], 8: [1]}


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ("evaluate.curve=false", {Curve}),
        ("evaluate.cards=0", {Cards}),
        ("evaluate.groups=0", {Grouping, GroupEffects}),
        ("evaluate.graphs=0", {Graphs}),
        ("evaluate.parts=false", {Look, Parts}),
        ("evaluate.widths=false", {Width}),
        ("deltas.d_new=[4]", {Width}),
    ],
)
def test_what_is_switched_off_is_not_planned(settings: str, missing: set[Any], tmp_path: Path) -> None:
    inputs = ExpectedPlanInputs(context_of(tmp_path, *CHANGE, settings))
    absent = {kind for kind in KINDS if not kind.plan(inputs)}
    assert absent == missing | {Reconstruction}


def test_features_are_ranked_only_if_something_reads_the_order(tmp_path: Path) -> None:
    assert planned(Ranking, tmp_path, *CHANGE, "evaluate.cards=0", "evaluate.curve=false", "evaluate.groups=0") == []
    assert len(planned(Ranking, tmp_path, *CHANGE, "evaluate.cards=0", "evaluate.curve=false")) == 1
    assert planned(Ranking, tmp_path, *RESIDUAL, "evaluate.cards=0") == []
    assert len(planned(Ranking, tmp_path, *CHANGE, "evaluate.cards=0")) == 1


def test_cards_are_of_the_first_target_alone_and_each_feature_has_one(tmp_path: Path) -> None:
    targets = ("deltas.targets=[change, residual]", "deltas.d_new=[4]", "evaluate.percentile=0.25")
    works = planned(Cards, tmp_path, *CHANGE, *targets, "evaluate.controls=[]", "evaluate.cards=100")
    assert {work.sites[0].ground.target for work in works} == {"change"}
    features = [feature for work in works for feature in work.features]
    assert sorted(features) == [(Site(layer), feature) for layer in (1, 2) for feature in range(4 + 1)]


def test_a_set_without_controls_or_strengths_has_neither(tmp_path: Path) -> None:
    sets = "evaluate.sets=[{layers: all, controls: false}, {layers: [1], alphas: []}]"
    every, one = planned(Behaviour, tmp_path, *CHANGE, sets)
    assert every.controls == []
    assert every.doses == (0.0, 0.5, 1.0)
    assert [name for name, _ in one.controls] == ["random_delta", "dense_delta"], "scaled_weights has a strength"
    assert one.doses == ()
    assert one.strengths == (0.0, 1.0), "of no_delta and full"


def test_all_kinds_of_site_are_spliced_in_together(tmp_path: Path) -> None:
    kinds = ("deltas.sites=[qkv, o, mlp]", "deltas.d_new=[4]", "evaluate.controls=[]")
    (work,) = planned(Behaviour, tmp_path, *CHANGE, *kinds)
    assert {plan.site for plan in work.sites} == {Site(layer, kind) for layer in (1, 2) for kind in SITE_KINDS.values()}
