"""Arguments and options shared by several commands, and the `Context` made from them.

In: the command line. Out: types for Typer's signatures, and a `Context`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.errors import RequestError

if TYPE_CHECKING:
    from jobs.context.context import Context

Config = Annotated[
    str, typer.Argument(help="A settings file, or a preset: quickstart, tiny, smollm2, study, gemma3_270m, gemma2_2b.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override those in the file.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="A running Ray cluster: auto, HOST:PORT on a node, ray://HOST:PORT from outside; default: start one here."
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Join a cluster even if it can be used without a token.")]
DeltaTarget = Annotated[str | None, typer.Option(help="change or residual; default: the first of deltas.targets.")]
Percentile = Annotated[float | None, typer.Option(help="Use the bases of this percentile; default: the evaluated one.")]
Width = Annotated[int | None, typer.Option("--d-new", help="Use deltas of this width; default: the evaluated one.")]
Without = Annotated[
    list[str] | None, typer.Option(help="A feature (L17F042) or group ('group 3') to leave out, repeatable.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="A feature or group to keep, repeatable: all others are off, except those at BOS."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete this sweep's earlier results and start over.")]


def check_strengths(alphas: Iterable[float]) -> None:
    """Raises RequestError, before a model is loaded, for an `--alpha` that is not finite."""
    for alpha in alphas:
        if not math.isfinite(alpha):
            raise RequestError(f"--alpha: got {alpha}, must be a finite number")


def context_of(config: str | None, overrides: list[str] | None) -> Context:
    """The `Context` of a command. Invalid settings are rejected before the slow imports."""
    from search_spaces.load import load

    settings = load(config, overrides or [])
    from jobs.context.context import Context

    return Context(settings)
