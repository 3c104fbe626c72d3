"""What the tables say, in sentences.

In: the conditions, contrast and dose-response tables. Out: plain sentences with their intervals. A difference is
claimed only if its 95% interval excludes zero; otherwise the sentence gives the largest effect still compatible.
"""

import math
from typing import NamedTuple

import pandas as pd

from evaluators.tables.pooling import rates_in
from evaluators.tables.statistics import Estimate
from sites import is_set

NATS = "nats per token"


class Findings(NamedTuple):
    """Sentences under one heading, a question."""

    title: str
    sentences: list[str]


def number(value: float | None, *, signed: bool = False, scale: float | None = None) -> str:
    """A value with decimals chosen by its size, or by `scale` for several values shown together.

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


def difference_sentence(value: Estimate, unit: str) -> str:
    """The value, its interval, and what follows: a difference, or the largest effect still compatible."""
    if math.isnan(value.value):
        return "not measured"
    if math.isnan(value.low):
        return f"{number(value.value, signed=True)} {unit} (too few prompts for an interval)"
    if value.value == value.low == value.high == 0:
        return f"exactly 0 {unit} on every prompt"
    text = f"{number(value.value, signed=True, scale=_scale(value))} {unit} ({_ends(value, signed=True)})"
    if value.excludes_zero:
        return text
    return f"{text}, no effect larger than {number(_bound(value))} {unit} is compatible with these data"


def raw_findings(conditions: pd.DataFrame) -> Findings:
    """What the finetuned model does with nothing spliced, one sentence per subset."""
    sentences = []
    for _, row in conditions[conditions["condition"] == "raw"].iterrows():
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
    """The report's questions answered over all layers and sets, one sentence per subset.

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


def _counted(rows: pd.DataFrame, column: str, unit: str) -> list[str]:
    """One sentence per subset: the single layers counted together, then each set of layers."""
    sentences = []
    for subset in rows["subset"].unique() if len(rows) else []:
        subset_rows = _of(rows, subset)
        in_sets = subset_rows["layer"].map(is_set).astype(bool)
        single = [(_place(row, rows), estimate(row, column)) for _, row in subset_rows[~in_sets].iterrows()]
        parts = _single_layers([pair for pair in single if not math.isnan(pair[1].low)], unit)
        for _, row in subset_rows[in_sets].iterrows():
            value = estimate(row, column)
            if not math.isnan(value.value):
                parts.append(f"{_place(row, rows)} {difference_sentence(value, unit)}")
        if parts:
            sentences.append(f"{subset}: {'; '.join(parts)}.")
    return sentences


def _single_layers(estimates: list[tuple[str, Estimate]], unit: str) -> list[str]:
    """The layers whose interval excludes zero, and the largest effect still compatible with the others."""
    parts = []
    nonzero = [(place, value) for place, value in estimates if value.excludes_zero]
    bounds = [_bound(value) for _, value in estimates if not value.excludes_zero]
    if nonzero:
        scale = max(abs(value.value) for _, value in nonzero)
        listed = ", ".join(f"{place} {number(value.value, signed=True, scale=scale)}" for place, value in nonzero)
        parts.append(
            f"the interval leaves out zero at {len(nonzero)} of {len(estimates)} single layers ({listed} {unit})"
        )
    if bounds:
        at_all = f"the interval covers zero at all {len(bounds)} single layers:"
        scope = f"at the other {len(bounds)}" if nonzero else at_all
        allowed = f"no effect larger than {number(max(bounds))} {unit} is compatible with these data"
        parts.append(f"{scope} {allowed if max(bounds) > 0 else f'exactly 0 {unit} on every prompt'}")
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
