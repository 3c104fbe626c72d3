"""Cells with attribution graphs: how the answers to a few prompts come about.

In: the inputs of an evaluation. Out: pieces of work and, on a worker, `cells/graph_PLACE_SUBSET.json`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar

from data.rows import DataError, slug
from jobs.evaluation.features import OF_A_SET, Grouping
from jobs.evaluation.work import PlanInputs, Timing, Work, cell_name, place_of
from jobs.files import key_of

PASSES = 120
"""Approximate number of passes of one text that a graph takes: mostly backward ones, a text for each expanded node."""


@dataclass(frozen=True)
class Graphs(Work):
    """The graphs of a subset's first prompts, through the change deltas of all sites."""

    kind: ClassVar[str] = "graph"
    columns: ClassVar[tuple[str, ...]] = (*OF_A_SET, "subset")
    grouping: str = ""
    """The cell with the groups; empty if there is none."""
    most: int = 0
    rest: tuple[str, ...] = ()
    """Changed parameters outside all sites; empty unless the sites are all that finetuning changed."""

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        return {
            f"correlation_{sample}_{number}": correlation[0]
            for number, graph in enumerate(cell["graphs"])
            for sample, correlation in graph.get("checks", {}).get("correlation", {}).items()
            if correlation is not None
        }

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        context = inputs.context
        # One prompt of each subset, then a second one of each, and so on.
        graph_counts = Counter(islice(cycle(inputs.subsets), inputs.settings.graphs))
        sites = context.sites_of("change") if "change" in inputs.chosen else ()
        if not graph_counts or not sites:
            return []
        plans = inputs.kept(sites, *inputs.chosen["change"])
        groupings = Grouping.plan(inputs)
        grouping = groupings[0].name if groupings else ""
        rest = context.rest if context.is_everything(sites) else ()
        lineage, keys_of_groups = inputs.lineage(plans), [grouping.key for grouping in groupings]
        place = place_of([plan.site for plan in plans], *inputs.chosen["change"])
        return [
            cls(
                cell_name(cls.kind, place, slug(subset)),
                key_of(cls.kind, lineage, inputs.judged_with, most, rest, keys_of_groups),
                **inputs.common(),
                sites=plans,
                subset=subset,
                grouping=grouping,
                most=most,
                rest=rest,
            )
            for subset, most in graph_counts.items()
        ]

    def cost(self, n_layers: int) -> int:
        return self.most * PASSES * self.above(n_layers) // 24

    def seconds(self, timing: Timing) -> float:
        return timing.passes(self.most * PASSES)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.graph import GraphOptions, attribution_graph, choose_output
        from evaluators.measures.graph_formats import as_json, with_groups
        from models.rest import read_rest

        started, patches = time.perf_counter(), self.load_patches()
        rest = read_rest(Path(self.shared.base_model), self.rest) if self.rest else None
        grouping = self.earlier_cell(self.grouping) if self.grouping else None
        graphs: list[dict[str, Any]] = []
        for row in rows[: self.most]:
            try:
                output, next_tokens = choose_output(model, patches, row, self.shared.limits, rest)
            except DataError:  # both models say the same
                graphs.append({"prompt": row.input})
                continue
            graph = attribution_graph(model, patches, output, next_tokens, GraphOptions(seed=self.seed))
            described = as_json(graph, model.tokenizer, "", {"prompt": row.input, "subset": self.subset})
            graphs.append({"prompt": row.input, **with_groups(described, grouping)})
        return self.write({"subset": self.subset, "graphs": graphs}, started)
