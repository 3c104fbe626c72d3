"""The page of a first look at a pair of models, and the same in ten lines.

In: the figures of `measures.look`, with the weights that changed and the facts of the pair, as plain values. Out: one
self-contained HTML document; lines for the terminal.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from data.selection import first_of_each
from evaluators.report import look_figures
from evaluators.report.findings import Findings, number, with_interval
from evaluators.report.page import (
    Block,
    Picture,
    Section,
    Sentences,
    Span,
    Table,
    Texts,
    picture,
    render,
)
from evaluators.report.parts_section import parts_blocks
from evaluators.tables.recovery import EVERY_LAYER, parts_table
from evaluators.tables.statistics import Estimate, paired_bootstrap, wilson
from sites import parse_sites

Figures = Mapping[str, Any]
TEXTS_SHOWN = 12
POSITIONS_SHOWN = 20
MOST_ALIKE = 3
CONTEXT_TOKENS = 12
"""Tokens shown before a position."""
FULL_SHADE = 5.0
"""KL in nats that is drawn in the darkest shade."""
SPANS = {"first": "the first five tokens", "all": "all tokens"}
PARTS = {
    "patterns": "attention's patterns",
    "values": "attention's values",
    "output": "attention's output",
    "mlp": "MLPs",
    "rest": "what is outside the sites",
}
KIND_OF_PART = {"output": "o", "mlp": "mlp"}
"""Parts that make up a whole kind of site."""
NEARLY_ALL = 0.95
"""Minimum share of the effect for which a narrower sweep is suggested."""
STANDS_OUT = 2.0
"""How many times the control's norm a mean difference must have to stand out."""
LAYERS_SHOWN = 6


def look_page(look: Figures, *, seed: int) -> str:
    """The page. For a pair in which nothing changed, its first line says so and there is nothing else."""
    parts = parts_blocks(parts_table(look["parts"], seed=seed), seed=seed) if look["changed"] else []
    return page_of(look, look_sections(look, parts, seed=seed))


def page_of(look: Figures, sections: Sequence[Section]) -> str:
    """The page of these sections."""
    return render(f"A first look: {look['facts']['title']}", sections)


def look_sections(look: Figures, parts: Sequence[Block], *, seed: int) -> list[Section]:
    """The sections of the page; `parts` are the blocks that show its parts."""
    if not look["changed"]:
        return [Section("weights", "What changed in the weights", NOTHING_CHANGED)]
    return [
        _weights(look),
        _answers(look, seed),
        _divergence(look),
        _parts(look, parts, seed),
        _lens(look),
        *([_next(look, seed)] if "next" in look else []),
    ]


def look_section(look: Figures, sections: Sequence[Section]) -> Section:
    """How a report begins: where the weights changed, and what that does to neutral text. `sections` are those of the
    page."""
    pictures = [
        block
        for section in sections
        if section.anchor in ("weights", "lens")
        for block in section.blocks[:1]
        if isinstance(block, Picture)
    ]
    intro = (
        f"{_changed_in_words(look)}. On unrelated text, {_lens_in_words(look)}. The page of the first look has more."
    )
    return Section("look", "A first look", intro, pictures)


NOTHING_CHANGED = (
    "Nothing changed: every weight of the finetuned model equals the un-finetuned one's, so both say the same. Was the "
    "right checkpoint saved, and was it trained?"
)


def in_ten_lines(look: Figures, *, seed: int) -> list[str]:
    """What the page says, for the terminal."""
    if not look["changed"]:
        return [NOTHING_CHANGED]
    lines = [f"weights: {_changed_in_words(look)}"]
    for subset, estimate in effects(look, seed).items():
        after, before = mean_nll(look, subset, "finetuned"), mean_nll(look, subset, "unfinetuned")
        change = f"{-estimate.value:+.2f} [{-estimate.high:+.2f}, {-estimate.low:+.2f}]"
        lines.append(f"CE on {subset}: {before:.2f} before, {after:.2f} after ({change} nats per token)")
    lines = lines[:4]
    example = next((row for row in look["answers"] if row["finetuned"]["text"] != row["unfinetuned"]["text"]), None)
    if example is not None:
        was, now = (repr(_short(example[model]["text"])) for model in ("unfinetuned", "finetuned"))
        lines.append(f"asked {_short(example['input'])!r}: {was} before, {now} after")
    for at in [at for at in _positions(look, most=None) if at["where"] == "answer"][:1]:
        tokens = f"{at['finetuned']!r} instead of {at['unfinetuned']!r} (KL {at['kl']:.2f} nats)"
        lines.append(f"diverges most after {_short(at['context'], 40, end=True)!r}: {tokens}")
    lines += [f"where it lives, {sentence}" for sentence in _parts_in_words(look, seed)[:2]]
    lines.append(f"on unrelated text: {_lens_in_words(look)}")
    if "next" in look:
        lines.append(" ".join(["next:", look["next"]["command"], *_enough(_narrower(look, seed))]))
    return lines


def effects(look: Figures, seed: int) -> dict[str, Estimate]:
    """By subset, CE of the un-finetuned model minus that of the finetuned one on the targets, with its paired
    interval over rows."""
    return {
        subset: paired_bootstrap(*_nll(look, subset, "unfinetuned"), *_nll(look, subset, "finetuned"), seed=seed)
        for subset in _subsets(look)
    }


def mean_nll(look: Figures, subset: str, model: str) -> float:
    nll, tokens = _nll(look, subset, model)
    return float(nll.sum() / tokens.sum())


def _nll(look: Figures, subset: str, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each row's target."""
    rows = [row for row in look["divergence"] if row["label"] == subset]
    targets = [row[f"nll_{model}"][row["n_prompt"] - 1 :] for row in rows]
    return np.array([sum(target) for target in targets]), np.array([len(target) for target in targets], dtype=float)


def _subsets(look: Figures) -> list[str]:
    return list(dict.fromkeys(row["label"] for row in look["divergence"]))


def _weights(look: Figures) -> Section:
    changed = look["changed"]
    table = pd.DataFrame(changed)
    blocks: list[Block] = []
    if table["layer"].notna().any():
        help = "How much each matrix changed, relative to its size. Layers and modules that are white did not change."
        blocks.append(picture("weights", look_figures.weights_by_layer(changed), "Where the weights changed", help))
    rows = []
    for module, group in table.groupby("module", sort=False):
        layers = group["layer"].dropna()
        place = f"{len(layers)} layers" if len(layers) else "outside the blocks"
        low, high = group["relative"].min(), group["relative"].max()
        relative = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
        rows.append([str(module), place, relative, _ranks(group) or "-"])
    help = (
        "The rank is that of what changed: a LoRA's rank shows here, and a matrix that was trained whole has more than "
        "64. It counts singular values above what rounding alone explains."
    )
    blocks.append(Table("By module", help, ["module", "where", "|W' - W| / |W|", "rank of the change"], rows))
    for embedding in look["embeddings"]:
        help = f"{embedding['changed']} of {embedding['of']} rows of {embedding['name']} changed; the largest changes."
        listed = [[str(row), repr(token), f"{relative:.3g}"] for row, token, relative in embedding["rows"]]
        blocks.append(Table("Tokens whose embedding changed", help, ["row", "token", "relative change"], listed))
    return Section(
        "weights",
        "What changed in the weights",
        f"{_changed_in_words(look)}. {' '.join(map(_sentence, look['notes']))}",
        blocks,
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _changed_in_words(look: Figures) -> str:
    """`q_proj, v_proj in 30 layers (2.1% of their size, rank 16)`."""
    table = pd.DataFrame(look["changed"])
    by_module = {str(module): group for module, group in table.groupby("module", sort=False)}
    same_extent: dict[tuple[int, str], list[str]] = {}
    for module, group in by_module.items():
        same_extent.setdefault((int(group["layer"].count()), _ranks(group)), []).append(module)
    parts = []
    for (count, ranks), modules in same_extent.items():
        size = pd.concat([by_module[module]["relative"] for module in modules]).median()
        place = f" in {count} layers" if count > 1 else ""
        parts.append(f"{', '.join(modules)}{place} ({size:.1%} of their size{ranks and f', rank {ranks}'})")
    return "; ".join(parts[:4]) + (f" and {len(parts) - 4} more groups" if len(parts) > 4 else "")


def _ranks(group: pd.DataFrame) -> str:
    """`16`, `7 to 16`, `more than 64`; empty for vectors."""
    matrices = group[group["rank_in_words"] != "-"]
    if matrices.empty:
        return ""
    ranks = matrices["rank"].dropna().astype(int)
    if len(ranks) < len(matrices):
        return str(matrices[matrices["rank"].isna()]["rank_in_words"].iloc[0])
    low, high = ranks.min(), ranks.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _answers(look: Figures, seed: int) -> Section:
    blocks: list[Block] = []
    rows = []
    for subset, estimate in effects(look, seed).items():
        count = sum(row["label"] == subset for row in look["divergence"])
        before, after = mean_nll(look, subset, "unfinetuned"), mean_nll(look, subset, "finetuned")
        change = f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
        rows.append([subset, number(before), number(after), change, str(count)])
    help = (
        "CE in nats per target token, of both models on the same rows. The gain is before minus after, with its 95% "
        "interval over rows."
    )
    blocks.append(Table("Cross-entropy", help, ["subset", "before", "after", "gain", "rows"], rows))
    rates = _rates(look["answers"])
    if rates:
        help = (
            f"Shares of {len(look['answers'])} answers of each model, with Wilson 95% intervals: enough for a first "
            "impression only."
        )
        blocks.append(Table("Behaviours", help, ["behaviour", "subset", "before", "after", "answers"], rates))
    lines = []
    for answer in look["answers"]:
        before, after = answer["unfinetuned"]["text"], answer["finetuned"]["text"]
        row_cells = [[Span(answer["label"])], [Span(answer["input"])], [Span(answer["target"])]]
        lines.append([*row_cells, marked(after, before), marked(before, after)])
    help = (
        "Greedy answers to the same prompts, cut at the token budget. Words that the other model did not say there are "
        "marked."
    )
    blocks.append(Texts("Answers side by side", help, ["subset", "prompt", "target", "before", "after"], lines))
    intro = "What both models make of the same rows: how likely they find the targets, and what they answer."
    return Section("answers", "What changed in what it says", intro, blocks)


def _rates(answers: Sequence[Figures]) -> list[list[str]]:
    rows = []
    for name in answers[0]["finetuned"]["behaviours"] if answers else ():
        for subset in dict.fromkeys(answer["label"] for answer in answers):
            subset_answers = [answer for answer in answers if answer["label"] == subset]
            shown = []
            for model in ("unfinetuned", "finetuned"):
                verdicts = [answer[model]["behaviours"][name] for answer in subset_answers]
                hits = [verdict for verdict in verdicts if verdict is not None]
                low, high = wilson(sum(hits), len(hits))
                shown.append(f"{sum(hits) / len(hits):.2f} [{low:.2f}, {high:.2f}]" if hits else "-")
            if shown != ["-", "-"]:
                rows.append([name, subset, *shown, str(len(subset_answers))])
    return rows


def marked(other: str, text: str) -> list[Span]:
    """`text` in spans, in which the words that differ from `other` are marked."""
    words_here, words_there = text.split(" "), other.split(" ")
    spans = []
    for tag, _, _, start, end in difflib.SequenceMatcher(None, words_there, words_here, autojunk=False).get_opcodes():
        if words := " ".join(words_here[start:end]):
            spans.append(Span(f"{words} ", marked=tag != "equal"))
    return spans


def _divergence(look: Figures) -> Section:
    shown = first_of_each(look["divergence"], lambda row: row["label"], TEXTS_SHOWN)
    lines = [[[Span(row["label"])], _shaded(row)] for row in shown]
    help = (
        "Each token is shaded by the KL divergence between the two models' predictions of it: not at all at 0, fully "
        "at 5 nats. A tooltip has the figure and what each model would have said."
    )
    texts = Texts("KL token by token", help, ["subset", "text"], lines)
    rows = [
        [
            f"{at['kl']:.2f}",
            f"{at['label']}, {at['where']}",
            f"...{at['context']}",
            repr(at["said"]),
            ", ".join(map(repr, at["all_finetuned"])),
            ", ".join(map(repr, at["all_unfinetuned"])),
        ]
        for at in _positions(look)
    ]
    header = ["KL, nats", "where", "after", "in the text", "the finetuned model says", "the un-finetuned model says"]
    help = (
        "The positions with the largest KL, at most two of a prompt and two of an answer; each model's three most "
        "likely tokens."
    )
    return Section(
        "divergence",
        "Where they diverge",
        "KL(finetuned || un-finetuned) of the next token, at every position of prompts and targets.",
        [texts, Table("Largest divergences", help, header, rows, wide_text=True)],
    )


def _shaded(row: Figures) -> list[Span]:
    spans = [Span(row["tokens"][0])] if row["n_prompt"] > 1 else []
    for index, kl in enumerate(row["kl"], start=1):
        after, before = (row[model][index - 1][0] for model in ("finetuned", "unfinetuned"))
        tip = f"KL {kl:.2f}; finetuned {after!r}, un-finetuned {before!r}"
        spans.append(Span(row["tokens"][index], shade=round(min(1.0, kl / FULL_SHADE), 2), tip=tip))
    return spans


def _positions(look: Figures, most: int | None = POSITIONS_SHOWN) -> list[dict[str, Any]]:
    """The positions with the largest KL: at most two of a text's prompt and two of its answer, and three where the
    finetuned model would say the same instead of the same token."""
    listed: list[dict[str, Any]] = []
    for row in look["divergence"]:
        ranked = sorted(range(len(row["kl"])), key=lambda at: -row["kl"][at])
        prompt, answer = ([at for at in ranked if (at >= row["n_prompt"] - 1) == half] for half in (False, True))
        for place in prompt[:2] + answer[:2]:
            listed.append(
                {
                    "kl": row["kl"][place],
                    "label": row["label"],
                    "where": "answer" if place >= row["n_prompt"] - 1 else "prompt",
                    "context": "".join(row["tokens"][max(1, place + 1 - CONTEXT_TOKENS) : place + 1]),
                    "said": row["tokens"][place + 1],
                    "finetuned": row["finetuned"][place][0],
                    "unfinetuned": row["unfinetuned"][place][0],
                    "all_finetuned": row["finetuned"][place],
                    "all_unfinetuned": row["unfinetuned"][place],
                }
            )
    listed.sort(key=lambda at: -at["kl"])
    repeats: Counter[tuple[str, str]] = Counter()
    positions = []
    for at in listed:  # a chat template would fill the list with one and the same place
        repeats[at["said"], at["finetuned"]] += 1
        if repeats[at["said"], at["finetuned"]] <= MOST_ALIKE:
            positions.append(at)
    return positions[:most]


def _parts(look: Figures, blocks: Sequence[Block], seed: int) -> Section:
    intro = (
        "The effect on CE by parts of the model: what is lost when one part alone is un-finetuned, and what one part "
        "finetuned alone brings."
    )
    sentences = _parts_in_words(look, seed)
    return Section(
        "parts",
        "Where it lives",
        intro,
        [Sentences([Findings("In words", sentences)]), *blocks],
    )


def _parts_in_words(look: Figures, seed: int) -> list[str]:
    """For each subset with an effect: the part that brings the largest share of it alone, the one without which the
    largest share is lost, and the third of the layers that brings the largest."""
    table = parts_table(look["parts"], seed=seed).dropna(subset=["share"])
    worse = {
        cell["subset"]
        for cell in look["parts"]
        if sum(row["nll"] for row in cell["finetuned"]) > sum(row["nll"] for row in cell["unfinetuned"])
    }
    sentences = []
    for subset, rows in table.groupby("subset", sort=False):
        every_layer = rows["layers"] == EVERY_LAYER
        best, costliest = (_largest(rows[every_layer & (rows["way"] == way)]) for way in ("finetuned", "unfinetuned"))
        sentence = (
            f"{subset} ({best['n_examples']} rows): finetuned alone, {PARTS[best['part']]} bring the largest share of "
            f"the effect, {_share(best)}; put back alone, {PARTS[costliest['part']]} take the largest share away, "
            f"{_share(costliest)}"
        )
        thirds = rows[~every_layer & (rows["way"] == "finetuned")]
        if len(thirds) > 1:
            third = _largest(thirds)
            sentence += f"; of the thirds, layers {third['layers']} bring the largest, {_share(third)}"
        if subset in worse:
            sentence += " (here finetuning made the CE worse, and that is the effect)"
        sentences.append(sentence)
    silent = [cell["subset"] for cell in look["parts"] if cell["subset"] not in set(table["subset"])]
    return sentences + [f"{subset}: no effect on CE that its rows can tell from zero" for subset in silent]


def _largest(rows: pd.DataFrame) -> pd.Series:
    return rows.sort_values("share").iloc[-1]


def _share(row: pd.Series) -> str:
    return f"{row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"


def _lens(look: Figures) -> Section:
    help = (
        "Where the line of the pair stands well above the control, the finetuning left a trace on text that has "
        "nothing to do with its task. The control shows how far two halves of the texts are apart in one model."
    )
    blocks: list[Block] = [
        picture("lens", look_figures.lens_by_layer(look["lens"], SPANS), "How far the mean stream moved", help)
    ]
    header = ["layer", "tokens", "times the control", "promoted by the difference", "promoted by the control"]
    ranked = sorted(look["lens"], key=_ratio, reverse=True)
    help = (
        "The difference alone, through the final norm and the unembedding. Read the control first: tokens that it "
        "promotes as well mean nothing."
    )
    for title, readings, folded in (
        ("What it reads where it stands out most", ranked[:LAYERS_SHOWN], False),
        ("Every layer", look["lens"], True),
    ):
        rows = [
            [
                str(reading["layer"]),
                SPANS[reading["span"]],
                f"{_ratio(reading):.1f}",
                _listed(reading["promoted"]),
                _listed(reading["control_promoted"]),
            ]
            for reading in readings
        ]
        blocks.append(Table(title, help, header, rows, wide_text=True, folded=folded))
    intro = (
        "The mean difference of the two models' residual streams on unrelated text, read as if it were the last "
        f"layer's output. {_sentence(_lens_in_words(look))}"
    )
    return Section("lens", "What the mean change reads", intro, blocks)


def _ratio(reading: Figures) -> float:
    return reading["norm"] / max(reading["control_norm"], 1e-30)


def _listed(tokens: Sequence[str]) -> str:
    return " ".join(repr(token) for token in tokens)


def _lens_in_words(look: Figures) -> str:
    best = max(look["lens"], key=_ratio)
    tokens = ", ".join(repr(token) for token in best["promoted"][:5])
    caution = "" if _ratio(best) >= STANDS_OUT else ", which does not stand out,"
    return (
        f"in layer {best['layer']}, over {SPANS[best['span']]}, the mean difference has {_ratio(best):.1f} times the "
        f"control's norm{caution} and promotes {tokens}"
    )


def _narrower(look: Figures, seed: int) -> dict[str, pd.DataFrame]:
    """Settings that restrict a sweep, each with what it could explain at most, by subset: the share of the effect that
    is lost when just its sites are un-finetuned. Queries, keys and values are not measured together."""
    table = parts_table(look["parts"], seed=seed)
    reverted = table[(table["way"] == "unfinetuned") & table["share"].notna()]
    kinds = KIND_OF_PART if reverted.loc[reverted["layers"] == EVERY_LAYER, "part"].nunique() > 1 else {}
    rows = {f"deltas.sites=[{kind}]": reverted[reverted["part"] == part] for part, kind in kinds.items()}
    for third in reverted.loc[reverted["layers"] != EVERY_LAYER, "layers"].unique():
        layers = ",".join(str(site.layer) for site in parse_sites(third))
        rows[f"deltas.layers=[{layers}]"] = reverted[reverted["layers"] == third]
    return {setting: shares for setting, shares in rows.items() if len(shares)}


def _enough(narrower: dict[str, pd.DataFrame]) -> list[str]:
    """The first setting that could explain nearly all on every subset with an effect."""
    return [setting for setting, shares in narrower.items() if (shares["share_low"] >= NEARLY_ALL).all()][:1]


def _next(look: Figures, seed: int) -> Section:
    suggested, narrower = look["next"], _narrower(look, seed)
    sentences = [f"Run: {' '.join([suggested['command'], *_enough(narrower)])}"]
    if "refused" in suggested:
        sentences.append(f"As it stands, the sweep would refuse this pair: {suggested['refused']}")
    sentences += [f"{name}: {text}" for name, text in suggested["plan"].items()]
    if suggested["plan"] and "time" not in suggested["plan"]:
        sentences.append("How long it takes is not known before a sweep has run on this machine.")
    if "YOUR_ROWS" in suggested["command"]:
        sentences.append(
            "YOUR_ROWS stands for a file of prompts and answers like those of the finetuning: without one, the sweep "
            "evaluates rows that are generated for the presets' own task, which say nothing about other finetunings."
        )
    sentences.append(
        "At best, its deltas explain the whole effect on its rows: every weight that changed is at a site with deltas, "
        "or is un-finetuned together with them."
    )
    blocks: list[Block] = [Sentences([Findings("The sweep", sentences)])]
    if narrower:
        subsets = list(dict.fromkeys(subset for shares in narrower.values() for subset in shares["subset"]))
        rows: list[list[Any]] = []
        for setting, shares in narrower.items():
            by_subset = shares.set_index("subset")
            cells = [
                with_interval(by_subset.loc[name], "share") if name in by_subset.index else "-" for name in subsets
            ]
            rows.append([setting, *cells])
        help = (
            "Fewer sites train faster, but their deltas explain at most what is lost when just these sites are "
            "un-finetuned: that share of the effect, with 95% intervals. All sites together can explain all of it."
        )
        blocks.append(Table("A narrower sweep", help, ["setting", *subsets], rows, wide_text=True))
    return Section(
        "next", "What to do next", "Sparse deltas say what these parts have learnt, feature by feature.", blocks
    )


def _short(text: str, most: int = 60, end: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return f"...{text[-most:]}" if end else f"{text[:most]}..."
