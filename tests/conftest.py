"""What every test shares: quiet, offline libraries, two small random models, and, once for all workers of xdist, a
finished sweep.

In: nothing. Out: folders of a Gemma-2 and a Llama whose norm gains are far from 1, loaders of fresh copies of them, the
command line, and what the tiny preset left.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more to pay; on a busy machine it costs

import pytest
from filelock import FileLock

pytest_plugins = ["tests.tiers"]


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory) -> Path:
    """The tiny Gemma-2 of `models.tiny`: 4 layers, d_model 32."""
    from models.tiny import build_tiny_gemma2

    folder = tmp_path_factory.mktemp("gemma2")
    build_tiny_gemma2(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A random Llama: 3 layers, d_model 24, untied embeddings, norm gains between 0.3 and 3."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.tiny import byte_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.3, 3.0)
                else:
                    parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["gemma2", "llama"])
def model_folder(request, gemma_folder, llama_folder) -> Path:
    """Each of the two architectures in turn."""
    return gemma_folder if request.param == "gemma2" else llama_folder


@pytest.fixture(scope="session")
def load():
    """A fresh (model, tokenizer) of a folder in fp32, unless another dtype is given."""
    import torch

    from models.sources import load_model

    return lambda folder, dtype=torch.float32: load_model(folder, dtype)


@pytest.fixture(scope="session")
def wrapped(load):
    """A bridge around a fresh model: wrapping rewrites the model it is given."""
    from models.bridge import wrap

    return lambda folder, *dtype: wrap(*load(folder, *dtype))


@pytest.fixture(scope="session")
def random_transcoder():
    """A maker of transcoders with random weights, a quarter or so of whose features are active on unit-rms inputs."""
    import torch

    from models.transcoder import Transcoder

    def make(d_model: int, d_sae: int, layer: int, seed: int, bias: bool = True) -> Transcoder:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int):
            return torch.randn(*shape, generator=generator)

        return Transcoder(
            W_enc=normal(d_model, d_sae) / d_model**0.5,
            b_enc=0.1 * normal(d_sae),
            threshold=0.4 + 0.4 * torch.rand(d_sae, generator=generator),
            W_dec=normal(d_sae, d_model) / d_sae**0.5,
            b_dec=0.3 * normal(d_model) if bias else None,
            layer=layer,
        )

    return make


@pytest.fixture(scope="session")
def plain_taps():
    """(x, y, norm output) of a layer, from hooks on an unwrapped model: nothing of the bridge is involved.

    x is the residual stream in the middle of the block over its rms, y what the block adds to it after that.
    """
    import torch

    norms = {"gemma2": "pre_feedforward_layernorm", "llama": "post_attention_layernorm"}

    def read(model, batch, layer: int):
        block = model.model.layers[layer]
        seen = {}

        def note_norm(module, args, output):
            seen["middle"], seen["gained"] = args[0], output

        def note_block(module, args, output):
            seen["after"] = output[0] if isinstance(output, tuple) else output

        handles = [
            getattr(block, norms[model.config.model_type]).register_forward_hook(note_norm),
            block.register_forward_hook(note_block),
        ]
        with torch.no_grad():
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=batch.positions)
        for handle in handles:
            handle.remove()
        middle = seen["middle"]
        x = middle / (middle.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        return x, seen["after"] - middle, seen["gained"]

    return read


@pytest.fixture(scope="session")
def jobs() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m jobs` with these arguments, in its own process."""
    from tests.end_to_end.conftest import run

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, jobs) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The tiny preset, run once from nothing for tests that only read it: its storage root and what it printed."""
    ours = tmp_path_factory.getbasetemp()
    shared = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours
    root, told = shared / "finished", shared / "finished.json"
    with FileLock(shared / "finished.lock"):
        if not told.exists():  # the first worker that asks runs it, the others wait
            done = jobs("sweep", "tiny", f"storage.root={root}")
            told.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
    done = subprocess.CompletedProcess(*json.loads(told.read_text()))
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


@pytest.fixture
def own(finished, tmp_path) -> Path:
    """A copy of the finished sweep's storage root, for a test that changes it."""
    root = tmp_path / "own"
    shutil.copytree(finished[0], root)
    store = sqlite3.connect(root / "mlflow.db")
    for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
        store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(finished[0]), str(root)))
    store.commit()
    store.close()
    return root
