"""The metrics, one entry each: training, evaluation, intervals, plans, tables and model cards read them here.

Imports no torch: a report is written without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class MetricSpec:
    """A metric: how it is counted, and how it is shown.

    Args:
        torch_metric: Makes it, from the module ``torchmetrics.classification`` and the number of classes C; None for
            the loss, which the model gives.
        heading: Its heading in tables; a metric without one is logged only.
        rows: What each row adds, (N, K), from log-probabilities (N, C) and labels (N,): what its interval is made of.
        value: The metric (...) from means (..., K) of ``rows``; None where it is the mean of one value a row. Arms of
            an ablation can be chosen and compared by metrics of that kind.
        higher_is_better: Whether more of it is better.
        of_training: Whether training rows have it: not what takes more than the predicted classes.
        hub_type: The Hub's name for it in the metadata of model cards; None leaves it out of them.
    """

    torch_metric: Callable[[Any, int], Any] | None
    heading: str = ""
    rows: Callable[[NDArray, NDArray], NDArray] | None = None
    value: Callable[[NDArray], NDArray] | None = None
    higher_is_better: bool = True
    of_training: bool = True
    hub_type: str | None = None


def _hits(log_p: NDArray, labels: NDArray) -> NDArray:
    return (log_p.argmax(axis=1) == labels)[:, None].astype(float)


def _losses(log_p: NDArray, labels: NDArray) -> NDArray:
    return -log_p[np.arange(len(labels)), labels][:, None]


def _class_counts(log_p: NDArray, labels: NDArray) -> NDArray:
    """Of each class whether it is the label, whether it is predicted, and both; (N, 3 C)."""
    truth, predicted = (np.eye(log_p.shape[1])[classes] for classes in (labels, log_p.argmax(axis=1)))
    return np.concatenate([truth, predicted, truth * predicted], axis=1)


def _macro(score: Callable[[NDArray, NDArray, NDArray], tuple[NDArray, NDArray]]) -> Callable[[NDArray], NDArray]:
    """The mean of a score, as numerator and denominator, over the classes that labels or predictions have."""

    def value(means: NDArray) -> NDArray:
        truth, predicted, hits = np.split(means, 3, axis=-1)
        part, whole = score(truth, predicted, hits)
        ratio = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
        return (ratio * (truth + predicted > 0)).sum(axis=-1) / (truth + predicted > 0).sum(axis=-1)

    return value


def calibration_bins(log_p: NDArray) -> tuple[NDArray, NDArray]:
    """Return the probability of each row's predicted class, (N,), and the bin that it falls into, (N,)."""
    confidence = np.exp(log_p.max(axis=1))
    return confidence, np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def _calibration_gaps(log_p: NDArray, labels: NDArray) -> NDArray:
    confidence, bins = calibration_bins(log_p)
    return np.eye(CALIBRATION_BINS)[bins] * (confidence[:, None] - _hits(log_p, labels))


#: Metric by name. The average is part of the name; "_per_class" gives one value a label, logged as "<metric>/<label>".
METRICS: dict[str, MetricSpec] = {
    "accuracy": MetricSpec(
        lambda t, c: t.MulticlassAccuracy(c, average="micro"), "accuracy", _hits, hub_type="accuracy"
    ),
    "f1_macro": MetricSpec(
        lambda t, c: t.MulticlassF1Score(c, average="macro"),
        "F1 (macro)",
        _class_counts,
        _macro(lambda truth, predicted, hits: (2 * hits, truth + predicted)),
        hub_type="f1",
    ),
    "precision_macro": MetricSpec(
        lambda t, c: t.MulticlassPrecision(c, average="macro"),
        "precision (macro)",
        _class_counts,
        _macro(lambda truth, predicted, hits: (hits, predicted)),
        hub_type="precision",
    ),
    "recall_macro": MetricSpec(
        lambda t, c: t.MulticlassRecall(c, average="macro"),
        "recall (macro)",
        _class_counts,
        _macro(lambda truth, predicted, hits: (hits, truth)),
        hub_type="recall",
    ),
    "loss": MetricSpec(None, "loss", _losses, higher_is_better=False),
    # Naeini et al. 2015: bins of equal width over the probability of the predicted class.
    "calibration_error": MetricSpec(
        lambda t, c: t.MulticlassCalibrationError(c, n_bins=CALIBRATION_BINS, norm="l1"),
        "calibration error",
        _calibration_gaps,
        lambda means: np.abs(means).sum(axis=-1),
        higher_is_better=False,
        of_training=False,
    ),
    "f1_per_class": MetricSpec(lambda t, c: t.MulticlassF1Score(c, average="none")),
    "precision_per_class": MetricSpec(lambda t, c: t.MulticlassPrecision(c, average="none")),
    "recall_per_class": MetricSpec(lambda t, c: t.MulticlassRecall(c, average="none")),
}


def row_metrics() -> list[str]:
    """Return the metrics that are a mean of one value a row, by which arms can be compared."""
    return [name for name, spec in METRICS.items() if spec.rows is not None and spec.value is None]
