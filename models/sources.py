"""Where a base model comes from.

In: `model.source` from the settings. Out: a local folder with `config.json`, safetensors weights and a tokenizer, which
`load_model` turns into a transformers model. To add a kind of source, add a branch to `resolve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import replacing
from data.rows import one_line
from models.errors import ModelError
from models.gguf_files import PACKAGED, check_file, convert, convert_packaged, is_gguf, packaged_files, sha256_of_all
from models.hub import check_hub, hub_errors
from sites import Site

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TINY = "tiny-gemma2"


def check_source(source: str, revision: str | None = None, key: str = "model.source") -> None:
    """Raises ModelError at once, before anything heavy is imported, if `source` is not available; `key` is the setting
    that names it."""
    if source == TINY:
        return
    if source in PACKAGED:
        packaged_files(source, key)
    elif is_gguf(source) and not Path(source).is_dir():
        check_file(Path(source), key)
    elif Path(source).is_dir():
        _refuse_adapter(Path(source), key)
        if key == "model.source" and not (Path(source) / "config.json").is_file():
            raise ModelError(f"{key}: the folder {source} has no config.json, so it is not a saved model")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        names = ", ".join([*PACKAGED, TINY])
        raise ModelError(
            f"{key}: there is no model {source!r}; give a folder, a GGUF file, a hub repository OWNER/NAME, or {names}"
        )
    else:
        check_hub(source, key, revision)


def resolve(
    source: str,
    cache: Path,
    revision: str | None = None,
    seed: int = 0,
    key: str = "model.source",
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """The local folder of `source`; packaged models, GGUF files and tiny models are converted once under `cache`.

    Raises ModelError if the source is not available. `seed` is for the tiny model's random weights, `key` is the
    setting that names the source. `say` is called with a line about each slow step.
    """
    check_source(source, revision, key)
    if source == TINY:
        from models.tiny import build_tiny_gemma2

        return _build_once(cache / f"{TINY}-seed{seed}", lambda folder: build_tiny_gemma2(folder, seed))
    if source in PACKAGED:
        name = f"{source}-{PACKAGED[source].sha256[:8]}"
        return _build_once(cache / name, lambda folder: convert_packaged(source, folder, key, say))
    if is_gguf(source) and not Path(source).is_dir():
        path = Path(source).resolve()
        name = f"{path.stem}-{sha256_of_all([path])[:8]}"
        return _build_once(cache / name, lambda folder: convert(path, folder, key, say))
    if Path(source).is_dir():
        return Path(source).resolve()
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    with hub_errors(key, source):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    _refuse_adapter(folder, key)  # transformers would attach it to the model that the repository may hold, too
    return folder


def _refuse_adapter(folder: Path, key: str) -> None:
    if key == "model.source" and (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{key}: {folder} holds a PEFT adapter (adapter_config.json); give the model that it was trained on here, "
            "and the adapter as model.finetuned"
        )


def repository_of(source: str) -> str | None:
    """The hub repository that a source is, or was made from; None for a folder, a GGUF file and a model that is
    built here."""
    if source in PACKAGED:
        return PACKAGED[source].repository
    if source == TINY or is_gguf(source) or Path(source).is_dir() or source.count("/") != 1:
        return None
    return source


FACTS = {"n_layers": ("num_hidden_layers", "n_layer", "num_layers"), "d_model": ("hidden_size", "n_embd")}
"""Names of these facts in the architectures' config.json."""
HEADS = ("num_attention_heads", "n_head", "num_heads")
_PART = re.compile(
    r"(vision|visual|image|video|audio|speech|text|language|llm|thinker|talker|perceiver|qformer|vq|vit|encoder|decoder"
    r"|backbone)(_\w+)?_(config|cfg)|encoder|decoder|(mm_)?vision_tower"
)
"""Keys of config.json that describe one of several parts of a model."""


def model_facts(folder: Path, key: str = "model.source") -> dict[str, Any]:
    """`n_layers`, `d_model`, `n_heads`, `n_kv_heads`, `d_head` and `architecture`, read from config.json alone; `key`
    is the setting that names the model.

    Raises ModelError if the file is missing, or describes an unsupported model: not a causal LM, multimodal (text and
    images, say), with quantised weights, or in need of its own code.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _check_config(config, folder, key)
        facts: dict[str, Any] = {"architecture": str(config.get("model_type", "unknown"))}
        for fact, names in FACTS.items():
            if (name := next((name_used for name_used in names if name_used in config), None)) is None:
                raise ModelError(f"{key}: {path} lacks {names[0]!r}, so it is not a causal LM")
            facts[fact] = int(config[name])
        heads = int(next((config[name] for name in HEADS if name in config), 1))
        facts["n_heads"], facts["n_kv_heads"] = heads, int(config.get("num_key_value_heads") or heads)
        facts["d_head"] = int(config.get("head_dim") or facts["d_model"] // heads)
        return facts
    except ModelError:  # a ValueError itself
        raise
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{key}: {path} cannot be read as a model's config ({error})") from None


def widths_of(facts: Mapping[str, Any], site: Site) -> tuple[int, int]:
    """d_in and d_out of a site in a model with these facts."""
    queries, keys, d_model = facts["n_heads"] * facts["d_head"], facts["n_kv_heads"] * facts["d_head"], facts["d_model"]
    widths = {"qkv": (d_model, queries + 2 * keys), "o": (queries, d_model), "mlp": (d_model, d_model)}
    return widths[site.kind.name]


def _check_config(config: dict[str, Any], folder: Path, key: str) -> None:
    parts = sorted(name for name, value in config.items() if value and _PART.fullmatch(name))
    if parts:
        raise ModelError(
            f"{key}: {folder} is a model of several parts ({', '.join(parts)} in its config.json), and only plain "
            "language models are supported; save its language model by itself as a causal LM"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{key}: {folder} is an encoder-decoder model, and only causal LMs are supported")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{key}: the config.json in {folder} says that its weights are quantised ({method}), and only plain "
            "weights can be compared: give the model before quantisation, or a copy that was dequantised; "
            "if its weights are plain, remove quantization_config from that file"
        )
    if (multiplier := config.get("residual_multiplier", 1)) != 1:
        raise ModelError(
            f"{key}: the blocks of {folder} multiply what they add to the residual stream by {multiplier} "
            "(residual_multiplier in its config.json), which deltas do not take into account, so it is not supported"
        )
    if config.get("auto_map") and not _is_known(config.get("model_type")):
        raise ModelError(
            f"{key}: {folder} needs code of its own (auto_map in its config.json), and code that comes with a model is "
            "never run"
        )


def _is_known(architecture: str | None) -> bool:
    from transformers import CONFIG_MAPPING

    return architecture in CONFIG_MAPPING


def load_model(
    folder: Path, dtype: torch.dtype, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its tokenizer, with EOS as pad token if it has none.

    Raises ModelError if a file is missing, truncated or does not fit the config, if the files lack a weight
    (transformers would fill it with random numbers), or if the tokenizer has no EOS.
    """
    import transformers
    from safetensors import SafetensorError

    from models.packed import drop_unused

    drop_unused()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"model.source: {folder} cannot be loaded: {one_line(error, 300)}") from None
    model, loading = loaded
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"model.source: the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}")
    return model.to(device).eval(), _within(load_tokenizer(folder), model, folder)


def _within(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, padding with EOS if the model has no row for its pad token, since padding is masked anyway. Raises
    ModelError if it has none for BOS or EOS."""
    rows = model.get_input_embeddings().num_embeddings
    for name in ("bos_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, name)) >= rows:
            raise ModelError(
                f"model.source: the tokenizer of {folder} has {name} {token}, but the model has rows for {rows} tokens "
                "only; give it the tokenizer that it was trained with"
            )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(folder: Path, key: str = "model.source") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. One without BOS, such as Qwen's, starts every text with EOS, as TransformerLens does.

    Raises ModelError where it cannot be loaded or has no EOS.
    """
    tokenizer = read_tokenizer(folder, key)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{key}: the tokenizer of {folder} has no EOS token, which generation needs to stop")
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(folder: Path, key: str = "model.source") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder as it is; code that comes with it is never run. Raises ModelError."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise their own, and some that are only ever Exception
        reason = one_line(error, 300)
        if "trust_remote_code" in reason or _has_own_code(folder):
            raise ModelError(
                f"{key}: the tokenizer in {folder} needs code of its own, and code that comes with a model is never "
                "run; save a tokenizer that transformers has there"
            ) from None
        raise ModelError(f"{key}: the tokenizer in {folder} cannot be loaded: {reason}") from None


def _has_own_code(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError, AttributeError):
        return False


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Builds under a temporary name and renames, so that a killed build leaves nothing that looks finished."""
    if not folder.is_dir():
        try:
            with replacing(folder) as temporary:
                temporary.mkdir(parents=True)
                build(temporary)
        except OSError:
            if not folder.is_dir():  # otherwise another process finished it first
                raise
    return folder
