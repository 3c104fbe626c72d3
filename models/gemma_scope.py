"""Base transcoders in Gemma Scope's layout: `layer_{L}/{width}/average_l0_{N}/params.npz`.

In: a local folder or a hub repository. Out: a layer's candidates, the one selected by a percentile or a target L0, and
its `Transcoder`; also writes transcoders in this layout. For transcoders trained here, a `config.json` next to
params.npz names the taps; without it they are Gemma Scope's.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import replacing
from models.errors import ModelError
from models.hub import cached_snapshot, hub_errors
from models.transcoder import Transcoder, read_config, write_config
from sites import Site

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_L0_FILE = re.compile(r"(average_l0_(\d+(?:\.\d+)?))/params\.npz")


@dataclass(frozen=True, order=True)
class Candidate:
    """One published base transcoder: its mean L0, and its folder relative to the root."""

    average_l0: float
    path: str


def candidate_at(path: str) -> Candidate:
    """The candidate whose folder this is; the inverse of `Candidate.path`."""
    return Candidate(float(path.rpartition("average_l0_")[2]), path)


def width_label(width: int | str) -> str:
    """`16k` -> `width_16k`, 2304 -> `width_2304`."""
    return f"width_{width}"


def candidates(root: str, site: Site, width: int | str) -> list[Candidate]:
    """The base transcoders of a site and width, by ascending L0.

    `root` is a local folder or a hub repository. If there are none, raises ModelError and says what exists instead.
    """
    below = f"{site.published_folder}/{width_label(width)}"
    matches = [_L0_FILE.fullmatch(file) for file in _files(root, below)]
    available = [Candidate(float(match[2]), f"{below}/{match[1]}") for match in matches if match]
    if not available:
        widths = {file.partition("/")[0] for file in _files(root, site.published_folder)}
        place, listed = site.published_folder, widths
        if not widths:
            place, listed = "the top folder", {file.partition("/")[0] for file in _files(root, "")}
        raise ModelError(
            f"transcoders.source: {root} has no {below}/average_l0_*/params.npz; "
            f"{place} has {', '.join(sorted(listed)[:32]) or 'none at all'}"
        )
    return sorted(available)


def select_percentile(available: list[Candidate], percentile: float) -> Candidate:
    """Index `min(n - 1, int(n * percentile))` by ascending L0: 0.0 is the sparsest."""
    ordered = sorted(available)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percentile))]


def select_target_l0(available: list[Candidate], target_l0: float) -> Candidate:
    """The candidate with the nearest L0; of two equally near ones, the sparser."""
    return min(sorted(available), key=lambda candidate: abs(candidate.average_l0 - target_l0))


def select(available: list[Candidate], percentile: float | None, target_l0: float | None) -> Candidate:
    """The candidate at that percentile; if it is None, the one nearest to `target_l0`."""
    if percentile is not None:
        return select_percentile(available, percentile)
    assert target_l0 is not None
    return select_target_l0(available, target_l0)


def read(root: str, candidate: Candidate, site: Site) -> Transcoder:
    """The transcoder of `candidate`, fp32, on the CPU. Raises ModelError if it cannot be fetched or read."""
    if Path(root).is_dir():
        return read_npz(Path(root) / candidate.path / "params.npz", site)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with hub_errors("transcoders.source", root):
            path = hf_hub_download(root, f"{candidate.path}/params.npz")
    except EntryNotFoundError:
        raise ModelError(f"transcoders.source: {root} has no {candidate.path}/params.npz") from None
    return read_npz(Path(path), site)


def read_npz(path: Path, site: Site) -> Transcoder:
    """Reads one params.npz as the transcoder of `site`; pickled arrays are refused. If there is a config.json next to
    it, that determines the kind of site.

    Raises ModelError if the file is missing or truncated or lacks a key, or if a shape, a dtype, a value or the
    config.json is wrong.
    """
    arrays = _arrays(path)
    for key, array in arrays.items():
        if array.dtype.kind != "f":
            raise ModelError(f"{path}: {key} has dtype {array.dtype}, expected floating point")
        if array.ndim != (2 if key.startswith("W") else 1):
            kind = "a matrix" if key.startswith("W") else "a vector"
            raise ModelError(f"{path}: {key} has shape {array.shape}, expected {kind}")
        if not np.isfinite(array).all():
            raise ModelError(f"{path}: {key} has values that are not finite")
    config = path.with_name("config.json")
    if config.is_file():
        layer, site = site.layer, read_config(config)
        if site.layer != layer:
            raise ModelError(f"{path}: made for layer {site.layer}, but found in the folder of layer {layer}")
    tensors = {key: torch.from_numpy(array.astype(np.float32)) for key, array in arrays.items()}
    try:
        return Transcoder(**tensors, site=site)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def write(transcoder: Transcoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes config.json (layer, taps and `facts`) and then params.npz to `folder`, each by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "config.json", transcoder, facts)
    b_dec = transcoder.b_dec if transcoder.b_dec is not None else torch.zeros(transcoder.d_out)
    arrays = {key: b_dec if key == "b_dec" else getattr(transcoder, key) for key in KEYS}
    with replacing(folder / "params.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{key: tensor.detach().cpu().float().numpy() for key, tensor in arrays.items()})  # type: ignore[arg-type]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ModelError(f"{path}: one array, expected an npz of {', '.join(KEYS)}")
        with loaded:
            missing = [key for key in KEYS if key not in loaded.files]
            if missing:
                raise ModelError(f"{path}: lacks {', '.join(missing)}; found {', '.join(loaded.files) or 'nothing'}")
            return {key: loaded[key] for key in KEYS}
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except ModelError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(f"{path}: not a readable npz of plain arrays ({error})") from None


def _files(root: str, below: str) -> list[str]:
    """Paths, relative to `below`, of every params.npz under it in a local folder or a hub repository."""
    if Path(root).is_dir():
        folder = Path(root) / below
        return [path.relative_to(folder).as_posix() for path in folder.rglob("params.npz")]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with hub_errors("transcoders.source", root):
            tree = HfApi().list_repo_tree(root, path_in_repo=below or None, recursive=True)
            files = [entry.path for entry in tree if entry.path.endswith("/params.npz")]
    except EntryNotFoundError:
        return []
    except ModelError:
        cached = cached_snapshot(root)  # offline, use what an earlier run downloaded
        if cached is None:
            raise
        return _files(str(cached), below)
    return [file.removeprefix(f"{below}/") for file in files]
