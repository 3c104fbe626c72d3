"""What every stage of a sweep is given.

In: settings and where to run. Out: one object with the workspace, progress, tracking and the cluster. Heavy parts are
built lazily, so that a finished sweep can say so without starting anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster import connection as cluster
from jobs.cluster.fanout import Pool
from jobs.errors import RequestError
from jobs.progress import Progress
from jobs.study.workspace import TIMELINE, Workspace, storage_root
from models.sources import check_hub, check_source, model_facts, resolve
from search_spaces.schema import Sweep

if TYPE_CHECKING:
    from jobs.search.studies import Storage
    from jobs.tracking.writer import Tracker


@dataclass
class Context:
    settings: Sweep
    progress: Progress = field(default_factory=Progress)
    address: str | None = None
    insecure: bool = False
    """Join a cluster that others can use without a token."""
    failures: list[str] = field(default_factory=list)
    """Trials and cells that failed, each with its reason; they are listed at the end."""

    @cached_property
    def space(self) -> Workspace:
        return Workspace(storage_root(self.settings.storage.root), self.settings.name)

    @cached_property
    def model(self) -> Path:
        """The folder of the un-finetuned model."""
        chosen = self.settings.model
        try:
            return resolve(chosen.source, self.space.models, chosen.revision, self.settings.seed)
        except PermissionError as error:
            raise RequestError(f"storage.root: {error.filename} cannot be written ({error.strerror})") from None
        except (NotADirectoryError, FileNotFoundError, FileExistsError) as error:
            raise RequestError(f"storage.root: {self.space.root} is not a folder ({error.strerror})") from None

    @cached_property
    def layers(self) -> list[int]:
        """The swept layers, ascending; raises RequestError if the model does not have one of them."""
        swept = self.settings.transcoders.layers
        count = model_facts(self.model)["n_layers"]
        dosed = self.settings.evaluate.alpha_layers
        for key, given in (("transcoders.layers", swept), ("evaluate.alpha_layers", dosed)):
            outside = [layer for layer in given if not 0 <= layer < count] if isinstance(given, list) else []
            if outside:
                source = self.settings.model.source
                raise RequestError(f"{key}: got {outside[0]}, but {source} has layers 0 to {count - 1}")
        return sorted(swept) if isinstance(swept, list) else list(range(count))

    @property
    def spliced(self) -> dict[tuple[int, ...], tuple[float, ...]]:
        """For each layer, and for all of them together: the strengths to measure besides the conditions."""
        settings = self.settings.evaluate
        sets: list[tuple[int, ...]] = [(layer,) for layer in self.layers]
        if settings.joint and len(sets) > 1:
            sets.append(tuple(self.layers))
        dosed = self.layers if settings.alpha_layers == "all" else settings.alpha_layers
        return {one: tuple(sorted(settings.alphas)) if set(one) <= set(dosed) else () for one in sets}

    @cached_property
    def share(self) -> cluster.Share:
        """What one worker gets. The first access starts or joins the cluster, whose nodes must share the storage."""
        cluster.connect(self.address, self.insecure)
        cluster.check_storage(self.space.root)
        return cluster.share_of(self.settings.compute)

    @cached_property
    def pool(self) -> Pool:
        """The workers for fan-outs; close it before a search, which needs the machine for its trials."""
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

    def finish_trial(self, stage: str, group: str, result: dict[str, Any]) -> None:
        """Tracks a trial that has just ended; a failed one is remembered for the end of the sweep."""
        from jobs.tracking.records import record_trial

        if result["state"] == "FAILED":
            self.failures.append(f"{stage} {group} trial {result['trial']}: {result['reason']}")
        record_trial(self.tracker, stage, group, result)

    @property
    def bytes_needed(self) -> int:
        """Disk space for a whole sweep, small files aside: activations, base errors, adapters and the merged model."""
        settings = self.settings
        width = model_facts(self.model)["d_model"]
        tokens = settings.activations.train_tokens + settings.activations.validation_tokens
        a_tensor = tokens * len(self.layers) * width * 2
        captures = 2 if settings.transcoders.source == "train" else 1
        weights = sum(path.stat().st_size for path in self.model.glob("*.safetensors"))
        bases = 0
        if settings.transcoders.source == "train" and isinstance(settings.transcoders.width, int):
            bases = len(self.layers) * len(settings.transcoders.target_l0) * settings.transcoders.width * width * 8
        return a_tensor * (2 * captures + len(settings.deltas.selections)) + 2 * weights + bases

    def check_bases(self) -> None:
        """Checks that published transcoders exist for every swept layer, before hours go into earlier stages."""
        if self.settings.transcoders.source != "train":
            from models.gemma_scope import candidates

            for layer in self.layers:
                candidates(self.settings.transcoders.source, layer, self.settings.transcoders.width)

    def check_request(self) -> None:
        """Checks everything about the request that can be known within a second, before anything is written."""
        check_source(self.settings.model.source, self.settings.model.revision)
        source = self.settings.transcoders.source
        if source != "train" and not Path(source).is_dir():
            if source.startswith((".", "/", "~")) or source.count("/") != 1:
                raise RequestError(
                    f"transcoders.source: there is no folder {source!r}; "
                    "give train, a folder, or a hub repository OWNER/NAME"
                )
            check_hub(source, "transcoders.source")
        data = self.settings.data
        for key in ("rows_file", "text_train_file", "text_validation_file"):
            path = getattr(data, key)
            if path is None:
                continue
            try:
                Path(path).open("rb").close()
            except OSError as error:
                raise RequestError(f"data.{key}: {path} cannot be read ({error.strerror})") from None
        if self.address:
            cluster.check_answers(self.address)


def tracking_uri(settings: Sweep, root: Path) -> str:
    """The configured server, else MLFLOW_TRACKING_URI, else the SQLite file under the storage root."""
    import os

    return (
        settings.storage.tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{(root / 'mlflow.db').resolve()}"
    )
