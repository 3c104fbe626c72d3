"""One self-contained HTML page out of sections of figures, tables and sentences.

In: `Section`s. Out: the text of an HTML document that loads nothing: pictures are data URIs, there is no script, and
its content policy forbids requests. Readable on a phone and in dark mode.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluators.report import figures
from evaluators.report.findings import Findings, number, with_interval

LONG_TABLE = 12  # rows; longer ones are folded away until opened
PIXELS_PER_INCH = 100  # of a figure on the page, so that text has one size in all of them
PLAIN = ("alpha", "percentile", "d_new", "layer", "target_l0", "lr", "sparsity")  # settings: no fixed decimals
WHOLE = ("n_tokens", "tokens", "seconds")


@dataclass(frozen=True)
class Picture:
    """A PNG, the name of its file without ending, and one sentence on how to read it."""

    name: str
    png: bytes
    title: str
    help: str
    kind: str = "picture"

    @property
    def width(self) -> int:
        """Pixels across on the page."""
        dots = int.from_bytes(self.png[16:20], "big")  # the PNG header's width
        return round(dots / figures.DPI * PIXELS_PER_INCH)

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Gallery:
    """Small pictures side by side."""

    pictures: Sequence[Picture]
    kind: str = "gallery"


class Link(NamedTuple):
    """Text that leads elsewhere."""

    text: str
    href: str


@dataclass(frozen=True)
class Table:
    """Header and rows of text with one sentence on how to read them; `marks` are CSS classes of the rows."""

    title: str
    help: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    marks: Sequence[str] = ()
    wide_text: bool = False
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Sentences:
    """Findings under their headings."""

    findings: Sequence[Findings]
    kind: str = "sentences"


class Span(NamedTuple):
    """A piece of text: how dark its background is, from 0 to 1, a tooltip, and whether it is marked as different."""

    text: str
    shade: float = 0.0
    tip: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Texts:
    """A table whose cells are texts with shaded or marked pieces."""

    title: str
    help: str
    header: Sequence[str]
    rows: Sequence[Sequence[Sequence[Span]]]
    kind: str = "texts"


Block: TypeAlias = Picture | Gallery | Table | Texts | Sentences


@dataclass(frozen=True)
class Section:
    """A heading, a short introduction and what stands under it."""

    anchor: str
    title: str
    intro: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def picture(name: str, figure: Figure, title: str, help: str) -> Picture:
    for axes in figure.axes:
        axes.set_title(axes.get_title(), y=1)  # without y, each draw measures ticks to find where the title fits
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # savefig would lay the figure out and draw it twice
    return Picture(name, buffer.getvalue(), title, help)


def table_block(frame: pd.DataFrame, columns: Mapping[str, str], title: str, help: str) -> Table:
    """A `Table` of some columns of a frame: `{column: header}`; a column with `_low` and `_high` shows its interval.

    Columns that the frame lacks, or that are empty throughout, are left out. Long tables are folded.
    """
    shown = {name: head for name, head in columns.items() if name in frame and frame[name].notna().any()}
    rows: list[list[str | Link]] = [[_cell(row, name) for name in shown] for _, row in frame.iterrows()]
    return Table(title, help, list(shown.values()), rows, folded=len(rows) > LONG_TABLE)


def render(title: str, sections: Sequence[Section], pages: Sequence[Link] = ()) -> str:
    """The whole page; `pages` lie beside it. Text is escaped by the template, so generated text cannot add markup."""
    return template("page.html.jinja").render(title=title, sections=sections, pages=pages)


def template(name: str) -> Template:
    """A template of this folder; whatever is put into it is escaped, and a name that it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _cell(row: pd.Series, name: str) -> str:
    value: Any = row[name]
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "-"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if f"{name}_low" in row:
        return with_interval(row, name)
    if name in WHOLE:
        return f"{value:,.0f}"
    if isinstance(value, (int, np.integer)):
        return str(value)
    return f"{value:.4g}" if name in PLAIN or name.startswith("lora.") else number(value)
