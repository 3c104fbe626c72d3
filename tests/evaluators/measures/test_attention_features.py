"""What features of attention do: patterns of a plain model edited by hand, and products of its weights."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from data.encoding import encode_row, pad_left
from evaluators.measures import attention_features, features
from evaluators.measures.attention_features import Look, pattern_changes, written_by_values
from evaluators.measures.features import read_features
from evaluators.splice.interventions import Edit, Patch, RowEdits, spliced
from evaluators.splice.passes import Passes
from models.blocks import read_paths
from models.bridge import hooked
from models.transcoder import Transcoder, with_bos
from sites import ATTENTION_OUT, QKV, Site
from tests.evaluators.conftest import ROWS

INTO_HEADS, OUT = Site(1, QKV), Site(1, ATTENTION_OUT)
MLP_BELOW = Site(0)
WIDTH = 6


def transcoder(site, d_in, d_out, seed):
    generator = torch.Generator().manual_seed(seed)
    return Transcoder(
        W_enc=torch.randn(d_in, WIDTH, generator=generator) / d_in**0.5,
        b_enc=0.1 * torch.randn(WIDTH, generator=generator),
        threshold=0.2 + 0.4 * torch.rand(WIDTH, generator=generator),
        W_dec=torch.randn(WIDTH, d_out, generator=generator),
        b_dec=None,
        site=site,
    )


@pytest.fixture(scope="module")
def made(model_folder, load, altered, wrapped, tmp_path_factory):
    """A pair of models that differ in the weights of three sites, its plain models, its bridge, and a delta at each
    site; the one of queries, keys and values has a feature at BOS."""
    folder, generator = tmp_path_factory.mktemp("before"), torch.Generator().manual_seed(3)
    before, tokenizer = load(altered(model_folder, folder, "proj.weight", much=0.3))
    bridge = wrapped(model_folder)
    patches = []
    for seed, (site, path) in enumerate(read_paths(bridge, folder, [INTO_HEADS, OUT, MLP_BELOW]).items()):
        delta = transcoder(site, path.d_in, path.d_out, seed)
        if site == INTO_HEADS:
            delta = with_bos(delta, torch.randn(path.d_out, generator=generator))
        patches.append(Patch(site, path, delta))
    plain, _ = load(model_folder)
    for model in (plain, before):
        model.set_attn_implementation("eager")
    return SimpleNamespace(
        passes=Passes(bridge, batch_size=5),
        patches=patches,
        plain=plain,
        before=before,
        tokenizer=tokenizer,
        rows=[encode_row(tokenizer, row).ids for row in ROWS],
    )


def of(made, site):
    return next(patch for patch in made.patches if patch.site == site)


def acts_of(delta, x):
    pre = x @ delta.W_enc + delta.b_enc
    acts = torch.where((pre > 0) & (pre > delta.threshold), pre, torch.zeros_like(pre))
    if delta.at_bos is not None:
        acts[0] = delta.at_bos
    else:
        acts[0] = 0.0
    return acts


def pattern_by_hand(made, ids, without):
    """(head, query, key) of layer 1 in the plain model: sites' weights from before finetuning, and each delta added
    by a hook on the projection that it writes to, the feature `without` of queries, keys and values left out."""
    gemma = made.plain.config.model_type == "gemma2"
    eps = made.plain.config.rms_norm_eps
    swapped = {}
    for site, names in ((MLP_BELOW, ("mlp.",)), (INTO_HEADS, ("q_proj", "k_proj", "v_proj")), (OUT, ("o_proj",))):
        for name, parameter in made.before.named_parameters():
            if f"layers.{site.layer}." in name and any(one in name for one in names):
                swapped[name] = parameter
    ours, seen = dict(made.plain.named_parameters()), {}
    kept = {name: ours[name].data for name in swapped}
    blocks = made.plain.model.layers
    into, mlp = of(made, INTO_HEADS).delta, of(made, MLP_BELOW).delta

    def reading(name):
        def read(module, args):
            seen[name] = (args[0] / (args[0].pow(2).mean(-1, keepdim=True) + eps).sqrt())[0]

        return read

    def add_mlp(module, args, y):
        return y + acts_of(mlp, seen["mlp"]) @ mlp.W_dec

    def adding(part):
        def add(module, args, y):
            acts = acts_of(into, seen["heads"])
            if without is not None:
                acts[:, without] = 0.0
            return y + acts @ into.W_dec[:, part]

        return add

    norm, after = (
        (blocks[0].pre_feedforward_layernorm, blocks[0].post_feedforward_layernorm)
        if gemma
        else (blocks[0].post_attention_layernorm, blocks[0].mlp)
    )
    attention, done = blocks[1].self_attn, 0
    with ExitStack() as stack, torch.no_grad():
        for name, other in swapped.items():
            ours[name].data = other.data
        stack.callback(norm.register_forward_pre_hook(reading("mlp")).remove)
        stack.callback(after.register_forward_hook(add_mlp).remove)
        stack.callback(blocks[1].input_layernorm.register_forward_pre_hook(reading("heads")).remove)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            part = slice(done, done + projection.out_features)
            stack.callback(projection.register_forward_hook(adding(part)).remove)
            done += projection.out_features
        pattern = made.plain(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions[1][0]
        for name, own in kept.items():
            ours[name].data = own
    return pattern


@pytest.mark.parametrize("feature", [1, 4, WIDTH])
def test_patterns_with_and_without_a_feature_are_those_of_a_model_edited_by_hand(made, feature):
    """The last one is active at BOS. A context of one text begins after BOS, and has pieces of several tokens."""
    first = [0, 0, 30, 3]
    peaks = [0 if feature == WIDTH else peak for peak in (9, 4, 45, 7)]
    looks = []
    for ids, start, peak in zip(made.rows, first, peaks, strict=True):
        start = min(start, peak)
        counts = [1, 2, *[1] * min(25, len(ids) - start - 3)]
        looks.append(Look(ids, peak, start, counts))
    found = pattern_changes(made.passes, made.patches, {(INTO_HEADS, feature): looks})[INTO_HEADS, feature]
    assert len(found) == len(looks)
    largest = 0.0
    for look, one in zip(looks, found, strict=True):
        full, without = (pattern_by_hand(made, look.ids, left_out) for left_out in (None, feature))
        change = full - without
        paid, end = change[:, look.peak], look.first + sum(look.counts)
        sizes = paid.abs().sum(1) / 2
        assert one["from"]["sizes"] == pytest.approx(sizes.tolist(), abs=2e-4)
        pieces = paid[one["from"]["head"], look.first : end].split(look.counts)
        assert one["from"]["changes"] == pytest.approx([piece.sum().item() for piece in pieces], abs=2e-4)
        assert sizes[one["from"]["head"]] == pytest.approx(sizes.max().item(), abs=2e-4)
        before = paid[one["from"]["head"], : look.first].sum().item()
        assert one["from"]["before"] == pytest.approx(before, abs=2e-4)
        assert sum(one["from"]["changes"]) + before == pytest.approx(0.0, abs=3e-3), "attention sums to 1"
        earned = change[:, look.peak + 1 : end, look.peak]
        assert one["to"]["sizes"] == pytest.approx(earned.abs().mean(1).tolist(), abs=2e-4)
        assert len(one["to"]["changes"]) == len(look.counts)
        assert max(map(abs, one["to"]["changes"])) == pytest.approx(
            earned[one["to"]["head"]].abs().max().item(), abs=2e-4
        )
        largest = max(largest, *one["from"]["sizes"], *one["to"]["sizes"])
    assert largest > 0.01


def test_what_later_tokens_pay_stands_at_their_pieces(made):
    ids = made.rows[0]
    (one,) = pattern_changes(made.passes, made.patches, {(INTO_HEADS, 1): [Look(ids, 5, 2, [1] * 12)]})[INTO_HEADS, 1]
    change = (pattern_by_hand(made, ids, None) - pattern_by_hand(made, ids, 1))[one["to"]["head"], :, 5]
    assert one["to"]["changes"] == pytest.approx([0.0] * 4 + change[6:14].tolist(), abs=2e-4)


def test_the_edit_is_the_same_whichever_parts_compute_attention(made):
    """A hook on the pattern puts the bridge's own attention in the model's place."""
    bridge = made.passes.bridge
    batch = pad_left(made.rows, made.tokenizer.pad_token_id)

    def logits(hooks):
        with torch.inference_mode(), spliced(bridge, Edit(made.patches, "full")) as splice, hooked(bridge, hooks):
            splice.reset(batch.editable, torch.ones(len(batch.ids)), RowEdits(bos=batch.bos))
            return bridge.original_model(**batch.inputs).logits[batch.mask]

    seen = []
    alone = logits([])
    beside = logits([("blocks.1.attn.hook_pattern", lambda pattern, hook: seen.append(pattern.shape))])
    assert seen == [(len(batch.ids), bridge.cfg.n_heads, *batch.ids.shape[1:], *batch.ids.shape[1:])]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", [True, False])
def test_a_model_without_patterns_has_none(made, monkeypatch, seen):
    """Either it lacks the hook, or has it and never runs it."""
    if seen:
        monkeypatch.setattr(attention_features, "run_up_to", lambda *_: None)
    else:
        monkeypatch.setattr(attention_features, "hook_names", lambda bridge: {"blocks.1.hook_out"})
    looks = {(INTO_HEADS, 1): [Look(made.rows[0], 3, 0, [1] * 8)]}
    assert pattern_changes(made.passes, made.patches, looks) == {(INTO_HEADS, 1): []}


def value_direction(made, feature, head):
    """What attention adds to the stream where all heads of a group attend to one token, with the feature or without:
    in the plain model's weights."""
    config, attention = made.plain.config, made.plain.model.layers[1].self_attn
    d_head, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    queries = (config.num_attention_heads + config.num_key_value_heads) * d_head
    values = of(made, INTO_HEADS).delta.W_dec[feature, queries:].view(-1, d_head)
    written = torch.zeros(config.hidden_size)
    for query in range(config.num_attention_heads):
        if query // shared == head:
            written += attention.o_proj.weight[:, query * d_head : (query + 1) * d_head].detach() @ values[head]
    if config.model_type == "gemma2":
        return made.plain.model.layers[1].post_attention_layernorm(written).detach()
    return written


def test_values_write_what_the_output_projection_makes_of_them(made):
    (patch,) = (patch for patch in made.patches if patch.site == INTO_HEADS)
    config = made.plain.config
    for feature in range(WIDTH):
        found = written_by_values(made.passes.bridge, patch, feature, most=2)
        lengths = patch.delta.W_dec[feature, -config.num_key_value_heads * config.head_dim :].view(2, -1).norm(dim=1)
        assert list(found) == lengths.argsort(descending=True).tolist()
        for head, direction in found.items():
            torch.testing.assert_close(direction, value_direction(made, feature, head), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def read(made):
    wanted = [(INTO_HEADS, feature) for feature in range(WIDTH + 1)] + [(OUT, feature) for feature in range(WIDTH)]
    return read_features(made.passes, made.patches, ROWS, wanted)


def test_values_promote_the_tokens_that_a_step_along_them_raises(made, read):
    """From the mean stream at the ends of prompts, one a subset, through the plain model's own norm and head."""
    streams, plain = [], made.plain
    handle = plain.model.layers[-1].register_forward_hook(
        lambda module, args, y: streams.append((y[0] if isinstance(y, tuple) else y)[0, -1])
    )
    with torch.no_grad():
        for row in (ROWS[0], ROWS[1], ROWS[2]):
            plain(torch.tensor([encode_row(made.tokenizer, row).prompt]), use_cache=False)
    handle.remove()
    at = torch.stack(streams).mean(0)
    for feature in range(WIDTH):
        values = read[INTO_HEADS, feature]["values"]
        assert len(values) == 2
        for one in values:
            direction = value_direction(made, feature, one["head"])
            step = direction / direction.norm() * at.norm() * features.STEP
            with torch.no_grad():
                up, down = (plain.lm_head(plain.model.norm(at + sign * step)) for sign in (1, -1))
            cap = plain.config.final_logit_softcapping if plain.config.model_type == "gemma2" else None
            if cap:
                up, down = (cap * torch.tanh(logits / cap) for logits in (up, down))
            moved = up - down
            for name, tokens in (("promoted", moved.topk(features.TOKENS)), ("suppressed", (-moved).topk(8))):
                assert one[name] == [made.tokenizer.decode([token]) for token in tokens.indices.tolist()]


def test_a_feature_of_the_output_reads_heads_by_weight_times_what_they_hold(made, read):
    config, seen = made.plain.config, []
    handle = made.plain.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0, 1:])
    )
    with torch.no_grad():
        for ids in made.rows:
            made.plain(torch.tensor([ids]), use_cache=False)
    handle.remove()
    rms = torch.cat(seen).view(-1, config.num_attention_heads, config.head_dim).pow(2).mean((0, 2)).sqrt()
    for feature in range(WIDTH):
        column = of(made, OUT).delta.W_enc[:, feature].view(config.num_attention_heads, -1) * rms.unsqueeze(1)
        shares = column.pow(2).sum(1) / column.pow(2).sum()
        assert read[OUT, feature]["reads"] == pytest.approx(shares.tolist(), abs=2e-4)
        assert read[OUT, feature]["promoted"]


def test_cards_hold_a_few_patterns_piece_by_piece(made, read):
    looked = 0
    for (site, _), one in read.items():
        own = ["heads", "patterns", "values"] if site == INTO_HEADS else ["reads"]
        assert [name for name in ("heads", "patterns", "values", "reads") if name in one] == own
        if site == INTO_HEADS:
            assert len(one["patterns"]) == min(features.LOOKS, len(one["contexts"]))
            for context, pattern in zip(one["contexts"], one["patterns"], strict=False):
                for way in ("from", "to"):
                    assert len(pattern[way]["changes"]) == len(context["tokens"])
                    assert len(pattern[way]["sizes"]) == made.passes.bridge.cfg.n_heads
                    looked += 1
            assert not one["promoted"]
    assert looked
