"""Commands that read the results of finished sweeps: texts and figures on the terminal, exports, web pages.

In: a settings file, or files of results. Out: tables on the terminal or JSON, and files for other tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import (
    Config,
    DeltaTarget,
    Only,
    Overrides,
    Percentile,
    Width,
    Without,
    check_strengths,
    context_of,
)
from jobs.errors import RequestError

commands = typer.Typer()


@commands.command()
def score(
    file: Annotated[str, typer.Argument(help="JSON lines of {input, target, generation, label}; label is optional.")],
    behaviours: Annotated[
        str, typer.Option(help="A preset or settings file; its evaluate.behaviours are used.")
    ] = "quickstart",
    by: Annotated[str, typer.Option(help="The column to group by.")] = "label",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print how often each behaviour occurs in a file of generated texts, with Wilson 95% intervals."""
    from evaluators.measures.behaviours import read_behaviours
    from evaluators.measures.scoring import score_file
    from jobs.commands.show import show_scores
    from search_spaces.load import SettingsError, load

    try:
        settings = load(behaviours, [])
    except SettingsError as error:
        raise RequestError(f"--behaviours {behaviours}: {error}") from None
    groups = score_file(file, read_behaviours(settings.evaluate.behaviours), by)
    if as_json:
        print(json.dumps(groups))
        return
    show_scores(by, groups)


@commands.command()
def look(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A sweep's settings file or preset; or only overrides: model.source=A model.finetuned=B "
            "data.rows_file=F data.text_train_file=T.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="At most this many rows, equally many of each label.")] = 60,
    html: Annotated[Path | None, typer.Option(help="Path of the page; default: in ROOT/looks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Take a first look at two models: what changed, where, and what they say differently. It trains nothing."""
    from rich.console import Console

    from jobs.commands.look import Request
    from jobs.commands.look import look as run
    from jobs.progress import Progress

    config, overrides = None, arguments or []
    if overrides and ("=" not in overrides[0] or Path(overrides[0]).is_file()):
        config, overrides = overrides[0], overrides[1:]
    context = context_of(config, overrides)
    if as_json:
        context.progress = Progress(Console(stderr=True))
    if config is None and context.settings.model.finetuned is None:
        raise RequestError(
            "give two models, as in `deltascope look model.source=BASE model.finetuned=FINETUNED`, or the CONFIG of a "
            "sweep that has a finetuned model"
        )
    report = run(Request(context, config, rows, html))
    if as_json:
        print(json.dumps(report, ensure_ascii=False))


@commands.command()
def probe(
    config: Config,
    prompt: Annotated[str, typer.Option(help="The prompt to give the model.")],
    overrides: Overrides = None,
    target: Annotated[str | None, typer.Option(help="The answer to score; default: the finetuned model's own.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to splice, repeatable; default: all swept.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Also run at this strength, repeatable.")] = None,
    deltas: DeltaTarget = None,
    without: Without = None,
    only: Only = None,
    percentile: Percentile = None,
    d_new: Width = None,
    top: Annotated[int, typer.Option(min=1, help="How many next tokens and features to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Run one prompt without deltas and with them at any alpha: cross-entropy, next tokens, output, active features."""
    from evaluators.measures.probe import probe as run
    from jobs.commands.feature_choice import FeatureChoice
    from jobs.commands.load import (
        DeltaChoice,
        check_length,
        combination,
        load_bridge,
        load_patches,
        load_rest,
        prompt_row,
    )
    from models.bridge import device_of

    check_strengths(alpha or [])
    chosen = FeatureChoice(without or (), only or ())
    context = context_of(config, overrides)
    model = load_bridge(context)
    deltas_of_sweep = combination(context, DeltaChoice(deltas, percentile, d_new))
    patches = load_patches(context, layer, deltas_of_sweep, model, chosen)
    patches = [patch.to(device_of(model)) for patch in patches]
    rest = None if chosen else load_rest(context, deltas_of_sweep, patches)
    row = prompt_row(context, prompt, target or "")
    check_length(model, row, context.limits.max_new_tokens)
    report = run(model, row, patches, alpha or [], top=top, limits=context.limits, rest=rest)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    from jobs.commands.show import show_probe

    show_probe(report)


@commands.command()
def graph(
    config: Config,
    prompt: Annotated[str, typer.Option(help="The prompt to explain.")],
    overrides: Overrides = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Explain the logit of this token after the prompt; default: the first token at which the two models' "
            "answers differ."
        ),
    ] = None,
    frozen_patterns: Annotated[
        bool, typer.Option("--frozen-patterns/--free-patterns", help="Treat attention patterns as constants.")
    ] = False,
    frozen_norms: Annotated[
        bool, typer.Option("--frozen-norms/--free-norms", help="Treat the norms' denominators as constants.")
    ] = False,
    max_expanded: Annotated[int, typer.Option(min=1, help="Maximum number of nodes that get incoming edges.")] = 64,
    node_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Keep the fewest nodes with this share of the influence.")
    ] = 0.8,
    edge_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Keep the fewest edges with this share of the influence.")
    ] = 0.98,
    out: Annotated[Path | None, typer.Option(help="Output folder; default: graphs in the sweep's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Draw an attribution graph: which delta features, at which positions, lead to the model's answer."""
    if not prompt.strip():
        raise RequestError("--prompt: got an empty text")
    if out is not None and out.exists() and not out.is_dir():
        raise RequestError(f"--out: {out} is a file, must be a folder")
    context = context_of(config, overrides)
    if as_json:
        from rich.console import Console

        from jobs.progress import Progress

        context.progress = Progress(Console(stderr=True))
    from evaluators.measures.graph import GraphOptions
    from jobs.commands.graph import Request
    from jobs.commands.graph import graph as run
    from models.frozen import Frozen

    options = GraphOptions(
        frozen=Frozen(frozen_patterns, frozen_norms),
        max_expanded=max_expanded,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        seed=context.settings.seed,
    )
    described = run(Request(context, prompt, token, options, out))
    if as_json:
        print(json.dumps(described, ensure_ascii=False))


@commands.command()
def chat(
    config: Config,
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 64,
    alpha: Annotated[float | None, typer.Option(help="Splice the deltas in at this strength; 0 is no delta.")] = None,
    deltas: DeltaTarget = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer to splice with --alpha, repeatable; default: all.")
    ] = None,
    without: Without = None,
    only: Only = None,
) -> None:
    """Talk to the finetuned model, one request per line."""
    from jobs.commands.chat import chat as run
    from jobs.commands.feature_choice import FeatureChoice

    features = FeatureChoice(without or (), only or ())
    if features and alpha is None:
        alpha = 1.0
    if alpha is not None:
        check_strengths([alpha])
    elif deltas or layer:
        option = "--deltas" if deltas else "--layer"
        raise RequestError(f"{option}: needs --alpha too; without it no delta is spliced in")
    run(context_of(config, overrides), max_new_tokens, alpha, deltas, layer, features)


@commands.command()
def export(
    config: Config,
    folder: Annotated[str, typer.Option("--to", help="A folder that does not exist yet.")],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option("--format", help="gemma-scope, saelens or circuit-tracer.")] = "saelens",
    alpha: Annotated[float, typer.Option(help="Strength to fold into the delta's decoder.")] = 1.0,
    deltas: DeltaTarget = None,
    without: Without = None,
    only: Only = None,
    percentile: Percentile = None,
    d_new: Width = None,
    onto_bases: Annotated[
        bool, typer.Option("--onto-bases", help="Fuse change deltas with their layers' bases.")
    ] = False,
) -> None:
    """Write the deltas in another tool's format, a transcoder per site; a residual delta is merged with its base."""
    from jobs.commands import export as exporting
    from jobs.commands.feature_choice import FeatureChoice
    from jobs.commands.load import DeltaChoice

    check_strengths([alpha])
    choice, features = DeltaChoice(deltas, percentile, d_new), FeatureChoice(without or (), only or ())
    context = context_of(config, overrides)
    for path in exporting.export(context, kind, Path(folder), choice, alpha, onto_bases, features):
        print(path)


@commands.command()
def features(
    config: Config,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=1, help="How many features to list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print how many change-delta features carry the effect of finetuning, which ones, and which fire together."""
    from jobs.commands.few_features import few_features, show

    report = few_features(context_of(config, overrides), top)
    print(json.dumps(report)) if as_json else show(report)


@commands.command()
def compare(
    sweeps: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Sweeps' names, or folders.")] = None,
    root: Annotated[list[str] | None, typer.Option(help="A storage root, repeatable; default: mlruns.")] = None,
    experiment: Annotated[
        list[str] | None, typer.Option(help="The name of a sweep's experiment in MLflow, repeatable.")
    ] = None,
    tracking: Annotated[str | None, typer.Option(help="MLflow's address; default: mlflow.db in the roots.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write every figure to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Path of the page; default: ROOT/comparisons/NAMES.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compare finished sweeps: settings that differ, numbers side by side, means over seeds, and a plot."""
    from jobs.commands import compare as run
    from jobs.progress import Progress

    roots = root or ["mlruns"]
    comparison = run.compare(run.Sources(sweeps or [], roots, experiment or [], tracking))
    if csv is not None:
        run.write(csv, run.as_csv(comparison), "--csv")
    page = run.write(html or run.page_path(roots[0], comparison), run.as_page(comparison), "--html")
    if as_json:
        print(json.dumps({**run.as_json(comparison), "page": str(page)}, ensure_ascii=False))
        return
    run.show(comparison, Progress().console)
    print(f"comparison: {page}")


@commands.command()
def ui(
    root: Annotated[str, typer.Option(help="The storage root.")] = "mlruns",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on loopback.")] = 5000,
    studies: Annotated[bool, typer.Option("--studies", help="Serve the Optuna dashboard instead of MLflow.")] = False,
) -> None:
    """Serve the MLflow UI for this machine's sweeps, on loopback."""
    from jobs.commands.ui import serve

    serve(root, port, studies)
