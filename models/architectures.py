"""Which kinds of site an architecture has, and which architectures are not supported.

In: a model folder, or an architecture's name. Out: kinds, or a one-sentence ModelError. An MLP is a site if it has its
own norm before it, whose output a transcoder reads. docs/architectures.md lists what a test has tried.
"""

from __future__ import annotations

from pathlib import Path

from models.errors import ModelError
from models.sources import model_facts
from sites import KINDS, MLP, Kind

NO_NORM = "its MLP reads the residual stream without a norm of its own before it"
SHARED_NORM = "attention and MLP share one norm"
EXPERTS = "a mixture of experts has no single MLP in a block"
NO_GAIN = "its norms have no weights"
NO_MODULE = "its MLP is not a module of its own"
MISSING = {
    "olmo2": NO_NORM,
    "olmo3": NO_NORM,
    "exaone4": NO_NORM,
    "olmo": NO_GAIN,
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "bloom": "its MLP adds the residual stream itself",
    "stablelm": "TransformerLens' bridge changes what it computes",
    "apertus": "its activation function has parameters that its weights' files do not hold",
}
"""By architecture (`model_type`), why it is refused."""
WITHOUT_MLP = {
    "phi": SHARED_NORM,
    "gptj": SHARED_NORM,
    "cohere": SHARED_NORM,
    "cohere2": SHARED_NORM,
    "falcon": SHARED_NORM,
    "gpt_oss": EXPERTS,
    "opt": NO_MODULE,
}
"""By architecture, why its MLPs are not sites although attention's projections are. What finetuning changed in these
MLPs belongs to the rest."""


def kinds_of(architecture: str) -> list[Kind]:
    """The kinds of site in the blocks of an architecture, in the order of a forward pass."""
    return [kind for kind in KINDS.values() if not (kind == MLP and architecture in WITHOUT_MLP)]


def check_mlps(folder: Path, source: str, setting: str) -> None:
    """Raises ModelError if the model's MLPs are not sites; `setting` is the one that needs them."""
    name = model_facts(folder)["architecture"]
    if name in WITHOUT_MLP:
        allowed = ", ".join(kind.name for kind in kinds_of(name))
        raise ModelError(
            f"{setting} needs the MLPs of {source}, which have no place for deltas in the architecture {name}: "
            f"{WITHOUT_MLP[name]}; change deltas of {allowed} are possible (deltas.targets=[change] deltas.sites=auto)"
        )


def check_architecture(folder: Path, source: str, key: str = "model.source") -> None:
    """Raises ModelError if nothing can be spliced into the model's blocks; `source` is its name in the settings, and
    `key` the setting that gives it."""
    name = model_facts(folder, key)["architecture"]
    if name in MISSING:
        raise ModelError(f"{key}: {source} is of the architecture {name}, which is not supported: {MISSING[name]}")
