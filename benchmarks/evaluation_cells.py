"""How far each kind of evaluation cell is from the matrix products that it cannot do without.

    python -m benchmarks.evaluation_cells quickstart storage.root=mlruns [--kinds Raw,Behaviour,Cards] [--subset tool]

In: a finished sweep, which is not touched. Out: for one cell of each kind, computed again in a temporary folder: its
seconds, the FLOPs of the products that it computed, as torch counts them, and those of the products with weights that
any exact method needs (`Needed`), both also as seconds at this machine's measured rate.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from os import cpu_count
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluation_grid import beyond, matmul_rate, timed
from data.encoding import encode_row
from data.rows import Row, read_rows
from evaluators.splice.interventions import Edit
from evaluators.splice.teacher_forcing import Job

SCORING = ("edited_behaviour", "group_effects", "single_features", "curve")
"""Modules of `evaluators.measures` that score rows and decode answers."""


def _packed(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """FLOPs of a product with packed weights, which torch does not count by itself."""
    return 2 * x.numel() * out_shape[-1]


PACKED = {torch.ops.mkldnn._linear_pointwise: _packed} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}


@dataclass
class Needed:
    """FLOPs of the products with weights that any exact method needs. Kinds that neither score rows nor decode answers
    have none; `Parts` has its own.

    Scoring: each text once below the first edited block; above it once for each strength and choice of features; one
    projection for each target token. Answers: each token after what the target or the guess proves takes a pass, each
    token that only the guess proves the blocks above the first edit. Cards: the blocks from a feature's own on, for
    each text on which it fires. Attention's products and gradients are left out, so the ratio of what is computed to
    what is needed is an upper bound. A block with deltas counts as the block alone: its un-finetuned parts take the
    place of its own, and its features are counted with it.
    """

    bridge: Any
    flops: float = 0.0

    def __post_init__(self) -> None:
        model = self.bridge.original_model
        body = sum(weight.numel() for weight in self.bridge.blocks.parameters() if weight.ndim == 2)
        self.n_layers = self.bridge.cfg.n_layers
        self.layer, self.head = body / self.n_layers, model.get_output_embeddings().weight.numel()

    def passes(self, tokens: int, layers: int, projected: int = 0, features: int = 0) -> None:
        """Adds `tokens` through `layers` blocks with `features` more weights, `projected` of them to the vocabulary."""
        self.flops += 2 * (tokens * (layers * self.layer + features) + projected * self.head)

    def score(self, edit: Edit, jobs: Sequence[Job]) -> None:
        first = min((patch.site.layer for patch in edit.patches), default=self.n_layers)
        texts = {tuple(job.encoded.ids) for job in jobs}
        self.passes(sum(map(len, texts)), first)
        distinct = {(tuple(job.encoded.ids), job.alpha, job.kept): len(job.encoded.target) for job in jobs}
        for (ids, *_), n_targets in distinct.items():
            self.passes(len(ids), self.n_layers - first, n_targets, _features(edit))

    def answers(self, edit: Edit, jobs: Sequence[Job], outputs: Sequence[Sequence[int]]) -> None:
        first = min((patch.site.layer for patch in edit.patches), default=self.n_layers)
        distinct = {
            (tuple(job.encoded.ids), job.alpha, job.kept, tuple(job.guess)): (job.encoded.target, output)
            for job, output in zip(jobs, outputs, strict=True)
        }
        for (*_, guess), (target, output) in distinct.items():
            off_target, off_both = beyond(output, [target]), beyond(output, [target, guess])
            self.passes(off_target - off_both, self.n_layers - first, off_target - off_both, _features(edit))
            self.passes(off_both, self.n_layers, off_both, _features(edit))

    def parts(self, work: Any, rows: Sequence[Row]) -> None:
        """The blocks of each model of `parts_ceiling`, those that are the same up to a layer once."""
        from evaluators.measures.parts import Changes, models_of
        from jobs.capture.worker_memory import paths

        changes = Changes.of(self.bridge, paths(work.model, work.shared.base_model, work.changed).values())
        models = models_of(changes, self.n_layers)
        blocks = sum(
            len({frozenset(piece for piece in model if (piece.layer or 0) <= layer) for model in models})
            for layer in range(self.n_layers)
        )
        encoded = [encode_row(self.bridge.tokenizer, row) for row in rows]
        n_targets = sum(len(row.target) for row in encoded)
        self.passes(sum(len(row.ids) for row in encoded), blocks, len(models) * n_targets)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the `with`, adds what every scoring and every answer needs."""
        from evaluators.measures import single_features
        from evaluators.splice import decoding, teacher_forcing

        def score(passes: Any, edit: Edit, jobs: Sequence[Job], **options: Any) -> Any:
            self.score(edit, jobs)
            return teacher_forcing.score(passes, edit, jobs, **options)

        def generate(passes: Any, edit: Edit, jobs: Sequence[Job], *rest: Any) -> Any:
            outputs = decoding.generate(passes, edit, jobs, *rest)
            self.answers(edit, jobs, outputs)
            return outputs

        def counted(run: Any) -> Any:
            @wraps(run)
            def counting(bridge: Any, patches: Any, condition: str, site: Any, pairs: Any, *rest: Any) -> Any:
                for _, place in pairs:
                    text, above = rest[-1][place], self.n_layers - site.layer - (run is single_features._above)
                    features = _features(Edit([patch for patch in patches if patch.site >= site]))
                    self.passes(len(text.ids), above, len(text.target), features)
                return run(bridge, patches, condition, site, pairs, *rest)

            return counting

        runs = {run.__name__: counted(run) for run in (single_features._above, single_features._through)}
        with ExitStack() as stack:
            for name in SCORING:
                module = import_module(f"evaluators.measures.{name}")
                for function in (score, generate, *runs.values()):
                    if hasattr(module, function.__name__):
                        stack.enter_context(mock.patch.object(module, function.__name__, function))
            yield


def _features(edit: Edit) -> int:
    """Weights of the deltas' encoders and decoders."""
    return sum(patch.transcoder.W_enc.numel() + patch.transcoder.W_dec.numel() for patch in edit.patches)


def main(
    config: Annotated[list[str] | None, typer.Argument(help="Settings and overrides of a finished sweep.")] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of cell; default: all.")] = "",
    subset: Annotated[str, typer.Option(help="Of kinds that have a cell for each subset.")] = "tool",
    threads: Annotated[int, typer.Option(min=1, help="As many as a worker of a sweep has.")] = 1,
) -> None:
    from jobs.capture.worker_memory import bridge as load
    from jobs.context.context import Context
    from jobs.evaluation.kinds import works_of
    from jobs.evaluation.work import PlanInputs
    from search_spaces.load import load as load_settings

    torch.set_num_threads(threads)
    name, *overrides = config or ["quickstart"]
    context = Context(load_settings(name, overrides))
    works: dict[str, Any] = {}
    for work in works_of(PlanInputs(context)):
        kind = type(work).__name__
        if work.subset in ("", subset) and (not kinds or kind in kinds.split(",")):
            works.setdefault(kind, work)
    rate = matmul_rate("cpu" if context.device == "cpu" else context.device)
    typer.echo(f"{context.device}, {torch.get_num_threads()} threads of {cpu_count()}, {rate / 1e9:.0f} GFLOP/s")
    typer.echo(f"{'kind':<16}{'seconds':>9}{'computed':>17}{'needed':>17}{'of computed':>13}{'of needed':>11}")
    for kind, work in works.items():
        model = load(work.model.folder, work.model.device, work.model.precision)
        rows = [row for row in read_rows(work.shared.rows) if work.subset in ("", row.label)]
        with tempfile.TemporaryDirectory() as folder:
            again = replace(work, shared=replace(work.shared, cells=_copied(Path(work.shared.cells), Path(folder))))
            seconds, _ = timed(partial(again.compute, model, rows), context.device)
            needed = Needed(model)
            with needed.counting(), FlopCounterMode(display=False, custom_mapping=PACKED) as counted:
                again.compute(model, rows)
            if kind == "Parts":
                needed.parts(work, rows)
        computed = counted.get_total_flops()
        shown = f"{kind:<16}{seconds:>8.1f} {computed / 1e12:>8.2f} T {computed / rate:>5.1f} s"
        shown += f"{needed.flops / 1e12:>8.2f} T {needed.flops / rate:>5.1f} s" if needed.flops else f"{'-':>17}"
        shown += f"{seconds * rate / computed:>12.2f}x" if computed else f"{'-':>13}"
        typer.echo(shown + (f"{seconds * rate / needed.flops:>10.2f}x" if needed.flops else f"{'-':>11}"))


def _copied(cells: Path, folder: Path) -> str:
    """The sweep's cells and answers in another folder, so that the sweep keeps its own."""
    for name in ("cells", "generations"):
        shutil.copytree(cells.parent / name, folder / name)
    return str(folder / "cells")


if __name__ == "__main__":
    typer.run(main)
