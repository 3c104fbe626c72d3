"""`features.html`: a card for each of the most effective delta features, and a list of all of them.

In: card cells, and the tables of features. Out: the text of one self-contained page. Its only script sorts, filters and
scrolls; without it the cards are shown in order. Nothing is requested, and no other script may run: the content policy
allows the script by its hash.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

from evaluators.report import PAGE
from evaluators.report.findings import number, with_interval
from evaluators.report.page import Link, Table, template
from evaluators.report.scripted import data, script, visible
from evaluators.tables.feature_tables import FIRING, WAYS
from evaluators.tables.pooling import RATE, Cell, of_kind
from sites import MLP, Site

SHOWN, SUBSETS_SHOWN = 8, 2
"""Features per target in the report itself, and subsets for which it gives their effects."""
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
WAY_WORDS = {"ablated": "without it", "alone": "alone"}
BAR = 8
"""Width of a histogram's bar in pixels."""

PROJECTIONS = {"q": "queries", "k": "keys", "v": "values"}
HEADS = 4
"""Heads that a card lists for each projection."""
LEAST = 0.001
"""Share of attention that must move for a head's pattern to be drawn, and for a piece of its text to be shaded."""


class Piece(NamedTuple):
    """A token of a context; `shade` is its activation as a share of the feature's largest one, empty where it does not
    fire."""

    text: str
    shade: str
    title: str
    peak: bool


class Shift(NamedTuple):
    """A token of a context, whose attention grows (`gain`) or shrinks (`loss`); `shade` is by how much, as a share of
    the largest change there, empty where nothing moves."""

    text: str
    shade: str
    way: str
    title: str
    peak: bool


class Pattern(NamedTuple):
    """One head's change of attention in a context: in words, drawn on the text, and what lies before that text."""

    words: str
    shifts: list[Shift]
    before: str


class Effect(NamedTuple):
    """What changes on a subset, as text with intervals: CE in both ways, and the behaviours that change."""

    subset: str
    fires: str
    ce: tuple[str, str]
    rates: list[tuple[str, str, str]]


class Card(NamedTuple):
    address: str
    title: str
    place: str
    group: str
    """The number of its group; empty if it has none."""
    effects: list[Effect]
    promoted: list[str]
    suppressed: list[str]
    bars: list[tuple[int, int]]
    top: str
    contexts: list[tuple[str, list[Piece]]]
    at_bos: bool
    heads: list[tuple[str, str]]
    """For a feature of queries, keys and values: the share of its row in each, and the heads with most of it."""
    reads: str
    """For a feature of attention's output: the heads that it reads most."""
    patterns: list[Pattern] | None
    """For a feature of queries, keys and values: what it does to attention; None if that was not measured."""
    values: list[tuple[int, list[str], list[str]]]
    """By head: the tokens that its values promote, and suppress."""


def address(target: str, layer: int | str, feature: int) -> str:
    """A card's name on the page: `L17F042`; that of a residual delta's feature begins with the target."""
    return ("" if target == "change" else f"{target}-") + f"L{str(layer).replace('.', '-')}F{feature:03d}"


def name(layer: int | str, feature: int, at_bos: bool) -> str:
    site = Site.parse(layer)
    words = f"layer {site.layer}" if site.kind == MLP else f"{site.kind.words} of layer {site.layer}"
    return f"{words}, " + ("at BOS" if at_bos else f"feature {feature}")


def most_effective(features: pd.DataFrame, target: str) -> Table | None:
    """A short list of a target's first cards; None if there are none."""
    rows = features[features["target"] == target].head(SHOWN) if len(features) else features
    if rows.empty:
        return None
    subsets = [column.removeprefix(FIRING) for column in rows.columns if column.startswith(FIRING)][:SUBSETS_SHOWN]
    effects = {f"{way}_ce_{subset}": f"CE {words}, {subset}" for subset in subsets for way, words in WAY_WORDS.items()}
    header = ["rank", "feature", "estimated effect", *effects.values(), "promotes"]
    lines: list[list[str | Link]] = []
    for _, row in rows.iterrows():
        link = Link(
            name(row["layer"], row["feature"], row["at_bos"]),
            f"{PAGE}#{address(target, row['layer'], row['feature'])}",
        )
        changes = [_change(row, column) for column in effects]
        promoted = " ".join(QUOTED.findall(row["promoted"])[:4])
        lines.append([str(row["rank"]), link, number(row["effect"], signed=True), *changes, promoted])
    help = (
        "Ranked by the estimated effect, nats per target token on held-out rows. Without it: all deltas but this "
        "feature, minus all deltas. Alone: this feature alone, minus no feature at all. In nats, with paired 95% "
        "intervals over prompts; a feature may be replaceable among the others and still do much alone."
    )
    return Table(f"The most effective {target} features", help, header, lines, wide_text=True)


def feature_page(cells: Sequence[Cell], features: pd.DataFrame, ranking: pd.DataFrame, pair: str) -> str:
    """The page; `features` has a row for each card, `ranking` one for each feature of all layers."""
    card_of = {
        (cell["target"], card["layer"], card["feature"]): card
        for cell in of_kind(cells, "cards")
        for card in cell["cards"]
    }
    subsets = [column.removeprefix(FIRING) for column in ranking.columns if column.startswith(FIRING)]
    totals = ranking.groupby("target").size().to_dict()
    cards = [
        _card(row, card_of[row["target"], row["layer"], row["feature"]], subsets, totals[row["target"]])
        for _, row in features.iterrows()
    ]
    return template("features.html.jinja").render(
        pair=pair,
        cards=cards,
        subsets=subsets,
        targets=list(totals),
        total=len(ranking),
        n_prompts=int(max((features[f"n_{subset}"].max() for subset in subsets), default=0)),
        with_patterns=any(card.patterns is not None for card in cards),
        bar=BAR,
        script=script("features.js"),
        data=_data(features, ranking, subsets),
    )


def _card(row: pd.Series, card: dict[str, Any], subsets: Sequence[str], total: int) -> Card:
    layer, feature = row["layer"], int(row["feature"])
    target = "" if row["target"] == "change" else f" of the {row['target']} delta"
    counts, top = card["histogram"]["counts"], card["histogram"]["top"]
    most = max(counts, default=1)
    return Card(
        address(row["target"], layer, feature),
        _capital(name(layer, feature, row["at_bos"])) + target,
        f"rank {int(row['rank']):,} of {total:,}; estimated effect {row['effect']:+.4f} nats per target token",
        "" if pd.isna(row["group"]) else str(int(row["group"])),
        [_effect(row, subset) for subset in subsets],
        [visible(token) for token in card["promoted"]],
        [visible(token) for token in card["suppressed"]],
        # The square root, so that rare strong activations stay visible next to many weak ones.
        [] if row["at_bos"] else [(count, round(40 * math.sqrt(count / most))) for count in counts],
        f"{top:.3g}",
        [] if row["at_bos"] else [_context(context, top) for context in card["contexts"]],
        bool(row["at_bos"]),
        _heads(card.get("heads", {})),
        _most(card.get("reads", [])),
        [line for pair in zip(card["contexts"], card["patterns"], strict=False) for line in _patterns(*pair)]
        if card.get("patterns")
        else None,
        [
            (values["head"], [*map(visible, values["promoted"])], [*map(visible, values["suppressed"])])
            for values in card.get("values", [])
        ],
    )


def _heads(shares: dict[str, list[float]]) -> list[tuple[str, str]]:
    return [(f"{PROJECTIONS[name]} {sum(head_shares):.0%}", _most(head_shares)) for name, head_shares in shares.items()]


def _most(head_shares: list[float]) -> str:
    """The heads of the largest shares."""
    most = sorted(range(len(head_shares)), key=lambda head: -head_shares[head])[:HEADS]
    return ", ".join(f"head {head} {head_shares[head]:.0%}" for head in most if head_shares[head] >= 0.01)


def _patterns(context: dict[str, Any], changes: dict[str, Any]) -> list[Pattern]:
    """Changes of the attention that the strongest token pays, and that later tokens pay to it, if large enough."""
    lines = []
    for way, change in changes.items():
        sizes, head = change["sizes"], change["head"]
        if sizes[head] < LEAST:
            continue
        other_heads = sorted(
            (number for number in range(len(sizes)) if number != head), key=lambda number: -sizes[number]
        )
        others_text = ", ".join(
            f"head {number} {sizes[number]:.1%}" for number in other_heads[: HEADS - 1] if sizes[number] >= LEAST
        )
        effect = (
            f"what the outlined token attends to; {sizes[head]:.1%} of its attention moves"
            if way == "from"
            else f"how much later tokens attend to the outlined one; {sizes[head]:.1%} of their attention on average"
        )
        words = f"{context['subset']}, head {head}: {effect}" + (f" ({others_text})" if others_text else "")
        before = change.get("before", 0.0)
        earlier = f"tokens before these: {_signed(before)}" if abs(before) >= LEAST else ""
        lines.append(Pattern(words, _shifts(context, change["changes"]), earlier))
    return lines


def _shifts(context: dict[str, Any], changes: Sequence[float]) -> list[Shift]:
    top, shifts = max(map(abs, changes), default=0.0), []
    for index, (text, change) in enumerate(zip(context["tokens"], changes, strict=True)):
        shade = f"{abs(change) / top:.2f}" if abs(change) >= LEAST else ""
        way = "gain" if change > 0 else "loss"
        shifts.append(Shift(_in_line(text), shade, way, _signed(change), index == context["peak"]))
    return shifts


def _signed(change: float) -> str:
    return f"{100 * change:+.1f}%"


def _effect(row: pd.Series, subset: str) -> Effect:
    share = "of texts" if row["at_bos"] else "of tokens"
    rates = []
    names = [column.removeprefix("ablated_").removesuffix(f"_{subset}") for column in row.index]
    for rate in dict.fromkeys(name for name in names if name.endswith(RATE)):
        texts = [_change(row, f"{way}_{rate}_{subset}") for way in WAYS]
        if any(abs(row.get(f"{way}_{rate}_{subset}", 0.0)) > 0 for way in WAYS):
            rates.append((rate.removesuffix(RATE).replace("_", " "), *texts))
    ce = tuple(_change(row, f"{way}_ce_{subset}") for way in WAYS)
    return Effect(subset, f"{row[f'{FIRING}{subset}']:.1%} {share}", (ce[0], ce[1]), rates)


def _change(row: pd.Series, column: str) -> str:
    value = row.get(column, math.nan)
    if pd.isna(value):
        return "-"
    return number(value) if pd.isna(row[f"{column}_low"]) else with_interval(row, column, signed=True)


def _context(context: dict[str, Any], top: float) -> tuple[str, list[Piece]]:
    pieces = []
    for index, (text, act) in enumerate(zip(context["tokens"], context["acts"], strict=True)):
        shade = f"{act / top:.2f}" if act > 0 and top > 0 else ""
        pieces.append(Piece(_in_line(text), shade, f"{act:.3g}", index == context["peak"]))
    return context["subset"], pieces


def _in_line(text: str) -> str:
    return text.replace("\n", "\u23ce")


def _data(features: pd.DataFrame, ranking: pd.DataFrame, subsets: Sequence[str]) -> Markup:
    """What the script reads: `cards` by address, and `list`, one array a feature."""
    cards = {
        address(row["target"], row["layer"], row["feature"]): {
            "target": row["target"],
            "layer": row["layer"],
            "rank": row["rank"],
            "fires": [row[f"{FIRING}{subset}"] for subset in subsets],
            **{way: [row.get(f"{way}_ce_{subset}", math.nan) for subset in subsets] for way in WAYS},
        }
        for row in features.to_dict("records")
    }
    columns = ["target", "layer", "feature", "rank", "effect", *(f"{FIRING}{subset}" for subset in subsets)]
    rows = [[*row, int(at_bos)] for *row, at_bos in ranking[[*columns, "at_bos"]].itertuples(index=False)]
    return data({"cards": cards, "list": rows, "subsets": list(subsets)})


def _capital(text: str) -> str:
    """With a capital first letter; `capitalize` would lower-case BOS."""
    return text[:1].upper() + text[1:]
