"""The pieces of an evaluation: the ones counted are the ones written, whichever settings ask for them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from jobs.cluster.connection import Share
from jobs.commands.plan import plan_rows
from jobs.context.context import Context
from jobs.evaluation.kinds import KINDS, Behaviour, Cards, Exactness, Parts, Reconstruction, works_of
from jobs.evaluation.work import ExpectedPlanInputs, PlanInputs, Work
from jobs.files import MANIFEST, read_json
from search_spaces.load import load
from sites import KINDS as SITES
from sites import QKV, Site

VARIANTS = {
    "as it is": (),
    "replicas": ("evaluate.replicas=2",),
    "no controls": ("evaluate.controls=[]",),
    "no parts": ("evaluate.parts=false",),
    "no curve": ("evaluate.curve=false",),
    "no cards": ("evaluate.cards=0",),
    "many cards": ("evaluate.cards=100",),
    "one width": ("deltas.d_new=[4]",),
    "three widths": ("deltas.d_new=[2, 4, 8]", "evaluate.d_new=4"),
    "each site": ("evaluate.sets=[each]",),
    "change alone": ("deltas.targets=[change]", "evaluate.controls=[]"),
}


def context_of(root: Path, *settings: str) -> Context:
    return Context(load("tiny", [f"storage.root={root}", *settings]))


def by_kind(works: list[Work]) -> Counter[str]:
    """How many cells of each kind there are."""
    return Counter(type(work).__name__ for work in works for _ in work.cells())


def test_works_counted_are_cells_written_are_the_plans_number(finished: tuple[Path, object]) -> None:
    context = context_of(finished[0])
    planned = works_of(ExpectedPlanInputs(context))
    vars(context)["share"] = Share(1, 0, 1)  # so that no cluster is started
    works = works_of(PlanInputs(context))
    expected = {name: key for work in works for name, key in work.cells().items()}
    files = [path for path in context.space.cells.glob("*.json") if "kind" in read_json(path)]
    assert {path.stem: read_json(path)["key"] for path in files} == expected
    assert read_json(context.space.cells / MANIFEST)["cells"] == list(expected)
    assert by_kind(planned) == by_kind(works)
    shown = dict(plan_rows(context_of(finished[0])))["evaluation"]
    assert shown.startswith(f"{len(expected)} cells, ")
    assert all(work.is_finished() for work in works if isinstance(work, Exactness))
    for path in files:  # what a cell says of itself is what its kind's pieces are made of
        cell = read_json(path)
        (work,) = (work for work in works if path.stem in work.cells())
        assert (cell["kind"], cell["seed"]) == (work.kind, work.seed)
        assert cell.get("subset", "") == work.subset


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_no_two_cells_share_a_name_and_everything_costs_something(settings: tuple[str, ...], tmp_path: Path) -> None:
    context = context_of(tmp_path, *settings)
    works = works_of(ExpectedPlanInputs(context))
    names = [name for work in works for name in work.cells()]
    assert len(set(names)) == len(names)
    assert all(work.cost(4) > 0 for work in works)
    assert not context.space.folder.exists(), "counting writes nothing"
    assert "share" not in vars(context), "and starts no cluster"


def test_each_setting_adds_the_cells_of_its_kind(tmp_path: Path) -> None:
    def counted(*settings: str) -> Counter[str]:
        return by_kind(works_of(ExpectedPlanInputs(context_of(tmp_path, *settings))))

    plain, subsets = counted(), 3
    assert plain["Reconstruction"] == 2 * 2 * 2, "layers, bases and widths"
    assert plain - counted("evaluate.curve=false") == Counter(Curve=subsets)
    assert plain - counted("evaluate.parts=false") == Counter(Parts=subsets, Look=1)
    assert counted("deltas.targets=[residual]", "evaluate.controls=[]")["Parts"] == 0
    assert counted("evaluate.cards=100")["Cards"] == 5, "100 of the 108 features of all sites, 24 at a time"
    assert counted("evaluate.widths=false")["Width"] == 0 < plain["Width"]
    assert counted("deltas.d_new=[4, 8, 16]")["Change"] == plain["Change"] + 1
    assert set(plain) == {kind.__name__ for kind in KINDS} - {"Exactness"}


def test_parts_are_of_all_that_finetuning_changed_whichever_sites_get_deltas(tmp_path: Path) -> None:
    context = context_of(tmp_path, "deltas.sites=[mlp]", "deltas.layers=[1]")
    (work, *_) = Parts.plan(ExpectedPlanInputs(context))
    assert work.changed == tuple(Site(layer, kind) for layer in range(4) for kind in SITES.values())
    assert (work.passes, work.cost(4)) == (2 + 2 * (4 + 3), 64)
    vars(context)["pair"] = {"sites": ["2.qkv", 0], "rest": ["model.norm.weight"], "exact": True, "rounded": ""}
    (known, *_) = Parts.plan(ExpectedPlanInputs(context))
    assert known.changed == (Site(0), Site(2, QKV))
    assert known.rest == ("model.norm.weight",)
    assert known.passes == 2 + 2 * (3 + 1 + 3), "patterns, values, MLPs and the rest, and thirds"


def test_the_keys_of_parts_do_not_depend_on_deltas(finished: tuple[Path, object]) -> None:
    def keys(*settings: str) -> set[str]:
        return {work.key for work in Parts.plan(PlanInputs(context_of(finished[0], *settings)))}

    assert len(keys()) == 1
    assert keys() == keys("deltas.sites=[mlp]", "deltas.d_new=[16]", "evaluate.curve=false")
    assert keys() != keys("compute.precision=bf16")


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    works = works_of(ExpectedPlanInputs(context_of(tmp_path)), [Reconstruction, Behaviour, Cards])
    for work in works:
        first, *others = work.cells()
        if isinstance(work, Cards):
            assert work.remaining({first}) == work
        else:
            assert list(work.remaining({first}).cells()) == others
