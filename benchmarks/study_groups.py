"""Do the groups of features of one finetuned model come back in another?

In: the groups of two models, with the tokens that each fires on and promotes, as a report's `groups.csv` lists them.
Out: which group of the second model fires like each of the first, and whether such pairs also promote the same tokens,
compared with chance.

Groups are paired by what they fire on. What they promote takes no part in that, so it tests the pairs: chance is what
the same groups share when their partners are exchanged at random.
"""

from __future__ import annotations

import ast
import math
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
"""A token in a list of tokens, as written by Python."""
DRAWS = 10_000
ALIKE = 0.5
"""Groups that share at least this of the tokens they fire on count as the same."""


class Agreement(NamedTuple):
    """Of the pairs: their number, how many are `ALIKE` in what they fire on, the mean share of tokens that they fire on
    and that they promote; the latter for exchanged partners, with the middle 95% of the draws; and how many of the
    draws reach the true pairs' share."""

    pairs: int
    alike: int
    fires: float
    promotes: float
    chance: float
    chance_low: float
    chance_high: float
    p: float


def tokens(listed: str) -> frozenset[str]:
    """The tokens of a list without spaces and capitals: two vocabularies seldom agree in those."""
    found = (ast.literal_eval(token).strip().lower() for token in TOKEN.findall(str(listed)))
    return frozenset(token for token in found if token)


def shared(first: pd.Series, second: pd.Series) -> np.ndarray:
    """The Jaccard index of every list of the first with every one of the second, (first, second)."""
    rows, columns = [tokens(listed) for listed in first], [tokens(listed) for listed in second]
    return np.array([[len(a & b) / max(1, len(a | b)) for b in columns] for a in rows])


def pair_up(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Columns `group`, `other`, `fires` and `promotes`: groups of both models, paired such that they share as much as
    possible of what they fire on."""
    fires, promotes = (shared(first[name], second[name]) for name in ("fires_on", "promoted"))
    rows, columns = linear_sum_assignment(fires, maximize=True)
    names = {"group": first["group"].to_numpy()[rows], "other": second["group"].to_numpy()[columns]}
    return pd.DataFrame(names | {"fires": fires[rows, columns], "promotes": promotes[rows, columns]})


def agreement(first: pd.DataFrame, second: pd.DataFrame, seed: int = 0) -> Agreement:
    """How far the paired groups of two models also promote the same tokens: NaN where one model's groups promote none,
    as without deltas at attention's output and MLPs."""
    pairs = pair_up(first, second)
    counts = len(pairs), int((pairs["fires"] >= ALIKE).sum())
    if first["promoted"].isna().all() or second["promoted"].isna().all():
        return Agreement(*counts, pairs["fires"].mean(), *[math.nan] * 5)
    places = first["group"].searchsorted(pairs["group"]), second["group"].searchsorted(pairs["other"])
    promotes = shared(first["promoted"], second["promoted"])[np.ix_(*places)]
    random = np.random.default_rng(seed)
    order = np.arange(len(pairs))
    draws = np.array([promotes[order, random.permutation(order)].mean() for _ in range(DRAWS)])
    low, high = np.quantile(draws, [0.025, 0.975])
    true = pairs["promotes"].mean()
    reached = (1 + int((draws >= true - 1e-12).sum())) / (1 + DRAWS)
    return Agreement(*counts, pairs["fires"].mean(), true, draws.mean(), low, high, reached)
