"""Which architectures cannot be looked at, and what they lack.

In: a model folder. Out: nothing, or a ModelError of one sentence. What a transcoder reads is the norm's output before
the MLP, and what it stands for is what the block adds to the stream after that; an architecture without such a path has
no place for it. docs/architectures.md lists those that a test has tried.
"""

from __future__ import annotations

from pathlib import Path

from models.errors import ModelError
from models.sources import model_facts

NO_NORM = "its MLP reads the residual stream without a norm of its own before it"
SHARED_NORM = "attention and MLP share one norm"
EXPERTS = "a mixture of experts has no single MLP in a block"
NO_GAIN = "its norms have no weights"
MISSING = {
    "olmo2": NO_NORM,
    "olmo3": NO_NORM,
    "exaone4": NO_NORM,
    "phi": SHARED_NORM,
    "gptj": SHARED_NORM,
    "cohere": SHARED_NORM,
    "cohere2": SHARED_NORM,
    "falcon": SHARED_NORM,
    "olmo": NO_GAIN,
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "bloom": "its MLP adds the residual stream itself",
    "opt": "its MLP is no module of its own",
    "stablelm": "TransformerLens' bridge changes what it computes",
    "apertus": "its activation function has parameters that its weights' files do not hold",
}
"""By architecture (`model_type`)."""


def check_architecture(folder: Path, source: str, key: str = "model.source") -> None:
    """Raises ModelError where nothing can be spliced into the model's blocks; `source` is its name in the settings, and
    `key` the one that gives it."""
    name = model_facts(folder, key)["architecture"]
    if name in MISSING:
        raise ModelError(f"{key}: {source} is of the architecture {name}, which is not supported: {MISSING[name]}")
