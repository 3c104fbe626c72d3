"""The first section of the report: what finetuning changed, and whether that change is a knob.

In: a sweep's tables and its delta trials. Out: a section of the page, with sentences that claim only what the intervals
support: first the ceiling (is there a gap?), then how much is recovered, then controls.
"""

import math

import pandas as pd

from evaluators.conditions import CHANGE_CONTROLS
from evaluators.report import figures, knob_figures
from evaluators.report.feature_page import most_effective
from evaluators.report.findings import NATS, Findings, estimate, number, with_interval
from evaluators.report.page import Block, Section, Sentences, Table, picture, table_block
from evaluators.tables import recovery
from evaluators.tables.group_tables import groups_needed
from evaluators.tables.pooling import rates_in
from evaluators.tables.tables import Results
from sites import MLP, parse_sites


def knob_section(results: Results, deltas: pd.DataFrame, pair: str, *, rest: bool = False, seed: int) -> Section | None:
    """The answer first: figures, the knob, how few features, where; then sentences and tables. None without change
    deltas. `rest`: finetuning changed parameters outside all sites too."""
    gaps = results.gaps[results.gaps["target"] == "change"]
    if gaps.empty:
        return None
    widest = recovery.widest_set(gaps)
    rows = headline_rows(results)
    help = (
        f"For sites {widest}, CE in nats per target token: the effect of putting un-finetuned weights back there, its "
        "share of the whole effect of finetuning, and how much of it the deltas recover at alpha 1, with 95% intervals."
    )
    if rest:
        help += (
            " Finetuning also changed parameters outside all sites, such as embeddings. Where the sites are all the "
            "others that it changed, these parameters have the same strength, exactly: they are part of the gap and of "
            "what is recovered. Single features and groups are counted with these parameters finetuned throughout."
        )
    lines = [list(row.values()) for row in rows]
    blocks: list[Block] = [Table("The answer", help, list(rows[0]), lines, wide_text=True)]
    dose = results.dose[(results.dose["layer"] == widest) & (results.dose["target"] == "change")]
    is_widest = results.conditions["layer"].isin([widest, "none"]) & results.conditions["target"].isin(["change", ""])
    if len(dose):
        figure = knob_figures.knob(dose, results.conditions[is_widest], seed=seed)
        help = (
            "A knob is a line that goes from one behaviour to the other as alpha grows; random directions should not."
        )
        blocks.append(picture("knob", figure, f"The knob, layers {widest}", help))
    if results.widths["recovered"].notna().any():
        figure = knob_figures.recovered_by_width(results.widths, seed=seed)
        help = (
            "What deltas of each width recover. Controls of the same rank: a linear map, which is not sparse, and the "
            "change along principal directions, which is computed from both models' weights, not from the input."
        )
        if any(site.kind.name != MLP.name for site in parse_sites(widest)):
            help += (
                " What finetuning changed in attention's projections is itself linear, with a rank of at most LoRA's: "
                "there, the linear map of that rank is the change itself, so it is a ceiling, not a competitor."
            )
        blocks.append(picture("widths", figure, "How wide must a delta be", help))
    if len(results.curve):
        figure = knob_figures.recovered_by_count(results.curve, seed=seed)
        help = "Features are ranked by integrated gradients on held-out rows, then added one after the other."
        blocks.append(picture("few_features", figure, "How few features", help))
    if (table := most_effective(results.features, "change")) is not None:
        blocks.append(table)
    if len(deltas) and (deltas["target"] == "change").any():
        figure = knob_figures.where_it_is(deltas, gaps, results.recovered)
        help = (
            "By layer: |y_finetuned - y_un|^2 over the variance of y, and the share of it that the deltas leave "
            "unexplained. By set of sites: how much of the whole effect is lost when only these are un-finetuned, and "
            "how much of that their deltas recover. Layers make up for each other, so the shares need not add up."
        )
        blocks.append(picture("where", figure, "Where in the network", help))
    findings = [*knob_findings(results, deltas), _limits(results, gaps[gaps["layer"] == widest], seed)]
    blocks.append(Sentences([finding for finding in findings if finding.sentences]))
    blocks += _every_behaviour(dose, seed)
    blocks += _tables(results, gaps)
    intro = (
        f"{pair} The finetuned model's sites are put back to what they were before, and sparse deltas add what "
        "finetuning changed there, times alpha: none of it at 0, and at 1 all that the deltas have learnt."
    ).strip()
    return Section("knob", "The change, as a knob", intro, blocks)


def _limits(results: Results, gaps: pd.DataFrame, seed: int) -> Findings:
    low, high = int(gaps["n_examples"].min()), int(gaps["n_examples"].max())
    count = f"{low}" if low == high else f"{low} to {high}"
    sentences = [
        f"{count} prompts per subset, one finetuned model, seed {seed}. The intervals are over prompts: they say "
        "nothing about another finetuning, for which other seeds must be run. With few prompts they are too narrow: "
        "about 88% of those of 8 prompts contain the true value, and 93% of those of 20, instead of 95%."
    ]
    replicas = results.conditions["n_replicas"].max() if "n_replicas" in results.conditions else 1
    if replicas > 1:
        sentences.append(
            f"What deltas do is a mean over {int(replicas)} of them, trained with different seeds, and its intervals "
            "are over prompts and these seeds. Other widths, numbers of features, cards and groups are of one seed."
        )
    if len(results.features):
        most = int(results.features[[name for name in results.features if name.startswith("n_")]].max(axis=None))
        sentences.append(f"Single features were measured on at most {most} prompts per subset.")
    return Findings("What does this rest on?", sentences)


def _every_behaviour(dose: pd.DataFrame, seed: int) -> list[Block]:
    """The same dose-response with every rate, where there are more than the knob's own picture shows."""
    sparse = dose[dose["condition"] == "alpha"]
    if len([rate for rate in rates_in(sparse) if sparse[rate].notna().any()]) < 2:
        return []
    help = "CE minus the finetuned model's, and the share of prompts for which each behaviour holds, against alpha."
    return [picture("knob_behaviours", figures.dose_response(sparse, seed=seed), "Every behaviour against alpha", help)]


def _tables(results: Results, gaps: pd.DataFrame) -> list[Block]:
    columns = {"layer": "layers", "subset": "subset", "metric": "metric", "raw": "finetuned", "ground": "sites swapped"}
    columns |= {"gap": "gap", "unfinetuned": "un-finetuned", "share": "share of the whole effect"}
    help = "The ceiling: what un-finetuned weights at its sites do. Where a gap's interval holds 0, nothing comes back."
    blocks: list[Block] = [table_block(gaps, columns, "Gaps", help)]
    recovered = results.recovered[results.recovered["target"] == "change"]
    columns = {
        name: name for name in ("layer", "subset", "metric", "condition", "alpha", "d_new", "value", "recovered")
    }
    help = "(swapped - spliced) / (swapped - finetuned), over the same prompts; 1 is all of the gap."
    blocks.append(table_block(recovered, columns, "Recovered", help))
    if len(results.change):
        columns = {name: name for name in ("layer", "d_new", "subset", "part", "unexplained", "l0", "n_tokens")}
        help = "Share of |c|^2 that a layer's delta leaves, on tokens of prompts and of targets."
        blocks.append(table_block(results.change, columns, "Unexplained share of the change", help))
    return blocks


def knob_findings(results: Results, deltas: pd.DataFrame) -> list[Findings]:
    """Is there something to explain, what comes back, with how few features; and what residual deltas learn."""
    gaps = results.gaps[(results.gaps["target"] == "change") & (results.gaps["metric"] == "mean_ce")]
    findings = []
    if len(gaps):
        widest = recovery.widest_set(gaps)
        widest_gaps = gaps[gaps["layer"] == widest]
        findings += [
            Findings(f"Is there anything to explain at the sites {widest}?", _ceilings(widest_gaps)),
            Findings("How much of it do the deltas bring back?", _recovered(results, widest_gaps)),
            Findings("How wide must a delta be?", _wide(results)),
            Findings("How few features?", _few(results)),
        ]
    return [*findings, Findings("What is a residual delta trained on?", residual_split(deltas))]


def _ceilings(gaps: pd.DataFrame) -> list[str]:
    sentences = []
    for _, row in gaps.iterrows():
        text = f"{row['subset']}: un-finetuned there, CE is {number(row['ground'])}; finetuned, {number(row['raw'])}"
        if math.isnan(row["gap_low"]):
            sentences.append(f"{text}: too few prompts for an interval.")
            continue
        if not _leaves_out_zero(row, "gap"):
            sentences.append(f"{text}: nothing to recover here (gap {with_interval(row, 'gap', signed=True)} {NATS}).")
            continue
        share = "" if math.isnan(row["share"]) else f", {with_interval(row, 'share')} of the whole finetuning's effect"
        sentences.append(f"{text}: a gap of {with_interval(row, 'gap', signed=True)} {NATS}{share}.")
    return sentences


def _recovered(results: Results, gaps: pd.DataFrame) -> list[str]:
    table = results.recovered[(results.recovered["target"] == "change") & (results.recovered["metric"] == "mean_ce")]
    controls_at_one = [name for name, condition in CHANGE_CONTROLS.items() if not condition.dosed]
    names = {"alpha": "the deltas"}
    names |= {name: f"the {name.replace('_', ' ')}" for name, condition in CHANGE_CONTROLS.items() if condition.dosed}
    sentences = []
    for _, gap in gaps.iterrows():
        rows = table[(table["layer"] == gap["layer"]) & (table["subset"] == gap["subset"])].dropna(subset=["recovered"])
        full = rows[rows["condition"] == "full"]
        if full.empty:
            continue
        text = f"{gap['subset']}: {with_interval(full.iloc[0], 'recovered')} of the gap in CE at alpha 1"
        for _, row in _others_of(results, gap).iterrows():
            text += f", {with_interval(row, 'recovered')} of that in {row['metric']}"
        at_one = rows[rows["condition"].isin(controls_at_one)]
        controls = [f"{row['condition']} {with_interval(row, 'recovered')}" for _, row in at_one.iterrows()]
        half = rows[(rows["alpha"] == 0.5) & rows["condition"].isin(names)]
        at_half = [f"{names[row['condition']]} {with_interval(row, 'recovered')}" for _, row in half.iterrows()]
        text += f"; controls: {', '.join(controls)}" if controls else ""
        sentences.append(text + (f"; at alpha 0.5: {', '.join(at_half)}." if at_half else "."))
    return sentences


def _others_of(results: Results, gap: pd.Series) -> pd.DataFrame:
    """What `full` recovers of the gaps in KL and the rates, if there are any, at the place of a gap in CE."""
    table = results.recovered[(results.recovered["target"] == "change") & (results.recovered["condition"] == "full")]
    gap_rows = table[
        (table["layer"] == gap["layer"]) & (table["subset"] == gap["subset"]) & (table["metric"] != "mean_ce")
    ]
    return gap_rows.dropna(subset=["recovered"])


def _wide(results: Results) -> list[str]:
    table = results.widths[(results.widths["metric"] == "mean_ce") & (results.widths["condition"] == "full")]
    sentences = []
    for subset, rows in table.dropna(subset=["recovered"]).groupby("subset", sort=False):
        parts = [f"{with_interval(row, 'recovered')} with d_new {int(row['d_new'])}" for _, row in rows.iterrows()]
        sentences.append(f"{subset}: {', '.join(parts)}.")
    return sentences


def _few(results: Results) -> list[str]:
    sentences = []
    total = _total(results)
    for subset in results.curve["subset"].unique():
        count = recovery.features_needed(results.curve, subset)
        if results.curve.loc[results.curve["subset"] == subset, "recovered"].isna().all():
            sentences.append(f"{subset}: no gap in CE that these prompts can tell from zero, so nothing to recover.")
            continue
        if count is None:
            sentences.append(f"{subset}: no number of features recovers {recovery.ENOUGH:.0%} of the gap in CE.")
            continue
        row = results.curve[(results.curve["subset"] == subset) & (results.curve["k"] == count)].iloc[0]
        sentences.append(
            f"{subset}: {count} of {total} features of all layers recover {with_interval(row, 'recovered')} of the gap."
        )
    return sentences


def _total(results: Results) -> int:
    return int((results.ranking["target"] == "change").sum())


def residual_split(deltas: pd.DataFrame) -> list[str]:
    """For each layer and base: how much of a residual is finetuning's change, and how much the base's own error."""
    if deltas.empty:
        return []
    best = deltas[(deltas["target"] == "residual") & deltas["best"].astype(bool)]
    sentences = []
    for (layer, percentile), rows in best.groupby(["layer", "percentile"], dropna=False):
        row = rows.iloc[0]
        if pd.isna(row.get("change_share")):
            continue
        base = "" if pd.isna(percentile) else f" (percentile {percentile:g})"
        before = row.get("val_fvu_base_unfinetuned")
        grown = "" if before is None or pd.isna(before) else f", {number(before)} before finetuning"
        part = row["change_share"] / row["val_fvu_base"]
        mostly = "; most of that is the base's own error." if part < 0.5 else "."
        sentences.append(
            f"Layer {layer}{base}: the base leaves {number(row['val_fvu_base'])} of the finetuned output's variance"
            f"{grown}; finetuning changed {number(row['change_share'])} of it at the same input. So the change is "
            f"{part:.1%} the size of what the delta is trained on{mostly}"
        )
    return sentences


def _leaves_out_zero(row: pd.Series, column: str) -> bool:
    value = estimate(row, column)
    return value.low > 0 or value.high < 0


def headline_rows(results: Results) -> list[dict[str, str]]:
    """The short table at a sweep's end: for the widest set and each subset the gap, what is recovered, and controls."""
    gaps = results.gaps[results.gaps["target"] == "change"]
    if gaps.empty:
        return []
    widest = recovery.widest_set(gaps)
    gaps = gaps[(gaps["layer"] == widest) & (gaps["metric"] == "mean_ce")]  # a subset whose cells failed has none
    rows = []
    conditions = results.conditions[results.conditions["target"].isin(["", "change"])]
    conditions = conditions[conditions["layer"].isin([widest, "none"])]
    rate = next((name for name in rates_in(conditions) if conditions[name].notna().any()), None)
    for subset in gaps["subset"].unique():
        gap = gaps[gaps["subset"] == subset].iloc[0]
        row = {"subset": subset, "gap in CE": with_interval(gap, "gap", signed=True)}
        row["sites' share"] = "-" if pd.isna(gap["share"]) else with_interval(gap, "share")
        table = results.recovered[(results.recovered["target"] == "change") & (results.recovered["layer"] == widest)]
        table = table[table["subset"] == subset]
        ce, kl = (table[table["metric"] == metric].set_index("condition") for metric in ("mean_ce", "kl"))
        for condition, name in (("full", "recovered"), ("random_delta", "random")):
            figures = ce.loc[[condition]].iloc[0] if condition in ce.index else None
            row[name] = "-" if figures is None else _share(figures)
            if condition == "full":
                row["KL recovered"] = _share(kl.loc[["full"]].iloc[0]) if "full" in kl.index else "-"
        count = recovery.features_needed(results.curve, subset) if len(results.curve) else None
        row["features for 90%"] = "-" if count is None else f"at most {count:,} of {_total(results):,}"
        if len(results.group_curve):
            groups = groups_needed(results.group_curve, subset)
            row["groups for 90%"] = "-" if groups is None else f"at most {groups} of {len(results.groups)}"
        if rate is not None:
            rates = conditions[conditions["subset"] == subset].set_index("condition")[rate].dropna()
            shown = [
                f"{rates[[name]].iloc[0]:.2f}" if name in rates.index else "-" for name in ("no_delta", "full", "raw")
            ]
            row[f"{rate} at alpha 0, 1; finetuned"] = ", ".join(shown) if len(rates) else "-"
        rows.append(row)
    return rows


def _share(row: pd.Series) -> str:
    if math.isnan(row["gap_low"]):
        return "too few prompts"
    return "nothing to recover" if math.isnan(row["recovered"]) else with_interval(row, "recovered")
