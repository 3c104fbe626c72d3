"""Keys: short hashes of everything that a result on disk depends on.

In: settings. Out: keys. Settings that give the same result give the same key. Each key includes those it builds on, so
a changed setting changes exactly the keys of what depends on it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jobs.context.fingerprints import fingerprint
from jobs.context.workspace import storage_root
from jobs.files import key_of, short_hash
from search_spaces.schema import Sweep
from search_spaces.sections import Section
from sites import MLP, Address, Ground, Site

GROUPED_BY = ("targets", "sites", "layers", "percentiles", "target_l0", "d_new", "trials")
"""Delta settings that define which groups exist, not what a group's trials do."""
POLISH = ("polish_steps", "polish_lr")
DIRECTIONS = ["directions by site"]
"""Part of the keys where random directions are drawn; before, they were the same at all sites."""
EXECUTION = ("side_by_side", "workers_per_trial", "workers_per_layer")
"""Execution settings: they affect results only by rounding."""


def _dump(section: Section, *leave_out: str) -> dict:
    return section.model_dump(mode="json", exclude=set(leave_out))


def data(settings: Sweep) -> str:
    section = settings.data
    files = (section.rows_file, section.evaluation_file, section.text_train_file, section.text_validation_file)
    stamps = [_stamp(path) for path in files if path]
    # Also depends on the model: a user's rows are checked against its context length, a chat uses its template.
    model, chat = settings.model, section.format == "chat"
    reader: list[object] | None = None
    if stamps or chat:
        reader = [model.source, model.revision, model.finetuned is None, *model_files(settings)]
        reader += [model.finetuned, model.finetuned_revision, *finetuned_files(settings)] if chat else []
    return key_of("data", settings.seed, _dump(section), reader, stamps)


def _stamp(path: str) -> list[int]:
    """Size and modification time of a user's file, so that an edited file is read again; for a folder, of everything in
    it."""
    try:
        stats = [
            entry.stat() for entry in (Path(path), *(sorted(Path(path).rglob("*")) if Path(path).is_dir() else ()))
        ]
    except FileNotFoundError:
        return []
    return [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]


def model_files(settings: Sweep) -> list[object]:
    """Hashes of the un-finetuned model's files, for a folder or a hub repository; empty for a model that comes with a
    package, which its name identifies."""
    return _files(settings, settings.model.source, settings.model.revision)


def finetuned_files(settings: Sweep) -> list[object]:
    """Hashes of an adopted finetuned model's files."""
    model = settings.model
    return _files(settings, model.finetuned, model.finetuned_revision) if model.finetuned else []


def _files(settings: Sweep, source: str, revision: str | None) -> list[object]:
    hashes = fingerprint(source, revision, storage_root(settings.storage.root) / "models")
    return [] if hashes is None else [hashes]


def _unfinetuned(settings: Sweep) -> list[object]:
    return [_dump(settings.model, "finetuned", "finetuned_revision", "dtype"), *model_files(settings)]


def own_dtype(settings: Sweep) -> list[str]:
    """The dtype of evaluation, if it is not the default."""
    return [] if settings.model.dtype == "fp32" else [settings.model.dtype]


def lora_group(settings: Sweep) -> str:
    """The key of a single LoRA trial, which does not include the number of trials."""
    return key_of(
        "lora",
        data(settings),
        settings.seed,
        *_unfinetuned(settings),
        _dump(settings.lora, "trials"),
        settings.compute.precision,
    )


def lora(settings: Sweep) -> str:
    model = settings.model
    if model.finetuned:
        files = [*model_files(settings), *finetuned_files(settings)]
        return key_of("adopted", data(settings), _dump(model, "dtype"), *files)
    return key_of(lora_group(settings), settings.lora.trials)


def finetuned_check(settings: Sweep) -> str:
    """The key of the finetuned model's answers to the validation rows."""
    return key_of(lora(settings), behaviours(settings), settings.evaluate.max_new_tokens, settings.evaluate.stop)


def behaviours(settings: Sweep) -> list[object]:
    """The behaviours, in the order of the tables' columns, and the files of a user's own checks."""
    items = list(settings.evaluate.behaviours.items())
    modules = [check["python"].partition(":")[0] for _, check in items if isinstance(check, dict) and "python" in check]
    return [*items, *(_stamp_of_module(name) for name in modules)]


def _stamp_of_module(name: str) -> list[int]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # reported when the check is read
        spec = None
    return _stamp(spec.origin) if spec is not None and spec.origin else []


def base_activations(settings: Sweep) -> str:
    # A user's rows may contain the adopted model's own answers.
    answered = lora(settings) if settings.model.finetuned and settings.data.rows_file else None
    return key_of(
        "activations",
        answered,
        settings.transcoders.convention,
        data(settings),
        settings.seed,
        *_unfinetuned(settings),
        _dump(settings.activations),
        settings.compute.precision,
    )


def place(site: Site) -> int | str:
    """A site as part of a key: for MLPs the layer number, so that keys from before other kinds existed stay valid."""
    return site.layer if site.kind.name == MLP.name else site.label


def base(settings: Sweep, site: Site) -> str:
    """The key of a site's base transcoders."""
    section = settings.transcoders
    if section.source != "train":
        files = (
            sorted(Path(section.source).glob(f"{site.published_folder}/*/*/params.npz"))
            if Path(section.source).is_dir()
            else []
        )
        stamps = [_stamp(str(path)) for path in files]
        return key_of("published", section.source, section.width, place(site), section.convention, *stamps)
    return key_of("base", base_activations(settings), _dump(section, "layers", *EXECUTION), place(site))


def transcoders(settings: Sweep, sites: list[Site]) -> str:
    return key_of([base(settings, site) for site in sites], settings.deltas.selections, settings.deltas.target_l0)


def finetuned_activations(settings: Sweep) -> str:
    exact = "change" in settings.deltas.targets  # then a CPU captures everything in fp32
    return key_of("finetuned", lora(settings), base_activations(settings), exact)


def delta_data(settings: Sweep, site: Site, ground: Ground) -> str:
    """The key of the training data of a site's deltas on a ground."""
    activations = finetuned_activations(settings)
    if ground.target == "change":
        return key_of("change with BOS", activations, place(site))
    chosen_by = settings.deltas.target_l0 if ground.percentile is None else ground.percentile
    return key_of("residual", activations, base(settings, site), chosen_by)


def search_seed(settings: Sweep, site: Site, ground: Ground) -> int:
    """The seed of the search for a ground's deltas. It depends on no other setting, so that a search proposes the same
    values whether the finetuned model was trained or adopted."""
    return int(short_hash(1, "search", settings.seed, place(site), ground.label)[:8], 16) % 2**31


def delta_group(settings: Sweep, group: Address) -> str:
    return key_of(
        "delta",
        delta_data(settings, group.site, group.ground),
        group.d_new,
        settings.seed,
        _dump(settings.deltas, *GROUPED_BY, *POLISH, *EXECUTION),
        settings.compute.precision,
    )


def polished(settings: Sweep, sources: object) -> str:
    """The key of one width's jointly trained change deltas; `sources` are the ones they started from."""
    polish_settings = [getattr(settings.deltas, name) for name in POLISH]
    return key_of("polished", sources, polish_settings, lora(settings), settings.seed, settings.compute.precision)


def deltas(settings: Sweep, groups: list[Address]) -> str:
    polish_settings = [getattr(settings.deltas, name) for name in POLISH] if settings.deltas.polish_steps else []
    return key_of([delta_group(settings, group) for group in groups], settings.deltas.trials, *polish_settings)


def evaluate(settings: Sweep, groups: list[Address]) -> str:
    drawn = DIRECTIONS if "random_delta" in settings.evaluate.controls else []
    evaluation = [_dump(settings.evaluate), behaviours(settings), *own_dtype(settings), *drawn]
    return key_of("evaluate", deltas(settings, groups), *evaluation)


def report(settings: Sweep, groups: list[Address]) -> str:
    return key_of("report", evaluate(settings, groups), settings.name)
