"""What is found out before the first stage works, and what is shown after the last."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from evaluators.tables import tables
from jobs.cluster.connection import Share
from jobs.context.context import Context
from jobs.errors import RequestError, WorkFailed
from jobs.files import MANIFEST, write_json
from jobs.progress import Progress
from jobs.sweep import stages
from jobs.sweep.stage_list import NAMES, STAGES
from jobs.sweep.stages.report import share
from jobs.sweep.sweep import check_unchanged, check_warm_starts, check_workers, show_results
from search_spaces.load import load

SETTINGS = ["lora.workers_per_trial", "transcoders.workers_per_layer", "deltas.workers_per_trial"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_workers_that_do_not_fit_are_refused_before_any_stage(tmp_path: Path, setting: str) -> None:
    context = Context(load("tiny", [f"storage.root={tmp_path}", f"{setting}=3"]))
    vars(context)["share"] = Share(1, 0.0, at_once=2)
    with pytest.raises(RequestError, match=f"{setting}: got 3, .* room for 2 at once"):
        check_workers(context, NAMES)
    check_workers(context, [name for name in NAMES if name != setting.partition(".")[0]])  # it is done already


@pytest.mark.parametrize("stage", ["lora", "deltas"])
def test_a_warm_start_from_a_sweep_without_studies_is_refused_before_any_stage(tmp_path: Path, stage: str) -> None:
    def context(earlier: str) -> Context:
        return Context(load("tiny", [f"storage.root={tmp_path}", f"{stage}.warm_start={earlier}"]))

    optuna.create_study(study_name="first/lora@1", storage=context("first").studies)
    optuna.create_study(study_name="first/deltas/mlp_00/change_d4@2", storage=context("first").studies)
    check_warm_starts(context("first"), NAMES)
    with pytest.raises(RequestError, match=rf"{stage}\.warm_start: no sweep named 'frist' .* those that do: first$"):
        check_warm_starts(context("frist"), NAMES)
    check_warm_starts(context("frist"), [name for name in NAMES if name != stage])  # it is done already
    result = context("frist").space.folder / stage / "trial_0000" / "result.json"
    write_json(result, {})
    check_warm_starts(context("frist"), NAMES)  # it has begun, and its studies were lost
    result.unlink()
    optuna.create_study(study_name=f"tiny/{stage}@3", storage=context("first").studies)
    check_warm_starts(context("deleted"), NAMES)  # the sweep is continued, and has its own studies


def test_a_base_that_is_written_anew_while_a_stage_runs_fails_it(tmp_path: Path, llama_folder: Path) -> None:
    base = Path(shutil.copytree(llama_folder, tmp_path / "base"))
    context = Context(load("tiny", [f"storage.root={tmp_path}", f"model.source={base}"]))
    stages = [stage for stage in STAGES if stage.name in ("lora", "transcoders", "deltas", "evaluate")]
    keys = [stage.key(context) for stage in stages]
    for stage, key in zip(stages, keys, strict=True):
        check_unchanged(context, stage, key)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"rope_theta": 5.0}))
    for stage, key in zip(stages, keys, strict=True):
        with pytest.raises(WorkFailed, match=f"the {stage.name} stage reads, changed while it ran"):
            check_unchanged(context, stage, key)


def test_the_folder_of_stages_holds_stages_and_nothing_else() -> None:
    files = {path.stem for path in Path(stages.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == set(NAMES)


def shown(root: Path, **manifest: object) -> str:
    """What `show_results` prints for a sweep without cells whose report's manifest holds this."""
    console = Console(file=io.StringIO(), width=120)
    context = Context(load("tiny", [f"storage.root={root}"]), Progress(console))
    vars(context)["cells"] = []
    checks = [{"name": "holds", "passed": True, "detail": ""}]
    write_json(context.space.report / MANIFEST, {"checks": checks, "report": "report/report.html", **manifest})
    show_results(context)
    return console.file.getvalue()


def test_the_lines_at_the_end_are_those_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[f"subset_{number}", "0.25 [0.2, 0.3]", "left out"] for number in range(5)]
    columns = ["subset", "recovered", "another"]
    with monkeypatch.context() as patch:
        patch.setattr(tables, "all_tables", lambda *_, **__: pytest.fail("the tables were computed again"))
        text = shown(tmp_path, summary={"columns": columns, "rows": rows})
    assert "subset_2" in text
    assert "0.25 [0.2, 0.3]" in text
    assert "subset_3" not in text
    assert "another" not in text
    assert "and 2 more rows in the report" in text
    assert "checks: 1 of 1 passed" in text
    assert "checks: 1 of 1 passed" in shown(tmp_path), "a report made before its manifest held the lines"


def test_a_report_says_what_the_evaluation_ran_on_and_needs_no_cluster(tmp_path: Path) -> None:
    context, then = Context(load("tiny", [f"storage.root={tmp_path}"])), Share(1, 0.5, at_once=4)
    write_json(context.space.cells / MANIFEST, {"share": asdict(then)})
    assert share(context) == then
    assert "share" not in vars(context), "it asked the cluster"
    write_json(context.space.cells / MANIFEST, {})
    vars(context)["share"] = Share(2, 0.0, at_once=1)
    assert share(context) == context.share, "the cells of a sweep whose manifest does not say so"
