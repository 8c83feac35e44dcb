"""How far a metric could be off because the test rows are a sample: bootstrap intervals. Imports no torch.

Rows are drawn with replacement (Efron 1979), by ``scipy.stats.bootstrap``. They say nothing of the noise of
training: for that a run is repeated with other seeds.
"""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_lora.evaluation.metric_table import CALIBRATION_BINS, METRICS, calibration_bins, metrics_for
from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.tasks import Task

LEVEL = 0.95
RESAMPLES = 1000
#: Of rows from no more files than these the metrics of each file are shown too.
MOST_FILES = 8
_SEED = 0


def row_values(outputs: Outputs) -> dict[str, NDArray]:
    """Return what each row adds to each metric that has an interval, (rows, K)."""
    return {name: spec.rows(outputs) for name, spec in metrics_for(outputs.task).items() if spec.rows is not None}


def metric_of(name: str, means: NDArray, task: Task = "single_label") -> NDArray:
    """Return a metric (...) from means (..., K) of its row values."""
    value = METRICS[name].value
    return means[..., 0] if value is None else value(means, task)


def metrics_of(outputs: Outputs) -> dict[str, float]:
    """Return the metrics of rows that have an interval, as torchmetrics would, without torch."""
    rows = row_values(outputs)
    return {name: float(metric_of(name, each.mean(axis=0), outputs.task)) for name, each in rows.items()}


def pseudo_values(outputs: Outputs, name: str) -> NDArray:
    """Return a value for each row, (rows,), whose mean is the metric and whose spread says how exact that is.

    Where the metric is no mean of one value a row, they are those of the jackknife (Tukey 1958): of N rows, N times the
    metric less N - 1 times the metric without the row, moved by what their mean differs from the metric.
    """
    spec = METRICS[name]
    assert spec.rows is not None
    rows = spec.rows(outputs)
    count, whole = len(rows), metric_of(name, rows.mean(axis=0), outputs.task)
    if spec.value is None or count < 2:
        return rows[:, 0] if spec.value is None else np.array([whole])
    found = count * whole - (count - 1) * metric_of(name, (rows.sum(axis=0) - rows) / (count - 1), outputs.task)
    return found - found.mean() + whole


def intervals(outputs: Outputs) -> dict[str, list[float]]:
    """Return the interval of each metric, as ``{name: [low, high]}``; none where there is one row only.

    It holds the metric of the population in ``LEVEL`` of all samples. The calibration error of a sample is too large on
    average, and that of a resample again. Its interval is a careful one: the lower end takes that excess off ("basic"),
    and is 0 where a perfectly calibrated model would often have as large an error; the upper end leaves it on.
    """
    if len(outputs.truth) < 2:
        return {}
    rows, task = row_values(outputs), outputs.task
    found = _bootstrap(rows, lambda means: [metric_of(name, each, task) for name, each in means.items()])
    result = dict(zip(rows, found, strict=True))
    if "calibration_error" in result:
        value, high = metrics_of(outputs)["calibration_error"], result["calibration_error"][1]
        by_chance = np.quantile(calibrated_errors(outputs), (1 + LEVEL) / 2)
        result["calibration_error"][0] = 0.0 if value <= by_chance else max(2 * value - high, 0.0)
    return result


def difference_interval(first: Outputs, second: Outputs, name: str) -> list[float]:
    """Return the interval of a metric of the first outputs minus that of the second, on the same rows.

    The metric is one of ``row_metrics``. What both find hard cancels out.
    """
    rows = row_values(first)[name] - row_values(second)[name]
    return _bootstrap({name: rows}, lambda means: [means[name][..., 0]])[0]


def calibrated_errors(outputs: Outputs) -> NDArray:
    """Return calibration errors that chance alone gives a model with these confidences; shape (resamples,).

    How many predictions of a bin are right is drawn with its mean confidence as their probability (consistency
    resampling, Broecker and Smith 2007, https://doi.org/10.1175/WAF993.1).
    """
    confidence, bins = (each.ravel() for each in calibration_bins(outputs))
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    sums = np.bincount(bins, confidence, minlength=CALIBRATION_BINS)
    means = np.minimum(sums / np.maximum(counts, 1), 1)
    right = np.random.default_rng(_SEED).binomial(counts, means, (RESAMPLES, CALIBRATION_BINS))
    return np.abs(sums - right).sum(axis=1) / len(bins)


def _bootstrap(
    rows: Mapping[str, NDArray], statistics: Callable[[dict[str, NDArray]], list[NDArray]]
) -> list[list[float]]:
    """Return the percentile interval of each statistic of the means of row values, drawn together."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    columns = np.concatenate(list(rows.values()), axis=1)
    count, ends = len(columns), np.cumsum([each.shape[1] for each in rows.values()])

    def of_positions(positions: NDArray, axis: int = -1) -> NDArray:
        drawn = np.stack([np.bincount(each, minlength=count) for each in np.atleast_2d(positions)]).astype(float)
        means = np.split(drawn @ columns / count, ends[:-1], axis=1)
        found = np.stack(statistics(dict(zip(rows, means, strict=True))))
        return found.reshape(len(found), *positions.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # one number for all rows has no correlation: NaN
        found = bootstrap(
            (np.arange(count),),
            of_positions,
            n_resamples=RESAMPLES,
            batch=max(1, 2_000_000 // count),
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=_SEED,  # the same resamples for every model
        ).confidence_interval
    return np.stack([found.low, found.high], axis=-1).tolist()
