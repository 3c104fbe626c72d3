"""Commands that run a sweep, show what it would do or has done, and check the machine.

In: a settings file and overrides. Out: results on disk and in MLflow, lines on the terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import Address, Config, Fresh, Insecure, Overrides, context_of
from jobs.cluster import environment

commands = typer.Typer()


@commands.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    insecure: Insecure = False,
    fresh: Fresh = False,
    seeds: Annotated[
        str | None,
        typer.Option(help="Run a sweep for each of these seeds (0,1,2), named NAME-s0 and so on, and compare them."),
    ] = None,
) -> None:
    """Run the whole sweep; what is finished already is not run again."""
    if seeds is None:
        _run("sweep", config, overrides or [], address, insecure, fresh)
        return
    environment.prepare(address)
    from jobs.commands.seeds import run_seeds, settings_of

    settings = settings_of(config, overrides or [], seeds)
    if address and address.startswith("ray://"):
        raise typer.Exit(_submit("sweep", config, overrides or [], address, insecure, fresh, seeds))
    run_seeds(settings, address=address, insecure=insecure, fresh=fresh)


def _stage_command(name: str, help: str) -> None:
    def command(
        config: Config,
        overrides: Overrides = None,
        address: Address = None,
        insecure: Insecure = False,
        fresh: Fresh = False,
    ) -> None:
        _run(name, config, overrides or [], address, insecure, fresh)

    commands.command(name, help=help)(command)


def _run(name: str, config: str, overrides: list[str], address: str | None, insecure: bool, fresh: bool) -> None:
    """Runs the sweep up to a stage, here or as a job on the cluster."""
    from search_spaces.load import load

    environment.prepare(address)
    settings = load(config, overrides)  # invalid settings are rejected before the slow imports
    if address and address.startswith("ray://"):
        raise typer.Exit(_submit(name, config, overrides, address, insecure, fresh))
    from jobs.context.context import Context
    from jobs.sweep.sweep import run_sweep

    until = "report" if name == "sweep" else name
    run_sweep(Context(settings, address=address, insecure=insecure), until=until, fresh=fresh)


def _submit(
    name: str,
    config: str,
    overrides: list[str],
    address: str,
    insecure: bool,
    fresh: bool,
    seeds: str | None = None,
) -> int:
    """Runs the same command as a job on the cluster; returns its exit status."""
    from jobs.cluster.submission import run_there

    options = [*(["--fresh"] if fresh else []), *(["--seeds", seeds] if seeds is not None else [])]
    return run_there(address, name, config, overrides, options, insecure)


_stage_command("data", "Run the sweep until the data is ready.")
_stage_command("lora", "Run the sweep until the finetuned model is ready.")
_stage_command("transcoders", "Run the sweep until the base transcoders are ready.")
_stage_command("deltas", "Run the sweep until the delta transcoders are trained.")
_stage_command("evaluate", "Run the sweep until the evaluation cells are computed.")
_stage_command("report", "Run the sweep until the report is written.")


@commands.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Also forecast for this many workers.", min=1)] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Forecast from the costs in this sweep's folder; default: CONFIG's own.")
    ] = None,
) -> None:
    """Print how many trials, cells and base transcoders a sweep has, and the disk and time it takes; runs nothing."""
    from jobs.commands.plan import plan_rows

    _print_rows(plan_rows(context_of(config, overrides), measured, gpus))


@commands.command()
def status(config: Config, overrides: Overrides = None) -> None:
    """Print what a sweep has done and what is left to do."""
    from jobs.commands.status import status_rows

    _print_rows(status_rows(context_of(config, overrides)))


@commands.command()
def verify(config: Config, overrides: Overrides = None) -> None:
    """Read a sweep's files and list those that are damaged, missing, edited or added; exit status 1 if any are."""
    from jobs.commands.verify import verify as run

    run(context_of(config, overrides))


@commands.command()
def track(config: Config, overrides: Overrides = None) -> None:
    """Send MLflow the results of a sweep that it lacks, after an outage or to fill another server."""
    from jobs.commands.track import track as send

    send(context_of(config, overrides))


@commands.command()
def doctor(root: Annotated[str, typer.Option(help="The storage root.")] = "mlruns") -> None:
    """Check this machine: packages, devices, models, storage, and whether GPUs compute correctly (20 seconds)."""
    from jobs.commands.doctor import OPTIONAL, examine

    findings = examine(root)
    _print_rows([(name, ("" if good else "problem: ") + finding) for name, finding, good in findings])
    if not all(good for name, _, good in findings if not name.startswith(tuple(OPTIONAL))):
        raise typer.Exit(1)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<{max(len(label) for label, _ in rows)}}  {text}")
