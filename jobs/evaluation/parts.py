"""Cells that locate the finetuning: each part of the model un-finetuned alone, and finetuned alone.

In: the two models and a subset's rows; no deltas. Out: `cells/parts_SUBSET.json`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.rows import slug
from jobs.capture.worker_memory import paths
from jobs.evaluation.work import PlanInputs, Timing, Work, cell_name
from jobs.files import key_of, write_json
from sites import KINDS, QKV, Site

THIRDS = 3


@dataclass(frozen=True)
class Parts(Work):
    """One subset's cross-entropy with each part un-finetuned alone, and with each part finetuned alone."""

    kind: ClassVar[str] = "parts"
    columns: ClassVar[tuple[str, ...]] = ("kind", "subset")
    changed: tuple[Site, ...] = ()
    """The sites that finetuning changed, whether they get deltas or not."""
    rest: tuple[str, ...] = ()
    """The parameters outside all sites that finetuning changed."""

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        from evaluators.tables.recovery import EVERY_LAYER

        def mean(rows: list[dict[str, Any]]) -> float:
            return sum(row["nll"] for row in rows) / sum(row["n_tokens"] for row in rows)

        found = {f"ce_all_{model}": mean(cell[model]) for model in ("finetuned", "unfinetuned")}
        parts = [part for part in cell["parts"] if part["layers"] == EVERY_LAYER]
        return found | {f"ce_only_{part['part']}_{part['way']}": mean(part["rows"]) for part in parts}

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        context = inputs.context
        if not inputs.settings.parts or "change" not in context.settings.deltas.targets:
            return []
        changed, rest = tuple(context.changed_sites), context.rest
        key = key_of("parts", inputs.finetuned_key, inputs.computed_with)
        return [
            cls(cell_name("parts", slug(subset)), key, **inputs.common(), subset=subset, changed=changed, rest=rest)
            for subset in inputs.subsets
        ]

    @property
    def passes(self) -> int:
        """Approximate number of models that the rows run through: both whole ones, and two for each part and each third
        of the layers. Attention's projections count as two parts, patterns and values."""
        kinds = {site.kind for site in self.changed}
        parts = sum(2 if kind == QKV else 1 for kind in KINDS.values() if kind in kinds) + bool(self.rest)
        return 2 + 2 * (parts + THIRDS)

    def cost(self, n_layers: int) -> int:
        return self.passes * n_layers

    def seconds(self, timing: Timing) -> float:
        return timing.passes(timing.prompts * self.passes)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.parts import Changes, evaluate_parts
        from models.rest import read_rest

        started = time.perf_counter()
        before = paths(self.model, self.shared.base_model, self.changed)
        rest = read_rest(Path(self.shared.base_model), self.rest) if self.rest else None
        found = evaluate_parts(self.plain_passes(model), Changes.of(model, before.values(), rest), rows)
        cell = {
            "kind": self.kind,
            "target": "",
            "subset": self.subset,
            "seed": self.seed,
            "key": self.key,
            "seconds": time.perf_counter() - started,
            **found,
        }
        write_json(self.cell_file(self.name), cell)
        return [self.name]
