"""Whether a difference between arms is real: over seeds and test rows at once. Imports no torch.

An arm that was trained with S seeds and tested on N rows gives S x N values (right or wrong, a loss). Seeds and rows
are both samples, crossed: every seed meets the same rows. The variance of the mean is taken as the sum of what each
shows, s2(seed means) / S + s2(row means) / N (Owen 2007, https://doi.org/10.1214/07-AOAS122, says why the sum errs on
the careful side), with Satterthwaite's degrees of freedom. Resampling three seeds would claim too much: their bootstrap
variance is a third too small, and its quantiles are a normal's (docs/LOG.md has both, simulated).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
POWER = 0.8
#: More seeds than this are not advised.
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and rows.

    Args:
        mean: The mean.
        sd: Standard deviation of the seeds' means; NaN for one seed.
        seeds: Number of seeds.
        rows: Number of rows.
        se: Standard error of the mean, over seeds and rows.
        df: Its degrees of freedom.
        low: Lower end of the interval that holds the population's mean in ``LEVEL`` of all repetitions.
        high: Its upper end.
    """

    mean: float
    sd: float
    seeds: int
    rows: int
    se: float
    df: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """An arm against the baseline, paired by seed and row.

    Args:
        estimate: The mean difference, arm minus baseline.
        p: Two-sided p-value of no difference.
        p_corrected: The same, corrected for the number of comparisons (Holm); ``corrected`` sets it.
        margin: Differences under this count as none.
        p_equivalent: p-value of a difference of at least the margin (the larger of two one-sided tests).
        detectable: The smallest true difference that ``POWER`` of such experiments would have found.
        seeds_needed: Seeds at which a difference as found would be, with ``POWER``; None where no number of seeds
            is enough on these rows.
        per_seed: McNemar's exact p-value of each seed, for values that are right or wrong.
    """

    estimate: Estimate
    p: float
    p_corrected: float
    margin: float
    p_equivalent: float
    detectable: float
    seeds_needed: int | None
    per_seed: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """What may be said: "better", "worse", "equivalent", "not told apart", "one seed", or "same answers".

        Where no row of any seed differs there is no variance to judge by, and nothing is claimed of other rows.
        """
        if self.estimate.seeds < 2:
            return "one seed"
        if self.estimate.se == 0 and self.estimate.mean == 0:
            return "same answers"
        if self.p_corrected < 1 - LEVEL:
            return "better" if self.estimate.mean > 0 else "worse"
        return "equivalent" if self.p_equivalent < 1 - LEVEL else "not told apart"


def estimate(values: NDArray) -> Estimate:
    """The mean of values of shape (seeds, rows), with an interval over both."""
    from scipy import stats

    seeds, rows = values.shape
    seed_means, row_means = values.mean(axis=1), values.mean(axis=0)
    of_rows = float(row_means.var(ddof=1)) / rows if rows > 1 else 0.0
    of_seeds = float(seed_means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = of_rows + of_seeds
    parts = (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0) + (of_rows**2 / (rows - 1) if rows > 1 else 0.0)
    df = variance**2 / parts if parts > 0 else math.inf
    mean, se = float(values.mean()), math.sqrt(variance)
    half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * se if se > 0 else 0.0
    sd = float(seed_means.std(ddof=1)) if seeds > 1 else math.nan
    return Estimate(mean, sd, seeds, rows, se, df, mean - half, mean + half)


def difference(arm: NDArray, baseline: NDArray, margin: float, higher_is_better: bool = True) -> Difference:
    """An arm's values against the baseline's, both (seeds, rows) with the same seeds and rows in the same order.

    Args:
        arm: The arm's values.
        baseline: The baseline's.
        margin: Differences under this count as none.
        higher_is_better: Else the difference is turned round, so that above 0 is always better.
    """
    from scipy import stats

    if arm.shape != baseline.shape:
        raise ValueError(f"shapes differ: {arm.shape} and {baseline.shape}; compare the seeds that both have")
    sign = 1.0 if higher_is_better else -1.0
    found = estimate(sign * (arm.astype(float) - baseline.astype(float)))
    if found.se == 0:
        p = 1.0 if found.mean == 0 else 0.0
        p_equivalent = 0.0 if abs(found.mean) < margin else 1.0
    else:
        p = float(2 * stats.t.sf(abs(found.mean) / found.se, found.df))
        lower = stats.t.sf((found.mean + margin) / found.se, found.df)
        upper = stats.t.sf((margin - found.mean) / found.se, found.df)
        p_equivalent = float(max(lower, upper))
    binary = bool(np.isin(arm, (0, 1)).all() and np.isin(baseline, (0, 1)).all())
    per_seed = [mcnemar_p(one, other) for one, other in zip(arm, baseline, strict=True)] if binary else []
    return Difference(
        found, p, p, margin, p_equivalent, detectable(found.se, found.df), seeds_needed(arm - baseline), per_seed
    )


def mcnemar_p(arm: NDArray, baseline: NDArray) -> float:
    """The exact p-value of McNemar's test on the rows that one of the two has right."""
    from statsmodels.stats.contingency_tables import mcnemar

    right, base = arm.astype(bool), baseline.astype(bool)
    table = [[int((right & base).sum()), int((right & ~base).sum())], [int((~right & base).sum()), 0]]
    table[1][1] = len(right) - sum(map(sum, table))
    return float(mcnemar(table, exact=True).pvalue)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences with p-values corrected for their number (Holm 1979)."""
    from dataclasses import replace

    from statsmodels.stats.multitest import multipletests

    if not differences:
        return []
    _, p, _, _ = multipletests([each.p for each in differences], alpha=1 - LEVEL, method="holm")
    return [replace(each, p_corrected=float(value)) for each, value in zip(differences, p, strict=True)]


def detectable(se: float, df: float) -> float:
    """The smallest true difference that a test with this standard error finds with ``POWER``."""
    from scipy import optimize, stats

    if se == 0:
        return 0.0
    critical = stats.t.ppf((1 + LEVEL) / 2, df)

    def power(effect: float) -> float:
        if df > 1e5:  # where scipy's noncentral t gives up, and is a normal
            return float(stats.norm.sf(critical - effect) + stats.norm.cdf(-critical - effect))
        upper, lower = stats.nct.sf(critical, df, effect), stats.nct.cdf(-critical, df, effect)
        return float(np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower))  # NaN where it is as good as that

    return se * float(optimize.brentq(lambda effect: power(effect) - POWER, 0.0, 4 * critical + 5))


def seeds_needed(differences: NDArray) -> int | None:
    """Seeds at which a difference as large as this one would be found with ``POWER`` on these rows.

    Args:
        differences: Paired differences, shape (seeds, rows).

    Returns:
        The number, at least that of the seeds there are; None where there is one seed, no difference, or too few
        rows for any number of seeds.
    """
    seeds, rows = differences.shape
    mean = abs(float(differences.mean()))
    if seeds < 2 or mean == 0:
        return None
    of_rows = float(differences.mean(axis=0).var(ddof=1)) / rows
    of_seeds = float(differences.mean(axis=1).var(ddof=1))
    if of_rows + of_seeds == 0:
        return seeds

    def enough(count: int) -> bool:
        seed_part = of_seeds / count
        parts = seed_part**2 / (count - 1) + of_rows**2 / (rows - 1)
        df = (seed_part + of_rows) ** 2 / parts if parts > 0 else math.inf
        return detectable(math.sqrt(seed_part + of_rows), df) <= mean

    if not enough(MOST_SEEDS):
        return None
    low, high = seeds, MOST_SEEDS
    if enough(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
