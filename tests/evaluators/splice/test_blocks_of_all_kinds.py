"""Passes that start above a block, in architectures whose blocks return a stream and in those that return a tuple."""

import pytest
import torch

from data.encoding import pad_left
from evaluators.splice.passes import forward, project, resume, run_up_to
from models.bridge import wrap
from models.sources import load_model
from tests.models.table import build


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neo", "falcon", "qwen3"])
def test_a_pass_from_above_a_block_is_the_rest_of_a_whole_one(name, tmp_path):
    bridge = wrap(*load_model(build(name, tmp_path), torch.float32))
    batch = pad_left([[1, 10, 20, 30], [1, 40, 50, 60]], 0)
    with torch.inference_mode():
        whole = resume(bridge, batch)
        middle = run_up_to(bridge, batch, 0, [])
        torch.testing.assert_close(resume(bridge, batch, 0, middle), whole)
        higher = run_up_to(bridge, batch, 1, [], 0, middle)
        torch.testing.assert_close(higher, run_up_to(bridge, batch, 1, []))
        torch.testing.assert_close(torch.cat([*project(bridge, whole[:, -1])]), forward(bridge, batch, 1)[:, 0])
