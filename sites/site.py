"""A site: one place in a model where a delta can be trained and spliced in.

In: a layer and a kind. Out: a key, ordered as in the forward pass, with a label and a folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sites.kinds import KINDS, MLP, Kind


@dataclass(frozen=True, order=True)
class Site:
    """The key of every mapping over places in a model; sorts by layer, then by place within the block."""

    layer: int
    kind: Kind = MLP

    @property
    def label(self) -> str:
        """`8` for an MLP, `8.qkv` for other kinds; the inverse of `parse`."""
        return self._name(f"{self.layer}")

    @property
    def folder(self) -> str:
        """`layer_08`, `layer_08.qkv`."""
        return self._name(f"layer_{self.layer:02d}")

    @property
    def key(self) -> int | str:
        """The site in JSON files: the layer for an MLP, the label for other kinds; the inverse of `parse`."""
        return self.layer if self.kind.name == MLP.name else self.label

    @property
    def published_folder(self) -> str:
        """`layer_8`, as Gemma Scope and SAELens name folders."""
        return f"layer_{self.label}"

    @property
    def words(self) -> str:
        """`the MLP of layer 8`."""
        return f"{self.kind.words} of layer {self.layer}"

    @property
    def reads(self) -> str:
        """The full name of the hook that holds x."""
        return f"blocks.{self.layer}.{self.kind.reads}"

    def writes(self, available: Collection[str]) -> tuple[str, ...]:
        """The full names of the hooks that hold y in a model that has the hooks `available`."""
        hooks = []
        for alternatives in self.kind.at or [(name,) for name in self.kind.writes]:
            names = [f"blocks.{self.layer}.{name}" for name in alternatives]
            hooks.append(next((name for name in names if name in available), names[-1]))
        return tuple(hooks)

    @classmethod
    def parse(cls, name: str | int) -> Site:
        """The site of a label, a folder or a key; raises ValueError for anything else."""
        text = str(name)
        layer, _, kind = text.removeprefix("layer_").partition(".")
        if not layer.isascii() or not layer.isdigit() or (kind or MLP.name) not in KINDS:
            raise ValueError(f"{text!r} is not the name of a site, such as 8 or layer_08")
        return cls(int(layer), KINDS[kind or MLP.name])

    def _name(self, number: str) -> str:
        return number if self.kind.name == MLP.name else f"{number}.{self.kind.name}"


def mlp_sites(layers: Iterable[int], kind: Kind = MLP) -> list[Site]:
    """The MLPs of these layers."""
    return [Site(layer, kind) for layer in layers]
