"""Behaviour cells: one subset answered by a raw model, or under conditions, strengths and controls.

In: work with the deltas of a set of sites, a model and rows. Out: `cells/NAME.json` and `generations/NAME.jsonl`, each
written under a temporary name and then renamed; and their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from data.files import replacing
from data.rows import sha256_of, slug
from evaluators.conditions import CONDITIONS
from jobs.capture.worker_memory import exact_paths, paths, reference
from jobs.context import keys
from jobs.context.workspace import replica_folder
from jobs.evaluation.work import Combination, PlanInputs, SitePlan, Timing, Work, cell_name, place_of
from jobs.files import key_of, read_json, write_json
from sites import Ground, Site

STRENGTHS = {"no_delta": 0.0, "full": 1.0}
"""Conditions that equal a strength of the delta."""
UNFINETUNED = "base_model_raw"
"""Condition of the plain model before finetuning, and the prefix of its cells' names."""


@dataclass(frozen=True)
class Answers(Work):
    """Work whose cells hold a model's answers, prompt by prompt."""

    kind: ClassVar[str] = "behaviour"
    columns: ClassVar[tuple[str, ...]] = (
        *("kind", "target", "layers", "percentile", "d_new"),
        *("condition", "alpha", "subset", "convention"),
    )

    @classmethod
    def metrics(cls, cell: dict[str, Any]) -> dict[str, float]:
        from evaluators.tables.pooling import means_of

        return means_of(cell)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The alphas that are measured in the same batches."""
        return ()

    def write_answers(
        self, name: str, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]
    ) -> str:
        """Writes one cell and its generated texts; returns its name."""
        from evaluators.measures.behaviours import AGREES

        layers = [plan.site.key for plan in self.sites]
        place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": self.subset}
        lines = [json.dumps({**place, **{k: v for k, v in text.items() if k != "seconds"}}) for text in texts]
        path = generations_folder(self) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
        cell = {
            "kind": self.kind,
            **place,
            "target": self.sites[0].ground.target if self.sites else "",
            "percentile": self.sites[0].ground.percentile if self.sites else None,
            "d_new": self.sites[0].d_new if self.sites and CONDITIONS[condition].uses_delta else None,
            "convention": self.sites[0].site.kind.reading if self.sites else "",
            "seed": self.seed,
            "strengths": self.strengths if condition in (*STRENGTHS, "alpha") else [],
            "seconds": texts[0]["seconds"] if texts else 0.0,
            "key": self.key,
            "behaviours": [*self.shared.behaviours, AGREES],
            "generations": sha256_of(path),
            "rows": figures,
        }
        write_json(self.cell_file(name), cell)
        return name


@dataclass(frozen=True)
class Raw(Answers):
    """Nothing spliced: the finetuned model and, if something is measured against it, the un-finetuned one."""

    condition: str = "raw"

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        key = key_of("raw with text", inputs.finetuned_key, inputs.judged_with)
        models = {"raw": inputs.finetuned}
        unfinetuned = any(CONDITIONS[name].model == "base" for name in inputs.settings.controls)
        if unfinetuned or "change" in inputs.context.settings.deltas.targets:
            models[UNFINETUNED] = inputs.unfinetuned
        return [
            cls(
                cell_name(condition, slug(subset)),
                key,
                **{**inputs.common(), "model": model},
                subset=subset,
                condition=condition,
            )
            for condition, model in models.items()
            for subset in inputs.subsets
        ]

    def cost(self, n_layers: int) -> int:
        return 3 * n_layers

    def seconds(self, timing: Timing) -> float:
        return timing.answers(timing.prompts)

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from evaluators.measures.behaviours import AGREES, read_behaviours
        from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour

        is_raw = self.condition == "raw"
        ((_, figures, texts),) = evaluate_behaviour(
            self.plain_passes(model),
            (),
            rows,
            [Ask("raw")],
            limits=self.shared.limits,
            behaviours=read_behaviours(self.shared.behaviours),
            known=Known(reference=_reference(self)) if is_raw else Known(),
        )
        if is_raw:
            figures = [{**row, "kl": 0.0, "behaviours": {**row["behaviours"], AGREES: True}} for row in figures]
        return [self.write_answers(self.name, self.condition, None, figures, texts)]


@dataclass(frozen=True)
class Behaviour(Answers):
    """The deltas of a set of sites, under conditions and at strengths, and the controls."""

    conditions: tuple[str, ...] = ()
    doses: tuple[float, ...] = ()
    control_doses: tuple[float, ...] = ()
    """Strengths of the controls that take one."""
    rest: tuple[str, ...] = ()
    """Changed parameters outside all sites, set to the strength of the deltas; empty unless the sites are all that
    finetuning changed."""

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        works: list[Work] = []
        for target, chosen in inputs.chosen.items():
            for sites, (conditions, doses) in inputs.context.sets_of(target).items():
                on_base = tuple(name for name in conditions if CONDITIONS[name].model == "base")
                on_finetuned = tuple(name for name in conditions if name not in on_base)
                plans = inputs.kept(sites, *chosen)
                rest = inputs.context.rest if target == "change" and inputs.context.is_everything(sites) else ()
                key_parts: tuple[Any, ...] = ("cell", inputs.lineage(plans), inputs.judged_with)
                key_parts += (rest,) if rest else ()
                key_parts += tuple(keys.DIRECTIONS) if "random_delta" in conditions else ()
                # At 0 and 1, interpolated weights are those of no_delta and raw.
                inner_doses = tuple(dose for dose in doses if dose not in (0.0, 1.0))
                for subset in inputs.subsets:
                    name = cell_name(place_of(sites, *chosen), slug(subset))
                    fields = {**inputs.common(), "sites": plans, "subset": subset, "rest": rest}
                    key = key_of(*key_parts)
                    work = cls(name, key, **fields, conditions=on_finetuned, doses=doses, control_doses=inner_doses)
                    works.append(work)
                    for rank in range(1, inputs.settings.replicas):
                        of_rank = _of_rank(plans, rank)
                        works.append(work._of_replica(rank, key_of(*key_parts, rank, inputs.lineage(of_rank)), of_rank))
                    if on_base:  # another model, so work of its own
                        fields["model"] = inputs.unfinetuned
                        works.append(cls(name, key, **fields, conditions=on_base))
        return works

    def _of_replica(self, rank: int, key: str, sites: tuple[SitePlan, ...]) -> Self:
        """The same cells for the kept trials' seed of this rank, without those that do not use the delta."""
        return replace(
            self,
            name=cell_name(self.name, f"s{rank}"),
            key=key,
            sites=sites,
            conditions=tuple(name for name in self.conditions if CONDITIONS[name].uses_delta),
            doses=tuple(dose for dose in self.doses if dose),
            seed=self.seed + rank,
        )

    @property
    def strengths(self) -> tuple[float, ...]:
        """The doses, plus 0 for no_delta and 1 for full."""
        return tuple(sorted({*self.doses, *(STRENGTHS[name] for name in self.conditions if name in STRENGTHS)}))

    @property
    def requested(self) -> list[tuple[str, float | None]]:
        """The condition of every cell, and its strength if it has one."""
        dosed: list[tuple[str, float | None]] = [("alpha", dose) for dose in self.doses]
        for condition in self.conditions:
            if CONDITIONS[condition].dosed:
                dosed += [(condition, dose) for dose in self.control_doses]
            else:
                dosed.append((condition, None))
        return dosed

    @property
    def controls(self) -> list[tuple[str, float | None]]:
        """Conditions that are not strengths of the delta; each needs its own passes."""
        return [cell for cell in self.requested if cell[0] not in (*STRENGTHS, "alpha")]

    @property
    def needs_moments(self) -> bool:
        return any(CONDITIONS[name].ranked for name in self.conditions)

    @property
    def units(self) -> int:
        """All strengths are rows in the same batches."""
        return 1

    def cells(self) -> dict[str, str]:
        return {self.name_of(*cell): self.key for cell in self.requested}

    def name_of(self, condition: str, alpha: float | None) -> str:
        return cell_name(self.name, f"{condition}{alpha!r}" if CONDITIONS[condition].dosed else condition)

    def reusable(self, done: Mapping[str, Sequence[float]]) -> set[str]:
        """If a strength is missing, all strengths measured together with it are computed again: they were rows of the
        same batches, and the last bits depend on the batch."""
        strengths = {self.name_of(*cell): STRENGTHS.get(*cell) for cell in self.requested if cell not in self.controls}
        missing = {strength for name, strength in strengths.items() if name not in done}
        return {name for name, measured_with in done.items() if not missing & set(measured_with)}

    def remaining(self, done: set[str]) -> Self:
        missing = [cell for cell in self.requested if self.name_of(*cell) not in done]
        return replace(
            self,
            doses=tuple(dose for dose in self.doses if ("alpha", dose) in missing),
            conditions=tuple(name for name in self.conditions if name in {condition for condition, _ in missing}),
        )

    def cost(self, n_layers: int) -> int:
        """Rows are scored and, token by token, answered."""
        return 2 * (max(1, len(self.strengths)) * self.above(n_layers) + len(self.controls) * n_layers)

    def seconds(self, timing: Timing) -> float:
        controls = [CONDITIONS[name].dosed for name in self.conditions if CONDITIONS[name].control]
        alone = sum(len(self.doses) if dosed else 1 for dosed in controls) * timing.answers(timing.prompts)
        if not self.strengths:
            return alone
        answers = timing.prompts * len({*self.doses, *STRENGTHS.values()})
        return alone + timing.answers(answers, self.above(timing.n_layers))

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        from data.encoding import encode_row
        from evaluators.measures.behaviours import read_behaviours
        from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour

        is_base = self.model.folder == self.shared.base_model
        is_change = self.sites[0].ground.target == "change"
        finetuned, unfinetuned = (_outputs(self, name, self.subset) for name in ("raw", UNFINETUNED))
        compared = None if is_base else _reference(self)
        if compared is not None:  # before a control swaps the model's weights
            compared.add([encode_row(model.tokenizer, row) for row in rows])
        settings: dict[str, Any] = {
            "limits": self.shared.limits,
            "behaviours": read_behaviours(self.shared.behaviours),
            "known": Known(
                unfinetuned if is_base else finetuned,
                unfinetuned if is_change else [],
                compared,
                finetuned,
            ),
        }
        patches = self.load_patches()
        asks = [Ask("alpha", strength) for strength in self.strengths]
        names = []
        at_strength: dict[float | None, list[list[int]]] = {}
        dosed = (
            self._with_rest(model, patches, rows, asks, settings)
            if self.rest
            else evaluate_behaviour(self.kept_passes(model), patches, rows, asks, **settings)
        )
        for ask, figures, texts in dosed:
            at_strength[ask.alpha] = [text["tokens"] for text in texts]
            if ask.alpha in self.doses:
                names.append(self._write("alpha", ask.alpha, figures, texts))
            # Strengths 0 and 1 equal no_delta and full to the last bit (checks.json): measured once, written twice.
            if ask.alpha == 0.0 and "no_delta" in self.conditions:
                without_acts = [{**row, "sum_abs_delta_acts": 0.0} for row in figures]
                names.append(self._write("no_delta", 0.0, without_acts, texts))
            if ask.alpha == 1.0 and "full" in self.conditions:
                names.append(self._write("full", 1.0, figures, texts))
        # The dense knob says much the same as the deltas at its strength.
        settings["known"] = settings["known"]._replace(at_strength=at_strength)
        for control, alpha in self.controls:
            with self._subject(control, alpha, model, rows, patches) as (passes, spliced):
                ask = Ask(control, alpha)
                with self._rest_at(model, ask):
                    answers = list(evaluate_behaviour(self._uncached(passes), spliced, rows, [ask], **settings))
                names += [self._write(control, alpha, figures, texts) for _, figures, texts in answers]
        return names

    def _write(self, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]) -> str:
        return self.write_answers(self.name_of(condition, alpha), condition, alpha, figures, texts)

    def _with_rest(
        self, model: Any, patches: list[Any], rows: list[Any], asks: list[Any], settings: dict[str, Any]
    ) -> Iterator[tuple[Any, list[dict], list[dict]]]:
        """Measures the strengths one by one, because the rest of the weights is the same for all rows of a batch."""
        from evaluators.measures.edited_behaviour import evaluate_behaviour

        for ask in asks:
            with self._rest_at(model, ask):
                answers = list(
                    evaluate_behaviour(self._uncached(self.plain_passes(model)), patches, rows, [ask], **settings)
                )
            yield from answers

    @contextmanager
    def _rest_at(self, model: Any, ask: Any) -> Iterator[None]:
        """Within the context, parameters outside all sites have the strength of `ask`. A control without a strength
        keeps the finetuned values, unless it swaps weights."""
        from models.rest import read_rest

        if not self.rest:
            yield
            return
        swapped = CONDITIONS[ask.condition].model == "swapped"
        with read_rest(Path(self.shared.base_model), self.rest).at(
            model, ask.alpha if ask.alpha is not None else 0.0 if swapped else 1.0
        ):
            yield

    def _uncached(self, passes: Any) -> Any:
        """Passes that share nothing with the raw model if its embeddings may differ."""
        if not self.rest:
            return passes
        return replace(passes, prefixes=None, shortcuts=replace(passes.shortcuts, share_prefix=False))

    @contextmanager
    def _subject(
        self, control: str, alpha: float | None, model: Any, rows: list[Any], patches: list[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """The passes and the patches of a control. Nothing is cached while the model's weights are swapped."""
        from data.encoding import encode_row
        from evaluators.splice.passes import Inputs
        from evaluators.splice.substitutes import SUBSTITUTES, Material
        from models.blocks import exchanged, interpolated

        condition, plain = CONDITIONS[control], self.plain_passes(model)
        if condition.substitute:
            widths = {patch.site: patch.transcoder.d_in for patch in patches}
            inputs = Inputs(model, widths, [encode_row(model.tokenizer, row).ids for row in rows])
            patches = [
                SUBSTITUTES[control](
                    patch,
                    Material(
                        partial(inputs.at, patch.site),
                        partial(_moments, plan),
                        self.seed,
                        partial(_true_change, self, plan.site) if plan.ground.target == "change" else None,
                    ),
                )
                for patch, plan in zip(patches, self.sites, strict=True)
            ]
        if condition.model in ("swapped", "scaled"):
            before = paths(self.model, self.shared.base_model, tuple(plan.site for plan in self.sites))
            subject = exchanged(model, list(before.values()))
            with subject if alpha is None else interpolated(model, list(before.values()), alpha):
                yield plain, patches
        else:
            yield self.kept_passes(model), patches


@dataclass(frozen=True)
class Width(Behaviour):
    """The change deltas of every width except the chosen one, at all sites at once, and controls of the same rank."""

    kind: ClassVar[str] = "width"

    @classmethod
    def plan(cls, inputs: PlanInputs) -> Sequence[Work]:
        if "change" not in inputs.chosen or not inputs.settings.widths:
            return []
        sites = inputs.context.sites_of("change")
        conditions = ("full", *(name for name in inputs.settings.controls if CONDITIONS[name].ranked))
        works: list[Work] = []
        for d_new in inputs.context.settings.deltas.d_new:
            combination = Combination(Ground("change"), d_new)
            plans = inputs.kept(sites, *combination)
            if d_new == inputs.chosen["change"].d_new or len(plans) < len(sites):
                continue
            key = key_of("width", inputs.lineage(plans), inputs.judged_with)
            works += [
                cls(
                    cell_name("width", place_of(sites, *combination), slug(subset)),
                    key,
                    **inputs.common(),
                    sites=plans,
                    subset=subset,
                    conditions=conditions,
                )
                for subset in inputs.subsets
            ]
        return works

    @property
    def units(self) -> int:
        return len(self.cells())

    def seconds(self, timing: Timing) -> float:
        return timing.answers(timing.prompts)


class EndCell(NamedTuple):
    """A cell with all deltas of its sites at strength 0 or 1: its condition of `STRENGTHS`, its name and its key."""

    condition: str
    cell: str
    key: str


def ends_of(works: Iterable[Work], sites: Sequence[SitePlan], subset: str) -> tuple[EndCell, ...]:
    """The cells, among those of behaviour works, that hold these deltas at strength 0 and 1 and change nothing else."""
    conditions = {strength: condition for condition, strength in STRENGTHS.items()}
    ends = {}
    for work in works:
        if isinstance(work, Behaviour) and (work.sites, work.subset, work.rest) == (tuple(sites), subset, ()):
            for condition, strength in work.requested:
                strength = STRENGTHS.get(condition, strength)
                if condition in (*STRENGTHS, "alpha") and strength in conditions:
                    ends[conditions[strength]] = EndCell(
                        conditions[strength], work.name_of(condition, strength), work.key
                    )
    return tuple(ends.values())


def _of_rank(plans: Sequence[SitePlan], rank: int) -> tuple[SitePlan, ...]:
    """The same deltas, each trained with the seed of this rank."""
    return tuple(plan._replace(delta=str(replica_folder(Path(plan.delta), rank))) for plan in plans)


def finished_ends(work: Work, ends: Iterable[EndCell], count: int) -> dict[str, list[dict[str, Any]]]:
    """By condition, the first `count` rows of those of the cells that are finished."""
    cells = {end: read_json(work.cell_file(end.cell)) for end in ends}
    return {end.condition: cell["rows"][:count] for end, cell in cells.items() if cell and cell["key"] == end.key}


def _reference(work: Work) -> Any:
    return reference(work.model, work.shared.rows, work.shared.batch_size)


def _true_change(work: Work, site: Site) -> Any:
    """The change of the site's function by finetuning, computed with both models."""
    from evaluators.splice.substitutes import TrueChange

    sites = tuple(plan.site for plan in work.sites)
    before, after = (exact_paths(work.model, folder, sites) for folder in (work.shared.base_model, work.model.folder))
    return TrueChange(before[site], after[site])


def _moments(plan: SitePlan) -> Any:
    """Second moments of the delta's training data: x, and residual or change."""
    from safetensors.torch import load_file

    from evaluators.splice.second_moments import Moments

    return Moments(**load_file(plan.moments))


def generations_folder(work: Work) -> Path:
    return Path(work.shared.cells).parent / "generations"


def guesses(work: Work, rows: list[Any], ground: str) -> dict[str, list[list[int]]]:
    """Guesses of the answers to the first rows of each subset: under full the finetuned model's, under no_delta those
    of the unedited model `ground`. Empty if that model was not evaluated."""
    guessed: dict[str, list[list[int]]] = {}
    for condition, name in (("full", "raw"), ("no_delta", ground)):
        outputs = {subset: iter(_outputs(work, name, subset)) for subset in {row.label for row in rows}}
        guessed[condition] = [next(outputs[row.label], []) for row in rows]
    return guessed


def _outputs(work: Work, name: str, subset: str) -> list[list[int]]:
    """An unedited model's answers to the subset, as tokens; empty if it was not evaluated."""
    path = generations_folder(work) / f"{cell_name(name, slug(subset))}.jsonl"
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()] if path.is_file() else []
