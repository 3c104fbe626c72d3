"""Commands use a sweep's results only with the settings that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.commands.few_features import few_features
from jobs.commands.load import DeltaChoice, combination, load_deltas
from jobs.commands.made_with import check_model, check_settings, differing
from jobs.commands.track import track
from jobs.context import keys
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.files import MANIFEST, keyed_folder, write_json
from jobs.sweep.sweep import write_settings
from search_spaces.load import load
from sites import Address, Site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A storage root with the settings of a sweep that ran."""
    context = context_of(tmp_path)
    context.space.create()
    write_settings(context)
    return tmp_path


def context_of(folder: Path, *overrides: str) -> Context:
    return Context(load("tiny", [f"storage.root={folder}", "data.rows_file=here/rows.csv", *overrides]))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("lora.steps=7", "lora.steps"),
        ("lora.space.lr={low: 1.0e-3, high: 2.0e-2, log: true}", "lora.space.lr.high"),
        ("model.finetuned=other", "model.finetuned"),
        ("model.source=other", "model.source"),
        ("deltas.epochs=9", "deltas.epochs"),
        ("deltas.l0_budget=1", "deltas.l0_budget"),
        ("transcoders.width=32", "transcoders.width"),
        ("data.rows_file=here/others.csv", "data.rows_file"),
        ("compute.precision=fp32", "compute.precision"),
    ],
)
def test_a_setting_that_decides_about_deltas_is_named(folder: Path, override: str, key: str) -> None:
    with pytest.raises(RequestError, match=rf"^{key}: got .*, but the results of the sweep tiny were made with"):
        check_settings(context_of(folder, override))


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "deltas.d_new=[4]",
        "deltas.layers=[1]",
        "lora.trials=9",
        "evaluate.max_new_tokens=5",
        "model.dtype=bf16",
        "compute.max_concurrent=1",
        "data.rows_file={folder}/there/rows.csv",
    ],
)
def test_one_that_only_chooses_may_differ(folder: Path, override: str) -> None:
    (folder / "there").mkdir()
    (folder / "there/rows.csv").write_text("")
    check_settings(context_of(folder, override.format(folder=folder)))


def test_the_finetuned_model_does_not_depend_on_how_deltas_are_trained(folder: Path) -> None:
    context = context_of(folder, "deltas.epochs=9", "activations.train_tokens=4000")
    assert not list(differing(context, "rows"))
    check_model(context)
    with pytest.raises(RequestError, match=r"^activations.train_tokens: got 4000"):
        check_settings(context)


def test_settings_that_nothing_reads_may_differ(folder: Path) -> None:
    check_settings(context_of(folder, "deltas.polish_lr=0.5", "machine.tflops=1"), "all")


def test_results_also_depend_on_how_they_were_evaluated(folder: Path) -> None:
    context = context_of(folder, "evaluate.max_new_tokens=5")
    assert [key for key, _, _ in differing(context, "all")] == ["evaluate.max_new_tokens"]
    write_json(context.space.lora / MANIFEST, {"key": "any"})
    with pytest.raises(RequestError, match=r"^evaluate.max_new_tokens: got 5"):
        track(context)


def test_features_of_other_settings_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"^deltas.epochs: got 9"):
        few_features(context_of(folder, "deltas.epochs=9"), 5)


def test_deltas_of_a_search_that_was_stopped_after_an_edit_are_refused(folder: Path) -> None:
    context = context_of(folder)
    group = Address(Site(1), *combination(context, DeltaChoice("change", d_new=4)))
    trial = keyed_folder(context.space.deltas / group.folder, "of earlier settings") / "trial_0000"
    write_json(trial.parent / "best.json", {"trial": 0})
    with pytest.raises(RequestError, match="may be of earlier settings; run `sweep` again"):
        load_deltas(context, [group.site], (group.ground, group.d_new))
    keyed_folder(context.space.deltas / group.folder, keys.delta_group(context.settings, group))
    with pytest.raises(RequestError, match="no kept delta under"):
        load_deltas(context, [group.site], (group.ground, group.d_new))


@pytest.mark.parametrize("text", ["a: [", "\xff"])
def test_settings_that_cannot_be_read_are_one_sentence(folder: Path, text: str) -> None:
    (context_of(folder).space.folder / "sweep.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match="cannot be read as YAML"):
        check_settings(context_of(folder))


@pytest.mark.parametrize("text", ["[1, 2]", "seed: 0\ndata: 3\n", ""])
def test_settings_of_another_form_are_no_traceback(folder: Path, text: str) -> None:
    (context_of(folder).space.folder / "sweep.yaml").write_text(text)
    check_settings(context_of(folder))


def test_settings_that_an_earlier_version_did_not_have_are_left_out(folder: Path) -> None:
    path = context_of(folder).space.folder / "sweep.yaml"
    made = yaml.safe_load(path.read_text())
    del made["deltas"]["epochs"], made["activations"]
    path.write_text(yaml.safe_dump(made))
    check_settings(context_of(folder, "deltas.epochs=9", "activations.train_tokens=4000"))
