"""Cells of single features and of groups: their order, the first k alone, cards, and what features do together.

In: the inputs of an evaluation. Out: pieces of work and, on a worker, `cells/NAME.json`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data.rows import Row, read_rows, slug
from jobs.capture.worker_memory import reference
from jobs.context import keys
from jobs.evaluation.behaviour import UNFINETUNED, Behaviour, EndCell, ends_of, finished_ends, guesses
from jobs.evaluation.work import PlanInputs, Timing, Work, cell_name, place_of
from jobs.files import key_of
from sites import Site

RANKING_ROWS = 16
"""Held-out rows of each label on which features are ranked and grouped."""
CARD_ROWS = 8
"""Rows of each subset on which a single feature or a group is ablated, and kept alone."""
CARDS_AT_ONCE = 24
"""Features in one piece of work, which a worker examines one by one."""
CURVE_STEPS = 10
"""Approximate number of points of the curve, without its ends."""
GROUP_STEPS = 5
"""Approximate number of points of the curve of groups, without its end and the first group, which is also one alone."""
OF_A_SET = ("kind", "target", "layers", "percentile", "d_new")


@dataclass(frozen=True)
class Ranking(Work):
    """The order of the features, over all sites for change deltas, per site for residual deltas."""

    kind: ClassVar[str] = "ranking"
    columns: ClassVar[tuple[str, ...]] = OF_A_SET

    @classmethod
    def plan(cls, inputs: PlanInputs) -> list[Ranking]:
        works = []
        for target, chosen in inputs.chosen.items():
            sites = inputs.context.sites_of(target)
            needs_ranking = target == "change" and (inputs.settings.curve or inputs.settings.groups)
            if inputs.context.cards_of(target) or needs_ranking:
                for group in [sites] if target == "change" else [[site] for site in sites]:
                    plans = inputs.kept(group, *chosen)
                    key = key_of(
                        "ranking with firing", inputs.lineage(plans), inputs.computed_with, *inputs.some_subsets
                    )
                    name = cell_name("ranking", place_of(group, *chosen))
                    works.append(cls(name, key, **inputs.common(), sites=plans))
        return works

    @property
    def place(self) -> str:
        """What is ranked, as part of a cell's name."""
        return place_of([plan.site for plan in self.sites], self.sites[0].ground, self.sites[0].d_new)

    def cost(self, n_layers: int) -> int:
        return 18 * self.above(n_layers)

    def seconds(self, timing: Timing) -> float:
        return 8 * timing.passes(timing.prompts)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.curve import rank_features
        from evaluators.measures.features import firing_rates

        started = time.perf_counter()
        chosen = held_out_rows(self)
        passes, patches = self.plain_passes(model), self.load_patches()
        rates = firing_rates(passes, patches, rows)
        features = [
            {
                "layer": ranked.site.key,
                "feature": ranked.feature,
                "effect": ranked.effect,
                "firing_rate": {subset: rate[ranked.feature] for subset, rate in rates[ranked.site].items()},
            }
            for ranked in rank_features(passes, patches, chosen)
        ]
        return self.write({"n_rows": len(chosen), "features": features}, started)


@dataclass(frozen=True)
class Curve(Work):
    """The first k features of the change deltas, subset by subset."""

    kind: ClassVar[str] = "curve"
    columns: ClassVar[tuple[str, ...]] = (*OF_A_SET, "subset")
    ranking: str = ""
    """The cell that ranks the sites' features."""
    ends: tuple[EndCell, ...] = ()
    """The cells that hold the curve's ends."""

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        answers = Behaviour.plan(inputs)
        return [
            cls(
                cell_name("curve", ranking.place, slug(subset)),
                key_of("curve", ranking.key),
                **inputs.common(),
                sites=ranking.sites,
                subset=subset,
                ranking=ranking.name,
                ends=ends_of(answers, ranking.sites, subset),
            )
            for ranking in Ranking.plan(inputs)
            if ranking.sites[0].ground.target == "change" and inputs.settings.curve
            for subset in inputs.subsets
        ]

    def cost(self, n_layers: int) -> int:
        return self.above(n_layers) * sum(plan.d_new for plan in self.sites).bit_length()

    def seconds(self, timing: Timing) -> float:
        return timing.passes(timing.prompts * CURVE_STEPS)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.curve import evaluate_curve

        started = time.perf_counter()
        ranked = ranked_features(self, self.ranking)
        compared = reference(self.model, self.shared.rows, self.shared.batch_size)
        measured = finished_ends(self, self.ends, len(rows))
        curve = evaluate_curve(self.kept_passes(model), self.load_patches(), rows, ranked, compared, measured)
        counts = [{"k": count, "rows": entries} for count, entries in curve.items()]
        return self.write({"subset": self.subset, "counts": counts}, started)


@dataclass(frozen=True)
class Cards(Work):
    """The features with the largest estimated effects, in batches of neighbouring sites."""

    kind: ClassVar[str] = "cards"
    columns: ClassVar[tuple[str, ...]] = (*OF_A_SET, "convention")
    features: tuple[tuple[Site, int], ...] = ()

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        works = []
        for ranking in Ranking.plan(inputs):
            best = inputs.ranked(ranking.name, ranking.sites)[: inputs.context.cards_of(ranking.sites[0].ground.target)]
            for number, start in enumerate(range(0, len(best), CARDS_AT_ONCE)):
                features = tuple(sorted(best)[start : start + CARDS_AT_ONCE])
                listed = [(keys.place(site), feature) for site, feature in features]
                key = key_of("cards", ranking.key, listed, inputs.judged_with)
                name = cell_name("cards", ranking.place, number)
                works.append(cls(name, key, **inputs.common(), sites=ranking.sites, features=features))
        return works

    def cost(self, n_layers: int) -> int:
        """Each feature is ablated and kept alone, on some of the rows, from its site on."""
        return (4 + len(self.features)) * len(self.shared.subsets) * self.above(n_layers)

    def seconds(self, timing: Timing) -> float:
        return CARDS_AT_ONCE * timing.passes(timing.prompts * timing.subsets) / 2

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.behaviours import read_behaviours
        from evaluators.measures.features import read_features
        from evaluators.measures.single_features import single_features

        started = time.perf_counter()
        passes, patches = self.plain_passes(model), self.load_patches()
        subsets = ([row for row in rows if row.label == subset] for subset in self.shared.subsets)
        card_rows = [row for subset in subsets for row in subset[:CARD_ROWS]]
        effects = single_features(
            passes,
            patches,
            card_rows,
            self.features,
            limits=self.shared.limits,
            behaviours=read_behaviours(self.shared.behaviours),
            guesses=guesses(self, card_rows, UNFINETUNED if self.sites[0].ground.target == "change" else "raw"),
        )
        facts = read_features(passes, patches, rows, self.features)
        cards = [{"layer": card[0].key, "feature": card[1], **facts[card], **effects[card]} for card in self.features]
        return self.write({"convention": self.sites[0].site.kind.reading, "cards": cards}, started)


@dataclass(frozen=True)
class Grouping(Work):
    """The change deltas' features in groups that fire on the same tokens."""

    kind: ClassVar[str] = "grouping"
    columns: ClassVar[tuple[str, ...]] = OF_A_SET
    ranking: str = ""
    """The cell that ranks the sites' features."""

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        return {"groups": float(len(cell["groups"])), "cut": cell["cut"], "silhouette": cell["silhouette"]["held_out"]}

    @classmethod
    def plan(cls, inputs: PlanInputs) -> list[Grouping]:
        return [
            cls(
                cell_name(cls.kind, ranking.place),
                key_of(cls.kind, ranking.key),
                **inputs.common(),
                sites=ranking.sites,
                ranking=ranking.name,
            )
            for ranking in Ranking.plan(inputs)
            if ranking.sites[0].ground.target == "change" and inputs.settings.groups
        ]

    def cost(self, n_layers: int) -> int:
        return 7 * self.above(n_layers)

    def seconds(self, timing: Timing) -> float:
        return 4 * timing.passes(RANKING_ROWS)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.groups import find_groups

        started = time.perf_counter()
        effects = {(site, number): effect for site, number, effect in ranked_features(self, self.ranking)}
        grouping = find_groups(self.plain_passes(model), self.load_patches(), held_out_rows(self), effects)
        groups = [
            {**group, "number": number, "features": [[site.key, feature] for site, feature in group["features"]]}
            for number, group in enumerate(grouping["groups"], start=1)
        ]
        singles = [[site.key, feature] for site, feature in grouping["singles"]]
        return self.write({**grouping, "groups": groups, "singles": singles}, started)


@dataclass(frozen=True)
class GroupEffects(Work):
    """What groups of features do, subset by subset: without each, each alone, and the first few together."""

    kind: ClassVar[str] = "groups"
    columns: ClassVar[tuple[str, ...]] = (*OF_A_SET, "subset")
    grouping: str = ""
    """The cell with the groups."""
    most: int = 0
    """Groups that are measured one by one."""
    ends: tuple[EndCell, ...] = ()
    """The cells that hold what groups are compared with: all deltas, and none."""

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        losses = {}
        for entry in cell["entries"]:
            tokens = sum(row["n_tokens"] for row in entry["rows"])
            name = f"ce_{entry['way']}_{entry['group']}" + ("_random" if entry["random"] else "")
            losses[name] = sum(row["nll"] for row in entry["rows"]) / tokens
        return losses

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        most, answers = inputs.settings.groups, Behaviour.plan(inputs)
        return [
            cls(
                cell_name(cls.kind, place_of([plan.site for plan in grouping.sites], *_which(grouping)), slug(subset)),
                key_of(cls.kind, grouping.key, inputs.judged_with, most),
                **inputs.common(),
                sites=grouping.sites,
                subset=subset,
                grouping=grouping.name,
                most=most,
                ends=ends_of(answers, grouping.sites, subset),
            )
            for grouping in Grouping.plan(inputs)
            for subset in inputs.subsets
        ]

    @property
    def passes(self) -> int:
        """Configurations that the rows run through: each group missing and alone, and the first few, all twice with
        the control."""
        return 2 * (2 * self.most + GROUP_STEPS)

    def cost(self, n_layers: int) -> int:
        return self.passes * self.above(n_layers) * 3 // 4

    def seconds(self, timing: Timing) -> float:
        return timing.passes(self.passes * min(CARD_ROWS, timing.prompts))

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.behaviours import read_behaviours
        from evaluators.measures.group_effects import group_effects

        started = time.perf_counter()
        by_key = {plan.site.key: plan.site for plan in self.sites}
        cell = self.earlier_cell(self.grouping)
        groups = [[(by_key[key], number) for key, number in group["features"]] for group in cell["groups"]]
        singles = [(by_key[key], number) for key, number in cell["singles"]]
        card_rows = rows[:CARD_ROWS]
        entries = group_effects(
            self.plain_passes(model),
            self.load_patches(),
            card_rows,
            groups,
            singles,
            most=self.most,
            limits=self.shared.limits,
            behaviours=read_behaviours(self.shared.behaviours),
            reference=reference(self.model, self.shared.rows, self.shared.batch_size),
            guesses=guesses(self, card_rows, UNFINETUNED),
            known=finished_ends(self, self.ends, len(card_rows)),
            seed=self.seed,
        )
        return self.write({"subset": self.subset, "entries": entries}, started)


def held_out_rows(work: Work) -> list[Row]:
    """The first `RANKING_ROWS` of each label, among rows that are not evaluated."""
    rows = read_rows(work.shared.ranking_rows)
    labels = dict.fromkeys(row.label for row in rows)
    return [row for label in labels for row in [row for row in rows if row.label == label][:RANKING_ROWS]]


def ranked_features(work: Work, ranking: str) -> list[Any]:
    """The features of the work's sites in the order of a ranking cell, as `curve.Ranked`."""
    from evaluators.measures.curve import Ranked

    by_key = {plan.site.key: plan.site for plan in work.sites}
    listed = work.earlier_cell(ranking)["features"]
    return [Ranked(by_key[entry["layer"]], entry["feature"], entry["effect"]) for entry in listed]


def _which(work: Work) -> tuple[Any, int]:
    return work.sites[0].ground, work.sites[0].d_new
