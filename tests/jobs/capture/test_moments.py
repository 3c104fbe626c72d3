"""Controls are fitted to the pairs as the capture stored them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.encoding import pad_left
from jobs.capture.moments import MomentsTask, compute_moments
from models.blocks import read_paths
from models.bridge import hooked
from sites import READINGS, Site
from trainers.activations import Pairs, read_pairs
from trainers.capture import Columns, Plan, capture

ROWS = [[2, *range(start, start + 40)] for start in range(20, 180, 20)]


@pytest.mark.parametrize("convention", READINGS)
def test_a_linear_control_reads_what_the_splice_gives_it(convention, model_folder, wrapped, tmp_path: Path) -> None:
    """Under the un-normalised convention x is the residual stream over sqrt(d_model). Dividing once more, for the
    moments alone, would make the map that is fitted to them sqrt(d_model) times too large where it is spliced."""
    bridge, site = wrapped(model_folder), Site(1, READINGS[convention])
    path = read_paths(bridge, model_folder, [site])[site]
    train = tmp_path / "train"
    capture(bridge, Plan.make(ROWS), {site: Columns(y=True, unfinetuned=path)}, train)
    compute_moments(MomentsTask(str(tmp_path), site, None, str(tmp_path / "moments.safetensors"), "cpu"))
    moments = load_file(tmp_path / "moments.safetensors")
    pairs: Pairs = read_pairs(train / "layer_01", ("x", "change"))
    x = torch.cat([x for x, _ in pairs.shards]).double()
    torch.testing.assert_close(moments["inputs"], x.T @ x)

    seen = {}
    read = "blocks.1.hook_resid_mid" if "resid" in convention else "blocks.1.ln2.hook_normalized"
    batch = pad_left(ROWS[:1], bridge.tokenizer.pad_token_id)
    with hooked(bridge, [(read, lambda activation, hook: seen.update(x=activation))]), torch.no_grad():
        bridge.original_model(input_ids=batch.ids)
    at_the_splice = seen["x"][0, 1:] / (seen["x"].shape[-1] ** 0.5 if "resid" in convention else 1.0)
    stored = pairs.shards[0][0]
    assert stored.float().pow(2).mean().item() == pytest.approx(at_the_splice.pow(2).mean().item(), rel=0.3)
