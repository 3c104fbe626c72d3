"""The context passed to every stage of a sweep.

In: settings and where to run. Out: one object with the workspace, progress, tracking and the cluster. Heavy parts are
built lazily, so that a finished sweep can say so without starting anything.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.build import REPORT
from data.readers import UNLABELLED
from data.requests.draw import LABELS
from data.sources import is_dataset
from evaluators.conditions import CONDITIONS
from evaluators.splice.limits import Limits
from jobs.cluster import address
from jobs.cluster import connection as cluster
from jobs.cluster.fanout import Pool
from jobs.cluster.sockets import check_temporary_folder
from jobs.context import keys
from jobs.context.fingerprints import stamps
from jobs.context.workspace import FINETUNED, PAIR, TIMELINE, Workspace, storage_root
from jobs.errors import DamagedFileError, RequestError
from jobs.files import MANIFEST, is_for, key_of, read_json
from jobs.progress import Progress
from models.adapters import is_adapter
from models.architectures import kinds_of
from models.sources import check_hub, check_source, model_facts, resolve
from search_spaces.dimensions import Choice
from search_spaces.schema import Sweep
from sites import KINDS, READINGS, Address, Ground, Kind, Site, sets_of

if TYPE_CHECKING:
    from jobs.search.studies import Storage
    from jobs.tracking.writer import Tracker


MODULES = {
    "qkv": {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"},
    "o": {"o_proj", "out_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "fc_in", "fc_out", "fc1", "fc2"},
}
"""By kind of site, the names that architectures give its modules."""


class SetPlan(NamedTuple):
    """What is measured at a set of sites: its conditions, and the strengths of its dose-response."""

    conditions: tuple[str, ...]
    doses: tuple[float, ...]


@dataclass
class Context:
    settings: Sweep
    progress: Progress = field(default_factory=Progress)
    address: str | None = None
    insecure: bool = False
    """Join a cluster even if it can be used without a token."""
    keeps_cluster: bool = False
    """Leave the cluster up for this process's next sweep; the last one disconnects."""
    failures: list[str] = field(default_factory=list)
    """Trials and cells that failed, each with its reason; they are listed at the end."""
    checked: set[Path] = field(default_factory=set)
    """Folders of activations that this command has written, or checked for damage."""

    @cached_property
    def space(self) -> Workspace:
        return Workspace(storage_root(self.settings.storage.root), self.settings.name)

    @cached_property
    def source(self) -> Path:
        """The folder of the un-finetuned model as given."""
        chosen = self.settings.model
        return self._resolve(chosen.source, chosen.revision, "model.source")

    @property
    def model(self) -> Path:
        """The folder of the un-finetuned model, or of a copy rounded to the finetuned one's dtype, if needed."""
        rounded = self.pair["rounded"] if self.pair is not None else ""
        return Path(rounded) if rounded else self.source

    @cached_property
    def pair(self) -> dict[str, Any] | None:
        """What finetuning changed; None until that is known. See `jobs.sweep.pair`."""
        try:
            pair = read_json(self.space.folder / PAIR)
            if pair is None or pair["key"] != self.pair_key:
                return None
            if not self.settings.model.finetuned and not is_for(self.space.lora, keys.lora_group(self.settings)):
                return None  # of a LoRA with other settings
        except DamagedFileError:  # one of the three files; it will be written again
            return None
        if "sites" not in pair:  # written before attention had sites
            from models.blocks import linear_kinds, sites_with
            from models.weights import load_config

            config = load_config(self.source)
            sites, pair["rest"] = sites_with(config, pair["changed"])
            pair["sites"] = [site.key for site in sites]
            pair["linear"] = [kind.name for kind in linear_kinds(config)]
        return pair

    @property
    def pair_key(self) -> str | None:
        """Identifies the finetuned model: an adopted one by its files and those of the un-finetuned model, else the
        last one trained here."""
        model = self.settings.model
        if model.finetuned:
            files = stamps(model.source, model.revision), stamps(model.finetuned, model.finetuned_revision)
            return key_of("pair", model.source, model.finetuned, *files)
        return (read_json(self.space.folder / FINETUNED) or {}).get("key")

    def forget_pair(self) -> None:
        """Makes the next access read what finetuning changed again from disk."""
        vars(self).pop("pair", None)

    @cached_property
    def adopted(self) -> Path | None:
        """The folder of the finetuned model or adapter in the settings; None if one is trained here."""
        chosen = self.settings.model
        if chosen.finetuned is None:
            return None
        return self._resolve(chosen.finetuned, chosen.finetuned_revision, "model.finetuned")

    @property
    def finetuned(self) -> Path:
        """The folder of the finetuned model: an adopted full model stays where it is; any other is merged by the lora
        stage."""
        if self.adopted is not None and not is_adapter(self.adopted):
            return self.adopted
        return self.space.lora / "merged"

    def _resolve(self, source: str, revision: str | None, key: str) -> Path:
        say = partial(print, file=sys.stderr, flush=True)  # standard output may be a command's JSON
        try:
            return resolve(source, self.space.models, revision, self.settings.seed, key, say)
        except PermissionError as error:
            raise RequestError(f"storage.root: {error.filename} cannot be written ({error.strerror})") from None
        except (NotADirectoryError, FileNotFoundError, FileExistsError) as error:
            raise RequestError(f"storage.root: {self.space.root} is not a folder ({error.strerror})") from None

    @property
    def rows(self) -> Path:
        """The folder of the rows, completed with the finetuned model's answers if a user's rows had no targets."""
        return self.space.answered if self.space.answered.is_dir() else self.space.data

    @property
    def subsets(self) -> list[str]:
        """The labels whose rows are evaluated, in order; a user's file counts as one label until it is read."""
        report = read_json(self.space.data / REPORT)
        expected = LABELS if self.settings.data.rows_file is None else (UNLABELLED,)
        return self.settings.evaluate.subsets or (report["labels"] if report else list(expected))

    @property
    def limits(self) -> Limits:
        """Where generations stop."""
        return Limits(self.settings.evaluate.max_new_tokens, tuple(self.settings.evaluate.stop))

    @property
    def sites(self) -> list[Site]:
        """Every site that gets deltas, in order."""
        return sorted({site for target in self.settings.deltas.targets for site in self.sites_of(target)})

    def sites_of(self, target: str) -> list[Site]:
        """The sites of a target's deltas, in order; empty if the settings do not name the target. Change deltas skip
        sites known to be unchanged by finetuning. Raises RequestError if the model lacks a layer."""
        unchanged = self._unchanged(target)
        return [site for site in self._requested_sites(target) if site not in unchanged]

    def layers_of(self, target: str) -> list[int]:
        """The layers of a target's sites, ascending."""
        return sorted({site.layer for site in self.sites_of(target)})

    @property
    def mlp_kind(self) -> Kind:
        """The kind of the sites of base transcoders: the MLP, with the settings' convention."""
        return READINGS[self.settings.transcoders.convention]

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of site that get change deltas: those in the settings; with `auto`, those that finetuning changed
        or, until that is known, those that LoRA may change."""
        requested = self.settings.deltas.sites
        if requested != "auto":
            return [kind for name, kind in KINDS.items() if name in requested]
        if self.pair is not None:
            changed = {site.kind for site in self._changed}
            return [kind for kind in self.known_kinds if kind in changed]
        return [kind for kind in kinds_of_targets(self.settings) if kind in self.known_kinds]

    @property
    def known_kinds(self) -> list[Kind]:
        """The kinds of site that the model's architecture has."""
        return kinds_of(model_facts(self.source)["architecture"])

    @property
    def changed_sites(self) -> list[Site]:
        """The sites that finetuning changed, in order, with or without deltas; all sites until that is known."""
        if self.pair is not None:
            return sorted(self._changed)
        return [Site(layer, kind) for layer in range(model_facts(self.source)["n_layers"]) for kind in self.known_kinds]

    @property
    def rest(self) -> tuple[str, ...]:
        """The parameters outside all sites that finetuning changed, by their names in transformers."""
        return tuple(self.pair["rest"]) if self.pair is not None and self.pair["exact"] else ()

    def is_everything(self, sites: Collection[Site]) -> bool:
        """Whether these include every site that finetuning changed, so that with `rest` they are the whole change."""
        return self.pair is not None and self._changed <= set(sites)

    def is_linear(self, site: Site) -> bool:
        """Whether the change at the site is an affine function of x, so that the weights determine it. Until the
        pair is known, assumes what holds for most architectures."""
        linear = ("qkv", "o") if self.pair is None else self.pair["linear"]
        return site.kind.name in linear

    @property
    def unchanged(self) -> list[Site]:
        """Sites that the settings request change deltas for, but that finetuning did not change."""
        return sorted(self._unchanged("change"))

    @property
    def _changed(self) -> set[Site]:
        """The sites that finetuning changed; the pair must be known."""
        assert self.pair is not None
        return {Site.parse(key) for key in self.pair["sites"]}

    def _unchanged(self, target: str) -> set[Site]:
        if target != "change" or self.pair is None:
            return set()
        return set(self._requested_sites(target)) - self._changed

    def _requested_sites(self, target: str) -> list[Site]:
        kinds = self.kinds if target == "change" else [self.mlp_kind]
        return sorted(Site(layer, kind) for layer in self._requested_layers(target) for kind in kinds)

    def _requested_layers(self, target: str) -> list[int]:
        settings = self.settings
        if target not in settings.deltas.targets:
            return []
        key, section = ("deltas", settings.deltas) if target == "change" else ("transcoders", settings.transcoders)
        requested, count = section.layers, model_facts(self.source)["n_layers"]
        if not isinstance(requested, list):
            return list(range(count))
        outside = [layer for layer in requested if not 0 <= layer < count]
        if outside:
            raise RequestError(
                f"{key}.layers: got {outside[0]}, but {settings.model.source} has layers 0 to {count - 1}"
            )
        return sorted(requested)

    def grounds_of(self, target: str) -> list[Ground]:
        """The grounds of one target; empty if the settings do not name it."""
        section = self.settings.deltas
        if target not in section.targets:
            return []
        return (
            [Ground("change")]
            if target == "change"
            else [Ground("residual", selection) for selection in section.selections]
        )

    @property
    def delta_groups(self) -> list[Address]:
        """Every group of deltas that is searched as one; groups of the same site and ground are adjacent."""
        return [
            Address(site, ground, d_new)
            for target in self.settings.deltas.targets
            for site in self.sites_of(target)
            for ground in self.grounds_of(target)
            for d_new in self.settings.deltas.d_new
        ]

    def best_of(self, group: Address) -> dict[str, Any] | None:
        """The result of the trial that a search kept; None if no trial succeeded."""
        return read_json(self.space.deltas / group.folder / "best.json")

    def kept_trial(self, group: Address) -> Path | None:
        """The folder of the trial that a search kept."""
        best = self.best_of(group)
        return None if best is None else self.space.deltas / group.folder / f"trial_{best['trial']:04d}"

    def kept_delta(self, group: Address) -> Path | None:
        """The folder of the delta to splice in: the one that the search kept, or its jointly polished version."""
        kept_folder = self.kept_trial(group)
        polished_folder = self.space.polished(group.d_new) / group.site.folder
        polished = group.ground.target == "change" and self.settings.deltas.polish_steps and polished_folder.is_dir()
        return polished_folder if kept_folder is not None and polished else kept_folder

    def cards_of(self, target: str) -> int:
        """Number of features that get a card: over all layers' change deltas, or per layer for residual deltas; none
        for the second target."""
        if target != self.settings.deltas.targets[0]:
            return 0
        return math.ceil(self.settings.evaluate.cards / (1 if target == "change" else len(self.layers_of(target))))

    def sets_of(self, target: str) -> dict[tuple[Site, ...], SetPlan]:
        """The sets of sites at which a target's deltas are spliced in together, and what is measured there."""
        settings = self.settings.evaluate
        plans: dict[tuple[Site, ...], SetPlan] = {}
        for entry in settings.sets:
            alphas = settings.alphas if entry.alphas is None else entry.alphas
            controls = settings.controls if entry.controls else []
            names = [name for name in [*settings.conditions, *controls] if name != "raw"]
            conditions = tuple(name for name in names if target in CONDITIONS[name].targets)
            chosen = entry.layers
            if isinstance(chosen, list) and target == "change":
                chosen = [layer for layer in chosen if layer in self.layers_of(target)]
            for sites in sets_of(chosen, self.sites_of(target)) if chosen else []:
                plans[sites] = SetPlan(conditions, tuple(sorted(alphas)))
        return plans

    @property
    def joins_cluster(self) -> bool:
        """Whether the work runs on an existing cluster, not on a Ray started here."""
        return address.chosen(self.address).joins

    @cached_property
    def share(self) -> cluster.Share:
        """The share of one worker. The first access starts or joins the cluster, whose nodes must share the storage."""
        cluster.connect(self.address, self.insecure, self.progress.line)
        cluster.check_storage(self.space.root)
        return cluster.share_of(self.settings.compute)

    @cached_property
    def pool(self) -> Pool:
        """The fan-out workers; close the pool before a search, whose trials need the machine."""
        return Pool(self.share, self.space.folder / TIMELINE)

    @property
    def device(self) -> str:
        return "cuda" if self.share.gpus else "cpu"

    @cached_property
    def tracker(self) -> Tracker:
        from jobs.tracking.writer import Tracker

        self.space.root.mkdir(parents=True, exist_ok=True)
        return Tracker(
            tracking_uri(self.settings, self.space.root),
            self.settings.name,
            self.space.root / "artifacts",
            scope=self.space.start,
            say=self.progress.line,
        )

    @cached_property
    def studies(self) -> Storage:
        from jobs.search.studies import open_storage

        return open_storage(self.settings.storage.optuna_url, self.space.root)

    @cached_property
    def cells(self) -> list[dict[str, Any]]:
        """The evaluated cells of these settings, without those left over from earlier settings."""
        names = read_json(self.space.cells / MANIFEST)["cells"]
        return [self._cell(name) for name in names]

    def cells_of(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind; empty if the evaluation has not ended."""
        names = (read_json(self.space.cells / MANIFEST) or {"cells": []})["cells"]
        return [self._cell(name) for name in names if name.startswith(f"{kind}_")]

    def _cell(self, name: str) -> dict[str, Any]:
        path = self.space.cells / f"{name}.json"
        cell: dict[str, Any] | None = read_json(path)
        if cell is None:
            raise DamagedFileError(path, "is missing")
        return cell

    def finish_trial(self, stage: str, group: str, result: dict[str, Any]) -> None:
        """Tracks a trial that has just ended; lists a failed one at the end of the sweep."""
        from jobs.tracking.records import record_trial

        if result["state"] == "FAILED":
            self.failures.append(f"{stage} {group} trial {result['trial']}: {result['reason']}")
        record_trial(self.tracker, stage, group, result)

    def check_bases(self) -> None:
        """Checks that published transcoders exist for every swept layer, before earlier stages take hours."""
        if self.settings.transcoders.source != "train":
            from models.gemma_scope import candidates

            for site in self.sites_of("residual"):
                candidates(self.settings.transcoders.source, site, self.settings.transcoders.width)

    def check_request(self) -> None:
        """Checks everything about the request that can be known within a second, before anything is written."""
        model = self.settings.model
        check_source(model.source, model.revision)
        if model.finetuned is not None:
            check_source(model.finetuned, model.finetuned_revision, "model.finetuned")
        source = self.settings.transcoders.source if "residual" in self.settings.deltas.targets else "train"
        if source != "train" and not Path(source).is_dir():
            if source.startswith((".", "/", "~")) or source.count("/") != 1:
                raise RequestError(
                    f"transcoders.source: there is no folder {source!r}; "
                    "give train, a folder, or a hub repository OWNER/NAME"
                )
            check_hub(source, "transcoders.source")
        data = self.settings.data
        for key in ("rows_file", "evaluation_file", "text_train_file", "text_validation_file"):
            path = getattr(data, key)
            if path is None or (key in ("rows_file", "evaluation_file") and is_dataset(path, f"data.{key}")):
                continue
            try:
                Path(path).open("rb").close()
            except OSError as error:
                raise RequestError(f"data.{key}: {path} cannot be read ({error.strerror})") from None
        from evaluators.measures.behaviours import read_behaviours

        read_behaviours(self.settings.evaluate.behaviours)
        if self.joins_cluster:
            address.check(address.chosen(self.address))
        else:
            check_temporary_folder()
        if self.settings.storage.optuna_url:
            from jobs.search.databases import is_file

            if not is_file(self.settings.storage.optuna_url):  # a file's folder may not exist yet
                _ = self.studies


def kinds_of_targets(settings: Sweep) -> list[Kind]:
    """The kinds of site that LoRA on `lora.space.targets` may change, judged by module names; all kinds if a name is
    unknown."""
    targets = settings.lora.space.targets
    choices = [str(choice) for choice in targets.choice] if isinstance(targets, Choice) else [str(targets)]
    names = {name.strip() for choice in choices for name in choice.split(",")}
    reached = {kind for kind, modules in MODULES.items() if names & modules}
    if names - set().union(*MODULES.values()):
        return list(KINDS.values())
    return [kind for name, kind in KINDS.items() if name in reached]


def error_name(target: str) -> str:
    """The figure with a target's unexplained share: of the change, or of the output's variance."""
    return "val_unexplained" if target == "change" else "val_fvu"


def tracking_uri(settings: Sweep, root: Path) -> str:
    """The configured server, else MLFLOW_TRACKING_URI, else the SQLite file under the storage root."""
    import os

    return (
        settings.storage.tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{(root / 'mlflow.db').resolve()}"
    )
