"""The sections of the report, one function each.

In: the tables of a sweep, and data about its searches. Out: a `page.Section` each, or None if there is no data for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from data.rows import slug
from evaluators.report import figures, findings
from evaluators.report.findings import number
from evaluators.report.page import Block, Gallery, Picture, Section, Sentences, Table, picture, table_block
from evaluators.tables.pooling import condition_order, rates_in
from evaluators.tables.tables import RECONSTRUCTION_COLUMNS, SUMMARY_METRICS, Results
from sites import NOTHING, is_set, label_of_keys, label_order, parse_sites, sites_label

GENERATIONS_SHOWN = 3  # per subset: raw examples, and as many changed ones
TEXT_SHOWN = 240  # characters per text in the samples
HELD_OUT_SHOWN = 200  # characters per text in the held-out examples
EXAMPLES = 4  # held-out rows shown whose answer missed the target; half as many that matched, per label
STUDY_PICTURES = {
    "lora_importances": ("Importances", "How much of the loss's variance each hyperparameter explains."),
    "lora_parallel": (
        "Parallel coordinates",
        "One line per trial, through its hyperparameters to its loss; darker is better.",
    ),
    "lora_history": (
        "Study history",
        "Loss of each finished trial, by trial number, and the best so far.",
    ),
}


def behaviour_shown(table: pd.DataFrame) -> dict[str, str]:
    """The columns of a behaviour table that the page shows, each with its heading there."""
    rates = rates_in(table)
    keys = ("layer", "percentile", "d_new", "condition", "alpha", "subset")
    return {
        **{name: name for name in keys},
        "mean_ce": "CE (nats per token)",
        "delta_ce": "CE - raw",
        **{rate: rate for rate in rates},
        "mean_abs_base_acts": "base |acts|",
        "mean_abs_delta_acts": "delta |acts|",
        **{f"delta_{rate}": f"{rate} - raw" for rate in rates},
        "n_examples": "prompts",
        "n_tokens": "target tokens",
    }


def checks_section(checks: Sequence[dict[str, Any]]) -> Section | None:
    """Which of the sweep's checks hold. Each check is `{"name", "passed", "detail"}`."""
    if not checks:
        return None
    failed = sum(not check["passed"] for check in checks)
    table = Table(
        f"{len(checks) - failed} of {len(checks)} hold",
        "Each check is computed from this sweep's own numbers; the last column says what was seen.",
        ["", "check", "what was seen"],
        [["holds" if check["passed"] else "FAILS", check["name"], str(check["detail"])] for check in checks],
        marks=["passed" if check["passed"] else "failed" for check in checks],
        wide_text=True,
        folded=not failed,
    )
    return Section("checks", "Checks", "What must hold before the findings of a sweep mean anything.", [table])


def settings_section(facts: dict[str, str]) -> Section | None:
    """What ran, where, and how long it took."""
    if not facts:
        return None
    rows = [[name, str(value)] for name, value in facts.items()]
    table = Table("Settings and machine", "What it takes to run this sweep again.", [], rows, wide_text=True)
    return Section("settings", "Settings", "What the numbers above were computed with.", [table])


def findings_section(results: Results, glance: Sequence[dict[str, str]], *, seed: int) -> Section | None:
    """CE by layer, as pictures and as a folded table, and findings over all layers in sentences."""
    if results.conditions.empty and results.dose.empty:
        return None
    summary = Table(
        "At a glance",
        "First what the finetuned model does (raw), then CE minus raw CE in nats per target token for each spliced "
        "layer or set, with its 95% interval; an interval that covers 0 is compatible with no difference.",
        list(glance[0]) if glance else [],
        [list(row.values()) for row in glance],
        folded=True,
    )
    general = [
        findings.raw_findings(results.conditions),
        *findings.overview(results.conditions, results.contrast, results.statistics),
    ]
    return Section(
        "findings",
        "The reference study's way",
        "A base transcoder replaces an MLP, and a delta is trained on what the base misses; the knob above uses "
        "neither. A difference is claimed only if its 95% interval excludes zero; otherwise the sentence gives the "
        "largest effect that the data still allow. Intervals are not corrected for multiple comparisons: of twenty "
        "true zeros, expect one to be excluded by chance.",
        [*_by_layer(results.conditions, seed), summary, Sentences([item for item in general if item.sentences])],
    )


def _by_layer(conditions: pd.DataFrame, seed: int) -> list[Block]:
    spliced = conditions[conditions["layer"] != NOTHING]
    in_sets = spliced["layer"].map(is_set).astype(bool)
    help = "Points above 0 predict the target worse than raw; a bar that crosses 0 is compatible with no difference."
    return [
        picture(name, figures.delta_ce_by_layer(rows, seed=seed), title, help)
        for name, rows, title in (
            ("delta_ce_by_layer", spliced[~in_sets], "CE increase, one layer spliced"),
            ("delta_ce_layer_sets", spliced if in_sets.any() else spliced[in_sets], "CE increase, layers and sets"),
        )
        if rows["delta_ce"].notna().any()
    ]


def reconstruction_section(results: Results) -> Section | None:
    """How closely base, and base + delta, match the finetuned MLPs (the reference study's experiment 1)."""
    if results.reconstruction.empty:
        return None
    pictures = [
        picture(
            f"heatmap_{column}",
            figures.combination_heatmap(results.summary, column),
            column,
            "One square per d_new and percentile, over layers; "
            + ("higher is better." if "cos" in column else "lower is better."),
        )
        for column in SUMMARY_METRICS
    ]
    table = table_block(
        results.reconstruction,
        {name: name for name in RECONSTRUCTION_COLUMNS if name not in ("seconds", "convention")},
        "Reconstruction by layer",
        "dce: CE increase over raw with this layer alone replaced; ce_recovered: 1 for raw, 0 for a zeroed MLP.",
    )
    layers = results.reconstruction.groupby(["d_new", "percentile"], dropna=False)["layer"].nunique()
    missing = " Some combinations lack layers, so their averages are not comparable." if layers.nunique() > 1 else ""
    return Section(
        "reconstruction",
        "Reconstruction",
        f"How closely the transcoders match the finetuned MLP's output on evaluation text.{missing}",
        [Gallery(pictures), table],
    )


def conditions_section(results: Results, *, seed: int) -> Section | None:
    """Behaviour by layer, condition and subset (the reference study's experiment 2A)."""
    table = results.conditions
    if table.empty:
        return None
    spliced = table[table["layer"] != NOTHING]
    blocks: list[Block] = []
    for subset in spliced["subset"].unique():
        help = "The dotted line is raw on the same prompts; the table below gives each paired difference from it."
        figure = figures.behaviour_by_layer(table, subset)
        blocks.append(picture(f"behaviour_{slug(subset)}", figure, f"Behaviour on {subset}", help))
    if (spliced["condition"] == "full").any():
        figure = figures.activations_by_layer(table, seed=seed)
        help = "How strongly base and delta are active; a delta more active on one subset than on another is selective."
        blocks.append(picture("activations_by_layer", figure, "Mean activations", help))
    help = "One row per layer, condition and subset; values with [95% interval]: Wilson for rates, bootstrap otherwise."
    blocks.append(table_block(table, behaviour_shown(table), "Conditions", help))
    if len(results.contrast):
        columns = {name: name for name in ("layer", "percentile", "d_new", "subset", "delta_ce", "n_examples")}
        columns |= {f"delta_{rate}": f"change of {rate}" for rate in rates_in(table)}
        help = "What adding the delta changes on the same prompts; a negative delta_ce means that the delta repairs CE."
        blocks.append(table_block(results.contrast, columns, "full minus no_delta", help))
    intro = (
        "The layer's MLP output is replaced by the base alone (no_delta), by base and delta (full), or by a control."
    )
    return Section("conditions", "Conditions", intro, blocks)


def dose_section(results: Results, *, seed: int) -> Section | None:
    """Behaviour against the strength of the delta (the reference study's experiment 2B)."""
    table = results.dose
    if table.empty:
        return None
    blocks: list[Block] = []
    help = "A knob is a line that moves with alpha beyond its band. Alpha 0: the base alone; 1: the delta as trained."
    varying = [name for name in ("percentile", "d_new") if table[name].nunique() > 1]
    for layer in sorted(table["layer"].unique(), key=label_order):
        groups = table[table["layer"] == layer].groupby(["percentile", "d_new"], dropna=False)
        for values, rows in groups:
            choices = [
                f"{name} {value:g}"
                for name, value in zip(("percentile", "d_new"), values, strict=True)
                if name in varying
            ]
            title = ", ".join([f"Layer {layer}", *choices])
            label = layer if is_set(layer) else sites_label(parse_sites(layer), digits=2)
            name = "_".join(["dose_response_layer", label, *(text.replace(" ", "_") for text in choices)])
            blocks.append(picture(name, figures.dose_response(rows, seed=seed), title, help))
    columns = {"layer": "layer", "percentile": "percentile", "d_new": "d_new", "subset": "subset", "metric": "metric"}
    columns |= {
        "slope": "slope per unit of alpha",
        "spearman": "Spearman rho",
        "n_alphas": "alphas",
        "n_examples": "prompts",
    }
    help = "A slope whose interval excludes 0 moves with alpha. A rate that no prompt changed has no interval or rho."
    blocks.append(table_block(results.statistics, columns, "Slope and rank correlation", help))
    help = "One row per layer, alpha and subset; columns as in the conditions table."
    blocks.append(table_block(table, behaviour_shown(table), "Dose-response", help))
    intro = "The layer's MLP output is replaced by base + alpha * delta: does the behaviour follow alpha?"
    return Section("dose-response", "Dose-response", intro, blocks)


def generations_section(generations: Sequence[dict[str, Any]]) -> Section | None:
    """Samples of generated text: raw, and spliced where the splice changed it, at most one a prompt."""
    if not generations:
        return None
    subsets = list(dict.fromkeys(row["subset"] for row in generations))
    ends = {(*_place(row), ENDS[row["condition"]]) for row in generations if row["condition"] in ENDS}
    generations = [
        row for row in generations if row["condition"] != "alpha" or (*_place(row), row["alpha"]) not in ends
    ]
    rows = sorted(
        ({**row, "layer": label_of_keys(row["layers"])} for row in generations),
        key=lambda row: (
            *(subsets.index(row["subset"]), row["index"]),
            *(condition_order(row["condition"]), label_order(row["layer"]), row["alpha"] or 0.0),
        ),
    )
    raw = {(row["subset"], row["index"]): row["generation"] for row in rows if row["condition"] == "raw"}
    spliced = [row for row in rows if row["layer"] != NOTHING and (row["subset"], row["index"]) in raw]
    changed = [row for row in spliced if row["generation"] != raw[row["subset"], row["index"]]]
    help = (
        f"{len(changed)} of {len(spliced)} texts written under a splice differ from the finetuned model's (raw) for "
        f"the same prompt; at most {GENERATIONS_SHOWN} of its texts and {GENERATIONS_SHOWN} changed ones a subset are "
        "shown."
    )
    shown = []
    for subset in subsets:
        for source in ([row for row in rows if row["condition"] == "raw"], changed):
            by_prompt = {row["index"]: row for row in reversed(source) if row["subset"] == subset}
            shown += [by_prompt[index] for index in sorted(by_prompt)][:GENERATIONS_SHOWN]
    header = ["subset", "prompt", "layer", "condition", "deltas", "alpha", "input", "target", "generated"]
    lines = [
        [
            *(row["subset"], str(row["index"]), row["layer"], row["condition"], row.get("deltas") or "-"),
            "-" if row["alpha"] is None else f"{row['alpha']:g}",
            *(_shorten(row[name]) for name in ("input", "target", "generation")),
        ]
        for row in shown
    ]
    table = Table("Samples", help, header, lines, wide_text=True)
    intro = "A sample; all generated texts are in the sweep's generations folder, as JSONL."
    return Section("generations", "Generations", intro, [table])


ENDS = {"no_delta": 0.0, "full": 1.0}
"""Conditions with the texts of a strength, which are therefore not counted twice."""


def _place(row: Mapping[str, Any]) -> tuple:
    """What the texts of a condition at some sites have in common."""
    return row["subset"], row.get("deltas"), row.get("seed"), tuple(row["layers"])


def lora_section(trials: pd.DataFrame) -> Section | None:
    """The LoRA search that made the finetuned model."""
    if trials.empty:
        return None
    parameters = {name: name.removeprefix("lora.") for name in trials.columns if name.startswith("lora.")}
    columns = {
        "trial": "trial",
        "state": "state",
        "value": "val_loss",
        "step": "steps",
        **parameters,
        "seconds": "seconds",
    }
    help = "Each point is one trial's held-out loss, the line the best so far; the best trial gave the finetuned model."
    return Section(
        "lora",
        "LoRA search",
        "Optuna proposed these adapters, weak ones were stopped early, and the lowest validation loss was kept.",
        [
            picture("lora_search", figures.search_history(trials), "Search history", help),
            table_block(
                trials, columns, "Trials", "One row per trial; val_loss in nats per target token, lower is better."
            ),
        ],
    )


def transcoders_section(base: pd.DataFrame, deltas: pd.DataFrame) -> Section | None:
    """The base transcoders, and the search for deltas."""
    blocks: list[Block] = []
    if len(base):
        columns = {
            name: name for name in ("layer", "percentile", "target_l0", "val_l0", "val_fvu", "dead_fraction", "path")
        }
        help = "FVU: share of the un-finetuned MLP's output variance left unexplained on held-out text; 0 is perfect."
        blocks.append(table_block(base, columns, "Base transcoders", help))
    if len(deltas):
        change = deltas[(deltas["target"] == "change") & deltas["best"].astype(bool)]
        if len(change):
            names = ("layer", "d_new", "val_unexplained", "change_share", "val_l0_delta", "val_cos", "dead_fraction")
            columns = {name: name for name in (*names, "tokens", "lr", "sparsity", "trial", "seconds")}
            help = "val_unexplained: the share of finetuning's change that is left on held-out text; 1 without a delta."
            blocks.append(table_block(change, columns, "Kept change deltas", help))
        deltas = deltas[deltas["target"] == "residual"]
    if len(deltas) and deltas["best"].astype(bool).any():
        best = deltas[deltas["best"].astype(bool)].sort_values(["layer", "percentile", "d_new"], kind="stable")
        help = "Lower is better; the delta repairs the gap between a solid line and the dashed line of the same colour."
        blocks.append(
            picture("delta_fvu", figures.unexplained_variance(deltas), "Residual deltas on held-out text", help)
        )
        columns = {
            name: name
            for name in (
                *("layer", "percentile", "d_new", "val_fvu", "val_fvu_base", "val_l0_delta", "val_cos", "val_l2_ratio"),
                *("dead_fraction", "tokens", "lr", "sparsity", "trial", "seconds"),
            )
        }
        better = int((best["val_fvu"] < best["val_fvu_base"]).sum())
        help = f"{better} of {len(best)} kept deltas explain more held-out variance than their base alone."
        blocks.append(table_block(best, columns, "Kept residual deltas", help))
        columns = {"layer": "layer", "percentile": "percentile", "d_new": "d_new", "trial": "trial", "state": "state"}
        names = ("val_loss", "val_fvu", "val_l0_delta", "pareto", "lr", "sparsity", "seconds")
        columns |= {name: name for name in names if name in deltas}
        help = "Every delta trial; losses are comparable only within one layer and percentile."
        blocks.append(table_block(deltas, columns, "All residual delta trials", help))
    intro = "A base transcoder imitates an MLP of the un-finetuned model; a residual delta adds d_new features to it."
    return _section("transcoders", "Transcoders", intro, blocks)


def completed(
    section: Section | None, finetuned: Mapping[str, Any] | None, pictures: Mapping[str, bytes]
) -> Section | None:
    """The LoRA section, completed with Optuna's pictures and the finetuned model's answers. If the model was made
    elsewhere, a section with its answers alone."""
    if section is None:
        lead = "It was made elsewhere and adopted: nothing was trained to get it."
        return Section("finetuned", "The finetuned model", lead, finetuned_blocks(finetuned)) if finetuned else None
    shown = [Picture(name, pictures[name], *texts) for name, texts in STUDY_PICTURES.items() if name in pictures]
    blocks: list[Block] = [Gallery(shown)] if shown else []
    return replace(section, blocks=[*section.blocks, *blocks, *finetuned_blocks(finetuned)])


def finetuned_blocks(checked: Mapping[str, Any] | None) -> list[Block]:
    """Rates and examples of the merged model; empty if it was not checked."""
    if not checked:
        return []
    exact = {end: checked["figures"][f"exact_match_rate{end}"] for end in ("", "_low", "_high", "_n")}
    lines = [
        ["exact match", "all", f"{number(exact[''])} [{number(exact['_low'])}, {number(exact['_high'])}]", exact["_n"]]
    ]
    lines += [
        [
            rate["behaviour"],
            rate["label"],
            f"{number(rate['value'])} [{number(rate['low'])}, {number(rate['high'])}]",
            rate["n"],
        ]
        for rate in checked["rates"]
    ]
    count = len(checked["rows"])
    help = f"The finetuned model's greedy answers to the {count} validation rows."
    if answered := checked.get("answered"):
        help += (
            f" {answered['made']} rows had no target; the model's own greedy answer became their target"
            f" ({answered['cut']} of these were cut at the token budget)."
        )
    return [
        Table("The finetuned model on held-out rows", help, ["behaviour", "subset", "rate", "n"], lines),
        _examples(checked["rows"]),
    ]


def _examples(rows: Sequence[Mapping[str, Any]]) -> Table:
    mismatched = [row for row in rows if not row["exact"]][:EXAMPLES]
    labels = dict.fromkeys(row["label"] for row in rows)
    matched = {label: [row for row in rows if row["exact"] and row["label"] == label] for label in labels}
    shown = [*mismatched, *(row for label_rows in matched.values() for row in label_rows[: EXAMPLES // 2])]
    lines = [
        [
            "yes" if row["exact"] else "no",
            row["label"],
            *(_shorten(row[name], HELD_OUT_SHOWN) for name in ("input", "target", "generation")),
        ]
        for row in shown
    ]
    return Table(
        "Examples",
        "Rows whose answer differs from the target come first.",
        ["exact", "label", "input", "target", "generated"],
        lines,
        marks=["" if row["exact"] else "failed" for row in shown],
        wide_text=True,
    )


def _section(anchor: str, title: str, intro: str, blocks: Sequence[Block]) -> Section | None:
    return Section(anchor, title, intro, blocks) if blocks else None


def _shorten(text: str, most: int = TEXT_SHOWN) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
