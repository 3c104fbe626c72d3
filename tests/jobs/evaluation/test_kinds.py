"""The pieces of an evaluation: the ones counted are the ones written, whichever settings ask for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from evaluators.measures.curve import FIGURES
from jobs.cluster.connection import Share
from jobs.commands.plan import plan_rows
from jobs.context.context import Context
from jobs.evaluation import work as work_module
from jobs.evaluation.features import CARDS_AT_ONCE, Curve, GroupEffects, Ranking
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
    "no groups": ("evaluate.groups=0",),
    "no graphs": ("evaluate.graphs=0",),
    "many cards": ("evaluate.cards=100",),
    "one width": ("deltas.d_new=[4]",),
    "three widths": ("deltas.d_new=[2, 4, 8]", "evaluate.d_new=4"),
    "each site": ("evaluate.sets=[each]",),
    "change alone": ("deltas.targets=[change]", "evaluate.controls=[]"),
}


def context_of(root: Path, *settings: str) -> Context:
    return Context(load("tiny", [f"storage.root={root}", *settings]))


def table(context: Context, name: str) -> pd.DataFrame:
    """A table of the finished sweep's report."""
    return pd.read_csv(context.space.report / f"{name}.csv", dtype={"layer": str})


def behaviour_in_tables(context: Context) -> int:
    """Cells pooled into the rows of both behaviour tables. The dose-response table repeats the ends of scaled_weights,
    which are cells of other conditions."""
    dose = table(context, "exp2B_metrics")
    repeated = (dose["condition"] == "scaled_weights") & dose["alpha"].isin([0.0, 1.0])
    return int(table(context, "exp2A_metrics")["n_replicas"].sum() + dose[~repeated]["n_replicas"].sum())


def widths_in_table(context: Context) -> int:
    """Rows of the widths that the behaviour cells do not have."""
    rows = table(context, "widths")
    chosen = read_json(context.space.cells / MANIFEST)["chosen"]["change"]["d_new"]
    return int(((rows["metric"] == "mean_ce") & (rows["d_new"] != chosen)).sum())


def rankings_in_table(context: Context) -> int:
    """One for all sites of change deltas, one for each site of residual deltas."""
    rows = table(context, "feature_ranking")
    layers = rows["layer"].where(rows["target"] == "residual", "all")
    return len(set(zip(rows["target"], layers, strict=True)))


IN_TABLES: dict[str, Callable[[Context], int]] = {
    "behaviour": behaviour_in_tables,
    "look": lambda context: len(list(context.space.report.glob("look.html"))),
    "parts": lambda context: table(context, "parts")["subset"].nunique(),
    "ranking": rankings_in_table,
    "change": lambda context: table(context, "change_by_subset")["d_new"].nunique(),
    "reconstruction": lambda context: len(table(context, "exp1_metrics")),
    "width": widths_in_table,
    "curve": lambda context: len(table(context, "few_features")[["layer", "d_new", "subset"]].drop_duplicates()),
    "grouping": lambda context: int((context.space.report / "groups.csv").is_file()),
    "groups": lambda context: table(context, "few_groups")["subset"].nunique(),
    "graph": lambda context: table(context, "graphs")["subset"].nunique(),
    "cards": lambda context: math.ceil(len(table(context, "features")) / CARDS_AT_ONCE),
}
"""Number of cells of each kind that the tables of a report show."""


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


def test_as_many_cells_of_each_kind_are_planned_as_written_and_shown(finished: tuple[Path, object]) -> None:
    """The number that `plan` counts, the files on disk, and the rows of the report's tables."""
    context = context_of(finished[0])
    works = works_of(ExpectedPlanInputs(context))
    planned = Counter(work.kind for work in works for _ in work.cells())
    cells = [cell for path in context.space.cells.glob("*.json") if "kind" in (cell := read_json(path))]
    written = Counter(cell["kind"] for cell in cells)
    shown = Counter({kind: count(context) for kind, count in IN_TABLES.items()})
    assert planned == written == shown
    assert dict(plan_rows(context))["evaluation"].startswith(f"{planned.total()} cells, ")
    # Cells that hold features have a row for each.
    features = sum(len(cell["features"]) for cell in cells if cell["kind"] == "ranking")
    assert len(table(context, "feature_ranking")) == features
    planned_cards = sum(len(work.features) for work in works if isinstance(work, Cards))
    assert len(table(context, "features")) == planned_cards == context.cards_of("change")


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
    assert plain - counted("evaluate.groups=0") == Counter(Grouping=1, GroupEffects=subsets)
    assert plain - counted("evaluate.graphs=0") == Counter(Graphs=subsets)
    assert plain - counted("evaluate.parts=false") == Counter(Parts=subsets, Look=1)
    assert counted("deltas.targets=[residual]", "evaluate.controls=[]")["Parts"] == 0
    assert counted("evaluate.cards=100")["Cards"] == 5, "100 of the 108 features of all sites, 24 at a time"
    assert counted("evaluate.widths=false")["Width"] == 0 < plain["Width"]
    assert counted("deltas.d_new=[4, 8, 16]")["Change"] == plain["Change"] + 1
    assert set(plain) == {kind.__name__ for kind in KINDS} - {"Exactness"}


def test_what_is_a_behaviour_cell_too_is_not_measured_again(finished: tuple[Path, object]) -> None:
    """The ends of the curve, and what groups are compared with: to the last bit the rows of no_delta and full."""
    context = context_of(finished[0])
    vars(context)["share"] = Share(1, 0, 1)  # so that no cluster is started
    works = works_of(PlanInputs(context), [Curve, GroupEffects])
    assert works
    for work in works:
        cell = read_json(work.cell_file(work.name))
        if isinstance(work, Curve):
            found = {"no_delta": cell["counts"][0]["rows"], "full": cell["counts"][-1]["rows"]}
        else:
            entries = {entry["way"]: entry["rows"] for entry in cell["entries"] if not entry["group"]}
            found = {"no_delta": entries["nothing"], "full": entries["without"]}
        assert {end.condition for end in work.ends} == set(found)
        for end in work.ends:
            for row, expected in zip(found[end.condition], read_json(work.cell_file(end.cell))["rows"], strict=False):
                assert {name: expected[name] for name in FIGURES} == {name: row[name] for name in FIGURES}


def test_parts_are_of_all_that_finetuning_changed_whichever_sites_get_deltas(tmp_path: Path) -> None:
    context = context_of(tmp_path, "deltas.sites=[mlp]", "deltas.layers=[1]")
    (work, *_) = Parts.plan(ExpectedPlanInputs(context))
    assert work.changed == tuple(Site(layer, kind) for layer in range(4) for kind in SITES.values())
    assert (work.passes, work.cost(4)) == (5 + 2 * 4, 52)
    vars(context)["pair"] = {"sites": ["2.qkv", 0], "rest": ["model.norm.weight"], "exact": True, "rounded": ""}
    (known, *_) = Parts.plan(ExpectedPlanInputs(context))
    assert known.changed == (Site(0), Site(2, QKV))
    assert known.rest == ("model.norm.weight",)
    assert known.passes == 5 + 2 * (3 + 1), "the whole and thirds; patterns, values, MLPs and the rest"


def test_the_keys_of_parts_do_not_depend_on_deltas(finished: tuple[Path, object]) -> None:
    def keys(*settings: str) -> set[str]:
        return {work.key for work in Parts.plan(PlanInputs(context_of(finished[0], *settings)))}

    assert len(keys()) == 1
    assert keys() == keys("deltas.sites=[mlp]", "deltas.d_new=[16]", "evaluate.curve=false")
    assert keys() != keys("model.dtype=bf16")


def test_cells_about_all_subsets_depend_on_which_these_are(finished: tuple[Path, object]) -> None:
    def keys(*settings: str) -> set[str]:
        inputs = PlanInputs(context_of(finished[0], *settings))
        return {work.key for kind in (Ranking, Cards, Exactness) for work in kind.plan(inputs)}

    assert not keys() & keys("evaluate.subsets=[tool]")


def test_replicas_are_known_by_their_own_deltas(finished: tuple[Path, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed more can change which one ranks second, while the best stays."""

    def keys() -> list[str]:
        inputs = PlanInputs(context_of(finished[0], "evaluate.replicas=2", "evaluate.sets=[all]"))
        works = [work for work in Behaviour.plan(inputs) if work.sites and work.sites[0].ground.target == "change"]
        return [
            next(work.key for work in works if ("replica_1" in work.sites[0].delta) == of_replica)
            for of_replica in (False, True)
        ]

    before = keys()
    sealed = work_module.sealed_hash
    monkeypatch.setattr(
        work_module, "sealed_hash", lambda path: "another" if "replica_1" in str(path) else sealed(path)
    )
    after = keys()
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)


def test_what_is_done_is_left_out(tmp_path: Path) -> None:
    works = works_of(ExpectedPlanInputs(context_of(tmp_path)), [Reconstruction, Behaviour, Cards])
    for work in works:
        first, *others = work.cells()
        if isinstance(work, Cards):
            assert work.remaining({first}) == work
        else:
            assert list(work.remaining({first}).cells()) == others
