"""One prompt under every condition: the figures and outputs of a sweep's cells, and features token by token."""

import dataclasses
import math

import pytest
import torch

from data.encoding import encode_row
from data.rows import Row
from evaluators.measures.probe import probe
from evaluators.splice.interventions import Edit
from evaluators.splice.limits import Limits
from evaluators.splice.teacher_forcing import Job, score
from models.rest import Rest
from models.transcoder import with_bos

BUDGET = Limits(6)


@pytest.fixture(scope="module")
def patches(subject):
    """The first patch's delta has a feature at BOS."""
    bos = torch.randn(subject.d_model, generator=torch.Generator().manual_seed(3))
    first, *others = subject.patches
    return [dataclasses.replace(first, delta=with_bos(first.delta, bos)), *others]


@pytest.fixture(scope="module")
def found(subject, patches):
    return probe(subject.bridge, subject.rows[0], patches, [0.5], top=3, limits=BUDGET)


def test_cross_entropies_are_those_of_the_cells(subject, patches, found):
    row, expected = subject.encoded[0], {}
    for name, condition, alpha in (("raw", "raw", 1.0), ("full", "full", 1.0), ("alpha 0.5", "alpha", 0.5)):
        edit = Edit() if condition == "raw" else Edit(patches, condition)
        (one,) = score(subject.passes, edit, [Job(row, alpha)])
        expected[name] = one.nll / one.n_tokens
    shown = {one["condition"]: one for one in found["conditions"]}
    assert list(shown) == ["raw", "no_delta", "full", "alpha 0.5"]
    for name, ce in expected.items():
        assert shown[name]["ce"] == pytest.approx(ce, rel=1e-4)
        assert shown[name]["delta_ce"] == pytest.approx(ce - expected["raw"], abs=1e-4)
    assert all(len(one["next_tokens"]) == 3 for one in shown.values())


def test_features_are_those_of_the_raw_run_and_the_one_at_bos(subject, patches, found):
    tokens = len(subject.encoded[0].ids)
    at_bos = [one for one in found["features"] if one["position"] == 0]
    assert [(one["layer"], one["delta"]) for one in at_bos] == [
        (patches[0].site.layer, [{"feature": patches[0].delta.d_sae - 1, "strength": 1.0}])
    ]
    for patch in patches:
        here = [one for one in found["features"] if one["layer"] == patch.site.layer and one["position"] > 0]
        assert [one["position"] for one in here] == list(range(1, tokens))
        assert any(one["base"] for one in here)
        for one in here:
            strengths = [entry["strength"] for entry in one["delta"]]
            assert strengths == sorted(strengths, reverse=True)
            assert len(strengths) <= 3
            assert all(entry["feature"] < 12 for entry in one["delta"])


def test_what_changed_outside_all_sites_has_the_deltas_strength(subject, patches, found):
    """A final norm that gives nothing makes the un-finetuned model's next tokens equally likely."""
    (name,) = (name for name in dict(subject.plain.named_parameters()) if name.endswith("model.norm.weight"))
    offset = -1.0 if subject.plain.config.model_type == "gemma2" else 0.0
    rest = Rest({name: torch.full_like(subject.plain.get_parameter(name), offset)})
    report = probe(subject.bridge, subject.rows[0], patches, [0.5], top=3, limits=BUDGET, rest=rest)
    before, after = ({one["condition"]: one for one in each["conditions"]} for each in (found, report))
    for name in ("raw", "full"):
        assert after[name]["ce"] == pytest.approx(before[name]["ce"], rel=1e-5)
        assert after[name]["output"] == before[name]["output"]
    assert after["no_delta"]["ce"] == pytest.approx(math.log(subject.plain.config.vocab_size), rel=1e-4)
    assert before["alpha 0.5"]["ce"] != pytest.approx(after["alpha 0.5"]["ce"], rel=1e-3)


def test_without_a_target_the_models_own_answer_is_scored(subject, patches):
    found = probe(subject.bridge, Row("Seven", "", ""), patches, [], top=1, limits=BUDGET)
    raw = found["conditions"][0]
    assert found["target"] == raw["output"]
    prompt = encode_row(subject.tokenizer, Row("Seven", raw["output"], "")).prompt
    with torch.no_grad():
        first = subject.plain(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
    assert raw["next_tokens"][0]["token"] == subject.tokenizer.decode([first])
