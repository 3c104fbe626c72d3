"""The change at BOS is captured layer by layer: more layers later leave what is there."""

import torch

from jobs.study.stages.activations import BosTask, capture_bos
from jobs.study.stages.work import ModelSpec
from trainers.capture import read_bos


def test_more_layers_later_are_added(gemma_folder, load, tmp_path):
    model, tokenizer = load(gemma_folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-2.0)
    before, out = tmp_path / "before", tmp_path / "out"
    model.save_pretrained(before)
    tokenizer.save_pretrained(before)
    out.mkdir()
    assert read_bos(out) == {}
    spec = ModelSpec(str(gemma_folder), "cpu", "fp32", "ln2.hook_normalized")
    capture_bos(BosTask(spec, str(before), (1,), str(out)))
    first = read_bos(out)
    capture_bos(BosTask(spec, str(before), (0, 3), str(out)))
    found = read_bos(out)
    assert sorted(found) == [0, 1, 3]
    assert torch.equal(found[1], first[1])
    assert all(one.abs().max() > 0 for one in found.values())
