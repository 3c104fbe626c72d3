"""Activation capture against hooks on the plain model; no BOS, no padding; an interrupted capture goes on as if not."""

import pytest
import torch

from data.encoding import encode_text, pad_left
from models.blocks import read_paths
from sites import Site, mlp_sites
from trainers import capture as module
from trainers.activations import read_index, read_pairs
from trainers.capture import (
    Columns,
    Plan,
    bos_changes,
    capture,
    capture_batch,
    finish_capture,
    read_bos,
    write_bos,
)

TEXTS = ["one", "a longer text than that", "12 + 30", "", "x" * 90, "what is 7 times 8?", "nine", "the end of it"]
SITES = {Site(0): Columns(), Site(2): Columns()}


@pytest.fixture(scope="module")
def sequences(load, gemma_folder):
    _, tokenizer = load(gemma_folder)
    return [encode_text(tokenizer, text) for text in TEXTS]


@pytest.fixture(scope="module")
def plan(sequences):
    return Plan.make(sequences, batch_tokens=64, shard_tokens=30, seed=5)


@pytest.fixture(scope="module")
def bridge(wrapped, gemma_folder):
    return wrapped(gemma_folder)


@pytest.fixture
def captured(tmp_path, bridge, plan):
    capture(bridge, plan, SITES, tmp_path)
    return tmp_path


def test_a_plan_holds_every_sequence_once_in_bounded_batches(sequences, plan):
    batches = [batch for shard in plan.shards for batch in shard]
    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(sequences[i]) for i in batch) <= 64
    assert len(plan.shards) > 2
    assert all(plan.tokens(number) >= 30 for number in range(len(plan.shards) - 1))
    assert plan.shards == Plan.make(sequences, 64, 30, 5).shards
    assert plan.shards != Plan.make(sequences, 64, 30, 6).shards


def test_nothing_to_capture_is_said():
    with pytest.raises(ValueError, match="none of 2 sequences has a token after BOS"):
        Plan.make([[2], [2]])


def test_captured_rows_are_the_plain_models(model_folder, load, wrapped, plain_taps):
    """Row by row in the order of the batch; the shortest row is padded by 80 tokens and gives none of them."""
    model, tokenizer = load(model_folder)
    rows = [encode_text(tokenizer, text) for text in TEXTS]
    batch = pad_left(rows, tokenizer.pad_token_id)
    sites = mlp_sites(range(model.config.num_hidden_layers))
    captured = capture_batch(wrapped(model_folder), rows, dict.fromkeys(sites, Columns()))
    for site in sites:
        for found, expected in zip(captured[site].values(), plain_taps(model, batch, site.layer)[:2], strict=True):
            assert found.dtype == torch.bfloat16
            assert len(found) == sum(len(row) - 1 for row in rows)
            wanted = torch.cat(
                [one[-(len(row) - 1) :] for one, row in zip(expected, rows, strict=True) if len(row) > 1]
            )
            torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())


def test_a_row_alone_gives_what_it_gives_in_a_batch(bridge, sequences):
    together = capture_batch(bridge, sequences, SITES)
    alone = [capture_batch(bridge, [row], SITES) for row in sequences]
    for site in SITES:
        for column in ("x", "y"):
            apart = torch.cat([one[site][column] for one in alone]).float()
            torch.testing.assert_close(together[site][column].float(), apart, rtol=1e-2, atol=1e-2)


def test_shards_hold_the_plan_in_order(captured, bridge, plan, sequences):
    for site in SITES:
        pairs = read_pairs(captured / site.folder)
        assert [len(x) for x, _ in pairs.shards] == [plan.tokens(n) for n in range(len(plan.shards))]
        index = read_index(captured / site.folder)
        assert (index["layer"], index["taps"]) == (site.layer, ["ln2.hook_normalized", "hook_mlp_out"])
        assert index["tokens"] == sum(len(row) - 1 for row in sequences)
        first = [
            capture_batch(bridge, [sequences[i] for i in batch], {site: Columns()})[site] for batch in plan.shards[0]
        ]
        assert torch.equal(pairs.shards[0][0], torch.cat([one["x"] for one in first]))
        assert torch.equal(pairs.shards[0][1], torch.cat([one["y"] for one in first]))


def test_layers_above_the_last_swept_are_not_run(bridge, sequences):
    ran = []
    blocks = bridge.original_model.model.layers
    handles = [block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(blocks)]
    capture_batch(bridge, sequences, {Site(0): Columns(), Site(1): Columns()})
    for handle in handles:
        handle.remove()
    assert set(ran) <= {0, 1}


def test_an_interrupted_capture_goes_on_from_its_last_shard(tmp_path, captured, bridge, plan, monkeypatch):
    folder = tmp_path / "interrupted"
    real, calls = module.capture_batch, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 1 + sum(map(len, plan.shards[:2])):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "capture_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        capture(bridge, plan, SITES, folder)
    assert not (folder / "layer_00" / "index.json").exists()
    before = len(calls)
    done = []
    capture(bridge, plan, SITES, folder, report=lambda shards, total: done.append((shards, total)))
    assert len(calls) - before == sum(map(len, plan.shards[2:])), "finished shards are not computed again"
    assert done[-1] == (len(plan.shards), len(plan.shards))
    for site in SITES:
        whole, parts = captured / site.folder, folder / site.folder
        assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
            path.name: path.read_bytes() for path in parts.iterdir()
        }


def test_shards_of_another_plan_are_refused(captured, plan, sequences):
    other = Plan.make(sequences[:-2], batch_tokens=64, shard_tokens=30, seed=5)
    with pytest.raises(ValueError, match=r"shard_\d+\.safetensors has \d+ tokens, but the plan has \d+; delete"):
        finish_capture(other, SITES, captured)


def test_the_change_at_bos_is_what_a_whole_text_shows_there(bridge, gemma_folder, load, sequences, tmp_path):
    """Before finetuning the MLPs gave -2 times what they give now: the change follows from a plain hook."""
    model, _ = load(gemma_folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-2.0)
    model.save_pretrained(tmp_path)
    before, after = (read_paths(bridge, folder, mlp_sites([0, 2])) for folder in (tmp_path, gemma_folder))
    found = bos_changes(bridge, bridge.tokenizer.bos_token_id, before, after)
    seen = {}
    plain, _ = load(gemma_folder)
    for layer in (0, 2):
        plain.model.layers[layer].post_feedforward_layernorm.register_forward_hook(
            lambda module, args, y, layer=layer: seen.update({layer: (y - module.forward(-2 * args[0]))[0, 0]})
        )
    with torch.no_grad():
        plain(input_ids=torch.tensor([max(sequences, key=len)]))
    for layer in (0, 2):
        torch.testing.assert_close(found[Site(layer)], seen[layer], rtol=1e-4, atol=1e-5)
    write_bos(tmp_path, found)
    assert all(torch.equal(one, found[site]) for site, one in read_bos(tmp_path).items())
