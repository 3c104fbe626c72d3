"""The taps against plain transformers, on two architectures: what a transcoder reads and what it replaces."""

from dataclasses import replace

import pytest
import torch

from data.encoding import encode_text, pad_left
from models.blocks import hooks_at
from models.bridge import hook_names, hooked, whole, wrap
from models.sources import load_model
from sites import ATTENTION_OUT, MLP, QKV, READINGS, Site
from tests.models.table import build

TEXTS = ["What is 12 + 30?", "A much longer line, so that the first one is padded on the left.", "9"]


def bridged(bridge, batch, site):
    """x and y of a pass."""
    seen = []
    with torch.no_grad(), hooked(bridge, hooks_at(bridge, site, seen.append, see=seen.append)):
        bridge.original_model(**batch.inputs)
    return seen


@pytest.fixture(scope="module")
def both(model_folder, load, wrapped):
    model, tokenizer = load(model_folder)
    batch = pad_left([encode_text(tokenizer, text) for text in TEXTS], tokenizer.pad_token_id)
    return model, wrapped(model_folder), batch


def test_taps_are_the_normalised_residual_and_what_the_block_adds(both, plain_taps):
    model, bridge, batch = both
    for layer in range(model.config.num_hidden_layers):
        x, y, gained = plain_taps(model, batch, layer)
        read, written = bridged(bridge, batch, Site(layer))
        torch.testing.assert_close(read[batch.mask], x[batch.mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(written[batch.mask], y[batch.mask], rtol=1e-4, atol=1e-4)
        # Before the gain: the norm's own output is another tensor altogether on these models.
        assert (gained - x)[batch.mask].norm() > 0.2 * x[batch.mask].norm()


def test_other_taps_read_something_else(both, plain_taps):
    model, bridge, batch = both
    x, y, _ = plain_taps(model, batch, 1)
    read, written = bridged(bridge, batch, Site(1, replace(MLP, reads="ln2.hook_in", writes=("mlp.hook_in",))))
    assert not torch.allclose(read[batch.mask], x[batch.mask], rtol=0.1)
    assert not torch.allclose(written[batch.mask], y[batch.mask], rtol=0.1)


def test_the_second_convention_reads_the_residual_over_a_constant(both, plain_taps):
    """resid_mid/sqrt(d_model), read two ways: as the bridge's residual, and as plain x times its own rms."""
    model, bridge, batch = both
    x, y, _ = plain_taps(model, batch, 1)
    read, written = bridged(bridge, batch, Site(1, READINGS["resid_mid/sqrt(d_model)"]))
    activation, _ = bridged(bridge, batch, Site(1, replace(MLP, reads="hook_resid_mid")))
    d_model = x.shape[-1]
    torch.testing.assert_close(read * d_model**0.5, activation)
    torch.testing.assert_close(written[batch.mask], y[batch.mask], rtol=1e-4, atol=1e-4)
    rms = (activation.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    torch.testing.assert_close((read * d_model**0.5 / rms)[batch.mask], x[batch.mask], rtol=1e-4, atol=1e-5)
    assert (read - x)[batch.mask].norm() > 0.2 * x[batch.mask].norm(), "another input altogether"


def projections(model, batch, layer):
    """In one pass of the plain model, what each of attention's projections reads and writes, and what attention adds to
    the stream."""
    block, seen, handles = model.model.layers[layer], {}, []

    def noting(name):
        return lambda module, args, output: seen.update({name: (args[0] if args else None, output)})

    modules = {name: getattr(block.self_attn, f"{name}_proj") for name in "qkvo"}
    after = block.post_attention_layernorm if model.config.model_type == "gemma2" else block.self_attn.o_proj
    handles = [one.register_forward_hook(noting(name)) for name, one in [*modules.items(), ("added", after)]]
    with torch.no_grad():
        model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_attention_s_sites_are_its_projections(both):
    model, bridge, batch = both
    seen = projections(model, batch, 1)
    x, y = bridged(bridge, batch, Site(1, QKV))
    weight = model.model.layers[1].input_layernorm.weight
    gain = weight + 1 if model.config.model_type == "gemma2" else weight
    torch.testing.assert_close((x * gain)[batch.mask], seen["q"][0][batch.mask], rtol=1e-4, atol=1e-4)
    written = torch.cat([seen[name][1] for name in "qkv"], dim=-1)
    torch.testing.assert_close(y[batch.mask], written[batch.mask], rtol=1e-4, atol=1e-4)
    z, added = bridged(bridge, batch, Site(1, ATTENTION_OUT))
    torch.testing.assert_close(z[batch.mask], seen["o"][0][batch.mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(added[batch.mask], seen["added"][1][batch.mask], rtol=1e-4, atol=1e-4)


def test_what_is_written_in_parts_takes_the_place_of_each(both):
    """Queries to zero, keys and values doubled."""
    model, bridge, batch = both
    parts, after = [], []

    def write(y, part):
        parts.append(part)
        return torch.zeros_like(y) if part.start == 0 else 2 * y

    site = Site(1, QKV)
    hooks = [*hooks_at(bridge, site, write=write), *hooks_at(bridge, site, see=after.append)]
    with torch.no_grad(), hooked(bridge, hooks):
        bridge.original_model(**batch.inputs)
    before = torch.cat([projections(model, batch, 1)[name][1] for name in "qkv"], dim=-1)
    queries, end = parts[0].stop, parts[-1].stop
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert end == before.shape[-1]
    assert not after[0][..., :queries].any()
    expected = 2 * before[..., queries:]
    torch.testing.assert_close(after[0][..., queries:][batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-4)


def test_wrapping_changes_no_logit(both):
    model, bridge, batch = both
    with torch.no_grad():
        expected, found = model(**batch.inputs).logits, bridge.original_model(**batch.inputs).logits
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-4)


def test_without_a_hook_the_model_runs_as_it_is_and_its_logits_are_the_bridge_s_to_the_last_bit(both):
    _, bridge, batch = both
    plain = [type(one) for one in bridge.original_model.modules()]
    assert not any("Bridge" in one.__name__ or one.__name__ == "HookPoint" for one in plain)

    def logits():
        with torch.no_grad():
            return bridge.original_model(**batch.inputs).logits[batch.mask]

    alone = logits()
    with whole(bridge):
        assert torch.equal(logits(), alone)
    for names in (["blocks.1.hook_mlp_out"], ["blocks.0.hook_out", "blocks.1.ln2.hook_normalized"]):
        with hooked(bridge, [(name, lambda activation, hook: None) for name in names]):
            assert torch.equal(logits(), alone)
    with pytest.raises(ZeroDivisionError), hooked(bridge, [("blocks.1.hook_out", lambda activation, hook: 1 / 0)]):
        logits()
    assert [type(one) for one in bridge.original_model.modules()] == plain
    assert torch.equal(logits(), alone)


def test_the_model_s_own_modules_show_and_take_what_the_bridge_s_parts_would(both):
    """At every hook of a site, to the last bit, read and written; and the parts are not needed for it."""
    model, bridge, batch = both
    known = hook_names(bridge)
    kinds = (QKV, ATTENTION_OUT, MLP, READINGS["resid_mid/sqrt(d_model)"])
    sites = [Site(layer, kind) for layer in range(model.config.num_hidden_layers) for kind in kinds]
    reads = {site.reads for site in sites}
    writes = {f"blocks.{site.layer}.hook_out" for site in sites} | {
        name for site in sites for name in site.writes(known)
    }

    def run(doubled):
        seen, parts = {}, set()

        def on(name):
            def note(activation, hook):
                seen[name] = activation.flatten(2).clone()
                parts.update(
                    type(one).__name__ for one in bridge.original_model.modules() if "Bridge" in str(type(one))
                )
                return activation * 2 if name == doubled else None

            return name, note

        with torch.no_grad(), hooked(bridge, [on(name) for name in sorted(reads | writes)]):
            seen["logits"] = bridge.original_model(**batch.inputs).logits[batch.mask]
        return seen, parts

    plain, _ = run("")
    for doubled in ("", *sorted(writes)):
        alone, without = run(doubled)
        with whole(bridge):
            expected, attached = run(doubled)
        assert attached
        assert not without
        assert alone.keys() == expected.keys() == {*reads, *writes, "logits"}
        for name, activation in expected.items():
            assert torch.equal(alone[name], activation), (name, doubled)
        assert torch.equal(alone["logits"], plain["logits"]) == (doubled == "")
    normalised = ("blocks.0.ln1.hook_normalized", lambda activation, hook: activation * 2)
    with torch.no_grad(), pytest.raises(ValueError, match="read, not replaced"), hooked(bridge, [normalised]):
        bridge.original_model(**batch.inputs)


def test_hooks_move_to_the_parts_when_one_inside_needs_them(both):
    """A norm's part whose denominator is replaced does not run its module, and what is around it sees that norm too."""
    _, bridge, batch = both
    seen, scaled = [], []

    def run():
        with torch.no_grad():
            return bridge.original_model(**batch.inputs).logits[batch.mask]

    outer = [
        ("blocks.1.ln2.hook_normalized", lambda x, hook: seen.append(x)),
        ("blocks.1.hook_out", lambda y, hook: 2 * y),
    ]
    alone = run()
    with hooked(bridge, outer):
        doubled = run()
        with hooked(bridge, [("blocks.1.ln2.hook_scale", lambda scale, hook: scaled.append(scale) or 4 * scale)]):
            quarter = run()
        again = run()
    assert len(scaled) == 1
    assert len(seen) == 3
    torch.testing.assert_close(seen[1], seen[0] / 4)
    assert torch.equal(again, doubled)
    assert torch.equal(run(), alone)
    assert not torch.equal(quarter, doubled)
    assert not torch.equal(alone, doubled)


def test_parts_stay_where_without_them_a_bit_would_change(tmp_path):
    """GPT-2 has LayerNorms, which the bridge computes in an order of its own."""
    model, tokenizer = load_model(build("gpt2", tmp_path / "gpt2"), torch.float32)
    bridge = wrap(model, tokenizer)
    names = [type(one).__name__ for one in model.modules()]
    assert "BlockBridge" in names
    seen = []
    with torch.no_grad(), hooked(bridge, [("blocks.1.hook_mlp_out", lambda activation, hook: seen.append(activation))]):
        model(input_ids=torch.tensor([[2, 50, 60]]))
    assert len(seen) == 1
    assert [type(one).__name__ for one in model.modules()] == names


def test_hooks_inside_others_and_hooks_of_what_runs_inside_a_part_are_all_run(both):
    _, bridge, batch = both
    expected = ["blocks.0.hook_out", "blocks.1.hook_mlp_out", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_in"]
    seen = []

    def note(name):
        return (name, lambda activation, hook: seen.append(name))

    with (
        torch.no_grad(),
        hooked(bridge, [note(expected[0]), note(expected[1])]),
        hooked(bridge, [note(expected[1])]),
        hooked(bridge, [note(expected[2]), note(expected[3])]),
    ):
        bridge.original_model(**batch.inputs)
    assert sorted(seen) == sorted([*expected, expected[1]])


def test_the_bridge_tokenises_as_we_do(both, load, model_folder):
    _, bridge, _ = both
    _, tokenizer = load(model_folder)
    for text in TEXTS:
        assert encode_text(bridge.tokenizer, text) == encode_text(tokenizer, text)
