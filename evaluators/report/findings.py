"""What the tables say, in sentences.

In: the conditions, contrast and dose-response tables. Out: plain sentences with their intervals. A difference is
claimed only where its 95% interval leaves out zero; otherwise the sentence says how large an effect is still allowed.
"""

import math
from typing import NamedTuple

import pandas as pd

from evaluators.layer_sets import NO_LAYER, is_set, layer_order
from evaluators.tables.pooling import rates_in
from evaluators.tables.statistics import Estimate

NATS = "nats per token"
CONDITION_NAMES = {
    "no_delta": "base alone (no_delta)",
    "full": "base and delta (full)",
    "base_model_raw": "the model before finetuning (base_model_raw)",
    "base_model_no_delta": "base alone in the model before finetuning (base_model_no_delta)",
    "mlp_swap": "the layer's MLP as before finetuning (mlp_swap)",
    "random_delta": "base and random directions of the delta's size (random_delta)",
    "shuffled_delta": "base and the delta's outputs at other tokens (shuffled_delta)",
    "dense_delta": "base and a linear map of the delta's rank (dense_delta)",
    "error_term": "base and its own error (error_term)",
}


class Findings(NamedTuple):
    """Sentences under one heading: a question over all layers, or one spliced layer or set."""

    title: str
    sentences: list[str]


def number(value: float | None, *, signed: bool = False, scale: float | None = None) -> str:
    """A value with the decimals that its size, or `scale` where several values stand together, calls for.

    Three decimals as a rule, fewer from 100 on, scientific below 0.001; `-` for none.
    """
    if value is None or pd.isna(value):
        return "-"
    size = abs(value) if scale is None or math.isnan(scale) else scale
    form = ".1e" if 0 < size < 0.001 else ".3f" if size < 100 else ".1f" if size < 1000 else ".0f"
    return format(value, f"{'+' if signed else ''}{form}")


def with_interval(row: pd.Series, column: str, *, signed: bool = False) -> str:
    """`0.950 [0.764, 0.991]` from a table row; the value alone where it has no interval."""
    value = estimate(row, column)
    if math.isnan(value.low):
        return number(value.value, signed=signed)
    text, low, high = (number(part, signed=signed, scale=_scale(value)) for part in value)
    return f"{text} [{low}, {high}]"


def estimate(row: pd.Series, column: str) -> Estimate:
    """A table row's value and interval of one column."""
    return Estimate(float(row[column]), float(row[f"{column}_low"]), float(row[f"{column}_high"]))


def excludes_zero(value: Estimate) -> bool:
    """Whether the interval lies on one side of zero; False without an interval."""
    return value.low > 0 or value.high < 0


def difference_sentence(value: Estimate, unit: str) -> str:
    """The value, its interval, and what follows: a difference, or the largest effect still compatible."""
    if math.isnan(value.value):
        return "not measured"
    if math.isnan(value.low):
        return f"{number(value.value, signed=True)} {unit} (too few prompts for an interval)"
    if value.value == value.low == value.high == 0:
        return f"exactly 0 {unit} on every prompt"
    text = f"{number(value.value, signed=True, scale=_scale(value))} {unit} ({_ends(value, signed=True)})"
    if excludes_zero(value):
        return text
    return f"{text}, no effect larger than {number(_bound(value))} {unit} is compatible with these data"


def raw_findings(conditions: pd.DataFrame) -> Findings:
    """What the finetuned model does with nothing spliced, one sentence per subset."""
    sentences = []
    for _, row in conditions[conditions["layer"] == NO_LAYER].iterrows():
        rates = [
            f"{rate} {number(row[rate])} ({_ends(estimate(row, rate))})"
            for rate in rates_in(conditions)
            if not pd.isna(row[rate])
        ]
        sentences.append(
            f"{row['subset']}: {', '.join(rates)}; CE {number(row['mean_ce'])} {NATS} "
            f"({row['n_examples']} prompts, {row['n_tokens']} target tokens)."
        )
    return Findings("What does the finetuned model do with nothing spliced (raw)?", sentences)


def overview(conditions: pd.DataFrame, contrast: pd.DataFrame, statistics: pd.DataFrame) -> list[Findings]:
    """The study's questions answered over all layers and sets, one sentence per subset.

    Takes the conditions, contrast and dose-response statistics tables; a question without data is left out.
    """
    no_delta, full = (conditions[conditions["condition"] == name] for name in ("no_delta", "full"))
    slopes = statistics[statistics["metric"] == "mean_ce"]
    per_alpha = f"{NATS} per unit of alpha"
    questions = [
        Findings("Does replacing the MLP by the base alone change CE?", _counted(no_delta, "delta_ce", NATS)),
        Findings("Does base and delta together change CE?", _counted(full, "delta_ce", NATS)),
        Findings("Does the delta change CE (full minus no_delta)?", _counted(contrast, "delta_ce", NATS)),
        *(
            Findings(
                f"Does the delta change {rate} (full minus no_delta)?",
                _counted(contrast, f"delta_{rate}", f"in {rate}"),
            )
            for rate in rates_in(conditions)[:1]
        ),
        Findings("Does CE follow alpha (slope)?", _counted(slopes, "slope", per_alpha)),
    ]
    return [question for question in questions if question.sentences]


def layer_findings(
    conditions: pd.DataFrame, contrast: pd.DataFrame, dose: pd.DataFrame, statistics: pd.DataFrame
) -> list[Findings]:
    """Per spliced layer or set and base percentile: delta_ce of every condition and alpha on each subset.

    Takes the conditions, contrast, dose-response and dose-response statistics tables; any may be empty.
    """
    spliced = conditions[conditions["layer"] != NO_LAYER]
    places = {(row["layer"], row["percentile"]) for _, row in pd.concat([spliced, dose]).iterrows()}
    # NaN is not equal to itself, so a percentile of NaN (base chosen by target L0) becomes None first.
    unique = {(layer, None if pd.isna(percentile) else percentile) for layer, percentile in places}
    found = []
    for layer, percentile in sorted(unique, key=lambda place: (layer_order(place[0]), place[1] or 0.0)):
        tables = [_at(table, layer, percentile) for table in (spliced, contrast, dose, statistics)]
        subsets = dict.fromkeys(subset for table in tables if len(table) for subset in table["subset"])
        title = f"Layer {layer}" if not is_set(layer) else f"Layers {layer} at once"
        found.append(
            Findings(
                title + ("" if percentile is None else f", base percentile {percentile:g}"),
                [text for name in subsets for text in _subset_sentences(name, *tables)],
            )
        )
    return found


def _at(table: pd.DataFrame, layer: str, percentile: float | None) -> pd.DataFrame:
    if table.empty:
        return table
    same = table["percentile"].isna() if percentile is None else table["percentile"] == percentile
    return table[(table["layer"] == layer) & same]


def _subset_sentences(
    subset: str, conditions: pd.DataFrame, contrast: pd.DataFrame, dose: pd.DataFrame, statistics: pd.DataFrame
) -> list[str]:
    """Everything measured on one subset with one layer (or set) spliced: a sentence per comparison."""
    sentences = []
    rows = _of(conditions, subset)
    for _, row in rows.iterrows():
        name = CONDITION_NAMES.get(row["condition"], row["condition"]) + _which(row, conditions)
        sentences.append(f"{name} minus raw, CE {difference_sentence(estimate(row, 'delta_ce'), NATS)}")
    for _, row in _of(contrast, subset).iterrows():
        change = difference_sentence(estimate(row, "delta_ce"), NATS)
        sentences.append(f"full minus no_delta{_which(row, contrast)}, CE {change}")
    for d_new, doses in _of(dose, subset).groupby("d_new", dropna=False):
        sentences.append(f"CE minus raw by alpha{_which(doses.iloc[0], dose)}: {_alpha_list(doses)}")
        slopes = _of(statistics, subset)
        for _, row in slopes[(slopes["metric"] == "mean_ce") & (slopes["d_new"] == d_new)].iterrows():
            slope = difference_sentence(estimate(row, "slope"), f"{NATS} per unit of alpha")
            sentences.append(f"slope of CE against alpha{_which(row, statistics)} {slope}")
    for rate in rates_in(conditions)[:1]:
        values = [
            f"{row['condition']}{_which(row, conditions)} {with_interval(row, rate)}"
            for _, row in rows.dropna(subset=[rate]).iterrows()
        ]
        sentences += [f"{rate}: {', '.join(values)}"] if values else []
    return [f"{subset}: {sentence}." for sentence in sentences]


def _alpha_list(doses: pd.DataFrame) -> str:
    text = ", ".join(f"{row['alpha']:g}: {with_interval(row, 'delta_ce', signed=True)}" for _, row in doses.iterrows())
    values = [estimate(row, "delta_ce") for _, row in doses.iterrows()]
    bounds = [_bound(value) for value in values if not math.isnan(value.low) and not excludes_zero(value)]
    if not bounds:
        return text
    return f"{text}; where these cover zero, no effect larger than {number(max(bounds))} {NATS} is compatible"


def _counted(rows: pd.DataFrame, column: str, unit: str) -> list[str]:
    """One sentence per subset: the single layers counted together, then each set of layers."""
    sentences = []
    for subset in rows["subset"].unique() if len(rows) else []:
        here = _of(rows, subset)
        several = here["layer"].map(is_set).astype(bool)
        single = [(_place(row, rows), estimate(row, column)) for _, row in here[~several].iterrows()]
        parts = _single_layers([pair for pair in single if not math.isnan(pair[1].low)], unit)
        for _, row in here[several].iterrows():
            value = estimate(row, column)
            if not math.isnan(value.value):
                parts.append(f"{_place(row, rows)} {difference_sentence(value, unit)}")
        if parts:
            sentences.append(f"{subset}: {'; '.join(parts)}.")
    return sentences


def _single_layers(known: list[tuple[str, Estimate]], unit: str) -> list[str]:
    """Where the interval leaves out zero, and the largest effect that the other layers still allow."""
    parts = []
    apart = [(place, value) for place, value in known if excludes_zero(value)]
    bounds = [_bound(value) for _, value in known if not excludes_zero(value)]
    if apart:
        scale = max(abs(value.value) for _, value in apart)
        listed = ", ".join(f"{place} {number(value.value, signed=True, scale=scale)}" for place, value in apart)
        parts.append(f"the interval leaves out zero at {len(apart)} of {len(known)} single layers ({listed} {unit})")
    if bounds:
        all_of_them = f"the interval covers zero at all {len(bounds)} single layers:"
        where = f"at the other {len(bounds)}" if apart else all_of_them
        allowed = f"no effect larger than {number(max(bounds))} {unit} is compatible with these data"
        parts.append(f"{where} {allowed if max(bounds) > 0 else f'exactly 0 {unit} on every prompt'}")
    return parts


def _place(row: pd.Series, table: pd.DataFrame) -> str:
    text = f"layer {row['layer']}" if not is_set(row["layer"]) else f"layers {row['layer']} at once"
    return text + _which(row, table)


def _which(row: pd.Series, table: pd.DataFrame) -> str:
    """Base percentile and d_new of a row, where its table holds several."""
    parts = [
        f"{name} {row[name]:g}"
        for name in ("percentile", "d_new")
        if not pd.isna(row[name]) and table[name].nunique() > 1
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _of(table: pd.DataFrame, subset: str) -> pd.DataFrame:
    return table[table["subset"] == subset] if len(table) else table


def _bound(value: Estimate) -> float:
    """The largest effect, either way, that an interval allows."""
    return max(abs(value.low), abs(value.high))


def _scale(value: Estimate) -> float:
    return max(abs(part) for part in value)


def _ends(value: Estimate, *, signed: bool = False) -> str:
    low, high = (number(part, signed=signed, scale=_scale(value)) for part in (value.low, value.high))
    return f"{low} to {high}"
