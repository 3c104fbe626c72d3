"""Commands that run a study, say what it would do or has done, and check the machine that it runs on.

In: a settings file and overrides. Out: results on disk and in MLflow, lines on the terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import Address, Config, Fresh, Insecure, Overrides, context_of
from jobs.cluster import environment

commands = typer.Typer()


def _stage_command(name: str, help: str) -> None:
    def command(
        config: Config,
        overrides: Overrides = None,
        address: Address = None,
        insecure: Insecure = False,
        fresh: Fresh = False,
    ) -> None:
        from search_spaces.load import load

        environment.prepare(address)
        settings = load(config, overrides or [])  # a wrong request is refused before seconds of imports
        from jobs.study.context import Context
        from jobs.study.sweep import run_sweep

        if address and address.startswith("ray://"):
            from jobs.cluster.submission import run_there

            raise typer.Exit(run_there(address, name, config, overrides or [], fresh, insecure))
        until = "report" if name == "sweep" else name
        context = Context(settings, address=address, insecure=insecure)
        run_sweep(context, until=until, fresh=fresh)

    commands.command(name, help=help)(command)


_stage_command("sweep", "Run the whole study; finished work is kept.")
_stage_command("data", "Run the study up to and including the data.")
_stage_command("lora", "Run the study up to and including the finetuned model.")
_stage_command("transcoders", "Run the study up to and including the base transcoders.")
_stage_command("deltas", "Run the study up to and including the delta transcoders.")
_stage_command("evaluate", "Run the study up to and including the evaluation cells.")
_stage_command("report", "Run the study up to and including the report.")


@commands.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Also forecast for this many workers.", min=1)] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Take costs from this sweep's folder; default: its own.")
    ] = None,
) -> None:
    """Print what a sweep would do: trials, cells, disk, bases, and its time at measured costs. Runs nothing."""
    from jobs.commands.plan import plan_rows

    _print_rows(plan_rows(context_of(config, overrides), measured, gpus))


@commands.command()
def status(config: Config, overrides: Overrides = None) -> None:
    """Print what a sweep has done and what is left to do."""
    from jobs.commands.plan import status_rows

    _print_rows(status_rows(context_of(config, overrides)))


@commands.command()
def track(config: Config, overrides: Overrides = None) -> None:
    """Send a sweep's results from disk to MLflow: after a server outage, or to another server. Sends nothing twice."""
    from jobs.commands.track import track as send

    send(context_of(config, overrides))


@commands.command()
def doctor(root: Annotated[str, typer.Option(help="The storage root.")] = "mlruns") -> None:
    """Check this machine: packages, devices, models, storage."""
    from jobs.commands.doctor import OPTIONAL, examine

    findings = examine(root)
    _print_rows([(name, ("" if good else "problem: ") + found) for name, found, good in findings])
    if not all(good for name, _, good in findings if not name.startswith(OPTIONAL)):
        raise typer.Exit(1)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<{max(len(one) for one, _ in rows)}}  {text}")
