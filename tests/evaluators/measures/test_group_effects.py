"""What groups do: every configuration is the deltas with the other features' decoder rows set to zero."""

import dataclasses

import pytest
import torch

from evaluators.measures import group_effects as module
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.edited_behaviour import Ask, Known, evaluate_behaviour
from evaluators.measures.group_effects import group_effects, steps_to
from evaluators.splice.interventions import EVERY, Edit
from evaluators.splice.limits import Limits
from evaluators.splice.teacher_forcing import Job, Reference, score
from tests.evaluators.conftest import CALCULATOR

LIMITS = Limits(8, ())


@pytest.fixture(scope="module")
def groups(path_sites):
    """Two groups of features of all sites, and the rest."""
    of_sites = [(patch.site, number) for patch in path_sites for number in range(12)]
    return of_sites[1::3], of_sites[::3][:2], [*of_sites[::3][2:], *of_sites[2::3]]


@pytest.fixture(scope="module")
def entries(subject, path_sites, groups):
    *some, singles = groups
    found = group_effects(
        subject.passes,
        path_sites,
        subject.rows,
        some,
        singles,
        most=1,
        limits=LIMITS,
        behaviours=read_behaviours(CALCULATOR),
        reference=Reference(subject.bridge),
    )
    return {(entry["way"], entry["group"], entry["random"]): entry for entry in found}


def with_only(patches, kept):
    """Patches whose deltas keep the rows of these features and those at BOS."""
    found = []
    for patch in patches:
        on = [number >= 12 or (patch.site, number) in kept for number in range(patch.delta.d_sae)]
        delta = dataclasses.replace(patch.delta, W_dec=patch.delta.W_dec * torch.tensor(on).float().unsqueeze(1))
        found.append(dataclasses.replace(patch, delta=delta))
    return found


def test_each_configuration_is_its_features_alone(subject, path_sites, groups, entries):
    first, second, singles = (set(group) for group in groups)
    kept = {
        ("without", 0, False): first | second | singles,
        ("without", 1, False): second | singles,
        ("alone", 1, False): first,
        ("first", 0, False): set(),
        ("first", 1, False): first,
        ("first", 2, False): first | second,
    }
    jobs = [Job(row) for row in subject.encoded]
    for key, features in kept.items():
        expected = score(subject.passes, Edit(with_only(path_sites, features), "full"), jobs)
        assert [row["nll"] for row in entries[key]["rows"]] == pytest.approx([one.nll for one in expected], rel=1e-5)
        assert entries[key]["n_features"] == len(features)
    ground = score(subject.passes, Edit(path_sites, "no_delta"), jobs)
    assert [row["nll"] for row in entries["nothing", 0, False]["rows"]] == [one.nll for one in ground]
    assert len(entries) == len(kept) + 1 + 4  # each of a group has its control


def test_controls_have_as_many_features_and_no_behaviours(entries):
    for (way, number, random), entry in entries.items():
        if random:
            assert entry["n_features"] == entries[way, number, False]["n_features"]
            assert number
        answered = way in ("without", "alone") or (way == "first" and not number)
        for row in entry["rows"]:
            assert ("behaviours" in row) == (answered and not random)
            assert row["kl"] >= 0


def test_the_same_features_are_measured_once(subject, path_sites, groups, entries, monkeypatch):
    """The first group alone is also the first one of those together."""
    for random in (False, True):
        first, alone = (entries[way, 1, random]["rows"] for way in ("first", "alone"))
        figures = [{name: row[name] for name in row if name != "behaviours"} for row in alone]
        assert first == figures
    calls, real = [], module.score

    def counted(passes, edit, jobs, **settings):
        calls.append([(job.kept, tuple(job.encoded.ids)) for job in jobs])
        return real(passes, edit, jobs, **settings)

    monkeypatch.setattr(module, "score", counted)
    *some, singles = groups
    group_effects(
        subject.passes, path_sites, subject.rows, some, singles, most=2, limits=LIMITS, behaviours={},
        reference=Reference(subject.bridge),
    )  # fmt: skip
    ground, plain, random = ([*dict.fromkeys(kept for kept, _ in call)] for call in calls)
    assert (len(ground), len(plain), len(random)) == (1, 7, 5)
    assert all(len(set(call)) == len(call) for call in calls)


def test_all_deltas_and_none_are_the_conditions_full_and_no_delta(subject, path_sites, groups, entries, monkeypatch):
    """Entries of behaviour cells take their place, and nothing else is another."""
    reference, behaviours = Reference(subject.bridge), read_behaviours(CALCULATOR)
    how = {"limits": LIMITS, "behaviours": behaviours, "known": Known(reference=reference)}
    reference.add(subject.encoded)
    known = {
        condition: next(evaluate_behaviour(subject.passes, path_sites, subject.rows, [Ask(condition)], **how))[1]
        for condition in ("no_delta", "full")
    }
    edits, real = [], module.score

    def counted(passes, edit, jobs, **settings):
        edits.extend((edit.condition, job.kept) for job in jobs)
        return real(passes, edit, jobs, **settings)

    monkeypatch.setattr(module, "score", counted)
    *some, singles = groups
    found = group_effects(
        subject.passes, path_sites, subject.rows, some, singles, most=1, limits=LIMITS, behaviours=behaviours,
        reference=reference, known=known,
    )  # fmt: skip
    assert {condition for condition, _ in edits} == {"full"}
    assert EVERY not in {kept for _, kept in edits}
    assert [(one["way"], one["group"], one["random"]) for one in found] == list(entries)
    for one, expected in zip(found, entries.values(), strict=True):
        assert one["n_features"] == expected["n_features"]
        for row, before in zip(one["rows"], expected["rows"], strict=True):
            assert row.pop("behaviours", None) == before.get("behaviours")
            figures = {name: before[name] for name in before if name != "behaviours"}
            assert row == pytest.approx(figures, rel=1e-5, abs=1e-5)


def test_the_random_features_are_drawn_by_the_seed(subject, path_sites, groups, entries):
    *some, singles = groups

    def drawn(seed: int) -> list[float]:
        found = group_effects(
            subject.passes, path_sites, subject.rows, some, singles, most=0, limits=LIMITS, behaviours={},
            reference=Reference(subject.bridge), seed=seed,
        )  # fmt: skip
        return [row["nll"] for entry in found if entry["random"] for row in entry["rows"]]

    assert drawn(0) == drawn(0) != drawn(1)


def test_steps_double_and_end_with_all():
    assert steps_to(0) == [0]
    assert steps_to(2) == [0, 1, 2]
    assert steps_to(30) == [0, 1, 2, 4, 8, 16, 30]


def test_without_groups_only_the_ends_are_measured(subject, path_sites):
    found = group_effects(
        subject.passes, path_sites, subject.rows[:2], [], [], most=3, limits=LIMITS, behaviours={},
        reference=Reference(subject.bridge),
    )  # fmt: skip
    assert [(entry["way"], entry["group"], entry["random"]) for entry in found] == [
        ("nothing", 0, False),
        ("without", 0, False),
        ("first", 0, False),
    ]
