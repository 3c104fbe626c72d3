"""The command line: `python -m jobs COMMAND`, each with `--help`.

In: arguments. Out: an exit status: 0 done, 1 some trials or cells failed, 2 invalid request, 130 interrupted.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cluster import environment

if TYPE_CHECKING:
    from jobs.study.context import Context

environment.prepare()

INTERRUPTED = 130

app = typer.Typer(
    name="python -m jobs",
    help="Sweeps of delta transcoders: find what finetuning changed in a model's MLPs, splice it in and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(help="A settings file, or a preset: quickstart, tiny, smollm2, gemma2_2b.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override those in the file.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="A running Ray cluster: auto, HOST:PORT on a node, ray://HOST:PORT from outside; default: its own."
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Join a cluster that others can use without a token.")]
DeltaTarget = Annotated[str | None, typer.Option(help="change or residual; default: the first of deltas.targets.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete this sweep's earlier results and start over.")]


def _context(config: str, overrides: list[str] | None) -> Context:
    """What a command is given; a wrong request is refused before seconds of imports."""
    from search_spaces.load import load

    settings = load(config, overrides or [])
    from jobs.study.context import Context

    return Context(settings)


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

    app.command(name, help=help)(command)


_stage_command("sweep", "Run the whole study; finished work is kept.")
_stage_command("data", "Run the study up to and including the data.")
_stage_command("lora", "Run the study up to and including the finetuned model.")
_stage_command("transcoders", "Run the study up to and including the base transcoders.")
_stage_command("deltas", "Run the study up to and including the delta transcoders.")
_stage_command("evaluate", "Run the study up to and including the evaluation cells.")
_stage_command("report", "Run the study up to and including the report.")


@app.command()
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

    _print_rows(plan_rows(_context(config, overrides), measured, gpus))


@app.command()
def status(config: Config, overrides: Overrides = None) -> None:
    """Print what a sweep has done and what is left to do."""
    from jobs.commands.plan import status_rows

    _print_rows(status_rows(_context(config, overrides)))


@app.command()
def track(config: Config, overrides: Overrides = None) -> None:
    """Send a sweep's results from disk to MLflow: after a server outage, or to another server. Sends nothing twice."""
    from jobs.commands.track import track as send

    send(_context(config, overrides))


@app.command()
def doctor(root: Annotated[str, typer.Option(help="The storage root.")] = "mlruns") -> None:
    """Check this machine: packages, devices, models, storage."""
    from jobs.commands.doctor import OPTIONAL, examine

    findings = examine(root)
    _print_rows([(name, ("" if good else "problem: ") + found) for name, found, good in findings])
    if not all(good for name, _, good in findings if not name.startswith(OPTIONAL)):
        raise typer.Exit(1)


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="JSON lines of {input, target, generation, label}; label is optional.")],
    behaviours: Annotated[str, typer.Option(help="Settings whose evaluate.behaviours are asked.")] = "quickstart",
    by: Annotated[str, typer.Option(help="The column to group by.")] = "label",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """The rates of behaviours in a file of generations, with Wilson 95% intervals."""
    from evaluators.measures.behaviours import read_behaviours
    from evaluators.measures.scoring import score_file
    from jobs.commands.show import show_scores
    from search_spaces.load import load

    groups = score_file(file, read_behaviours(load(behaviours, []).evaluate.behaviours), by)
    if as_json:
        print(json.dumps(groups))
        return
    show_scores(by, groups)


@app.command()
def probe(
    config: Config,
    prompt: Annotated[str, typer.Option(help="The prompt to give the model.")],
    overrides: Overrides = None,
    target: Annotated[str | None, typer.Option(help="The answer to score; default: the finetuned model's own.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to splice, repeatable; default: all swept.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Another strength to try, repeatable.")] = None,
    deltas: DeltaTarget = None,
    percentile: Annotated[float | None, typer.Option(help="Which base; default: the evaluated one.")] = None,
    d_new: Annotated[int | None, typer.Option("--d-new", help="Which delta; default: the evaluated one.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many next tokens and features to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """One prompt under raw, no_delta, full and any alpha: CE, next tokens, output, active features."""
    from evaluators.measures.probe import probe as run
    from jobs.commands.finished import Asked, asked, combination, load_bridge, load_sites
    from models.bridge import device_of

    context = _context(config, overrides)
    model = load_bridge(context)
    sites = load_sites(context, layer, combination(context, Asked(deltas, percentile, d_new)), model)
    sites = [site.to(device_of(model)) for site in sites]
    row = asked(context, prompt, target or "")
    found = run(model, row, sites, alpha or [], top=top, limits=context.limits)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    from jobs.commands.show import show_probe

    show_probe(found)


@app.command()
def chat(
    config: Config,
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 64,
    alpha: Annotated[
        float | None, typer.Option(help="Talk to the model with its deltas spliced in at this strength; 0 is no delta.")
    ] = None,
    deltas: DeltaTarget = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to splice, repeatable; default: all.")] = None,
) -> None:
    """Talk to the finetuned model, one request per line."""
    from jobs.commands.chat import chat as run

    run(_context(config, overrides), max_new_tokens, alpha, deltas, layer)


@app.command()
def export(
    config: Config,
    folder: Annotated[str, typer.Option("--to", help="A folder that does not exist yet.")],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option("--format", help="gemma-scope, saelens or circuit-tracer.")] = "saelens",
    alpha: Annotated[float, typer.Option(help="Strength to fold into the delta's decoder.")] = 1.0,
    deltas: DeltaTarget = None,
    percentile: Annotated[float | None, typer.Option(help="Which base; default: the evaluated one.")] = None,
    d_new: Annotated[int | None, typer.Option("--d-new", help="Which delta; default: the evaluated one.")] = None,
    onto_bases: Annotated[
        bool, typer.Option("--onto-bases", help="Fuse change deltas with their layers' bases.")
    ] = False,
) -> None:
    """Write change deltas, or bases and residual deltas fused, as one transcoder per layer in another tool's format."""
    from jobs.commands import finished

    context, asked = _context(config, overrides), finished.Asked(deltas, percentile, d_new)
    for path in finished.export(context, kind, Path(folder), asked, alpha, onto_bases):
        print(path)


@app.command()
def features(
    config: Config,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=1, help="How many features to list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print how few features of the change deltas carry the effect, and which they are."""
    from jobs.commands.few_features import few_features, show

    found = few_features(_context(config, overrides), top)
    print(json.dumps(found)) if as_json else show(found)


@app.command()
def ui(
    root: Annotated[str, typer.Option(help="The storage root.")] = "mlruns",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on loopback.")] = 5000,
    studies: Annotated[bool, typer.Option("--studies", help="Serve the Optuna dashboard instead of MLflow.")] = False,
) -> None:
    """Serve the MLflow UI for this machine's sweeps, on loopback."""
    from jobs.commands.ui import serve

    serve(root, port, studies)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<{max(len(one) for one, _ in rows)}}  {text}")


def main() -> None:
    """Runs a command, and turns its errors into one line and an exit status."""
    from data.rows import DataError
    from jobs.errors import RequestError, WorkFailed
    from models.errors import ModelError
    from search_spaces.load import SettingsError

    environment.install_stop_handlers()
    environment.repeat_stops_until_acknowledged()
    try:
        status = app(standalone_mode=False)  # Typer returns a status if the command raised an exit
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except (RequestError, ModelError, DataError, SettingsError) as error:
        _say(str(error))
        sys.exit(2)
    except WorkFailed as error:
        _say(str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno != 28:
            raise
        _say("the disk is full; free some space and run the same command to continue from here")
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            _say(error.format_message() if hasattr(error, "format_message") else str(error))
            sys.exit(2)
        raise
    if status == INTERRUPTED:
        environment.acknowledge_stop()
        _say("stopped; run the same command to continue from here")
        # Everything is cleaned up. A full interpreter shutdown, with Ray's threads cut short by an interrupt, now and
        # then ends in a segmentation fault.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    sys.exit(status or 0)


def _say(text: str) -> None:
    print(f"error: {text}" if not text.startswith("stopped") else text, file=sys.stderr)
