"""Settings: presets load, overrides reach their key, and every bad one is a sentence with key, what was given, and what
is allowed."""

import dataclasses
import hashlib
import json

import pytest
import yaml

from jobs.context import keys
from search_spaces.dimensions import Choice, Range
from search_spaces.load import SettingsError, load, presets
from search_spaces.schema import Sweep
from sites import Address, Ground, Site
from trainers.settings import BaseSettings, DeltaSettings, LoraSettings, settings_of


def refused(config, *overrides) -> str:
    with pytest.raises(SettingsError) as raised:
        load(config, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_every_preset_loads_and_survives_yaml_and_json():
    assert presets() == ["gemma2_2b", "gemma3_270m", "quickstart", "smollm2", "study", "tiny"]
    for name in presets():
        sweep = load(name)
        assert sweep.name == name
        values = sweep.model_dump()
        assert Sweep.model_validate(yaml.safe_load(yaml.safe_dump(values))) == sweep
        assert Sweep.model_validate(json.loads(json.dumps(values))) == sweep


def test_the_key_on_is_no_truth_value():
    """YAML 1.1 reads `on` as true."""
    behaviours = load("tiny").evaluate.behaviours
    assert behaviours["copy_exact"] == {"equals_target": True, "on": ["copy"]}
    changed = load("tiny", ["evaluate.behaviours.polite={contains: please, on: [copy]}"]).evaluate.behaviours
    assert changed["polite"] == {"contains": "please", "on": ["copy"]}
    assert list(changed) == [*behaviours, "polite"]


def test_the_gemma_preset_is_the_full_study():
    sweep = load("gemma2_2b")
    assert sweep.model.source == "google/gemma-2-2b"
    assert (sweep.transcoders.source, sweep.transcoders.width) == ("google/gemma-scope-2b-pt-transcoders", "16k")
    assert (sweep.transcoders.layers, sweep.deltas.layers) == ("all", "all")
    assert sweep.deltas.targets == ["change", "residual"]
    dosed = [one.layers for one in sweep.evaluate.sets if one.alphas is None]
    assert dosed == ["all", [20], [24]], "the reference study's alphas, and those of all layers at once"
    assert (sweep.deltas.percentiles, sweep.deltas.d_new) == ([0.25, 0.5, 0.75], [32, 64, 128])
    assert (sweep.compute.gpus_per_trial, sweep.compute.precision) == (1, "bf16")


def test_a_file_is_read_like_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nlora:\n  space:\n    lr: 1e-3  # no dot, still a number\n")
    sweep = load(path)
    assert sweep.lora.space.lr == 0.001
    assert sweep.deltas == Sweep(name="x").deltas


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("lora.trials=8", lambda s: s.lora.trials, 8),
        ("seed=7", lambda s: s.seed, 7),
        ("transcoders.layers=[0, 3]", lambda s: s.transcoders.layers, [0, 3]),
        ("transcoders.layers=all", lambda s: s.transcoders.layers, "all"),
        ("compute.max_concurrent=null", lambda s: s.compute.max_concurrent, None),
        ("transcoders.lr=1e-3", lambda s: s.transcoders.lr, 0.001),
        ("transcoders.lr=2", lambda s: s.transcoders.lr, 2.0),
        ("evaluate.curve=false", lambda s: s.evaluate.curve, False),
        ("evaluate.sets=[all]", lambda s: [one.layers for one in s.evaluate.sets], ["all"]),
        ("evaluate.sets=[[1, 2], {layers: each, alphas: []}]", lambda s: s.evaluate.sets[1].alphas, []),
        ("model.source=/a=b", lambda s: s.model.source, "/a=b"),
        ("lora.space.r=4", lambda s: s.lora.space.r, 4),
        ("lora.space.r={low: 2, high: 64, log: true}", lambda s: s.lora.space.r, Range(low=2, high=64, log=True)),
        ("lora.space.targets={choice: [all-linear, 'q_proj,v_proj']}", lambda s: len(s.lora.space.targets.choice), 2),
        ("deltas.space.sparsity={choice: [0, 1e-3]}", lambda s: s.deltas.space.sparsity, Choice(choice=[0, 1e-3])),
    ],
)
def test_overrides(override, read, value):
    assert read(load("tiny", [override])) == value


def test_later_overrides_win_and_siblings_stay():
    sweep = load("tiny", ["lora.trials=2", "lora.trials=3"])
    assert sweep.lora.trials == 3
    assert sweep.lora.steps == load("tiny").lora.steps


def test_a_range_of_real_numbers_is_never_searched_in_whole_steps():
    lr = load("tiny", ["lora.space.lr={low: 1, high: 3}"]).lora.space.lr
    r = load("tiny", ["lora.space.r={low: 1, high: 3}"]).lora.space.r
    assert (type(lr.low), type(lr.high)) == (float, float)
    assert (type(r.low), type(r.high)) == (int, int)


BAD = {
    # wrong kind
    "lora.trials=many": 'lora.trials: got "many", must be a whole number',
    "lora.trials=2.5": "lora.trials: got 2.5, must be a whole number",
    "lora.trials=true": "lora.trials: got true, must be a whole number",
    "lora.grad_clip=high": 'lora.grad_clip: got "high", must be a number',
    "evaluate.curve=maybe": 'evaluate.curve: got "maybe", must be true or false',
    "evaluate.sets=all": 'evaluate.sets: got "all", must be a list',
    "evaluate.sets=[halves]": 'got "halves", must be all, thirds, each, one of these for a single kind',
    "evaluate.sets=[[1, 1]]": "got [1, 1], must be all, thirds, each, one of these for a single kind",
    "evaluate.behaviours={polite: 7}": "got 7, must be the name of a check, or {CHECK: OPTION}",
    "evaluate.behaviours={polite: {contains: a, json: }}": "must be the name of a check, or {CHECK: OPTION}",
    "evaluate.behaviours={Polite now: json}": "evaluate.behaviours",
    "deltas.targets=[both]": 'deltas.targets.0: got "both"',
    "model.source=5": "model.source: got 5, must be text",
    "deltas.d_new=32": "deltas.d_new: got 32, must be a list",
    "deltas.d_new=[wide]": 'deltas.d_new.0: got "wide", must be a whole number',
    "evaluate.alphas=[0, strong]": 'evaluate.alphas.1: got "strong", must be a number',
    "evaluate.alphas=[.nan]": "evaluate.alphas.0: got NaN, must be a finite number",
    "transcoders.layers=some": "transcoders.layers: got \"some\", must be a list or 'all'",
    "transcoders.layers=[1, two]": 'transcoders.layers.1: got "two", must be a whole number',
    "lora=5": "lora: got 5, must be settings of its own, as key: value",
    "deltas.space=": "deltas.space: got null, must be settings of its own, as key: value",
    # out of bounds
    "lora.trials=0": "lora.trials: got 0, must be greater than or equal to 1",
    "deltas.percentiles=[1.5]": "deltas.percentiles.0: got 1.5, must be less than or equal to 1",
    "deltas.percentiles=[]": "deltas.percentiles: got [], must have at least one unless deltas.target_l0 is set",
    "transcoders.layers=[-1]": "transcoders.layers.0: got -1, must be greater than or equal to 0",
    "seed=-1": "seed: got -1, must be greater than or equal to 0",
    "activations.max_length=1": "activations.max_length: got 1, must be greater than or equal to 2",
    "deltas.sampler=grid": "deltas.sampler: grid needs choices, but deltas.space.lr is a range",
    "compute.precision=fp16": "compute.precision: got \"fp16\", must be 'auto', 'fp32', 'tf32' or 'bf16'",
    "evaluate.conditions=[raw, fulll]": "evaluate.conditions.1: got \"fulll\", must be 'raw', 'no_delta' or 'full'",
    "name=a/b": 'name: got "a/b", must be text of the form ',
    # named twice
    "transcoders.layers=[1, 1]": "transcoders.layers: got [1, 1], an entry appears twice",
    "evaluate.alphas=[1, 1.0]": "evaluate.alphas: got [1, 1.0], an entry appears twice",
    "deltas.d_new=[8, 8]": "deltas.d_new: got [8, 8], an entry appears twice",
    # dimensions
    "lora.space.r=wide": 'lora.space.r: got "wide", must be a whole number of at least 1',
    "lora.space.r=[8, 16]": "lora.space.r: got [8, 16], must be a value, {choice: [...]} or {low: ..., high: ...",
    "lora.space.r={choice: [8, 0]}": "must be a whole number of at least 1, and 0 is not",
    "lora.space.r={choice: [8, 8]}": "a value appears twice in [8, 8]",
    "lora.space.r={choice: []}": "lora.space.r: got [], must be a list of at least 1",
    "lora.space.r={low: 4.5, high: 8}": "must be a whole number of at least 1, and 4.5 is not",
    "lora.space.lr={low: 4, high: 2}": "low must be below high, got low=4 and high=2",
    "lora.space.lr={low: 0, high: 1, log: true}": "a log range needs low above 0, got low=0",
    "lora.space.lr={low: 1}": "lora.space.lr.high is missing; it must be given",
    "lora.space.lr=0": "lora.space.lr: got 0, must be a number above 0",
    "lora.space.lr=.inf": "lora.space.lr: got Infinity, must be a number above 0",
    "lora.space.dropout=1": "lora.space.dropout: got 1, must be a number of at least 0 and below 1",
    "lora.space.schedule=linaer": "must be one of linear, cosine, constant, constant_with_warmup",
    "lora.space.targets=7": "lora.space.targets: got 7, must be text",
    # unknown keys
    "lora.trial=3": "lora.trial: unknown key (did you mean trials?); allowed here: accumulate, asha,",
    "lora.choice=3": "lora.choice: unknown key; allowed here: accumulate, asha,",
    "nonsense=1": "nonsense: unknown key; allowed here: activations, compute, data,",
    "lora.space.r={low: 4, high: 8, lg: true}": "lora.space.r.lg: unknown key (did you mean log?); allowed here: high,",
    "lora.space.r={choices: [1]}": "lora.space.r.choices: unknown key (did you mean choice?); allowed here: choice",
    # settings that do not go together
    "transcoders.width=16k": "transcoders.width: got '16k', must be a whole number for trained bases",
    "transcoders.target_l0=[64]": "transcoders.target_l0: got 64, must be below transcoders.width 64",
    "evaluate.percentile=0.5": "evaluate.percentile: got 0.5, must be one of deltas.percentiles [0.25, 0.75]",
    "evaluate.d_new=5": "evaluate.d_new: got 5, must be one of deltas.d_new [4, 8]",
    "evaluate.conditions=[full]": 'evaluate.conditions: got ["full"], must include raw',
    "deltas.percentiles=[0.251]": "deltas.percentiles: got [0.251], must have at most two decimals",
    # no value at all
    "storage.root=''": 'storage.root: got "", must not be empty',
    "storage.root=' '": 'storage.root: got " ", must not be empty',
    "storage.mirror=''": 'storage.mirror: got "", must not be empty',
    "storage.tracking_uri=''": 'storage.tracking_uri: got "", must not be empty',
    "storage.optuna_url=''": 'storage.optuna_url: got "", must not be empty',
    "data.rows_file=''": 'data.rows_file: got "", must not be empty',
    "data.separator=": "data.separator: got null, must be text; a blank one needs quotes of its own",
    # what no value may be
    r'storage.root="a\0b"': r'storage.root: got "a\u0000b", must be text without a NUL character',
    r'data.rows_file="\0"': r'data.rows_file: got "\u0000", must be text without a NUL character',
    "evaluate.sets=&a [*a]": "evaluate.sets.0 refers to itself",
    "evaluate.sets=" + "[" * 9 + "]" * 9: "nests too deep; settings are 8 levels deep at most",
    "evaluate.sets=" + "[" * 3000 + "]" * 3000: "evaluate.sets: the value",
    # not an override
    "lora.trials": "'lora.trials' is not an override; write key.sub=value",
    "=3": "'=3' is not an override",
    "lora..r=1": "'lora..r=1' is not an override",
    "lora.trials=[1": "lora.trials: the value '[1' cannot be read",
    "model.source.folder=1": "model.source.folder: source is the value 'tiny-gemma2' and has no keys inside",
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_override_is_one_sentence(override):
    message = refused("tiny", override)
    assert BAD[override] in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lora: {trials: 2}\n", "name is missing; it must be given"),
        ("name: x\nlora:\n  trials: 2\n  trials: 3\n", "trials is given twice"),
        ("name: x\n  lora: 3", "is not valid YAML"),
        ("- a\n- b\n", "must have settings as `key: value` lines, found list"),
        ("", "must have settings as `key: value` lines, found NoneType"),
        ("1: x\n", "must have settings as `key: value` lines"),
        ("name: x\nstorage: &one\n  root: *one\n", "storage.root refers to itself"),
        ("name: " + "[" * 3000 + "]" * 3000, "nests too deep; settings are 8 levels deep at most"),
        ('name: x\nstorage: {root: "a\\0b"}\n', "storage.root: got"),
        ("name: !!python/object/apply:os.mkdir [made]\n", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    assert said in refused(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["deltas.targets=[change]", "evaluate.controls=[error_term]"],
            "error_term needs residual among deltas.targets",
        ),
        (["deltas.targets=[residual]"], "scaled_weights needs change among deltas.targets"),
        (
            ["transcoders.convention=resid_mid/sqrt(d_model)"],
            "must be ln2.hook_normalized where deltas.targets holds change",
        ),
        (["deltas.layers=[0, 1]", "evaluate.sets=[[0, 3]]"], "evaluate.sets: got layer 3, but the deltas have layers"),
    ],
)
def test_targets_controls_and_sets_must_go_together(overrides, said):
    assert said in refused("tiny", *overrides)


def test_a_missing_or_unreadable_file_is_one_sentence(tmp_path):
    assert (
        "give a YAML file or one of the presets: gemma2_2b, gemma3_270m, quickstart, smollm2, study, tiny"
        in refused("quickstrat")
    )
    assert "it holds a NUL character" in refused("a\0b")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "cannot be read" in refused(tmp_path / "latin.yaml")


def test_long_values_are_cut():
    message = refused("tiny", "lora.trials=" + "x" * 10_000)
    assert len(message) < 200


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load("tiny").lora.trials = 3


OF_A_RUN = {"seed", "precision", "d_new", "evals_per_epoch", "target_l0", "width", "lr_decay_fraction", "grad_clip"}
"""Settings of a trainer that are no key of their own, or one that is set otherwise."""


@pytest.mark.parametrize(
    ("section", "trainer"), [("lora", LoraSettings), ("deltas", DeltaSettings), ("transcoders", BaseSettings)]
)
def test_every_setting_of_a_trainer_arrives_from_the_file(section, trainer):
    """One that a section inherits or searches reaches the trainer under its name; there are no others."""
    found = getattr(load("tiny"), section)
    searched = set(type(found.space).model_fields) if hasattr(found, "space") else set()
    known = {field.name for field in dataclasses.fields(trainer)}
    inherited = {field.name for field in dataclasses.fields(found)}
    assert inherited | searched <= known
    assert known - inherited - searched <= OF_A_RUN
    given = {"target_l0": [4.0]} if trainer is BaseSettings else {}
    changed = found.model_copy(update={"epochs": 7})
    assert settings_of(trainer, changed, **given) == trainer(
        **{name: getattr(changed, name) for name in inherited}, **given
    )
    assert settings_of(trainer, changed, **given).epochs == 7


def test_a_settings_file_keeps_its_order():
    """Settings that a section inherits stand where they always did."""
    dumped = load("tiny").model_dump(mode="json")
    assert list(dumped["lora"])[:4] == ["trials", "steps", "epochs", "eval_every"]
    assert list(dumped["transcoders"])[4:6] == ["target_l0", "epochs"]
    assert list(dumped["deltas"])[5:9] == ["d_new", "trials", "replicas", "side_by_side"]
    text = yaml.safe_dump(dumped, sort_keys=False)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("7c84e2449c14db34")


def test_the_keys_of_earlier_sweeps_hold():
    """A changed key makes every finished sweep start again: change one here only if its results are others."""
    tiny = load("tiny")
    groups = [Address(Site(1), ground, 4) for ground in (Ground("change"), Ground("residual", 0.25))]
    assert keys.data(tiny) == "71d9eeca1eb22567"
    assert keys.lora(tiny) == "09e305cfb18a0530"
    assert keys.base(tiny, Site(1)) == "d6cc4b57931bb501"
    assert [keys.delta_group(tiny, group) for group in groups] == ["988cbd9751eb10b6", "7bb7cbcf0cd24774"]
    assert keys.report(tiny, groups) == "fada8cc642fa58ec"


def test_older_settings_say_auto_for_the_dtype() -> None:
    assert load("tiny", ["model.dtype=auto"]).model.dtype == "fp32"


def test_a_grid_is_not_started_elsewhere() -> None:
    space = "deltas.space={lr: 0.001, sparsity: {choice: [0.001, 0.01]}}"
    load("tiny", ["deltas.sampler=grid", space])
    with pytest.raises(SettingsError, match=r"deltas\.warm_start: a grid tries its combinations in its own order"):
        load("tiny", ["deltas.sampler=grid", space, "deltas.warm_start=other"])
    with pytest.raises(SettingsError, match=r"deltas\.trials: got 3, but the grid of deltas\.space has 2 combinations"):
        load("tiny", ["deltas.sampler=grid", space, "deltas.trials=3"])
