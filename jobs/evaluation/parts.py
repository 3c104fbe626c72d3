"""Cells that need no deltas: a first look at the two models, and in which parts of the model the finetuning is.

In: the two models and rows. Out: `cells/look.json`, and `cells/parts_SUBSET.json` with the cross-entropy of each part
un-finetuned alone, and finetuned alone.
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

WHOLE_AND_THIRDS = 5
"""Whole passes that both models take together with those of each third un-finetuned or finetuned alone: most of their
layers are shared."""
LOOK_ROWS, ANSWERS = 60, 12
"""Rows of a first look: in equal shares of the subsets, and those that both models answer."""


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

        losses = {f"ce_all_{model}": mean(cell[model]) for model in ("finetuned", "unfinetuned")}
        parts = [part for part in cell["parts"] if part["layers"] == EVERY_LAYER]
        return losses | {f"ce_only_{part['part']}_{part['way']}": mean(part["rows"]) for part in parts}

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
        """Approximate number of passes: those of both models and of the thirds of the layers, and two for each part.
        Attention's projections count as two parts, patterns and values."""
        kinds = {site.kind for site in self.changed}
        parts = sum(2 if kind == QKV else 1 for kind in KINDS.values() if kind in kinds) + bool(self.rest)
        return WHOLE_AND_THIRDS + 2 * parts

    def cost(self, n_layers: int) -> int:
        return self.passes * n_layers

    def seconds(self, timing: Timing) -> float:
        return timing.passes(timing.prompts * self.passes)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.parts import Changes, parts_ceiling
        from models.rest import read_rest

        started = time.perf_counter()
        before = paths(self.model, self.shared.base_model, self.changed)
        rest = read_rest(Path(self.shared.base_model), self.rest) if self.rest else None
        ceiling = parts_ceiling(self.plain_passes(model), Changes.of(model, before.values(), rest), rows)
        cell = {
            "kind": self.kind,
            "target": "",
            "subset": self.subset,
            "seed": self.seed,
            "key": self.key,
            "seconds": time.perf_counter() - started,
            **ceiling,
        }
        write_json(self.cell_file(self.name), cell)
        return [self.name]


@dataclass(frozen=True)
class Look(Work):
    """A first look at the pair: weights, token by token where the models diverge, answers, what the mean change reads.
    With the cells of parts it is what `deltascope look` shows."""

    kind: ClassVar[str] = "look"
    columns: ClassVar[tuple[str, ...]] = ("kind",)

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        values = [value for row in cell["divergence"] for value in row["kl"]]
        return {"mean_token_kl": sum(values) / len(values)}

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        key = key_of("look", inputs.finetuned_key, inputs.judged_with, inputs.subsets)
        return [cls(cls.kind, key, **inputs.common())] if Parts.plan(inputs) else []

    def cost(self, n_layers: int) -> int:
        return 5 * n_layers * len(self.shared.subsets)

    def seconds(self, timing: Timing) -> float:
        rows = min(LOOK_ROWS, timing.prompts * timing.subsets)
        return 3 * timing.passes(rows) + 2 * timing.answers(ANSWERS)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from data.neutral_texts import neutral_texts
        from evaluators.measures.behaviours import read_behaviours
        from evaluators.measures.look import Inputs, compare_weights, distinct_names, look_at, spread
        from evaluators.measures.parts import Changes
        from models.weights import open_weights

        started = time.perf_counter()
        base, finetuned = open_weights(Path(self.shared.base_model)), open_weights(Path(self.model.folder))
        with base.reader() as before, finetuned.reader() as after:
            weights = compare_weights(distinct_names(base, finetuned), before, after, model.tokenizer)
        changes = Changes.between(model, base.folder, [change["name"] for change in weights["changed"]])
        inputs = Inputs(
            spread(rows, LOOK_ROWS),
            neutral_texts()[0],
            self.shared.limits,
            read_behaviours(self.shared.behaviours),
            ("divergence", "answers", "lens"),
        )
        look = look_at(self.plain_passes(model), changes, inputs)
        ends = {"key": self.key, "seed": self.seed, "seconds": time.perf_counter() - started}
        write_json(self.cell_file(self.name), {"kind": self.kind, "target": "", **ends, **weights, **look})
        return [self.name]
