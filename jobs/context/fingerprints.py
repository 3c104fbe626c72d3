"""Hashes of a model's files, which are part of the keys of results.

In: a folder, a GGUF file, or a hub repository in the local cache. Out: name and SHA-256 of every file that transformers
or PEFT reads there; other files do not matter. A large file is read once: its hash is cached with its size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from data.files import replacing
from models.adapters import ADAPTER_WEIGHTS
from models.gguf_files import is_gguf
from models.hub import snapshot_of

CACHE = "fingerprints.json"
"""Under the storage root's `models/`."""
READ = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Stamp = tuple[str, int, int, int]
_known: dict[Stamp, str] = {}
_read_from: set[Path] = set()


def fingerprint(source: str, revision: str | None, models: Path) -> list[list[str]] | None:
    """(name, SHA-256) of a model's files; None if `source` is neither a path nor in the hub's cache. Caches hashes in
    `models`."""
    with contextlib.suppress(OSError):
        if (files := _files(source, revision)) is not None:
            return [[path.name, hash_of(path, models)] for path in files]
    return None


def stamps(source: str, revision: str | None) -> list[list[object]] | None:
    """(path, size, times) of the same files, without reading them."""
    with contextlib.suppress(OSError):
        if (files := _files(source, revision)) is not None:
            return [list(_stamp(path)) for path in files]
    return None


def files_read(folder: Path) -> list[Path]:
    """The files that define a model or an adapter."""
    names = [name for name in (*READ, ADAPTER_WEIGHTS) if (folder / name).is_file()]
    names += sorted(str(path.relative_to(folder)) for path in folder.glob("additional_chat_templates/*.jinja"))
    named = _named_weights(folder)
    if named is not None and (folder / named).is_file():
        names.append(named)
    elif (folder / SINGLE).is_file():  # transformers prefers it to an index
        names.append(SINGLE)
    elif (folder / INDEX).is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            names += [INDEX, *(name for name in sorted(shards) if (folder / name).is_file())]
    return [folder / name for name in names]


def _named_weights(folder: Path) -> str | None:
    """The weights file that config.json names, if any."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
        return name if isinstance(name, str) else None
    return None


def hash_of(path: Path, models: Path) -> str:
    """A file's SHA-256, cached under `models`."""
    cache, key = models / CACHE, _stamp(path)
    if key not in _known and cache not in _read_from:
        _read_from.add(cache)
        with contextlib.suppress(OSError, ValueError, TypeError):
            _known.update({tuple(stamp): digest for *stamp, digest in json.loads(cache.read_text()) if len(stamp) == 4})
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        _keep(cache)
    return _known[key]


def _files(source: str, revision: str | None) -> list[Path] | None:
    """The files that define a model, if it is here."""
    if is_gguf(source) and Path(source).is_file():
        return [Path(source)]
    folder = Path(source) if Path(source).is_dir() else snapshot_of(source, revision)
    return None if folder is None else files_read(folder)


def _stamp(path: Path) -> Stamp:
    """Includes ctime, because copying programs reset mtime but not ctime."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _keep(cache: Path) -> None:
    """Best effort: without the cache, files are hashed again."""
    with contextlib.suppress(OSError):
        if cache.parent.parent.is_dir():
            cache.parent.mkdir(exist_ok=True)
            with replacing(cache) as temporary:
                temporary.write_text(json.dumps([[*key, digest] for key, digest in sorted(_known.items())]))
