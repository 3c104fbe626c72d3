"""What every test shares: quiet, offline libraries, two small random models, and, once for all workers of xdist,
finished sweeps.

In: nothing. Out: folders of a Gemma-2 and a Llama whose norm gains are far from 1, loaders of fresh copies of them, the
command line, what the tiny preset left, and what two small sweeps did.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

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
    """The tiny Llama of `models.tiny`: 3 layers, d_model 24."""
    from models.tiny import build_tiny_llama

    folder = tmp_path_factory.mktemp("llama")
    build_tiny_llama(folder, seed=1)
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
def altered(load):
    """Saves a copy of a model in which every parameter whose name holds one of `parts` has other values."""
    import torch

    def save(folder: Path, to: Path, *parts: str, much: float = 0.4, dtype: torch.dtype = torch.float32) -> Path:
        model, tokenizer = load(folder)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in parts):
                    parameter.mul_(1 + much * torch.randn(parameter.shape, generator=generator))
        model.to(dtype).save_pretrained(to)
        tokenizer.save_pretrained(to)
        return to

    return save


@pytest.fixture(scope="session")
def grafted(load):
    """A plain model whose MLPs in some layers, with the norms before and after them, are those of another folder's."""

    def graft(folder: Path, donor: Path, layers: Iterable[int]):
        (model, _), (theirs, _) = load(folder), load(donor)
        norms = {"gemma2": ("pre_feedforward_layernorm", "post_feedforward_layernorm")}
        for layer in layers:
            for name in ("mlp", *norms.get(model.config.model_type, ("post_attention_layernorm",))):
                part = getattr(theirs.model.layers[layer], name)
                getattr(model.model.layers[layer], name).load_state_dict(part.state_dict())
        return model

    return graft


@pytest.fixture(scope="session")
def random_transcoder():
    """A maker of transcoders with random weights, a quarter or so of whose features are active on unit-rms inputs."""
    import torch

    from models.transcoder import Transcoder
    from sites import Site

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
            site=Site(layer),
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
            model(**batch.inputs)
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


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A folder that `make` has filled, once for all workers of xdist, and what `make` returned as JSON."""
    from tests.tiers import not_counted

    ours = factory.getbasetemp()
    shared = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours
    root, told = shared / name, shared / f"{name}.json"
    with not_counted(), FileLock(shared / f"{name}.lock"):
        if not told.exists():  # the first worker that asks makes it, the others wait
            told.write_text(json.dumps(make(root)))
    return root, json.loads(told.read_text())


def _said(done: subprocess.CompletedProcess[str]) -> list[Any]:
    return [done.args, done.returncode, done.stdout, done.stderr]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, jobs) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The tiny preset, run once from nothing for tests that only read it: its storage root and what it printed."""
    root, said = _once(tmp_path_factory, "finished", lambda root: _said(jobs("sweep", "tiny", f"storage.root={root}")))
    done = subprocess.CompletedProcess(*said)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


class Seeds(NamedTuple):
    """A storage root, what its sweeps were started with and printed, and how many times Ray started for them."""

    root: Path
    asked: tuple[str, ...]
    printed: str
    sessions: int


@pytest.fixture(scope="session")
def seeds(tmp_path_factory, jobs) -> Seeds:
    """Two small sweeps that differ in the seed, `tiny-s0` and `tiny-s1`, run once by one command."""
    from tests.end_to_end.conftest import SMALL, environment

    asked = ("sweep", "tiny", *SMALL, "--seeds", "0,1")

    def make(root: Path) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="ray") as sessions:  # its sockets need a short path
            variables = {**environment(), "RAY_TMPDIR": sessions}
            done = jobs(*asked, f"storage.root={root}", timeout=1200, env=variables)
            return [*_said(done), len(list(Path(sessions).rglob("session_2*")))]

    root, (*said, sessions) = _once(tmp_path_factory, "seeds", make)
    done = subprocess.CompletedProcess(*said)
    assert done.returncode == 0, done.stdout + done.stderr
    return Seeds(root, asked, done.stdout, sessions)


@pytest.fixture
def own(finished, tmp_path) -> Path:
    """A copy of the finished sweep's storage root, for a test that changes it."""
    from tests.end_to_end.damage import copied

    return copied(finished[0], tmp_path / "own")


@pytest.fixture
def own_seeds(seeds: Seeds, tmp_path) -> Path:
    """The same of the two small sweeps."""
    from tests.end_to_end.damage import copied

    return copied(seeds.root, tmp_path / "own_seeds")
