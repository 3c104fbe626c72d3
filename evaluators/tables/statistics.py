"""Interval estimates: Wilson for rates, bootstrap over prompts and replicas for differences and dose-response.

In: counts, or per-prompt sums as numpy arrays, of one replica or several. Out: a value with the ends of its 95%
interval; NaN where the data cannot say (no prompts, no spread to resample).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

CONFIDENCE = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A point estimate and its 95% interval, all in the unit of the metric."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """The estimate as columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; False without an interval."""
        return self.low > 0 or self.high < 0


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson score interval (95%) of a rate.

    `successes` may be fractional, which happens when a prompt's outcome is averaged over replicas; `n` counts
    independent prompts. Returns `(low, high)` in [0, 1], `(nan, nan)` for `n == 0`.
    Raises ValueError unless `0 <= successes <= n`.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: successes must lie between 0 and n, got {successes} of {n}")
    if n == 0:
        return math.nan, math.nan
    z = float(ndtri(0.5 + CONFIDENCE / 2))
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n successes the end is exactly 0 or 1; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def no_event_bound(n: int) -> float:
    """Largest rate compatible (95%, one-sided, exact) with seeing an event in none of `n` prompts.

    The bootstrap of a difference that is zero on every prompt has width zero, which claims more than `n`
    prompts can show; this bound, about `3 / n`, is what they do show. NaN for `n == 0`.
    """
    return math.nan if n == 0 else 1 - (1 - CONFIDENCE) ** (1 / n)


def paired_bootstrap(
    numerators: ArrayLike,
    denominators: ArrayLike,
    baseline_numerators: ArrayLike,
    baseline_denominators: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Difference of two ratios of sums over the same prompts, with its percentile bootstrap interval.

    All arrays are `(prompt,)`, or `(replica, prompt)` where a condition was measured with several seeds; position i is
    the same prompt in all four. The statistic is
    `sum(numerators) / sum(denominators) - sum(baseline_numerators) / sum(baseline_denominators)`, sums being means
    over replicas:

    - token-weighted mean, e.g. CE: numerators are summed nats per prompt, denominators token counts;
    - plain rate: numerators are 0 or 1, denominators 1, or 0 where the outcome is undefined for that prompt.

    Prompts are resampled whole, with the same draw for condition and baseline, and so are replicas, independently of
    the prompts: the interval covers other prompts and other seeds. The same seed and number of prompts give the same
    draws, so equal data give equal intervals. The ends are NaN for fewer than two prompts.
    Raises ValueError when the lengths differ.
    """
    stacked = _stacked(numerators, denominators, baseline_numerators, baseline_denominators)

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio(sums[:, 0], sums[:, 1]) - _ratio(sums[:, 2], sums[:, 3])

    return _bootstrap(difference, stacked, seed, resamples)


def _stacked(*columns: ArrayLike) -> NDArray[np.float64]:
    """Columns of sums per prompt, `(prompt,)` or `(replica, prompt)`, as one array `(column, replica, prompt)`."""
    arrays = [np.atleast_2d(np.asarray(column, dtype=np.float64)) for column in columns]
    replicas, prompts = max(map(len, arrays)), arrays[0].shape[1]
    if not replicas or any(array.shape not in ((1, prompts), (replicas, prompts)) for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"the bootstrap needs arrays of one entry per prompt, got shapes {shapes}")
    stacked = np.empty((len(arrays), replicas, prompts))
    for place, array in enumerate(arrays):
        stacked[place] = array
    return stacked


def _bootstrap(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    stacked: NDArray[np.float64],
    seed: int,
    resamples: int,
) -> Estimate:
    """A statistic of sums over prompts, `(draw, column)`, with its interval; `stacked` is (column, replica, prompt)."""
    value = float(statistic(stacked.mean(axis=1).sum(axis=1)[None, :])[0])
    if stacked.shape[2] < 2 or math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    return _interval(value, statistic(_resampled_sums(stacked, seed, resamples)))


def recovered_share(
    ground: tuple[ArrayLike, ArrayLike],
    spliced: tuple[ArrayLike, ArrayLike],
    raw: tuple[ArrayLike, ArrayLike],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """(m(ground) - m(spliced)) / (m(ground) - m(raw)) with its paired percentile bootstrap interval.

    Each argument holds numerators and denominators of the metric m, `(prompt,)` or `(replica, prompt)`, of the same
    prompts; m is a ratio of sums, as in `paired_bootstrap`, with the same draws. NaN where m(ground) equals m(raw).
    """
    stacked = _stacked(*ground, *spliced, *raw)

    def share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        start, here, end = (_ratio(sums[:, place], sums[:, place + 1]) for place in (0, 2, 4))
        return _ratio(start - here, start - end)

    return _bootstrap(share, stacked, seed, resamples)


def rate_difference(
    numerators: ArrayLike,
    denominators: ArrayLike,
    baseline_numerators: ArrayLike,
    baseline_denominators: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """`paired_bootstrap` for rates (outcomes in [0, 1]), honest where every prompt differs by the same amount.

    There the bootstrap has width zero. Instead the interval allows for the share of different prompts that `n`
    identical ones cannot exclude (`no_event_bound`): no difference on 20 prompts gives `0 (-0.14 to 0.14)`.
    """
    arrays = (numerators, denominators, baseline_numerators, baseline_denominators)
    estimate = paired_bootstrap(*arrays, seed=seed, resamples=resamples)
    whole = (np.atleast_2d(np.asarray(array, dtype=np.float64)).mean(axis=0) for array in arrays)
    top, bottom, base_top, base_bottom = whole
    both = (bottom > 0) & (base_bottom > 0)
    steps = top[both] - base_top[both]
    if len(steps) < 2 or np.ptp(steps) > 0:
        return estimate
    # The unseen share moves to the far ends of [-1, 1].
    step, share = float(steps[0]), no_event_bound(len(steps))
    return Estimate(estimate.value, step - share * (1 + step), step + share * (1 - step))


def slope_and_spearman(
    alpha: Sequence[float],
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Estimate, Estimate]:
    """Least-squares slope and Spearman rho of a metric against alpha, bootstrapped over prompts and replicas.

    `alpha` is `(dose,)`; `numerators` and `denominators` are `(dose, prompt)` or `(dose, replica, prompt)`, the same
    prompts in every row;
    the metric at a dose is `sum(numerators) / sum(denominators)`. The slope is in metric units per unit
    of alpha. Both are NaN for fewer than two distinct alphas; rho is NaN for a metric that never changes.
    Raises ValueError when the shapes do not match.
    """
    from scipy.stats import rankdata  # takes half a second to import, which workers need not wait for

    doses = np.asarray(alpha, dtype=np.float64)
    tops, bottoms = (np.asarray(sums, dtype=np.float64) for sums in (numerators, denominators))
    if tops.ndim not in (2, 3) or tops.shape != bottoms.shape or len(tops) != len(doses):
        raise ValueError(
            "slope_and_spearman needs (dose, prompt) or (dose, replica, prompt) arrays matching alpha, got "
            f"{doses.shape}, {tops.shape} and {bottoms.shape}"
        )
    tops, bottoms = (sums.reshape(len(doses), -1, sums.shape[-1]) for sums in (tops, bottoms))
    if len(np.unique(doses)) < 2:
        nothing = Estimate(math.nan, math.nan, math.nan)
        return nothing, nothing
    centred = doses - doses.mean()
    dose_ranks = rankdata(doses)

    def slopes(metric: NDArray[np.float64]) -> NDArray[np.float64]:
        # Measured from the first dose, so that a metric that never changes has slope 0 exactly.
        return (metric - metric[:, :1]) @ centred / (centred @ centred)

    def rhos(metric: NDArray[np.float64]) -> NDArray[np.float64]:
        # Ranks of n doses have mean (n + 1) / 2, ties or not; Pearson of ranks is Spearman's rho.
        x = dose_ranks - (len(doses) + 1) / 2
        y = rankdata(metric, axis=1, nan_policy="propagate") - (len(doses) + 1) / 2
        return _ratio(y @ x, np.sqrt((x @ x) * (y * y).sum(axis=1)))

    point = _ratio(tops.mean(axis=1).sum(axis=1), bottoms.mean(axis=1).sum(axis=1))[None, :]  # (1, dose)
    slope, rho = float(slopes(point)[0]), float(rhos(point)[0])
    if tops.shape[2] < 2:
        return Estimate(slope, math.nan, math.nan), Estimate(rho, math.nan, math.nan)
    drawn = _ratio(*(_resampled_sums(sums, seed, resamples) for sums in (tops, bottoms)))  # (resample, dose)
    return _interval(slope, slopes(drawn)), _interval(rho, rhos(drawn))


def pearson(x: ArrayLike, y: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Pearson's r of pairs `(n,)`, with its percentile bootstrap interval over pairs; NaN where one of the two does not
    vary."""
    pairs = np.stack([np.asarray(x, float), np.asarray(y, float)])
    n = pairs.shape[1]
    # Scaled first, so that sums of squares keep their digits.
    centre, spread = pairs.mean(axis=1, keepdims=True), pairs.std(axis=1, keepdims=True)
    first, second = (pairs - centre) / np.where(spread > 0, spread, 1.0)
    moments = np.stack([first, second, first * second, first**2, second**2])

    def r(means: NDArray[np.float64]) -> NDArray[np.float64]:
        mean_x, mean_y, xy, xx, yy = means.T
        variances = np.clip((xx - mean_x**2) * (yy - mean_y**2), 0, None)
        return _ratio(xy - mean_x * mean_y, np.sqrt(np.where(variances > 1e-20, variances, 0.0)))

    value = float(r(moments.mean(axis=1)[None, :])[0])
    return _interval(value, r(_resample_counts(n, seed, resamples) @ moments.T / n))


def _resampled_sums(stacked: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Sums over resampled prompts, means over replicas: (quantity, replica, prompt) -> (resample, quantity)."""
    quantities, replicas, prompts = stacked.shape
    sums = _resample_counts(prompts, seed, resamples) @ stacked.reshape(-1, prompts).T
    if replicas == 1:
        return sums
    shares = _resample_counts(replicas, seed + 1, resamples) / replicas
    return np.einsum("bqr,br->bq", sums.reshape(-1, quantities, replicas), shares)


@lru_cache(maxsize=4)
def _resample_counts(n: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each of `n` prompts (or replicas) is drawn in each bootstrap resample, `(resamples, n)`; read-only.

    A resampled sum is then one matrix product, and the draws are shared by every table row with `n` prompts.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """`top / bottom`, NaN where the denominator is zero (a resample without one defined outcome)."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)


def _interval(value: float, drawn: NDArray[np.float64]) -> Estimate:
    """Percentile interval of the resampled statistic, over the resamples in which it is defined."""
    defined = drawn[np.isfinite(drawn)]
    if math.isnan(value) or not len(defined):
        return Estimate(value, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
