"""The tensors of a saved model, under the names by which transformers loads them.

In: a model's folder. Out: names, shapes, dtypes, and single tensors, read only on request. Transformers' own code
decides which files hold the weights and how old names are mapped, so the tensors compared and exchanged here are those
that the model runs with. Other files in the folder do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from data.rows import one_line
from models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of plain weights, by their safetensors names."""


class Place(NamedTuple):
    """Where a tensor is stored: its file, its name there, its shape, and its safetensors dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """A saved model's tensors.

    places: by transformers' name; two names that are tied may share a place. files: those that hold the weights.
    missing: what the architecture needs and the files lack. unused: names in the files that the architecture has no
    place for, which transformers ignores.
    """

    folder: Path
    files: tuple[Path, ...]
    places: dict[str, Place]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, in the dtype of the file. Raises ModelError if one is missing or a file is damaged."""
        with self.reader() as tensor:
            return {name: tensor(name) for name in names}

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """Inside the `with`, a function that reads one tensor by its name; it raises as `read` does."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def tensor(name: str) -> Tensor:
                if (place := self.places.get(name)) is None:
                    raise ModelError(f"{self.folder}: the model's files lack {name}")
                try:
                    if place.file not in opened:
                        opened[place.file] = stack.enter_context(safe_open(place.file, framework="pt"))
                    return opened[place.file].get_tensor(place.name)
                except (OSError, SafetensorError) as error:
                    raise _unreadable(place.file, error) from None

            yield tensor


def open_weights(folder: Path, key: str = "model.source", skeleton: PreTrainedModel | None = None) -> Weights:
    """Finds the tensors of the model in `folder`; `key` is the setting that names it, `skeleton` the empty model.

    Raises ModelError where there are no safetensors weights, or where one of the files is missing or damaged.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    model: Any = build_skeleton(folder, key) if skeleton is None else skeleton
    expected: dict[str, Any] = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in conversions if not isinstance(rule, WeightConverter)]
    files = _weight_files(folder, key, getattr(model.config, "transformers_weights", None))
    places: dict[str, Place] = {}
    unused = []
    for file in files:
        for name, place in places_in(file).items():
            renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
            if converter is not None:
                raise ModelError(
                    f"{key}: {folder} stores {name} in a form that transformers converts while loading (as for a "
                    "mixture of experts), which is not supported"
                )
            if renamed not in expected:
                unused.append(name)
            elif renamed in places:
                raise ModelError(f"{key}: {folder} holds {renamed} twice, also as {name}; save the model again")
            else:
                _check_place(place, expected[renamed].shape, folder, key)
                places[renamed] = place
    for target, origin in model.all_tied_weights_keys.items():
        for name, tied in ((target, origin), (origin, target)):
            if name not in places and tied in places:
                places[name] = places[tied]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # buffers may be left out
    missing = tuple(name for name in parameters if name not in places)
    return Weights(folder, tuple(files), places, missing, tuple(unused))


def _check_place(place: Place, shape: Sequence[int], folder: Path, key: str) -> None:
    """Raises ModelError for a tensor of another shape than config.json describes, or of quantised values."""
    if place.shape != tuple(shape):
        raise ModelError(
            f"{key}: {place.name} in {place.file} has shape {shape_text(place.shape)}, and the config.json in {folder} "
            f"describes {shape_text(shape)}"
        )
    if place.dtype not in DTYPES:
        raise ModelError(
            f"{key}: {place.name} in {place.file} is stored as {place.dtype}, and only weights in {', '.join(DTYPES)} "
            "can be compared: give the model before quantisation, or a copy that was dequantised"
        )


def shape_text(shape: Sequence[int]) -> str:
    """`2 x 3`, for messages."""
    return " x ".join(map(str, shape))


def build_skeleton(folder: Path, key: str = "model.source") -> PreTrainedModel:
    """The model without values: its modules and shapes. Raises ModelError where config.json does not describe one."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(folder, key)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{key}: the config.json in {folder} does not describe a causal LM that transformers can build "
            f"({one_line(error)})"
        ) from None


def load_config(folder: Path, key: str = "model.source") -> Any:
    """The transformers config in a folder. Code that comes with a model is never run. Raises ModelError."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each field of a config can raise an error of its own
        raise ModelError(
            f"{key}: {folder / 'config.json'} cannot be read as a model's config ({one_line(error)})"
        ) from None
    if parts := sorted(type(config).sub_configs):
        raise ModelError(
            f"{key}: {folder} is a model of several parts ({', '.join(parts)}), and only plain language models "
            "are supported"
        )
    return config


def places_in(file: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file by its name there. Raises ModelError for a file that cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Place(file, name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None


def _weight_files(folder: Path, key: str, named: str | None) -> list[Path]:
    """The files that transformers loads, which are either a single one or those of an index."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        resolved, _ = _get_resolved_checkpoint_files(
            str(folder),
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=named,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if (index := folder / INDEX).is_file():
            raise ModelError(f"{key}: {index} cannot be read ({one_line(error)})") from None
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        has = f"only {pickled[0].name}, and pickled weights are not read" if pickled else "none"
        raise ModelError(f"{key}: {folder} needs weights as model.safetensors; it has {has}") from None
    files = [Path(path) for path in resolved or ()]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{key}: {folder / INDEX} names {missing[0]}, which is not there")
    return files


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file} cannot be read as safetensors ({one_line(error, 160)})")
