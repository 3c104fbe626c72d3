"""Base transcoders in Gemma Scope's layout: `layer_{L}/{width}/average_l0_{N}/params.npz`.

In: a local folder or a hub repository. Out: the candidates of a layer, the one a percentile or a target L0 selects,
and its `Transcoder`; and the reverse, writing one. A `config.json` beside params.npz names the taps of transcoders
trained here; without it the taps are Gemma Scope's.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.errors import ModelError
from models.transcoder import GEMMA_SCOPE_TAPS, Taps, Transcoder

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_L0_FOLDER = re.compile(r"average_l0_(\d+(?:\.\d+)?)")


@dataclass(frozen=True, order=True)
class Candidate:
    """One published base transcoder: its mean L0 and its folder below the root."""

    average_l0: float
    path: str


def width_label(width: int | str) -> str:
    """`16k` -> `width_16k`, 2304 -> `width_2304`."""
    return f"width_{width}"


def candidates(root: str, layer: int, width: int | str) -> list[Candidate]:
    """The base transcoders of a layer and width, by ascending L0.

    `root` is a local folder or a hub repository. Raises ModelError where there is none.
    """
    below = f"layer_{layer}/{width_label(width)}"
    names = _local_names(Path(root), below) if Path(root).is_dir() else _hub_names(root, below)
    found = [Candidate(float(match[1]), f"{below}/{name}") for name in names if (match := _L0_FOLDER.fullmatch(name))]
    if not found:
        raise ModelError(f"transcoders.source: {root} has no {below}/average_l0_*/params.npz")
    return sorted(found)


def select_percentile(found: list[Candidate], percentile: float) -> Candidate:
    """Index `min(n - 1, int(n * percentile))` by ascending L0: 0.0 is the sparsest."""
    ordered = sorted(found)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percentile))]


def select_target_l0(found: list[Candidate], target_l0: float) -> Candidate:
    """The candidate of nearest L0; of two equally near, the sparser."""
    return min(sorted(found), key=lambda candidate: abs(candidate.average_l0 - target_l0))


def read(root: str, candidate: Candidate, layer: int) -> Transcoder:
    """The transcoder of `candidate`, fp32, on the CPU."""
    if Path(root).is_dir():
        path = Path(root) / candidate.path / "params.npz"
    else:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(root, f"{candidate.path}/params.npz"))
    return read_npz(path, layer)


def read_npz(path: Path, layer: int) -> Transcoder:
    """Reads one params.npz; pickled arrays are refused, every shape is checked."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in KEYS if key not in arrays.files]
            if missing:
                raise ModelError(f"{path}: lacks {', '.join(missing)}; found {', '.join(arrays.files)}")
            loaded = {key: arrays[key] for key in KEYS}
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except ModelError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path}: not a readable npz of plain arrays ({error})") from None
    for key, array in loaded.items():
        if array.dtype.kind != "f":
            raise ModelError(f"{path}: {key} has dtype {array.dtype}, expected floating point")
        if array.ndim != (2 if key.startswith("W") else 1):
            raise ModelError(f"{path}: {key} has shape {array.shape}")
    tensors = {key: torch.from_numpy(array.astype(np.float32)) for key, array in loaded.items()}
    config = path.with_name("config.json")
    taps = Taps(*json.loads(config.read_text())["taps"]) if config.is_file() else GEMMA_SCOPE_TAPS
    try:
        return Transcoder(**tensors, layer=layer, taps=taps)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def write(transcoder: Transcoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes params.npz and config.json (taps and `facts`) under `folder`, npz last and by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"layer": transcoder.layer, "taps": list(transcoder.taps), **facts}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    b_dec = transcoder.b_dec if transcoder.b_dec is not None else torch.zeros(transcoder.d_model)
    arrays = {key: b_dec if key == "b_dec" else getattr(transcoder, key) for key in KEYS}
    beside = folder / f"params.{os.getpid()}.tmp.npz"
    np.savez(beside, **{key: tensor.detach().cpu().float().numpy() for key, tensor in arrays.items()})
    beside.rename(folder / "params.npz")


def _local_names(root: Path, below: str) -> list[str]:
    folder = root / below
    return [path.parent.name for path in folder.glob("average_l0_*/params.npz")] if folder.is_dir() else []


def _hub_names(repository: str, below: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        tree = list(HfApi().list_repo_tree(repository, path_in_repo=below))
    except EntryNotFoundError:
        return []
    return [Path(entry.path).name for entry in tree]
