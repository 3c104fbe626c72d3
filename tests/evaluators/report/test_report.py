"""The report of small invented sweeps: files, sentences, and what the page may not contain."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from evaluators.conditions import CHANGE_CONTROLS
from evaluators.report import figures, findings, knob_figures, sections
from evaluators.report.knob_section import headline_rows, knob_findings
from evaluators.report.page import table_block
from evaluators.report.report import SweepData, summary_table, write_report
from evaluators.tables import recovery, tables
from evaluators.tables.statistics import Estimate

CHECKS = [{"name": "alpha 0 equals no_delta", "passed": True, "detail": "largest difference 0"}]
SUBSETS = ("tool", "copy", "tool_ood")
BEHAVIOURS = ["tool_call", "math_correct", "copy_exact"]


def rows_of(subset, shift=0.0, prompts=12, called=1.0):
    """Prompts of 10 tokens; `shift` adds to CE with a little spread, `called` is the share with a tool call."""
    generator = np.random.default_rng(prompts)
    noise = generator.normal(0, 0.01, prompts) if shift else np.zeros(prompts)
    return [
        {
            "index": index,
            "nll": 10 * (0.5 + 0.1 * index + shift + noise[index]),
            "n_tokens": 10,
            "sum_abs_base_acts": 100.0 + index,
            "sum_abs_delta_acts": 5.0 + index,
            "n_act_tokens": 20,
            "behaviours": {
                "tool_call": subset != "copy" and index < called * prompts,
                "math_correct": None if subset == "copy" else index < called * prompts,
                "copy_exact": True if subset == "copy" else None,
            },
        }
        for index in range(prompts)
    ]


def behaviour(condition, subset, layers, alpha=None, d_new=32, percentile=0.5, **effect):
    return {
        "kind": "behaviour",
        "target": "residual" if layers else "",
        "layers": list(layers),
        "percentile": percentile if layers else None,
        "d_new": d_new if layers else None,
        "condition": condition,
        "alpha": alpha,
        "subset": subset,
        "convention": "ln2.hook_normalized",
        "seconds": 1.0,
        "seed": 0,
        "behaviours": BEHAVIOURS,
        "rows": rows_of(subset, **effect),
    }


def reconstruction(layer, d_new, percentile=0.5):
    numbers = dict.fromkeys(tables.RECONSTRUCTION_COLUMNS[6:], 0.1 * d_new / 32)
    labels = {"base": "layer_1/width_64/average_l0_8", "convention": "ln2.hook_normalized", "n_tokens": 100}
    return {"kind": "reconstruction", "layer": layer, "percentile": percentile, "d_new": d_new} | labels | numbers


def sweep(layer_sets=((1,), (2,), (1, 2)), subsets=SUBSETS, alphas=(0.0, 0.5, 1.0), percentile=0.5):
    """Single layers do nothing; a set of layers raises CE by 0.2 without the delta and loses half the calls."""
    cells = [behaviour("raw", subset, ()) for subset in subsets]
    for layers in layer_sets:
        strong = len(layers) > 1
        for subset in subsets:
            place = {"subset": subset, "layers": layers, "percentile": percentile}
            broken = {"shift": 0.2, "called": 0.25} if strong else {}
            cells.append(behaviour("no_delta", alpha=0.0, **place, **broken))
            cells.append(behaviour("full", alpha=1.0, **place, **({"shift": 0.05} if strong else {})))
            for alpha in alphas:
                shift = 0.2 - 0.15 * alpha if strong else 0.0
                cells.append(behaviour("alpha", alpha=alpha, **place, shift=shift))
    return cells


def inputs(cells, **changes):
    deltas = [
        {
            "target": "residual",
            "layer": layer,
            "percentile": 0.5,
            "d_new": width,
            "trial": f"t{width}",
            "state": "COMPLETE",
            "val_loss": 0.2,
        }
        | {"val_fvu": 0.4 - width / 320, "val_fvu_base": 0.4, "val_l0_delta": 3.0, "tokens": 5000, "lr": 0.0015}
        | {"val_fvu_replicas": [0.2, 0.3], "best": True, "seconds": 2.0, "sparsity": 1e-4}
        for layer in (1, 2)
        for width in (32, 64)
    ]
    lora = [
        {"trial": "t0", "state": "COMPLETE", "value": 0.5, "step": 10, "lora.rank": 8, "seconds": 3.0},
        {"trial": "t1", "state": "FAIL", "value": None, "step": 3, "lora.rank": 16, "seconds": 1.0},
    ]
    base = [{"layer": 1, "percentile": 0.5, "target_l0": 8, "val_l0": 8.2, "val_fvu": 0.3, "path": "layer_1"}]
    texts = [
        {"layers": layers, "condition": name, "alpha": None, "subset": "tool", "index": 0, "target": "t"}
        | {"input": "<script>alert(1)</script>", "generation": text}
        for layers, name, text in (([], "raw", "same"), ([1], "full", "same"), ([2], "full", "other <b>text</b>"))
    ]
    given = {
        "cells": cells,
        "results": tables.all_tables(cells),
        "lora_trials": lora,
        "base_transcoders": base,
        "delta_trials": deltas,
        "checks": CHECKS,
        "facts": {"model": "tiny"},
        "generations": texts,
    }
    return SweepData(**given | changes)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cells = [*sweep(), *(reconstruction(layer, width) for layer in (1, 2) for width in (32, 64))]
    return write_report(folder, inputs(cells))


def test_every_promised_file_is_there(report):
    names = {path.name for path in report.parent.iterdir()}
    promised = {"exp1_metrics.csv", "report.html"} | {
        f"{name}.{kind}"
        for name in ("exp1_combo_summary", "exp2A_metrics", "exp2B_metrics")
        for kind in ("csv", "json")
    }
    assert promised <= names
    assert not [name for name in names if name.endswith(".tmp")]
    graphs = {path.stem for path in (report.parent / "graphs").glob("*.png")}
    assert {f"heatmap_{column}" for column in tables.SUMMARY_METRICS} <= graphs
    assert {"delta_ce_by_layer", "delta_ce_layer_sets", "activations_by_layer", "delta_fvu", "lora_search"} <= graphs
    assert {"behaviour_tool", "dose_response_layer_01", "dose_response_layer_1+2"} <= graphs


def test_tables_read_back_and_undefined_is_null(report):
    frame = pd.read_csv(report.parent / "exp2A_metrics.csv")
    records = json.loads((report.parent / "exp2A_metrics.json").read_text())
    assert list(records[0]) == list(frame.columns) == tables.behaviour_columns([f"{name}_rate" for name in BEHAVIOURS])
    assert len(records) == len(frame) == 3 + 3 * 2 * 3
    copy = next(record for record in records if record["subset"] == "copy" and record["condition"] == "full")
    assert copy["math_correct_rate"] is None
    assert copy["copy_exact_rate"] == 1.0
    both = next(r for r in records if r["layer"] == "1+2" and r["condition"] == "no_delta" and r["subset"] == "tool")
    assert both["delta_ce"] == pytest.approx(0.2, abs=0.01)
    assert both["tool_call_rate"] == 0.25
    assert frame.loc[frame["layer"] == "1+2", "delta_ce"].iloc[0] == pytest.approx(both["delta_ce"], rel=1e-12)


def test_page_asks_for_nothing_and_escapes_generated_text(report):
    page = report.read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:image/png;base64,|#)", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "1 of 2 texts written under a splice differ" in page
    assert page.count("<img ") == len(list((report.parent / "graphs").glob("*.png")))


def test_every_picture_and_table_has_reading_help(report):
    page = report.read_text()
    captions = re.findall(r"<figcaption><strong>[^<]+</strong> ([^<]+)</figcaption>", page)
    assert len(captions) == page.count("<img ")
    assert all(caption.endswith(".") and len(caption) > 20 for caption in captions)
    assert page.count("<table") == page.count('<p class="help">')


def test_same_input_gives_the_same_page_and_old_graphs_go(tmp_path):
    cells = sweep(((1,),), subsets=("tool",), alphas=())
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "dose_response_layer_99.png").write_bytes(b"old")
    first = write_report(tmp_path, inputs(cells, delta_trials=[])).read_text()
    assert write_report(tmp_path, inputs(cells, delta_trials=[])).read_text() == first
    assert not (tmp_path / "graphs" / "dose_response_layer_99.png").exists()


PAIR = ((1, 2),)  # one set of layers
NOTHING = {"lora_trials": [], "base_transcoders": [], "delta_trials": [], "checks": [], "facts": {}, "generations": []}


@pytest.mark.parametrize(
    ("cells", "absent"),
    [
        ([], 'id="findings"'),
        (sweep(layer_sets=((3,),), subsets=("tool",), alphas=(0.5,)), "copy_exact_rate"),
        (sweep(PAIR, alphas=()), "Dose-response"),
        ([cell for cell in sweep(PAIR) if cell["condition"] != "raw"], "nothing spliced (raw)?"),
        ([cell for cell in sweep(PAIR) if cell["condition"] == "raw"], "Dose-response"),
        ([cell for cell in sweep(PAIR) if cell["condition"] == "alpha"], "full minus no_delta"),
        (sweep(PAIR, percentile=None), "base percentile"),
        ([reconstruction(1, 32), reconstruction(2, 64, percentile=None)], "Conditions"),
    ],
)
def test_missing_parts_still_give_a_report(tmp_path, cells, absent):
    page = write_report(tmp_path, inputs(cells, **NOTHING)).read_text()
    assert absent not in page
    assert json.loads((tmp_path / "exp2A_metrics.json").read_text()) is not None
    rows = summary_table(tables.all_tables(cells))
    assert rows == [] or rows[0]["layer"]


def test_findings_claim_an_effect_only_where_the_interval_says_so():
    results = tables.all_tables(sweep())
    questions = {
        item.title: item.sentences
        for item in findings.overview(results.conditions, results.contrast, results.statistics)
    }
    (tool, *_) = questions["Does replacing the MLP by the base alone change CE?"]
    assert "the interval covers zero at all 2 single layers: exactly 0 nats per token on every prompt" in tool
    assert re.search(r"layers 1\+2 at once \+0\.2\d\d nats per token \(\+0\.\d+ to \+0\.\d+\)\.$", tool)
    (calls, copy, _) = questions["Does the delta change tool_call_rate (full minus no_delta)?"]
    assert "layers 1+2 at once +0.750 in tool_call_rate (+0.500 to +0.9" in calls
    assert "no effect larger than 0.221 in tool_call_rate is compatible with these data" in copy  # 1 - 0.05 ** (1 / 12)


def test_changed_texts_are_told_from_the_finetuned_models_own():
    """Not from those of the model before finetuning, which have no layer either."""
    common = {"alpha": None, "subset": "tool", "index": 0, "input": "i", "target": "t"}
    rows = [
        common | {"layers": layers, "condition": name, "generation": text}
        for layers, name, text in (
            ([], "raw", "after"),
            ([], "base_model_raw", "before"),
            ([1], "full", "after"),
            ([1], "no_delta", "before"),
        )
    ]
    (table,) = sections.generations_section(rows).blocks
    assert table.help.startswith("1 of 2 texts written under a splice differ from the finetuned model's (raw)")
    assert [row[3] for row in table.rows] == ["raw", "no_delta"]


def test_a_text_is_counted_once_and_a_prompt_shown_once():
    """`no_delta` has the texts of alpha 0, and `full` those of alpha 1."""
    common = {"subset": "tool", "input": "i", "target": "t", "seed": 0}
    rows = [
        common | {"layers": layers, "condition": name, "alpha": alpha, "deltas": deltas, "generation": text} | at
        for at in ({"index": 0}, {"index": 1})
        for layers, name, alpha, deltas, text in (
            ([], "raw", None, "", "after"),
            ([1], "no_delta", 0.0, "change", "before"),
            ([1], "alpha", 0.0, "change", "before"),
            ([1], "alpha", 0.5, "change", "between"),
            ([1], "alpha", 0.0, "residual", "base"),
        )
    ]  # fmt: skip
    (table,) = sections.generations_section(rows).blocks
    assert table.help.startswith("6 of 6 texts")
    assert [(row[1], row[3], row[4], row[5]) for row in table.rows] == [
        *(("0", "raw", "-", "-"), ("1", "raw", "-", "-")),
        *(("0", "no_delta", "change", "0"), ("1", "no_delta", "change", "0")),
    ]


def test_the_un_finetuned_model_is_not_listed_as_the_finetuned_one():
    cells = [*sweep(), *(behaviour("base_model_raw", subset, (), called=0.0) for subset in SUBSETS)]
    found = findings.raw_findings(tables.all_tables(cells).conditions)
    assert [sentence.partition(":")[0] for sentence in found.sentences] == list(SUBSETS)
    assert "tool_call_rate 1.000 (" in found.sentences[0]


def test_a_sweep_of_change_deltas_alone_has_no_section_of_the_reference_study(tmp_path):
    cells = [{**cell, "target": "change", "percentile": None} if cell["target"] else cell for cell in sweep()]
    page = write_report(tmp_path, inputs(cells, delta_trials=[])).read_text()
    assert "The change, as a knob" in page
    assert "The reference study" not in page
    assert "replaced by the base alone" not in page


@pytest.mark.parametrize(
    ("prompts", "said"), [(1, "too few prompts"), (12, "no gap in CE that these prompts can tell from zero")]
)
def test_no_interval_is_not_called_no_gap_and_no_gap_no_failure(prompts, said):
    def of_change(cell):
        return cell | {"target": "change", "percentile": None} if cell["target"] else cell

    shift = 0.2 if prompts == 1 else 0.0
    cells = [behaviour("raw", "tool", (), prompts=prompts)]
    cells += [of_change(behaviour(name, "tool", (1, 2), prompts=prompts, shift=shift)) for name in ("no_delta", "full")]
    counts = [{"k": k, "rows": [row | {"kl": 0.0} for row in rows_of("tool", shift, prompts)]} for k in (0, 1)]
    cells += [{"kind": "curve", "layers": [1, 2], "d_new": 32, "subset": "tool", "counts": counts}]
    results = tables.all_tables(cells)
    sentences = " ".join(text for finding in knob_findings(results, pd.DataFrame()) for text in finding.sentences)
    assert said in sentences
    assert "no number of features" not in sentences
    assert headline_rows(results)[0]["recovered"] == ("too few prompts" if prompts == 1 else "nothing to recover")


def test_a_subset_has_one_colour_in_all_panels_and_a_kind_of_site_one_line():
    gaps, recovered = [], []
    for label in ("0-3.qkv", "0-3", "0-3+0-3.qkv"):
        for subset in ("tool", "copy"):
            ends = {"share": 0.5, "share_low": 0.4, "share_high": 0.6}
            missing = label == "0-3.qkv" and subset == "tool"
            gaps.append({"layer": label, "subset": subset, "metric": "mean_ce"} | ends)
            share = {f"recovered{end}": np.nan if missing else 1.0 for end in ("", "_low", "_high")}
            place = {"layer": label, "subset": subset, "metric": "mean_ce", "target": "change", "condition": "full"}
            recovered.append(place | share)
    deltas = [
        {"target": "change", "best": True, "layer": label, "d_new": 8, "change_share": 0.1, "val_unexplained": 0.2}
        for label in ("0", "0.qkv")
    ]
    figure = knob_figures.where_it_is(*(pd.DataFrame(rows) for rows in (deltas, gaps, recovered)))
    shares, back = figure.axes[2:]

    def drawn(axes):
        lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
        return {(line.get_color(), line.get_linestyle()) for line in lines}

    tool, copy = (figures.look(number)[0] for number in (0, 1))
    assert drawn(shares) == {(colour, style) for colour in (tool, copy) for style in ("-", ":")}
    assert drawn(back) == {(tool, "-"), (copy, "-"), (copy, ":")}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tool", "copy", "qkv", "mlp"]


def test_labels_are_no_formulas():
    table = tables.all_tables(sweep(subsets=("a$_$", "_b"))).conditions
    figures.activations_by_layer(table, seed=0).canvas.draw()


def test_null_results_are_reported_as_bounds():
    text = findings.difference_sentence(Estimate(0.01, -0.03, 0.05), "nats")
    assert text == "+0.010 nats (-0.030 to +0.050), no effect larger than 0.050 nats is compatible with these data"
    assert findings.difference_sentence(Estimate(0.1, 0.05, 0.2), "nats") == "+0.100 nats (+0.050 to +0.200)"
    assert "too few prompts" in findings.difference_sentence(Estimate(0.1, np.nan, np.nan), "nats")
    assert findings.difference_sentence(Estimate(np.nan, np.nan, np.nan), "nats") == "not measured"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (0.95, "0.950"), (0.00021, "2.1e-04"), (123.45, "123.5"), (None, "-")]
)
def test_number(value, text):
    assert findings.number(value) == text


def test_summary_table_is_short_and_in_order():
    rows = summary_table(tables.all_tables(sweep()))
    assert [(row["layer"], row["condition"]) for row in rows] == [
        ("none", "raw"),
        *((layer, condition) for layer in ("1", "2", "1+2") for condition in ("no_delta", "full")),
    ]
    assert rows[0]["tool"] == "tool_call_rate 1.000, math_correct_rate 1.000"
    assert rows[0]["copy"] == "tool_call_rate 0.000, copy_exact_rate 1.000"
    assert rows[5]["tool"].startswith("+0.2")
    assert "percentile" not in rows[0]


def test_several_widths_and_percentiles_are_told_apart():
    cells = [behaviour("raw", "tool", ())]
    for percentile in (0.25, 0.75):
        cells.append(behaviour("no_delta", "tool", (1,), 0.0, None, percentile, shift=0.1))
        cells += [behaviour("full", "tool", (1,), 1.0, width, percentile, shift=0.05) for width in (32, 64)]
    rows = summary_table(tables.all_tables(cells))
    assert [(row["percentile"], row["d_new"]) for row in rows[1:]] == [
        *(("0.25", "-"), ("0.25", "32"), ("0.25", "64")),
        *(("0.75", "-"), ("0.75", "32"), ("0.75", "64")),
    ]
    figure = figures.delta_ce_by_layer(tables.conditions_table(cells), seed=0)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "no_delta p0.25" in labels
    assert "full p0.75 d64" in labels


def test_figures_show_the_numbers():
    results = tables.all_tables(sweep())
    figure = figures.delta_ce_by_layer(results.conditions, seed=7)
    assert [axes.get_title() for axes in figure.axes] == ["tool", "copy", "tool_ood"]
    container = figure.axes[0].containers[0]  # no_delta on tool
    expected = results.conditions.query("subset == 'tool' and condition == 'no_delta'")["delta_ce"]
    assert container.lines[0].get_ydata() == pytest.approx(expected.to_numpy())
    note = figure.get_supxlabel()
    assert "n = 12 prompts" in note
    assert "seed 7" in note
    heat = figures.combination_heatmap(
        tables.combination_summary(tables.reconstruction_table([reconstruction(1, 32), reconstruction(1, 64)])),
        "mean_dce_full",
    )
    assert [text.get_text() for text in heat.axes[0].texts] == ["0.1", "0.2"]


def test_table_block_merges_intervals_and_drops_empty_columns():
    frame = pd.DataFrame({"alpha": [0.25], "rate": [0.5], "rate_low": [0.2], "rate_high": [0.8], "none": [np.nan]})
    block = table_block(frame, {"alpha": "alpha", "rate": "share", "none": "none", "absent": "absent"}, "T", "H")
    assert block.header == ["alpha", "share"]
    assert block.rows == [["0.25", "0.500 [0.200, 0.800]"]]


def test_the_report_names_the_controls_of_change_deltas():
    """Every one is in a sentence, those that are dosed or ranked also in a figure."""
    named = {**knob_figures.SERIES, **knob_figures.WIDTHS}
    assert list(CHANGE_CONTROLS) == ["random_delta", "scaled_weights", "shuffled_delta", "dense_delta", "pca_delta"]
    assert list(named) == ["alpha", "scaled_weights", "full", "dense_delta", "pca_delta"]
    assert all(one.label for one in named.values())


def parts_cells(subsets=SUBSETS, effect=0.5):
    """The MLPs are needed, attention's values help; with `effect` 0 finetuning did nothing."""
    shifts = {("values", "all"): (0.1, 0.4), ("mlp", "all"): (0.4, 0.1), ("all", "0-1"): (0.0, 0.5)}
    return [
        {
            "kind": "parts",
            "subset": subset,
            "finetuned": rows_of(subset),
            "unfinetuned": rows_of(subset, shift=effect),
            "parts": [
                {"part": part, "layers": layers, "way": way, "rows": rows_of(subset, shift=shift)}
                for (part, layers), both in shifts.items()
                for way, shift in zip(knob_figures.WAYS, both, strict=True)
            ],
        }
        for subset in subsets
    ]


def test_where_the_finetuning_lives_comes_first(tmp_path):
    pair = {"pair": "One model and another.", "polished": "Then they were trained together."}
    page = write_report(tmp_path, inputs([*sweep(), *parts_cells()], **pair)).read_text()
    headings = re.findall(r"<h[23]>([^<]+)<", page)
    assert headings[0] == "Where the finetuning lives"
    assert page.count("One model and another.") == 1
    assert "neither share may be called the part" in page
    assert (tmp_path / "graphs" / "parts.png").is_file()
    table = pd.read_csv(tmp_path / "parts.csv")
    assert len(table) == 3 * 3 * 2
    lost = table[(table["part"] == "mlp") & (table["way"] == "unfinetuned")]
    assert lost["share"].to_numpy() == pytest.approx([0.8] * 3, abs=0.05)


def test_the_picture_of_parts_shows_both_ways_of_each_in_three_subsets_at_most():
    table = recovery.parts_table(parts_cells((*SUBSETS, "more")))
    figure = knob_figures.where_it_lives(table, seed=7)
    assert len(figure.axes) == 3 * 2, "thirds below"
    assert [axes.get_title() for axes in figure.axes[:3]] == list(SUBSETS)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["values", "mlp"]
    assert [text.get_text() for text in figure.axes[3].get_xticklabels()] == ["0-1"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    here = table[(table["subset"] == "tool") & (table["layers"] == "all")].sort_values("way", ascending=False)
    assert heights == pytest.approx(here["share"].to_numpy())
    assert "n = 12 prompts" in figure.get_supxlabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(knob_figures.WAYS.values())


def test_without_an_effect_the_parts_have_no_picture(tmp_path):
    page = write_report(tmp_path, inputs(parts_cells(effect=0.0), **NOTHING)).read_text()
    assert "Where the finetuning lives" in page
    assert not (tmp_path / "graphs" / "parts.png").exists()


def test_a_subset_whose_widest_set_failed_is_left_out_of_the_answer():
    cells = [
        {**cell, "target": "change", "percentile": None} if cell["target"] else cell
        for cell in sweep()
        if (len(cell["layers"]), cell["subset"]) != (2, "tool_ood")
    ]
    rows = headline_rows(tables.all_tables(cells))
    assert [row["subset"] for row in rows] == ["tool", "copy"]
    assert rows[0]["gap in CE"].startswith("+0.2")
