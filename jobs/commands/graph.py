"""The attribution graph of one prompt: which features of the deltas lead to the model's answer.

In: a finished sweep with change deltas, and a prompt. Out: the graph as a page, as JSON, and as a folder for
circuit-tracer's viewer, and ten lines on the terminal.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.files import replacing
from jobs.commands.feature_choice import grouping_of
from jobs.commands.load import (
    DeltaChoice,
    check_length,
    combination,
    load_bridge,
    load_patches,
    load_rest,
    prompt_row,
)
from jobs.context.context import Context
from jobs.errors import DamagedFileError, RequestError
from jobs.progress import Bar, Progress, clock
from sites import Ground, Site

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evaluators.measures.direct_effects import Place
    from evaluators.measures.graph import Graph, GraphOptions
    from evaluators.measures.single_features import Feature

STRONGEST = 6
"""Features listed on the terminal."""


class Request(NamedTuple):
    """What to explain and how: a prompt; the token to explain (None: the first one at which the two models differ);
    options; and the output folder (None: `graphs` in the sweep's folder)."""

    context: Context
    prompt: str
    token: str | None
    options: GraphOptions
    out: Path | None = None

    @property
    def folder(self) -> Path:
        return self.out or self.context.space.folder / "graphs"

    @property
    def viewed(self) -> Path:
        """The folder that circuit-tracer's viewer is started with."""
        return self.folder / f"{self.name}.circuit-tracer"

    @property
    def name(self) -> str:
        """The files' name: the prompt's words, and a hash that distinguishes similar prompts."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower())[:40].strip("-") or "prompt"
        identity = json.dumps([self.prompt, self.token, self.options])
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}"


def graph(request: Request) -> dict[str, Any]:
    """Computes the graph, writes it and prints a summary. Returns it in our own format.

    Raises RequestError, ModelError or DataError if the sweep has no change deltas, or the prompt cannot be explained.
    """
    from evaluators.measures.graph import attribution_graph
    from evaluators.measures.graph_formats import as_json, with_groups

    started, context = time.monotonic(), request.context
    if "change" not in context.settings.deltas.targets:
        raise RequestError(
            f"the sweep {context.settings.name} has no change deltas, and a graph needs them; add 'change' to "
            "deltas.targets"
        )
    bridge, patches, rest = _spliced(context)
    tokenizer = bridge.tokenizer
    output, next_tokens = _output(request, bridge, patches, rest)
    with _bars(context.progress) as step:
        attribution = attribution_graph(bridge, patches, output, next_tokens, request.options, step)
    seconds = time.monotonic() - started
    facts = _facts(request, attribution, tokenizer, seconds)
    described = as_json(attribution, tokenizer, _title(context), facts, _cards(request))
    described = with_groups(described, grouping_of(context, *combination(context, DeltaChoice("change"))))
    written = _write(request, described, _viewer_files(request, attribution, tokenizer))
    for line in in_lines(described):
        context.progress.line(line)
    context.progress.line(
        f"for circuit-tracer's viewer: circuit-tracer start-server --graph_file_dir {shlex.quote(str(request.viewed))}"
    )
    context.progress.line(f"graph: {written} ({clock(seconds)})")
    return described


def _spliced(context: Context) -> tuple[Any, list[Any], Any]:
    """The bridge, the patches of all change deltas, and the un-finetuned values of changed parameters outside all sites
    (None if the patches leave out a changed site)."""
    from models.bridge import device_of

    bridge, chosen = load_bridge(context), combination(context, DeltaChoice("change"))
    patches = load_patches(context, None, chosen, bridge)
    return bridge, [patch.to(device_of(bridge)) for patch in patches], load_rest(context, chosen, patches)


def _output(request: Request, bridge: Any, patches: list[Any], rest: Any) -> tuple[Any, tuple[int, int]]:
    from evaluators.measures.graph import choose_output, token_output

    row, limits = prompt_row(request.context, request.prompt), request.context.limits
    check_length(bridge, row, 0 if request.token is not None else limits.max_new_tokens)
    if request.token is not None:
        return token_output(bridge, patches, row, request.token, rest)
    return choose_output(bridge, patches, row, limits, rest)


@contextmanager
def _bars(progress: Progress) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows the progress of each part of the work on a bar of its own."""
    opened: dict[str, tuple[Any, Bar]] = {}

    def step(name: str, done: int, total: int) -> None:
        if name not in opened:
            manager = progress.bar("graph", total, name)
            opened[name] = (manager, manager.__enter__())
        bar = opened[name][1]
        bar.advance(done - bar.done)

    try:
        yield step
    finally:
        for manager, _ in reversed(opened.values()):
            manager.__exit__(None, None, None)


def _title(context: Context) -> str:
    chosen = context.settings.model
    finetuned = chosen.finetuned or f"the finetuned model of the sweep {context.settings.name}"
    return f"{finetuned} compared with {chosen.source}"


def _facts(request: Request, attribution: Graph, tokenizer: PreTrainedTokenizerBase, seconds: float) -> dict[str, str]:
    """Settings shown at the end of the page."""
    context, options = request.context, request.options
    sites = context.sites_of("change")
    return {
        "sweep": context.settings.name,
        "prompt": request.prompt,
        "sites": f"{len(sites)}, {'all' if context.is_everything(sites) else 'not all'} that finetuning changed",
        "the spliced model says": repr(tokenizer.decode([attribution.next_tokens[2]])),
        "probability of the explained token": f"{attribution.probability:.3f}",
        "largest number of expanded nodes": str(options.max_expanded),
        "share of influence outside the graph": f"{_missing(attribution):.0%}",
        "checked edges of each sample": str(options.checked),
        "seed": str(options.seed),
        "seconds": f"{seconds:.1f}",
    }


def _missing(attribution: Graph) -> float:
    inside = sum(node.influence for node in attribution.nodes if node.kind != "output")
    return max(0.0, 1 - inside / attribution.total_influence)


def _cards(request: Request) -> Callable[[Place], str]:
    """Links from the graph's folder to the cards in the sweep's report."""
    from evaluators.report.feature_page import PAGE, address

    report = request.context.space.report
    listed: set[tuple[str, int]] = set()
    if (report / "features.csv").is_file() and (report / PAGE).is_file():
        try:
            with (report / "features.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            listed = {(row["layer"], int(row["feature"])) for row in rows if row["target"] == "change"}
        except (KeyError, TypeError, ValueError, csv.Error):
            raise DamagedFileError(report / "features.csv", "is not as the report wrote it") from None
    page = Path(os.path.relpath(report / PAGE, request.folder)).as_posix()

    def card(place: Place) -> str:
        label = place.site.label
        return f"{page}#{address('change', label, place.feature)}" if (label, place.feature) in listed else ""

    return card


def _viewer_files(request: Request, attribution: Graph, tokenizer: PreTrainedTokenizerBase) -> dict[Path, Any]:
    """What circuit-tracer's viewer reads: its list of graphs, the graph, and a file for each feature."""
    from evaluators.measures.graph_formats import SCAN, as_circuit_tracer, feature_files, viewer_list

    context, folder, scan = request.context, request.viewed, f"{SCAN}/{request.name}"
    tracer = as_circuit_tracer(attribution, request.name, tokenizer, scan)
    features = feature_files(attribution, scan, *_card_facts(context, *combination(context, DeltaChoice("change"))))
    return {
        folder / "graph-metadata.json": viewer_list(tracer, f"deltascope-{context.settings.name}"),
        folder / f"{request.name}.json": tracer,
        **{folder / "features" / request.name / name: feature for name, feature in features.items()},
    }


def _card_facts(
    context: Context, ground: Ground, d_new: int
) -> tuple[dict[Feature, dict[str, Any]], dict[Feature, float]]:
    """The cards of these deltas' features, and how often all features fire, as a mean over subsets."""

    def listed(kind: str, key: str) -> Iterator[tuple[Feature, dict[str, Any]]]:
        for cell in context.cells_of(kind):
            if (cell["target"], cell["d_new"]) == (ground.target, d_new):
                yield from (((Site.parse(entry["layer"]), entry["feature"]), entry) for entry in cell[key])

    rates = {
        feature: sum(entry["firing_rate"].values()) / len(entry["firing_rate"])
        for feature, entry in listed("ranking", "features")
    }
    return dict(listed("cards", "cards")), rates


def _write(request: Request, described: dict[str, Any], viewed: dict[Path, Any]) -> Path:
    """Writes the page, our JSON and the viewer's files; returns the page's path."""
    from evaluators.report.graph_page import graph_page

    path = request.folder / f"{request.name}.html"
    values = {path.with_suffix(".json"): described, **viewed}
    texts = {path: graph_page(described)}
    texts |= {file: json.dumps(value, ensure_ascii=False) for file, value in values.items()}
    try:
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--out: {request.folder} cannot be written ({error.strerror})") from None
    return path


def in_lines(graph: dict[str, Any]) -> list[str]:
    """A graph in about ten lines of text, from its JSON."""
    from evaluators.report.graph_page import TRUSTED

    output, tokens, counts, checks = graph["output"], graph["tokens"], graph["counts"], graph["checks"]["correlation"]
    lines = []
    weak = [name for name, correlation in checks.items() if correlation is not None and correlation[0] < TRUSTED]
    if weak:
        frozen = [name for name, is_frozen in graph["frozen"].items() if is_frozen]
        hint = f"; try --free-{' --free-'.join(frozen)}" if frozen else ""
        lines.append(
            f"warning: do not trust the effects: over {' and '.join(weak)} edges they correlate by less than {TRUSTED} "
            f"with what removing single features does{hint}"
        )
    lines += [
        f"after {''.join(tokens[-8:])!r} the finetuned model says {output['finetuned']!r}, the un-finetuned one "
        f"{output['unfinetuned']!r}",
        f"{output['words']}: {output['value']:+.3g} with all deltas, {output['unfinetuned_value']:+.3g} without",
        f"{counts['nodes']} nodes and {counts['edges']} edges of {counts['active']} active features; "
        f"{counts['expanded']} nodes expanded",
        "strongest direct effects on it:",
    ]
    end = next(number for number, node in enumerate(graph["nodes"]) if node["kind"] == "output")
    output_edges = [(weight, graph["nodes"][source]) for source, target, weight in graph["edges"] if target == end]
    for weight, node in sorted(output_edges, key=lambda pair: -abs(pair[0])):
        if node["kind"] == "rest":
            lines.append(f"  {weight:+.3g} un-finetuned parts alone")
    features = [pair for pair in output_edges if pair[1]["kind"] in ("feature", "bos")]
    for weight, node in sorted(features, key=lambda pair: -abs(pair[0]))[:STRONGEST]:
        label = "at BOS" if node["kind"] == "bos" else f"feature {node['feature']}"
        top_tokens = node["promoted"][:3] if node["kind"] == "feature" else []
        promoted = f", promotes {' '.join(map(repr, top_tokens))}" if top_tokens else ""
        at = f"{tokens[node['position']]!r} (position {node['position']})"
        lines.append(f"  {weight:+.3g} layer {node['site']} {label} on {at}{promoted}")
    listed = [f"{name} edges {r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})" for name, r in checks.items() if r]
    lines.append(f"checks, correlation with removing single features: {', '.join(listed) or 'too few edges'}")
    return lines
