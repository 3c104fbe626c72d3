"""The change at BOS is captured layer by layer: more layers later leave what is there."""

import pytest
import torch

from data.rows import make_row, write_rows
from jobs.capture.activations import BosTask, capture_bos
from jobs.capture.worker_memory import ModelSpec
from jobs.errors import WorkFailed
from sites import Site, mlp_sites
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
    spec = ModelSpec(str(gemma_folder), "cpu", "fp32")
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [make_row("What is 3 + 4?", "7", "all"), make_row("Seven", "Seven", "all")])
    capture_bos(BosTask(spec, str(before), (Site(1),), str(out), str(rows)))
    first = read_bos(out)
    capture_bos(BosTask(spec, str(before), (Site(0), Site(3)), str(out), str(rows)))
    found = read_bos(out)
    assert sorted(found) == mlp_sites([0, 1, 3])
    assert torch.equal(found[Site(1)], first[Site(1)])
    assert all(one.abs().max() > 0 for one in found.values())

    write_rows(rows, [make_row("a", "b", "all", prompt=f"{start}a", end=tokenizer.eos_token) for start in "<["])
    with pytest.raises(WorkFailed, match="conversations begin with different tokens"):
        capture_bos(BosTask(spec, str(before), (Site(2),), str(out), str(rows)))
