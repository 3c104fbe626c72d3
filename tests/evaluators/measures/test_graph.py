"""Attribution graphs: effects are exact where the model is linear, slopes elsewhere, and what a graph predicts is
compared with models in which a feature is off."""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from data.encoding import encode_prompt, pad_left
from data.rows import DataError
from evaluators.measures.direct_effects import Output, Place, held_model, spliced_activations
from evaluators.measures.graph import GraphOptions, attribution_graph, choose_output, token_output
from evaluators.measures.graph_formats import as_circuit_tracer, as_json
from evaluators.splice.interventions import Edit, Patch, RowEdits, spliced
from evaluators.splice.limits import Limits
from models import frozen
from models.blocks import read_paths
from models.bridge import hook_names, hooked, wrap
from models.errors import ModelError
from models.frozen import Frozen, check_frozen, hooks_of
from models.rest import Rest
from models.sources import load_model
from models.transcoder import Transcoder, with_bos
from sites import ATTENTION_OUT, MLP, QKV, Site
from tests.evaluators.conftest import ROWS
from tests.models.table import build

WIDTH = 6
SITES = [Site(0, QKV), Site(0), Site(1, QKV), Site(1, ATTENTION_OUT), Site(1), Site(2, QKV), Site(2)]
FREE = Frozen()
EVERYTHING = Frozen(patterns=True, norms=True)
BUDGET = Limits(8)


def transcoder(site, d_in, d_out, seed):
    generator = torch.Generator().manual_seed(seed)
    return Transcoder(
        W_enc=torch.randn(d_in, WIDTH, generator=generator) / d_in**0.5,
        b_enc=0.1 * torch.randn(WIDTH, generator=generator),
        threshold=0.2 + 0.4 * torch.rand(WIDTH, generator=generator),
        W_dec=0.4 * torch.randn(WIDTH, d_out, generator=generator),
        b_dec=None,
        site=site,
    )


def prepared(bridge, folder, sites):
    """Patches with random deltas on the paths of the model in `folder`; one of attention and one of an MLP has a
    feature at BOS."""
    patches = []
    for seed, (site, path) in enumerate(read_paths(bridge, folder, sites).items()):
        delta = transcoder(site, path.d_in, path.d_out, seed)
        if site in (Site(0, QKV), Site(1)):
            delta = with_bos(delta, torch.randn(path.d_out, generator=torch.Generator().manual_seed(seed)))
        patches.append(Patch(site, path, delta))
    ids = encode_prompt(bridge.tokenizer, ROWS[0])[:12]
    with torch.inference_mode():
        logits = bridge.original_model(torch.tensor([ids])).logits[0, -1]
    plus, minus = logits.topk(2).indices.tolist()
    return SimpleNamespace(bridge=bridge, patches=patches, output=Output(ids, plus, minus))


@pytest.fixture(scope="module")
def made(model_folder, altered, wrapped, tmp_path_factory):
    """A pair of models that differ in the weights of all sites."""
    before = altered(model_folder, tmp_path_factory.mktemp("before"), "proj.weight", much=0.3)
    return prepared(wrapped(model_folder), before, SITES)


@pytest.fixture(scope="module")
def linear(model_folder, load, wrapped, tmp_path_factory):
    """A model whose MLPs give nothing: given its patterns and denominators, it is linear between the sites."""
    model, tokenizer = load(model_folder)
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.data.zero_()
    folder = tmp_path_factory.mktemp("linear")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return prepared(wrapped(folder), folder, SITES)


def targets_of(acts):
    """The first and the last active feature of some sites after BOS, and the output."""
    chosen = [None]
    for site in SITES[3:]:
        active = [Place(site, *pair) for pair in (acts[site] > 0).nonzero().tolist() if pair[0] > 0]
        chosen += [active[0], active[-1]]
    return chosen


@contextmanager
def given(bridge, what, values):
    """Inside the `with`, the patterns and denominators of `what` are `values`, or are noted there on the first run."""

    def hold(name):
        return lambda value, hook: values.setdefault(name, value.detach().clone())

    with hooked(bridge, [(name, hold(name)) for name in hooks_of(bridge, what)]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def values_at(one, acts, targets, held_values=None, what=FREE):
    with held_model(one.bridge, one.patches, one.output, acts) as held:
        if held_values is None:
            return held.effects(targets, FREE).values
        with given(one.bridge, what, held_values):
            return held.effects(targets, FREE).values


def test_holding_activations_changes_nothing(made):
    acts = spliced_activations(made.bridge, made.patches, made.output.ids)
    with held_model(made.bridge, made.patches, made.output) as held:
        ours = held.effects([None], FREE).values.item()
        pre = held.effects(targets_of(acts)[1:], FREE).values
        logits = held.logits
    expected = torch.stack([acts[at.site][at.position, at.feature] for at in targets_of(acts)[1:]])
    torch.testing.assert_close(pre, expected, rtol=1e-4, atol=1e-5)
    batch = pad_left([made.output.ids], 0)
    with torch.inference_mode(), spliced(made.bridge, Edit(made.patches, "full")) as splice:
        splice.reset(batch.editable, torch.ones(1), RowEdits(bos=batch.bos))
        whole = made.bridge.original_model(**batch.inputs).logits[0, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert ours == pytest.approx(float(whole[made.output.plus] - whole[made.output.minus]), abs=1e-4)
    assert all(at_bos[0, -1] == 1 for at_bos in (acts[Site(0, QKV)], acts[Site(1)]))


def test_a_batch_of_targets_is_each_of_them(made):
    acts = spliced_activations(made.bridge, made.patches, made.output.ids)
    targets = targets_of(acts)
    for what in (FREE, EVERYTHING):
        with held_model(made.bridge, made.patches, made.output) as held:
            together = held.effects(targets, what)
            for row, at in enumerate(targets):
                alone = held.effects([at], what)
                assert alone.values[0] == together.values[row]
                assert None in targets or set(alone.slopes) <= set(together.slopes)
                for site, slopes in together.slopes.items():
                    own = alone.slopes.get(site, torch.zeros(1, *slopes.shape[1:]))[0]
                    torch.testing.assert_close(slopes[row], own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", [FREE, Frozen(patterns=True), Frozen(norms=True), EVERYTHING], ids=str)
def test_slopes_are_those_of_a_model_given_what_is_frozen(made, what):
    """Central differences in which the frozen patterns and denominators keep their values."""
    acts = spliced_activations(made.bridge, made.patches, made.output.ids)
    targets, constant = targets_of(acts), {}
    with held_model(made.bridge, made.patches, made.output) as held:
        found = held.effects(targets, what)
    replay = hooks_of(made.bridge, what) != []
    if replay:
        values_at(made, acts, targets, constant, what)  # notes them
    step, seen = 0.01, 0.0
    for site in SITES:
        for position, feature in [(0, WIDTH)] if site in (Site(0, QKV),) else (acts[site] > 0).nonzero().tolist()[:2]:
            up, down = ({key: value.clone() for key, value in acts.items()} for _ in range(2))
            up[site][position, feature] += step
            down[site][position, feature] -= step
            ends = [values_at(made, moved, targets, constant if replay else None, what) for moved in (up, down)]
            expected = (ends[0] - ends[1]) / (2 * step)
            slopes = torch.zeros(len(targets))
            if site in found.slopes:
                slopes = found.slopes[site][:, position, feature]
            torch.testing.assert_close(slopes, expected, rtol=0.03, atol=5e-3)
            seen = max(seen, expected.abs().max().item())
    assert seen > 0.05


def test_frozen_patterns_hide_queries_and_keys(made):
    """A feature that writes only queries and keys acts through patterns alone."""
    patches = []
    for patch in made.patches:
        if patch.site == Site(1, QKV):
            W_dec = patch.delta.W_dec.clone()
            W_dec[:, sum(patch.path.widths[:2]) :] = 0.0
            delta = Transcoder(
                *(patch.delta.W_enc, patch.delta.b_enc, patch.delta.threshold, W_dec), b_dec=None, site=patch.site
            )
            patch = Patch(patch.site, patch.path, delta)
        patches.append(patch)
    sizes = []
    for patterns in (False, True):
        with held_model(made.bridge, patches, made.output) as held:
            slopes = held.effects([None], Frozen(patterns=patterns)).slopes
            sizes.append(float(slopes[Site(1, QKV)].abs().max()) if Site(1, QKV) in slopes else 0.0)
    assert sizes[0] > 1e-3
    assert sizes[1] == 0.0


def test_where_all_parts_are_linear_effects_and_rest_are_the_value(linear):
    """`rest` is the value with all deltas off, given the patterns and denominators of the run with them."""
    acts = spliced_activations(linear.bridge, linear.patches, linear.output.ids)
    targets, constant = targets_of(acts), {}
    if linear.bridge.original_model.config.model_type == "gemma2":
        targets = targets[1:]  # its logits are soft-capped, which is not linear
    with held_model(linear.bridge, linear.patches, linear.output) as held:
        found = held.effects(targets, EVERYTHING)
    effects = sum((slopes * acts[site]).sum((1, 2)) for site, slopes in found.slopes.items())
    torch.testing.assert_close(values_at(linear, acts, targets, constant, EVERYTHING), found.values)
    nothing = {site: torch.zeros_like(of_site) for site, of_site in acts.items()}
    rest = values_at(linear, nothing, targets, constant, EVERYTHING)
    assert effects.abs().max() > 0.1
    torch.testing.assert_close(effects + rest, found.values, rtol=1e-4, atol=1e-4)


def test_falls_are_those_of_a_run_without_the_feature(made):
    acts = spliced_activations(made.bridge, made.patches, made.output.ids)
    targets = [*targets_of(acts), Place(Site(0), 1, 0)]
    sources = [Place(Site(0, QKV), 0, WIDTH), targets_of(acts)[1], targets_of(acts)[5]]
    with held_model(made.bridge, made.patches, made.output) as held:
        found = held.falls(targets, sources)
        alone = held.falls(targets[3:4], sources[1:2])  # starts above the first block, and ends below the last
        high = held.falls(targets, sources[2:])
        last = held.falls([None], [targets_of(acts)[7]])
    whole = values_at(made, acts, targets)
    for row, source in enumerate(sources):
        without = {site: of_site.clone() for site, of_site in acts.items()}
        without[source.site][source.position, source.feature] = 0.0
        torch.testing.assert_close(found[row], whole - values_at(made, without, targets), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(alone[0], found[1, 3:4], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(high[0], found[2], rtol=1e-3, atol=2e-5)
    assert found[1, -1] == 0, "what is below a feature does not depend on it"
    assert found.abs().max() > 0.01
    assert last.shape == (1, 1)


@pytest.mark.parametrize("what", [FREE, EVERYTHING], ids=str)
def test_the_whole_graph_adds_up(made, what):
    options = GraphOptions(what, max_expanded=10_000, node_threshold=1.0, edge_threshold=1.0, checked=8)
    steps = []
    graph = attribution_graph(made.bridge, made.patches, made.output, (1, 2), options, lambda *step: steps.append(step))
    places = [node.place for node in graph.nodes]
    assert [node.kind for node in graph.nodes[-2:]] == ["rest", "output"]
    assert graph.nodes[-1].influence == 1.0
    assert places[:-2] == sorted(places[:-2])
    acts = spliced_activations(made.bridge, made.patches, made.output.ids)
    assert graph.active == sum(int((of_site > 0).sum()) for of_site in acts.values())
    into = {}
    for edge in graph.edges:
        into[edge.target] = into.get(edge.target, 0.0) + edge.weight
        source, target = places[edge.source], places[edge.target]
        if source is not None and target is not None:
            assert source.site < target.site
            assert source.position <= target.position
    for number, total in into.items():
        value = graph.value if places[number] is None else graph.nodes[number].activation  # above its threshold
        assert total == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert {node.kind for node in graph.nodes} == {"feature", "bos", "rest", "output"}
    assert not {number for number in into if graph.nodes[number].kind == "bos"}, "nothing causes a BOS feature"
    assert sorted({check.sample for check in graph.checks}) == ["random", "strongest"]
    assert {name for name, *_ in steps} == {"nodes expanded", "sources removed"}
    assert all(node.promoted for node in graph.nodes[:-2] if node.place.site.kind == MLP)
    assert not any(node.promoted for node in graph.nodes[:-2] if node.place.site.kind == QKV)


def test_checks_agree_where_the_model_is_nearly_linear(made):
    small = [
        Patch(
            *(patch.site, patch.path),
            Transcoder(
                *(patch.delta.W_enc, patch.delta.b_enc, patch.delta.threshold, 0.02 * patch.delta.W_dec),
                b_dec=None,
                site=patch.site,
            ),
        )
        for patch in made.patches
    ]
    options = GraphOptions(FREE, max_expanded=20, checked=12)
    graph = attribution_graph(made.bridge, small, made.output, (1, 2), options)
    assert graph.expanded == 20
    for sample in ("random", "strongest"):
        found = graph.correlation(sample)
        assert found is not None
        assert found.value > 0.98
        assert found.low <= found.value <= found.high
    assert (
        attribution_graph(made.bridge, small, made.output, (1, 2), options._replace(checked=1)).correlation("random")
        is None
    )


def test_fewer_expanded_nodes_are_the_most_influential_first(made):
    graph = attribution_graph(made.bridge, made.patches, made.output, (1, 2), GraphOptions(max_expanded=1, checked=0))
    assert graph.expanded == 1
    assert {graph.nodes[edge.target].kind for edge in graph.edges} == {"output"}
    assert graph.checks == []
    assert graph.correlation("strongest") is None


def test_what_a_model_does_not_expose_cannot_be_frozen(made, monkeypatch):
    for what in (FREE, EVERYTHING):
        check_frozen(made.bridge, what)
    names = hook_names(made.bridge)
    with monkeypatch.context() as patched:
        patched.setattr(frozen, "hook_names", lambda bridge: names - {"blocks.1.attn.hook_pattern"})
        with pytest.raises(
            ModelError, match=r"patterns of the architecture .* blocks.1.attn.hook_pattern; .*free-patt"
        ):
            check_frozen(made.bridge, EVERYTHING)
    with monkeypatch.context() as patched:
        patched.setattr(frozen, "unhooked_norms", lambda bridge: ["model.odd_norm"])
        with pytest.raises(ModelError, match=r"denominators .* model.odd_norm; use --free-norms"):
            check_frozen(made.bridge, EVERYTHING)
        check_frozen(made.bridge, Frozen(patterns=True))
    with monkeypatch.context() as patched:  # the hook runs, and nothing depends on what it returns
        patched.setattr(frozen, "_acting", lambda bridge, given: set(given) - {"ln_final.hook_scale"})
        with pytest.raises(ModelError, match=r"hook at ln_final.hook_scale"):
            check_frozen(made.bridge, EVERYTHING)


@pytest.mark.parametrize("name", ["opt", "gptj"])
def test_an_architecture_whose_attention_ignores_the_hook_is_refused(name, tmp_path):
    bridge = wrap(*load_model(build(name, tmp_path), torch.float32))
    check_frozen(bridge, Frozen(norms=True))
    with pytest.raises(ModelError, match=rf"patterns of the architecture {name} cannot be frozen: .*hook_pattern"):
        check_frozen(bridge, EVERYTHING)


def test_norms_within_frozen_patterns_need_not_act(tmp_path):
    """As those of queries and keys."""
    bridge = wrap(*load_model(build("qwen3", tmp_path), torch.float32))
    assert any("q_norm" in name for name in hooks_of(bridge, EVERYTHING))
    check_frozen(bridge, EVERYTHING)


def test_the_output_is_where_the_models_first_differ(made):
    """The finetuned model's own greedy answer, and at each place what the other model would say."""
    (output, said), model = choose_output(made.bridge, made.patches, ROWS[0], BUDGET), made.bridge.original_model
    prompt = encode_prompt(made.bridge.tokenizer, ROWS[0])
    assert output.ids[: len(prompt)] == prompt
    assert (output.plus, output.minus) == said
    for end in range(len(prompt), len(output.ids) + 1):
        batch = pad_left([output.ids[:end]], 0)
        with torch.inference_mode():
            ours = int(model(**batch.inputs).logits[0, -1].argmax())
            with spliced(made.bridge, Edit(made.patches, "no_delta")) as splice:
                splice.reset(batch.editable, torch.zeros(1), RowEdits(bos=batch.bos))
                theirs = int(model(**batch.inputs).logits[0, -1].argmax())
        assert (ours == theirs) == (end < len(output.ids))
        assert ours == (output.ids[end] if end < len(output.ids) else output.plus)


def test_what_changed_outside_all_sites_is_unfinetuned_too(made):
    """A final norm that gives nothing makes the un-finetuned model's logits equal, and the first token the largest."""
    norm = dict(made.bridge.original_model.named_parameters())
    (name,) = (one for one in norm if one.replace("_original_component.", "") == "model.norm.weight")
    offset = -1.0 if made.bridge.original_model.config.model_type == "gemma2" else 0.0
    before, rest = norm[name].data, Rest({"model.norm.weight": torch.full_like(norm[name], offset)})
    _, without = choose_output(made.bridge, made.patches, ROWS[0], BUDGET)
    assert choose_output(made.bridge, made.patches, ROWS[0], BUDGET, rest)[1] == (without[0], 0)
    assert token_output(made.bridge, made.patches, ROWS[0], made.bridge.tokenizer.eos_token, rest)[1][1] == 0
    assert norm[name].data is before or torch.equal(norm[name].data, before)


def test_models_that_say_the_same_have_nothing_to_explain(model_folder, wrapped):
    bridge = wrapped(model_folder)
    one = prepared(bridge, model_folder, [Site(1)])
    with pytest.raises(DataError, match=r"--prompt: .* say the same for \d+ tokens"):
        choose_output(bridge, one.patches, ROWS[0], BUDGET)


def test_the_logit_of_one_token(made):
    tokenizer = made.bridge.tokenizer
    output, said = token_output(made.bridge, made.patches, ROWS[0], tokenizer.eos_token)
    assert output == Output(encode_prompt(tokenizer, ROWS[0]), tokenizer.eos_token_id)
    assert said == (choose_output(made.bridge, made.patches, ROWS[0], Limits(1))[1] if said[0] != said[1] else said)
    graph = attribution_graph(made.bridge, made.patches, output, said, GraphOptions(max_expanded=3, checked=2))
    assert as_json(graph, tokenizer, "", {})["output"]["words"] == f"logit of {tokenizer.eos_token!r}"
    with pytest.raises(DataError, match=r"--token: got 'seventy seven', which must be one token"):
        token_output(made.bridge, made.patches, ROWS[0], "seventy seven")


@pytest.fixture(scope="module")
def drawn(made):
    options = GraphOptions(max_expanded=12, checked=6)
    return attribution_graph(made.bridge, made.patches, made.output, (3, 4), options)


def test_our_own_format(made, drawn):
    tokenizer = made.bridge.tokenizer
    found = as_json(drawn, tokenizer, "pair", {"a": "b"}, lambda place: f"#{place.feature}")
    assert list(found) == [
        *("title", "tokens", "n_layers", "output", "frozen", "thresholds", "counts", "nodes", "edges", "groups"),
        *("checks", "facts"),
    ]
    assert len(found["tokens"]) == len(made.output.ids)
    assert found["output"]["position"] == len(made.output.ids) - 1
    assert found["output"]["words"].count("logit of") == 2
    assert found["counts"] == {
        "active": drawn.active,
        "expanded": 12,
        "nodes": len(found["nodes"]),
        "edges": len(found["edges"]),
    }
    for node, ours in zip(found["nodes"], drawn.nodes, strict=True):
        assert list(node) == [
            *("kind", "site", "layer", "site_kind", "feature", "position", "activation", "influence", "group"),
            *("promoted", "card"),
        ]
        assert 0 <= node["influence"] <= 1 + 1e-9
        if ours.place is None:
            assert (node["site"], node["feature"], node["card"]) == ("", None, "")
            assert node["layer"] == (-1 if node["kind"] == "rest" else found["n_layers"])
        else:
            assert node["site"] == ours.place.site.label
            assert node["card"] == f"#{ours.place.feature}"
            assert (node["position"] == 0) == (node["kind"] == "bos")
    assert all(0 <= end < len(found["nodes"]) for edge in found["edges"] for end in edge[:2])
    assert [row["sample"] for row in found["checks"]["rows"]] == ["random"] * 6 + ["strongest"] * 6
    assert all(len(one) == 3 for one in found["checks"]["correlation"].values())


def test_the_format_of_circuit_tracers_viewer(made, drawn):
    found = as_circuit_tracer(drawn, "a-slug", made.bridge.tokenizer, "a-scan")
    assert list(found) == ["metadata", "qParams", "nodes", "links"]
    assert found["metadata"]["slug"] == "a-slug"
    assert found["metadata"]["prompt_tokens"] == [made.bridge.tokenizer.decode([one]) for one in made.output.ids]
    assert found["qParams"] == {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    kinds = {
        str: ("node_id", "layer", "feature_type", "jsNodeId", "clerp"),
        int: ("feature", "ctx_idx", "run_idx", "reverse_ctx_idx"),
        float: ("token_prob",),
        bool: ("is_target_logit",),
    }
    for node in found["nodes"]:
        assert all(type(node[name]) is kind for kind, names in kinds.items() for name in names)
        assert node["influence"] is None or 0 < node["influence"] <= 1
        if node["feature_type"] == "cross layer transcoder":
            assert node["node_id"].split("_")[0] == node["layer"]
    for name in ("node_id", "jsNodeId"):
        assert len({node[name] for node in found["nodes"]}) == len(found["nodes"])
    of_features = [node for node in found["nodes"] if node["feature_type"] == "cross layer transcoder"]
    rows = {node["node_id"]: int(node["layer"]) for node in of_features}
    (logit,) = (node for node in found["nodes"] if node["is_target_logit"])
    assert logit["feature_type"] == "logit"
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(logit["token_prob"], abs=1e-3)
    assert int(logit["layer"]) > max(rows.values())
    for link in found["links"]:
        assert {link["source"], link["target"]} <= {node["node_id"] for node in found["nodes"]}
        if link["source"] in rows and link["target"] in rows:
            assert rows[link["source"]] < rows[link["target"]]


def test_sites_of_one_kind_keep_their_layers_in_circuit_tracers_format(made):
    patches = [patch for patch in made.patches if patch.site.kind == MLP]
    graph = attribution_graph(made.bridge, patches, made.output, (3, 4), GraphOptions(max_expanded=4, checked=0))
    nodes = as_circuit_tracer(graph, "s", made.bridge.tokenizer, "s")["nodes"]
    for node, ours in zip(nodes, graph.nodes, strict=False):  # the prompt's tokens follow
        if ours.place is not None:
            assert node["layer"] == str(ours.place.site.layer)
