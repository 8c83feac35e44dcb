"""How far a metric could be off because the test rows are a sample: bootstrap intervals. Imports no torch.

Rows are drawn with replacement (Efron 1979), by ``scipy.stats.bootstrap``. They say nothing of the noise of
training: for that a run is repeated with other seeds.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

LEVEL = 0.95
RESAMPLES = 1000
_SEED = 0
_BINS = 15  # as in metrics.py; a test holds both to the same values


class RowSums:
    """What the metrics are made of, a row each, so that any resample of the rows is a sum.

    Args:
        logits: float, shape (rows, C).
        labels: True class numbers, shape (rows,).
    """

    def __init__(self, logits: NDArray, labels: NDArray) -> None:
        rows, classes = logits.shape
        log_p = log_softmax(logits.astype(np.float64), axis=1)
        predicted = logits.argmax(axis=1)
        hit = predicted == labels
        confidence = np.exp(log_p[np.arange(rows), predicted])
        bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
        self.classes = classes
        self.confidence = confidence
        self.bins = bins
        self.sums = np.concatenate(
            [
                hit[:, None].astype(float),
                -log_p[np.arange(rows), labels][:, None],
                np.eye(_BINS)[bins] * (confidence - hit)[:, None],
                np.eye(classes)[labels],
                np.eye(classes)[predicted],
                np.eye(classes)[labels] * hit[:, None],
            ],
            axis=1,
        )

    def __len__(self) -> int:
        return len(self.sums)

    def metric(self, name: str, counts: NDArray) -> NDArray:
        """The metric where row ``j`` stands ``counts[i, j]`` times in sample ``i``; shape (samples,)."""
        sums = counts @ self.sums
        rest, per_class = sums[:, : 2 + _BINS], sums[:, 2 + _BINS :].reshape(len(sums), 3, self.classes)
        return INTERVAL_METRICS[name](rest, *per_class.transpose(1, 0, 2)) / (
            counts.sum(axis=1) if name in _PER_ROW else 1
        )

    def value(self, name: str) -> float:
        """The metric on all rows."""
        return float(self.metric(name, np.ones((1, len(self))))[0])


def interval(rows: RowSums, name: str) -> tuple[float, float]:
    """The interval that holds the metric of the population in ``LEVEL`` of all samples.

    The calibration error of a sample is too large on average, and that of a resample again. Its interval is
    a careful one: the lower end takes that excess off ("basic"), and is 0 where a perfectly calibrated model
    would often have as large an error (``calibrated_errors``); the upper end leaves it on.
    """
    low, high = _bootstrap(lambda counts: rows.metric(name, counts), len(rows))
    if name != "calibration_error":
        return low, high
    value = rows.value(name)
    by_chance = np.quantile(calibrated_errors(rows), (1 + LEVEL) / 2)
    return (0.0 if value <= by_chance else max(2 * value - high, 0.0)), high


def calibrated_errors(rows: RowSums) -> NDArray:
    """Calibration errors that chance alone gives a model with these confidences; shape (resamples,).

    Whether a prediction is right is drawn with the confidence as its probability (consistency resampling,
    Broecker and Smith 2007, https://doi.org/10.1175/WAF993.1).
    """
    rng = np.random.default_rng(_SEED)
    errors = []
    for _ in range(RESAMPLES):
        gap = rows.confidence - (rng.random(len(rows)) < rows.confidence)
        errors.append(np.abs(np.bincount(rows.bins, gap, minlength=_BINS)).sum() / len(rows))
    return np.array(errors)


def difference_interval(first: RowSums, second: RowSums, name: str) -> tuple[float, float]:
    """The interval of first minus second, on the same rows: what both find hard cancels out.

    Not for the calibration error, whose excess in a sample depends on how sure each model is and does not
    cancel.
    """
    assert name != "calibration_error"
    assert len(first) == len(second)
    return _bootstrap(lambda counts: first.metric(name, counts) - second.metric(name, counts), len(first))


def intervals(logits: NDArray, labels: NDArray) -> dict[str, list[float]]:
    """The interval of each metric, as ``{name: [low, high]}``; none where there is one row only."""
    rows = RowSums(logits, labels)
    if len(rows) < 2:
        return {}
    return {name: list(interval(rows, name)) for name in INTERVAL_METRICS}


def _bootstrap(statistic: Callable[[NDArray], NDArray], rows: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def of_positions(positions: NDArray, axis: int = -1) -> NDArray:
        flat = np.atleast_2d(positions)
        return statistic(np.stack([np.bincount(row, minlength=rows) for row in flat]).astype(float)).reshape(
            positions.shape[:-1]
        )

    found = bootstrap(
        (np.arange(rows),),
        of_positions,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // rows),
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=_SEED,  # the same resamples for every metric and model
    ).confidence_interval
    return float(found.low), float(found.high)


def _macro(score: NDArray, truth: NDArray, predicted: NDArray) -> NDArray:
    """The mean over the classes that are there, in truth or prediction (torchmetrics' convention)."""
    there = truth + predicted > 0
    return (score * there).sum(axis=1) / there.sum(axis=1)


def _ratio(part: NDArray, whole: NDArray) -> NDArray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


#: Metric by name, from sums over rows: (samples, 2 + bins), and of each class truth, prediction and hits.
INTERVAL_METRICS: dict[str, Callable[[NDArray, NDArray, NDArray, NDArray], NDArray]] = {
    "accuracy": lambda sums, t, p, h: sums[:, 0],
    "f1_macro": lambda sums, t, p, h: _macro(_ratio(2 * h, t + p), t, p),
    "precision_macro": lambda sums, t, p, h: _macro(_ratio(h, p), t, p),
    "recall_macro": lambda sums, t, p, h: _macro(_ratio(h, t), t, p),
    "loss": lambda sums, t, p, h: sums[:, 1],
    "calibration_error": lambda sums, t, p, h: np.abs(sums[:, 2:]).sum(axis=1),
}
_PER_ROW = ("accuracy", "loss", "calibration_error")
