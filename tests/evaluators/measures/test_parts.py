"""Where the finetuning lives: each way of each part is a plain model put together by hand from two."""

import pytest
import torch

from data.encoding import encode_row
from evaluators.measures import parts
from evaluators.measures.parts import EVERY, FINETUNED, PARTS, UNFINETUNED, Changes, Group, parts_ceiling
from evaluators.splice.interventions import Edit
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, score
from models.comparison import compare
from models.weights import open_weights
from tests.models.table import build

NAMES = {
    "patterns": ("q_proj", "k_proj"),
    "values": ("v_proj",),
    "output": ("o_proj",),
    "mlp": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
"""By part, what a parameter's name holds in Gemma-2 and Llama; all else is the rest, but for the norm between attention
and MLP, which is called alike in both and is of another part in each."""


def part_of(name, kind):
    if "post_attention_layernorm" in name:
        return "output" if kind == "gemma2" else "mlp"
    return next((part for part, known in NAMES.items() if any(one in name for one in known)), "rest")


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else None


def by_hand(after, before, is_undone):
    """The finetuned plain model with those un-finetuned parameters for which `is_undone`."""
    theirs = dict(before.named_parameters())
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if is_undone(name):
                parameter.copy_(theirs[name])
    return after


def nll(model, rows):
    found = []
    for row in rows:
        with torch.no_grad():
            steps = model(input_ids=torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
        found.append(-sum(step[token].item() for step, token in zip(steps, row.target, strict=True)))
    return found


def changes_of(bridge, before, after):
    return Changes.between(bridge, before, compare(open_weights(before), open_weights(after)).changed)


def test_each_way_of_each_part_is_a_model_put_together_by_hand(subject, load, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "")
    kind, n_layers = subject.plain.config.model_type, subject.plain.config.num_hidden_layers
    held = [parameter.clone() for parameter in subject.bridge.original_model.parameters()]
    found = parts_ceiling(subject.passes, changes_of(subject.bridge, before, subject.folder), subject.rows)
    others = dict.fromkeys((one["part"], one["layers"]) for one in found["parts"] if one["layers"] != EVERY)
    thirds = {"gemma2": [{0}, {1, 2}, {3}], "llama": [{0}, {1}, {2}]}[kind]
    assert len(thirds) == len(others)
    assert set().union(*thirds) == set(range(n_layers))
    groups = {(part, EVERY): lambda name, part=part: part_of(name, kind) == part for part in PARTS}
    for key, third in zip(others, thirds, strict=True):
        groups[key] = lambda name, third=third: layer_of(name) in third and part_of(name, kind) != "rest"
    seen = {(one["part"], one["layers"], one["way"]): one["rows"] for one in found["parts"]}
    assert list(seen) == [(*group, way) for group in groups for way in (UNFINETUNED, FINETUNED)]
    models = {
        "finetuned": (found["finetuned"], lambda name: False),
        "unfinetuned": (found["unfinetuned"], lambda name: True),
    }
    for group, is_here in groups.items():
        models[*group, UNFINETUNED] = seen[*group, UNFINETUNED], is_here
        models[*group, FINETUNED] = seen[*group, FINETUNED], lambda name, is_here=is_here: not is_here(name)
    values = {}
    for which, (rows, is_undone) in models.items():
        expected = nll(by_hand(load(subject.folder)[0], load(before)[0], is_undone), subject.encoded)
        values[which] = sum(expected)
        assert [row["nll"] for row in rows] == pytest.approx(expected, rel=1e-4), which
        assert [row["n_tokens"] for row in rows] == [len(row.target) for row in subject.encoded]
        assert [row["index"] for row in rows] == list(range(len(rows)))
    assert len({round(value, 3) for value in values.values()}) == len(values), "no two of them are alike"
    after = subject.bridge.original_model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(held, after, strict=True)), "the weights go back"


def test_only_what_changed_is_a_part(subject, altered, tmp_path):
    names = ("layers.1.self_attn.v_proj", "layers.1.mlp.up_proj")
    before = altered(subject.folder, tmp_path, *names)
    changes = changes_of(subject.bridge, before, subject.folder)
    groups = changes.groups(subject.plain.config.num_hidden_layers)
    assert [group for group in groups if group.layers == EVERY] == [Group("values", EVERY), Group("mlp", EVERY)]
    assert [group.part for group in groups if group.layers != EVERY] == [EVERY], "one third alone holds layer 1"
    found = parts_ceiling(subject.passes, changes, subject.rows)
    rows = {(one["part"], one["way"]): one["rows"] for one in found["parts"]}
    assert rows[EVERY, UNFINETUNED] == found["unfinetuned"]
    assert rows["values", FINETUNED] == rows["mlp", UNFINETUNED], "the other of two"
    assert rows["values", UNFINETUNED] != found["finetuned"]


def test_a_norm_before_attention_is_of_the_rest(subject, altered, tmp_path):
    before = altered(subject.folder, tmp_path, "input_layernorm")
    groups = changes_of(subject.bridge, before, subject.folder).groups(subject.plain.config.num_hidden_layers)
    assert list(groups) == [Group("rest", EVERY)]


def test_parts_of_a_joint_weight_change_alone(wrapped, load, altered, tmp_path):
    """Phi-3 has queries, keys and values in one weight, of which the bridge runs with copies."""
    from tests.evaluators.conftest import ROWS

    after, before = build("phi3", tmp_path / "after"), tmp_path / "before"
    altered(after, before, "qkv_proj")
    bridge = wrapped(after)
    found = parts_ceiling(Passes(bridge), changes_of(bridge, before, after), ROWS)
    rows = {(one["part"], one["way"]): one["rows"] for one in found["parts"]}
    assert {part for part, _ in rows} == {"patterns", "values", EVERY}, "and thirds of the layers"
    encoded, heads = [encode_row(bridge.tokenizer, row) for row in ROWS], 24 + 12
    for part, here in (("patterns", slice(0, heads)), ("values", slice(heads, None))):
        plain, other = load(after)[0], load(before)[0]
        with torch.no_grad():
            for block, theirs in zip(plain.model.layers, other.model.layers, strict=True):
                block.self_attn.qkv_proj.weight[here] = theirs.self_attn.qkv_proj.weight[here]
        assert [row["nll"] for row in rows[part, UNFINETUNED]] == pytest.approx(nll(plain, encoded), rel=1e-4)
    assert [row["nll"] for row in found["unfinetuned"]] == pytest.approx(nll(load(before)[0], encoded), rel=1e-4)
    assert [row["nll"] for row in found["finetuned"]] == pytest.approx(nll(load(after)[0], encoded), rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gemma2", ("q_proj", "v_proj", "o_proj", "mlp")),
        ("gemma2", ("layers.1.self_attn.q_proj", "layers.2.mlp")),
        ("gemma2", ("",)),
        ("phi3", ("qkv_proj", "mlp")),
        ("phi3", ("embed", "norm")),
        ("gpt_neox", ("layers.1.attention.dense", "layers.1.mlp")),
        ("gpt_neox", ("",)),
    ],
)
def test_no_block_runs_twice_on_the_same_stream_and_no_bit_changes(
    architecture, names, wrapped, altered, gemma_folder, tmp_path, monkeypatch
):
    """The plain way runs every model from the embedding up."""
    from tests.evaluators.conftest import ROWS

    after = gemma_folder if architecture == "gemma2" else build(architecture, tmp_path / "after")
    before = altered(after, tmp_path / "before", *names)
    bridge, run = wrapped(after), []
    changes, real = changes_of(bridge, before, after), parts.run_up_to

    def counted(bridge, batch, layer, hooks, after, stream):
        run.extend(range(after + 1, layer + 1))
        return real(bridge, batch, layer, hooks, after, stream)

    monkeypatch.setattr(parts, "run_up_to", counted)
    n_layers, passes = bridge.cfg.n_layers, Passes(bridge, batch_size=2)
    found = parts_ceiling(passes, changes, ROWS)
    groups = changes.groups(n_layers)
    models = {(): frozenset(), EVERY: changes.pieces}
    models |= {(*group, UNFINETUNED): pieces for group, pieces in groups.items()}
    models |= {(*group, FINETUNED): changes.pieces - pieces for group, pieces in groups.items()}
    seen = {(): found["finetuned"], EVERY: found["unfinetuned"]}
    seen |= {(one["part"], one["layers"], one["way"]): one["rows"] for one in found["parts"]}
    assert set(seen) == set(models)
    for which, pieces in models.items():
        with changes.undone(bridge, pieces):
            expected = score(passes, Edit(), [Job(encode_row(bridge.tokenizer, row)) for row in ROWS])
        assert [row["nll"] for row in seen[which]] == [row.nll for row in expected], which
    up_to = {
        (layer, frozenset(piece for piece in pieces if piece.layer is None or piece.layer <= layer))
        for pieces in models.values()
        for layer in range(n_layers)
    }
    batches = -(-len(ROWS) // passes.batch_size)
    assert len(run) == len(up_to) * batches < len(set(models.values())) * n_layers * batches
