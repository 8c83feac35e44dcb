"""Held against scipy and statsmodels where they have the same, and against simulated experiments."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from lightning_lora.evaluation import significance
from lightning_lora.evaluation.significance import (
    POWER,
    Difference,
    corrected,
    degrees_of_freedom,
    detectable,
    difference,
    estimate,
    mcnemar_p,
    seeds_needed,
)

RNG = np.random.default_rng(0)


def experiment(
    rng: np.random.Generator, seeds: int, rows: int, seed_sd: float, gap: float = 0.0, arm_row_sd: float = 0.6
) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong answers of two arms: hard and easy rows, good and bad seeds, rows that suit one arm more.

    ``gap`` is the difference of the population's accuracies on the probit scale.
    """
    hard = rng.normal(0, 1.2, rows)
    arms = []
    for shift in (gap / 2, -gap / 2):
        suits = rng.normal(0, arm_row_sd, rows)
        score = 1.5 + shift + hard + suits + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 0.5, (seeds, rows))
        arms.append((score > 0).astype(float))
    return arms[0], arms[1]


def test_where_rows_do_not_vary_it_is_the_t_test_over_seeds() -> None:
    """With one value a seed on all rows, only seeds are a sample: scipy's and statsmodels' paired tests."""
    arm, base = RNG.normal(0.80, 0.02, (5, 1)), RNG.normal(0.79, 0.02, (5, 1))
    found = difference(arm.repeat(50, axis=1), base.repeat(50, axis=1), margin=0.02)
    expected = stats.ttest_rel(arm[:, 0], base[:, 0])
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high))
    assert found.p_equivalent == pytest.approx(ttost_paired(arm[:, 0], base[:, 0], -0.02, 0.02)[0])


def test_where_seeds_do_not_vary_it_is_the_t_test_over_rows() -> None:
    row = RNG.normal(0.1, 1, 400)
    found = estimate(np.stack([row] * 3))
    interval = stats.ttest_1samp(row, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.sd == pytest.approx(0)


@pytest.mark.parametrize("df", [1.0, 1.05, 2.0, 30.0, 1e3, 9e4, 1e6])
def test_the_detectable_difference_is_found_in_four_of_five(df: float) -> None:
    critical, effect = stats.t.isf(0.025, df), detectable(1.0, df)
    power = stats.nct.sf(critical, df, effect) if df < 1e5 else stats.norm.sf(critical - effect)
    assert power == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 30])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_the_degrees_of_freedom_give_the_interval_of_both_parts(seeds: int, share: float) -> None:
    rows, of_seeds, of_rows = 2000, share, 1 - share
    half = math.hypot(
        stats.t.isf(0.025, seeds - 1) * math.sqrt(of_seeds), stats.t.isf(0.025, rows - 1) * math.sqrt(of_rows)
    )
    assert stats.t.isf(0.025, degrees_of_freedom(of_seeds, seeds, of_rows, rows)) == pytest.approx(half, rel=1e-6)


def test_the_detectable_difference_is_that_of_statsmodels() -> None:
    effect = TTestPower().solve_power(nobs=8, alpha=0.05, power=POWER)  # in standard deviations; se is sd / sqrt(8)
    assert detectable(1 / math.sqrt(8), 7) == pytest.approx(effect, rel=1e-3)


def test_the_seeds_needed_are_those_of_statsmodels_where_rows_do_not_vary() -> None:
    values = np.array([[0.012], [0.020], [-0.004], [0.009]])
    effect = abs(values.mean()) / values.std(ddof=1)
    expected = math.ceil(TTestPower().solve_power(effect_size=effect, alpha=0.05, power=POWER))
    assert seeds_needed(values.repeat(10, axis=1)) == max(expected, 4)


def test_where_the_rows_are_too_few_no_number_of_seeds_is_enough() -> None:
    arm, base = experiment(np.random.default_rng(1), 3, 60, 0.05, gap=0.1)
    assert seeds_needed(arm - base) is None


def test_mcnemar_s_test_is_that_of_statsmodels() -> None:
    arm, base = experiment(np.random.default_rng(2), 1, 300, 0.1, gap=0.3)
    right, other = arm[0].astype(bool), base[0].astype(bool)
    table = [[(right & other).sum(), (right & ~other).sum()], [(~right & other).sum(), (~right & ~other).sum()]]
    assert mcnemar_p(arm[0], base[0]) == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert mcnemar_p(arm[0], arm[0]) == 1.0


@pytest.mark.parametrize("count", [1, 2, 7])
def test_holm_s_correction_is_that_of_statsmodels(count: int) -> None:
    arms = [experiment(np.random.default_rng(i), 3, 500, 0.05, gap=0.15 * i) for i in range(count)]
    plain = [difference(*pair, margin=0.01) for pair in arms]
    expected = multipletests([each.p for each in plain], method="holm")[1]
    assert [each.p_corrected for each in corrected(plain)] == pytest.approx(list(expected))
    expected = multipletests([each.p_equivalent for each in plain], method="holm")[1]
    assert [each.p_equivalent_corrected for each in corrected(plain)] == pytest.approx(list(expected))
    assert corrected([]) == []


def test_one_seed_is_never_a_verdict_and_the_same_answers_are_no_difference() -> None:
    arm, base = experiment(np.random.default_rng(3), 1, 2000, 0.0, gap=2.0)
    one = difference(arm, base, margin=0.01)
    assert one.p < 1e-6 and one.verdict == "one seed"
    same = difference(arm.repeat(2, axis=0), arm.repeat(2, axis=0), margin=0.01)
    assert (same.p, same.estimate.mean, same.verdict) == (1.0, 0.0, "same predictions")


def test_a_loss_is_better_when_it_is_lower() -> None:
    low, high = RNG.normal(0.3, 0.01, (3, 200)), RNG.normal(0.5, 0.01, (3, 200))
    assert difference(low, high, 0.01, higher_is_better=False).verdict == "better"


@pytest.mark.parametrize(("seeds", "seed_sd"), [(2, 0.1), (2, 0.4), (3, 0.0), (3, 0.1), (3, 0.2), (3, 0.4), (5, 0.1)])
def test_of_simulated_null_comparisons_no_more_than_the_nominal_share_is_called_a_difference(seeds, seed_sd) -> None:
    """200 pairs of arms that are equally good in the population, though not on each row."""
    rng = np.random.default_rng(seeds * 100 + int(seed_sd * 10))
    pairs = [experiment(rng, seeds, 300, seed_sd) for _ in range(200)]
    found = [estimate(arm - base) for arm, base in pairs]
    assert sum(not each.low <= 0 <= each.high for each in found) <= 0.05 * 200
    one = difference(*pairs[0], margin=0.01)  # whose p-value says the same as the interval
    assert (one.p < 0.05) == (not found[0].low <= 0 <= found[0].high)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.25, 1, 4, 100])
def test_the_nominal_share_holds_whatever_seeds_and_rows_have_of_the_variance(seeds: int, ratio: float) -> None:
    """Normal effects without interaction, where nothing else is on the careful side."""
    rng = np.random.default_rng(17)
    wrong = 0
    for _ in range(1000):
        found = estimate(rng.normal(0, math.sqrt(ratio * seeds), (seeds, 1)) + rng.normal(0, math.sqrt(40), (1, 40)))
        wrong += not found.low <= 0 <= found.high
    # A share of 5% is exceeded so far by chance in 1% of such tests.
    assert wrong <= stats.binom.ppf(0.99, 1000, 0.05)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(2, 0.2), (3, 0.0), (3, 0.1), (3, 0.3), (5, 0.2)])
def test_the_interval_holds_the_population_s_accuracy_as_often_as_it_says(seeds: int, seed_sd: float) -> None:
    rng = np.random.default_rng(7)
    truth = stats.norm.cdf(1.5 / math.sqrt(1.2**2 + 0.6**2 + seed_sd**2 + 0.5**2))
    inside = 0
    for _ in range(400):
        found = estimate(experiment(rng, seeds, 300, seed_sd)[0])
        inside += found.low <= truth <= found.high
    assert inside >= 0.95 * 400


def test_a_difference_that_is_there_is_found_about_as_often_as_the_power_says() -> None:
    rng = np.random.default_rng(11)
    found = [difference(*experiment(rng, 5, 1000, 0.05, gap=0.35), margin=0.01) for _ in range(100)]
    expected = np.mean([each.detectable for each in found])
    share = np.mean([each.p < 0.05 for each in found])
    mean = np.mean([each.estimate.mean for each in found])
    assert (share >= POWER) == (mean >= expected) or abs(mean - expected) < 0.005


def family(rng: np.random.Generator, gap: float, arms: int = 6) -> list[Difference]:
    """Arms that are all better than one baseline by ``gap`` on the probit scale: compared, and corrected."""
    hard, noise = rng.normal(0, 1.2, 300), lambda: rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 0.5, (3, 300))
    base = (1.5 + hard + rng.normal(0, 0.6, 300) + noise() > 0).astype(float)
    others = [(1.5 + gap + hard + rng.normal(0, 0.6, 300) + noise() > 0).astype(float) for _ in range(arms)]
    return corrected([difference(other, base, margin=MARGIN) for other in others])


@pytest.fixture
def verdicts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes most of the time and no verdict depends on."""
    for name in ("seeds_needed", "detectable"):
        monkeypatch.setattr(significance, name, lambda *values: None)


MARGIN = 0.05
#: Standard deviation of a score in ``family``.
SPREAD = math.sqrt(1.2**2 + 0.6**2 + 0.2**2 + 0.5**2)


@pytest.mark.usefixtures("verdicts_only")
def test_of_simulated_families_without_a_difference_no_more_than_the_nominal_share_has_one_called_so() -> None:
    rng = np.random.default_rng(23)
    families = [{each.verdict for each in family(rng, 0.0)} for _ in range(200)]
    assert sum(bool({"better", "worse"} & verdicts) for verdicts in families) <= 0.05 * 200


@pytest.mark.usefixtures("verdicts_only")
def test_of_simulated_families_that_differ_by_the_margin_no_more_than_that_has_one_called_equivalent() -> None:
    gap = SPREAD * float(stats.norm.ppf(stats.norm.cdf(1.5 / SPREAD) + MARGIN)) - 1.5
    rng = np.random.default_rng(29)
    families = [{each.verdict for each in family(rng, gap)} for _ in range(200)]
    assert sum("equivalent" in verdicts for verdicts in families) <= 0.05 * 200


@pytest.mark.usefixtures("verdicts_only")
def test_arms_that_are_the_same_are_called_equivalent_where_there_are_rows_enough() -> None:
    rng = np.random.default_rng(31)
    pairs = [experiment(rng, 5, 4000, 0.02) for _ in range(20)]
    assert sum(difference(*pair, margin=MARGIN).verdict == "equivalent" for pair in pairs) >= 18


def cross_validated(
    rng: np.random.Generator, seeds: int, features: int, gap: float = 0.0, rows: int = 60
) -> tuple[np.ndarray, ...]:
    """Right or wrong answers of two arms and the fold of each row, from a real cross-validation.

    Each arm learns the difference of the classes' means, on features of its own that say as much as the other's (by
    ``gap`` more); a seed's noise is in what it learns. With many features models depend on the rows they learned from.
    """
    labels, folds = np.arange(rows) % 2, rng.permutation(np.arange(rows) % 5)
    arms = []
    for distance in (1.0 + gap, 1.0):
        x = rng.normal(0, 1, (rows, features)) + distance * (2 * labels[:, None] - 1) / math.sqrt(features)
        right = np.empty((seeds, rows))
        for k in range(5):
            train, test = x[folds != k], x[folds == k]
            own = labels[folds != k]
            learned = train[own == 1].mean(axis=0) - train[own == 0].mean(axis=0)
            scores = (learned + rng.normal(0, 0.05, (seeds, features))) @ test.T
            right[:, folds == k] = (scores > 0) == labels[folds == k]
        arms.append(right)
    return *arms, folds


def test_between_folds_it_is_the_corrected_resampled_t_test() -> None:
    """With values that differ by fold only; Nadeau and Bengio's statistic by hand, its p-value by scipy."""
    means = np.array([0.02, 0.05, 0.01, 0.04, 0.03])
    folds = np.arange(200) % 5
    found = difference(np.tile(means[folds], (2, 1)), np.zeros((2, 200)), margin=0.01, folds=folds)
    statistic = means.mean() / math.sqrt((1 / 5 + 0.2 / 0.8) * means.var(ddof=1))
    assert found.p == pytest.approx(2 * stats.t.sf(statistic, 4)) and found.estimate.df == 4
    assert found.p > stats.ttest_1samp(means, 0).pvalue
    assert found.estimate.mean == pytest.approx(means.mean())


def test_folds_that_happen_to_agree_take_nothing_off_what_the_rows_show() -> None:
    values = np.tile(np.repeat([0.0, 1.0], 100), (2, 1))
    plain, folded = estimate(values), estimate(values, np.arange(200) % 5)
    assert (folded.low, folded.high) == (plain.low, plain.high) and plain.high > plain.low


@pytest.mark.parametrize(("seeds", "features"), [(2, 5), (3, 40), (3, 200)])
def test_of_null_comparisons_over_folds_no_more_than_the_nominal_share_is_called_a_difference(seeds, features) -> None:
    """Real cross-validations of arms that are equally good, whose models share training rows between folds."""
    rng = np.random.default_rng(seeds + features)
    found = [cross_validated(rng, seeds, features) for _ in range(400)]
    wrong = {}
    for name in ("folds", "rows"):
        estimates = [estimate(one - other, folds if name == "folds" else None) for one, other, folds in found]
        wrong[name] = sum(not each.low <= 0 <= each.high for each in estimates)
    assert wrong["folds"] <= 0.05 * 400
    assert wrong["folds"] < wrong["rows"]  # which takes all rows for ones of a single model
    assert features < 200 or wrong["rows"] > 0.05 * 400


def test_a_difference_over_folds_is_found_and_the_seeds_that_would_are_counted_with_the_folds() -> None:
    rng = np.random.default_rng(5)
    found = [cross_validated(rng, 3, 5, 1.5, 200) for _ in range(20)]
    judged = [difference(one, other, 0.01, folds=folds) for one, other, folds in found]
    assert sum(each.verdict == "better" for each in judged) >= 15
    needed = [(seeds_needed(one - other, folds), seeds_needed(one - other)) for one, other, folds in found]
    assert all((plain or 1001) <= (folded or 1001) for folded, plain in needed)
