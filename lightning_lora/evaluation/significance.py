"""Whether a difference between arms is real: over seeds and test rows at once. Imports no torch.

An arm that was trained with S seeds and tested on N rows gives S x N values (right or wrong, a loss). Seeds and rows
are both samples, crossed: every seed meets the same rows. The variance of the mean is taken as the sum of what each
shows, s2(seed means) / S + s2(row means) / N (Owen 2007, https://doi.org/10.1214/07-AOAS122, says why the sum errs on
the careful side). Half of the interval is the root of the sum of each part's own, (t(S-1) s_seeds)2 + (t(N-1) s_rows)2,
as three seeds that happen to agree know little of their spread: Satterthwaite's degrees of freedom would jump to those
of the rows, and call differences that are none in up to one of ten (docs/LOG.md). The p-values are those of the t
distribution that gives this interval.

Where rows are tested in K folds, the models of two folds have learned from shared rows, and no estimate of the variance
of their mean is unbiased (Bengio and Grandvalet 2004, https://jmlr.org/papers/v5/grandvalet04a.html). The part of the
rows is then that of the corrected resampled t-test (Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366),
(1/K + 1/(K-1)) s2(fold means) with K-1 degrees of freedom, or what the rows show where that is more. It errs on the
careful side as long as the choice of training rows moves a result less than that of the rows of a fold does.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, nctdtrinc, ndtri, stdtr, stdtridf, stdtrit

from lightning_lora.evaluation.intervals import LEVEL

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
        p_equivalent: p-value of a difference of at least the margin (the larger of two one-sided tests).
        p_equivalent_corrected: The same, corrected like ``p``.
        detectable: The smallest true difference that ``POWER`` of such experiments would have found.
        seeds_needed: Seeds at which a difference as found would be, with ``POWER``; None where no number of seeds
            is enough on these rows.
        per_seed: McNemar's exact p-value of each seed, for values that are right or wrong.
    """

    estimate: Estimate
    p: float
    p_corrected: float
    p_equivalent: float
    p_equivalent_corrected: float
    detectable: float
    seeds_needed: int | None
    per_seed: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """What may be said: "better", "worse", "equivalent", "inconclusive", "one seed", or "same predictions".

        Where no row of any seed differs there is no variance to judge by, and nothing is claimed of other rows.
        """
        if self.estimate.seeds < 2:
            return "one seed"
        if self.estimate.se == 0 and self.estimate.mean == 0:
            return "same predictions"
        if self.p_corrected < 1 - LEVEL:
            return "better" if self.estimate.mean > 0 else "worse"
        return "equivalent" if self.p_equivalent_corrected < 1 - LEVEL else "inconclusive"


def estimate(values: NDArray, folds: NDArray | None = None) -> Estimate:
    """Return the mean of values with an interval over seeds and rows.

    Args:
        values: Of shape (seeds, rows).
        folds: The fold of each row, counted from 0, (rows,); None where one model a seed was tested on all rows.
    """
    seeds, rows = values.shape
    seed_means = values.mean(axis=1)
    of_rows, units = _row_part(values.mean(axis=0), folds)
    of_seeds = float(seed_means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    df = degrees_of_freedom(of_seeds, seeds, of_rows, units)
    mean, se = float(values.mean()), math.sqrt(of_rows + of_seeds)
    half = _t(df) * se if se > 0 else 0.0
    sd = float(seed_means.std(ddof=1)) if seeds > 1 else math.nan
    return Estimate(mean, sd, seeds, rows, se, df, mean - half, mean + half)


def _row_part(row_means: NDArray, folds: NDArray | None) -> tuple[float, int]:
    """The rows' part of the variance of a mean, and of how many units it is: rows, or the folds where they say more."""
    rows = len(row_means)
    of_rows = float(row_means.var(ddof=1)) / rows if rows > 1 else 0.0
    if folds is None:
        return of_rows, rows
    sizes = np.bincount(folds)
    k = len(sizes)
    of_folds = float((np.bincount(folds, row_means) / sizes).var(ddof=1)) * (1 / k + 1 / (k - 1))
    return max((of_rows, rows), (of_folds, k), key=lambda part: part[0] * _t(part[1] - 1) ** 2)


def degrees_of_freedom(of_seeds: float, seeds: int, of_rows: float, rows: int) -> float:
    """Return those of the t distribution whose interval is that of both parts of the variance together: see above."""
    if of_seeds + of_rows == 0:
        return math.inf
    if of_seeds == 0 or seeds < 2:
        return max(rows - 1, 1)
    if of_rows == 0 or rows < 2:
        return seeds - 1
    half = math.hypot(_t(seeds - 1) * math.sqrt(of_seeds), _t(rows - 1) * math.sqrt(of_rows))
    wanted = half / math.sqrt(of_seeds + of_rows)
    low, high = min(seeds, rows) - 1.0, max(seeds, rows) - 1.0
    if wanted >= _t(low) or wanted <= _t(high):  # one part is as good as nothing
        return low if wanted >= _t(low) else high
    return float(stdtridf((1 + LEVEL) / 2, wanted))


def _t(df: float) -> float:
    """The quantile of the t distribution that an interval ends at."""
    return float(stdtrit(df, (1 + LEVEL) / 2) if math.isfinite(df) else ndtri((1 + LEVEL) / 2))


def difference(
    arm: NDArray, baseline: NDArray, margin: float, higher_is_better: bool = True, folds: NDArray | None = None
) -> Difference:
    """Compare an arm's values with the baseline's, both (seeds, rows) with the same seeds and rows in the same order.

    Args:
        arm: The arm's values.
        baseline: The baseline's.
        margin: Differences under this count as none.
        higher_is_better: Else the difference is turned round, so that above 0 is always better.
        folds: As in ``estimate``.
    """
    if arm.shape != baseline.shape:
        raise ValueError(f"shapes differ: {arm.shape} and {baseline.shape}; compare the seeds that both have")
    paired = (1.0 if higher_is_better else -1.0) * (arm.astype(float) - baseline.astype(float))
    found = estimate(paired, folds)
    if found.se == 0:
        p, p_equivalent = float(found.mean == 0), float(abs(found.mean) >= margin)
    else:
        p = float(2 * stdtr(found.df, -abs(found.mean) / found.se))
        p_equivalent = float(stdtr(found.df, (abs(found.mean) - margin) / found.se))  # the larger of both sides
    binary = bool(np.isin([arm, baseline], (0, 1)).all())
    per_seed = [mcnemar_p(one, other) for one, other in zip(arm, baseline, strict=True)] if binary else []
    least = detectable(found.se, found.df)
    return Difference(found, p, p, p_equivalent, p_equivalent, least, seeds_needed(paired, folds), per_seed)


def mcnemar_p(arm: NDArray, baseline: NDArray) -> float:
    """Return the exact p-value of McNemar's test: of the rows that one of the two has right, is it either as often?"""
    only_arm, only_baseline = int((arm > baseline).sum()), int((arm < baseline).sum())
    return min(1.0, 2 * float(bdtr(min(only_arm, only_baseline), only_arm + only_baseline, 0.5)))


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p-values corrected for their number, those of a difference and of equivalence.

    A claim of either kind that is wrong then stands in at most 1 - ``LEVEL`` of such families of comparisons.
    """
    unequal = holm([each.p for each in differences])
    equivalent = holm([each.p_equivalent for each in differences])
    return [
        replace(each, p_corrected=p, p_equivalent_corrected=q)
        for each, p, q in zip(differences, unequal, equivalent, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979).

    Four lines instead of statsmodels' ``multipletests``, with which a test compares them: importing it takes longer
    than writing a report.
    """
    p = np.array(p_values, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return np.minimum(stepped, 1.0)[np.argsort(order)].tolist()


def detectable(se: float, df: float) -> float:
    """Return the smallest true difference that a test with this standard error finds with ``POWER``."""
    if se == 0:
        return 0.0
    if df > 1e5:  # the noncentral t is a normal by then
        return se * (_t(df) + float(ndtri(POWER)))
    return se * float(nctdtrinc(df, 1 - POWER, _t(df)))


def seeds_needed(differences: NDArray, folds: NDArray | None = None) -> int | None:
    """Return the seeds at which a difference as large as this one would be found with ``POWER`` on these rows.

    Args:
        differences: Paired differences, shape (seeds, rows).
        folds: As in ``estimate``.

    Returns:
        The number for a single comparison, at least that of the seeds there are; None where there is one seed, no
        difference, or more than ``MOST_SEEDS`` were needed.
    """
    seeds, rows = differences.shape
    mean = abs(float(differences.mean()))
    if seeds < 2 or rows < 2 or mean == 0:
        return None
    seed_means, row_means = differences.mean(axis=1), differences.mean(axis=0)
    rest = differences - seed_means[:, None] - row_means + differences.mean()
    interaction = float((rest**2).sum()) / ((seeds - 1) * (rows - 1))  # shrinks with more seeds; what rows are does not
    own, (of_rows, units) = float(row_means.var(ddof=1)), _row_part(row_means, folds)
    row_part, more = max(0.0, own - interaction / seeds), of_rows * rows / own if own else 1.0  # what the folds add
    seed_part = float(seed_means.var(ddof=1))
    if row_part + interaction + seed_part == 0:
        return seeds

    def enough(count: int) -> bool:
        of_seeds, of_rows = seed_part / count, more * (row_part + interaction / count) / rows
        df = degrees_of_freedom(of_seeds, count, of_rows, units)
        return detectable(math.sqrt(of_seeds + of_rows), df) <= mean

    found = bisect.bisect_left(range(seeds, MOST_SEEDS + 1), True, key=enough) + seeds
    return found if found <= MOST_SEEDS else None
