"""What groups of features do: all deltas without a group, the group alone, and the first few groups together.

In: a model's passes, patches, rows and groups of features, in order of effect. Out: for each configuration one entry
per row: cross-entropy, KL from the finetuned model and, for a group alone or missing, the behaviours of the output.

Each configuration has a control: the same with as many random features, drawn once from all that fire. Features that
are active only at BOS are on in every configuration, as they belong to no group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from data.encoding import encode_row
from data.rows import Row
from evaluators.measures.behaviours import Behaviour
from evaluators.measures.curve import FIGURES
from evaluators.measures.features import only_at_bos
from evaluators.measures.single_features import Feature, Guesses, Judge
from evaluators.splice.decoding import Stop, generate
from evaluators.splice.interventions import EVERY, Edit, Patch, Ranks
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, Reference, Scored, score

ALWAYS_ON = -1
"""Rank of features that are on in every configuration."""
WITHOUT, ALONE, FIRST, NOTHING = "without", "alone", "first", "nothing"
"""All deltas but one group; one group; the first groups in order of effect; no features at all."""


class Configuration(NamedTuple):
    """Which groups are on. `group` is the number of the group that is missing or alone, or of the last one that is on;
    with `random`, as many random features stand for them."""

    way: str
    group: int
    random: bool = False


def steps_to(total: int) -> list[int]:
    """Numbers of groups that are measured together: 0, the powers of 2 below `total`, and all."""
    powers = [1 << exponent for exponent in range(total.bit_length())]
    return [0, *(power for power in powers if power < total), *([total] if total else [])]


def group_effects(
    passes: Passes,
    patches: Sequence[Patch],
    rows: Sequence[Row],
    groups: Sequence[Sequence[Feature]],
    singles: Sequence[Feature],
    *,
    most: int,
    limits: Limits,
    behaviours: Mapping[str, Behaviour],
    reference: Reference,
    guesses: Guesses | None = None,
    known: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """An entry for each configuration: `way`, `group` (numbered from 1), `random`, `n_features`, and `rows` with
    `index`, `nll`, `kl`, `n_tokens` and, unless it is a control, `behaviours`.

    The first `most` groups are measured alone and missing. `without` group 0 is all deltas; `first` with 0 groups is
    the features at BOS alone, and with all groups still leaves out the single features; `nothing` is the bare ground.

    `known` are entries of these rows from elsewhere, under `no_delta` and `full`: those of `nothing` and of all deltas.
    They were rows of other batches, which may change the last bits.
    """
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    reference.add(encoded)
    ends = [0, *np.cumsum([len(group) for group in groups]).tolist()]
    plain = {Configuration(WITHOUT, 0): EVERY}
    plain |= {Configuration(FIRST, count): Ranks(0, ends[count]) for count in steps_to(len(groups))}
    for number in range(1, min(most, len(groups)) + 1):
        plain[Configuration(WITHOUT, number)] = Ranks(ends[number - 1], ends[number], outside=True)
        plain[Configuration(ALONE, number)] = Ranks(ends[number - 1], ends[number])
    random = {config._replace(random=True): ranks for config, ranks in plain.items() if config.group}
    ordered = [feature for group in groups for feature in group]
    shuffled = [*ordered, *singles]
    np.random.default_rng(seed).shuffle(shuffled)
    judge = Judge(Stop.of(passes.bridge, limits, rows[0]), behaviours)
    known = known or {}
    if "no_delta" in known:
        bare = [{name: row[name] for name in FIGURES} for row in known["no_delta"]]
    else:
        ground = score(passes, Edit(patches, "no_delta"), [Job(row) for row in encoded], reference=reference)
        bare = [*map(_figures, range(len(rows)), ground)]
    entries = [{**Configuration(NOTHING, 0)._asdict(), "n_features": 0, "rows": bare}]
    for features, configurations in ((ordered, plain), (shuffled, random)):
        edit = Edit(ranked(patches, features), "full")
        # The first group is also a group alone: features that are the same are measured once and written twice.
        answering = {ranks: configuration for configuration, ranks in configurations.items() if _answers(configuration)}
        figures: dict[Ranks, list[dict[str, Any]]] = defaultdict(list)
        verdicts: dict[Ranks, list[dict[str, Any]]] = defaultdict(list)
        if "full" in known and EVERY in answering:
            for row in known["full"]:
                figures[EVERY].append({name: row[name] for name in FIGURES})
                verdicts[EVERY].append({"behaviours": {name: row["behaviours"][name] for name in behaviours}})
        jobs = [
            Job(row, kept=ranks, guess=_guess(guesses, answering.get(ranks), index))
            for ranks in dict.fromkeys(configurations.values())
            if ranks not in figures
            for index, row in enumerate(encoded)
        ]
        scored = score(passes, edit, jobs, reference=reference)
        answered = [index for index, job in enumerate(jobs) if job.kept in answering]
        outputs = generate(passes, edit, [jobs[i] for i in answered], [scored[i] for i in answered], judge.stop)
        for index, (job, scores) in enumerate(zip(jobs, scored, strict=True)):
            figures[job.kept].append(_figures(index % len(rows), scores))
        for index, output in zip(answered, outputs, strict=True):
            verdicts[jobs[index].kept].append({"behaviours": judge(rows[index % len(rows)], output)})
        for configuration, ranks in configurations.items():
            judged = verdicts[ranks] if _answers(configuration) else [{}] * len(rows)
            rows_of_job = [row | verdict for row, verdict in zip(figures[ranks], judged, strict=True)]
            entries.append({**configuration._asdict(), "n_features": _size(ranks, len(shuffled)), "rows": rows_of_job})
    return entries


def ranked(patches: Sequence[Patch], features: Sequence[Feature]) -> list[Patch]:
    """The patches with the features' places as ranks; features at BOS are always on, all others come last."""
    places = {feature: index for index, feature in enumerate(features)}
    marked = []
    for patch in patches:
        at_bos = only_at_bos(patch).tolist()
        ranks = [
            ALWAYS_ON if at_bos[number] else places.get((patch.site, number), len(features))
            for number in range(patch.transcoder.d_sae)
        ]
        marked.append(replace(patch, ranks=torch.tensor(ranks, device=patch.transcoder.W_dec.device)))
    return marked


def _figures(index: int, scored: Scored) -> dict[str, Any]:
    return {"index": index, "nll": scored.nll, "kl": scored.kl, "n_tokens": scored.n_tokens}


def _answers(configuration: Configuration) -> bool:
    """Whether behaviours are measured: of groups, and of what they are compared with."""
    alone_or_missing = configuration.way != FIRST or configuration.group == 0
    return alone_or_missing and not configuration.random


def _guess(guesses: Guesses | None, configuration: Configuration | None, index: int) -> Sequence[int]:
    """The likelier output: the un-finetuned model's if little is on. None if behaviours are not measured."""
    if not guesses or configuration is None:
        return ()
    likely = guesses["full" if configuration.way == WITHOUT else "no_delta"]
    return likely[index] if likely else ()


def _size(ranks: Ranks, total: int) -> int:
    """The number of features that are on, apart from those at BOS."""
    inside = ranks.end - ranks.first
    return total - inside if ranks.outside else inside
