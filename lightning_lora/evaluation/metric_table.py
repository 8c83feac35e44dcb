"""The metrics, one entry each: training, evaluation, intervals, plans, tables and model cards read them here.

Imports no torch: a report is written without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.tasks import Task

CALIBRATION_BINS = 15
#: The metric by which checkpoints are chosen and training is stopped, on validation rows.
MONITORED: Mapping[Task, str] = {"single_label": "f1_macro", "multi_label": "f1_macro", "regression": "mse"}
#: What people look at first; the progress bar shows the first of them.
SHOWN: Mapping[Task, tuple[str, ...]] = {
    "single_label": ("accuracy", "f1_macro", "loss"),
    "multi_label": ("f1_samples", "f1_macro", "loss"),
    "regression": ("pearson", "spearman", "mse"),
}
SINGLE: tuple[Task, ...] = ("single_label",)
MULTI: tuple[Task, ...] = ("multi_label",)
CLASSES: tuple[Task, ...] = ("single_label", "multi_label")
NUMBERS: tuple[Task, ...] = ("regression",)


@dataclass(frozen=True)
class MetricSpec:
    """A metric: how it is counted, and how it is shown.

    Args:
        torch_metric: Makes it, from the module ``torchmetrics`` and what its classes are told of the labels:
            ``{"task": "multiclass", "num_classes": C}``, ``{"task": "multilabel", "num_labels": C}`` or nothing; None
            for the loss, which the model gives.
        heading: Its heading in tables; a metric without one is logged only.
        rows: What each row adds, (N, K): what its interval is made of; None where it has none.
        value: The metric (...) of a task from means (..., K) of ``rows``; None where it is the mean of one value a row.
        tasks: The tasks that have it.
        higher_is_better: Whether more of it is better.
        of_training: Whether training rows have it: not what takes more than the predictions of each class or label.
        of_scores: Whether it takes the probabilities of several labels, and not whether each is predicted.
        hub_type: The Hub's name for it in the metadata of model cards; None leaves it out of them.
        compared: Whether arms can be compared by it (``pseudo_values``): not by ranks, which depend on the other rows,
            nor by what is biased.
        unit: Of a metric in units of the data what a margin is a share of, in words and from the truth (N,).
    """

    torch_metric: Callable[[Any, Mapping[str, Any]], Any] | None
    heading: str = ""
    rows: Callable[[Outputs], NDArray] | None = None
    value: Callable[[NDArray, Task], NDArray] | None = None
    tasks: tuple[Task, ...] = SINGLE
    higher_is_better: bool = True
    of_training: bool = True
    of_scores: bool = False
    hub_type: str | None = None
    compared: bool = True
    unit: tuple[str, Callable[[NDArray], float]] | None = None


def _hits(outputs: Outputs) -> NDArray:
    """Whether the prediction of each row is right, with all its labels; (N, 1)."""
    return outputs.right.reshape(len(outputs.logits), -1).min(axis=1, keepdims=True)


def _losses(outputs: Outputs) -> NDArray:
    if outputs.task == "single_label":
        return -outputs.log_p[np.arange(len(outputs.truth)), outputs.truth][:, None]
    logits = outputs.logits.astype(np.float64)
    return (np.logaddexp(0, logits) - logits * outputs.truth).mean(axis=1, keepdims=True)


def _class_counts(outputs: Outputs) -> NDArray:
    """Of each class whether it is true, whether it is predicted, and both; (N, 3 C)."""
    truth, predicted = outputs.truth, outputs.predicted
    if outputs.task == "single_label":
        truth, predicted = (np.eye(outputs.logits.shape[1])[classes] for classes in (truth, predicted))
    return np.concatenate([truth, predicted, truth * predicted], axis=1).astype(float)


#: A score of counts, or of their means: of the truth, of what is predicted, and of both; as numerator and denominator.
Score = Callable[[NDArray, NDArray, NDArray], tuple[NDArray, NDArray]]


def _ratio(part: NDArray, whole: NDArray, none: float = 0.0) -> NDArray:
    return np.divide(part, whole, out=np.full(np.shape(whole), none), where=whole > 0)


def _f1(truth: NDArray, predicted: NDArray, hits: NDArray) -> tuple[NDArray, NDArray]:
    return 2 * hits, truth + predicted


def _precision(truth: NDArray, predicted: NDArray, hits: NDArray) -> tuple[NDArray, NDArray]:
    return hits, predicted


def _recall(truth: NDArray, predicted: NDArray, hits: NDArray) -> tuple[NDArray, NDArray]:
    return hits, truth


def _macro(score: Score) -> Callable[[NDArray, Task], NDArray]:
    """The mean of a score over all labels; over those classes, of which a row has one, that there are or are said."""

    def value(means: NDArray, task: Task) -> NDArray:
        truth, predicted, hits = np.split(means, 3, axis=-1)
        there = (truth + predicted > 0) | (task == "multi_label")
        return (_ratio(*score(truth, predicted, hits)) * there).sum(axis=-1) / there.sum(axis=-1)

    return value


def _micro(score: Score) -> Callable[[NDArray, Task], NDArray]:
    """A score of all labels counted together."""
    return lambda means, _: _ratio(*score(*(each.sum(axis=-1) for each in np.split(means, 3, axis=-1))))


def _f1_of_rows(outputs: Outputs) -> NDArray:
    counts = (each.sum(axis=1, keepdims=True) for each in np.split(_class_counts(outputs), 3, axis=1))
    return _ratio(*_f1(*counts), none=1.0)


def _matthews(means: NDArray, task: Task) -> NDArray:
    """Gorodkin 2004: a correlation of the two assignments to classes."""
    truth, predicted, hits = np.split(means, 3, axis=-1)
    spread = (1 - (truth**2).sum(axis=-1)) * (1 - (predicted**2).sum(axis=-1))
    return _ratio(hits.sum(axis=-1) - (truth * predicted).sum(axis=-1), np.sqrt(np.maximum(spread, 0)))


def _matthews_metric(torchmetrics: Any, size: Mapping[str, Any]) -> Any:
    from lightning_lora.evaluation.metrics import MatthewsCorrelation  # which imports torch

    return MatthewsCorrelation(**{name: value for name, value in size.items() if name != "task"})


def calibration_bins(outputs: Outputs) -> tuple[NDArray, NDArray]:
    """Return the probability of each row's predicted class, (N,), or of each of several labels, (N, C); and its bin."""
    single = outputs.task == "single_label"
    confidence = np.exp(outputs.log_p.max(axis=1)) if single else outputs.probabilities
    return confidence, np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def _calibration_gaps(outputs: Outputs) -> NDArray:
    """What each row adds to the sum of (probability - outcome) in each bin, (N, bins)."""
    confidence, bins = calibration_bins(outputs)
    gaps = confidence - (outputs.right if outputs.task == "single_label" else outputs.truth)
    in_bin = (np.where(bins == i, gaps, 0.0).reshape(len(gaps), -1).mean(axis=1) for i in range(CALIBRATION_BINS))
    return np.stack([*in_bin], axis=1)


def _correlation_metric(name: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    def make(torchmetrics: Any, size: Mapping[str, Any]) -> Any:
        from lightning_lora.evaluation import metrics  # which imports torch

        return getattr(metrics, f"{name}Correlation")()

    return make


def _calibration_error(torchmetrics: Any, size: Mapping[str, Any]) -> Any:
    kind = {"task": "binary"} if size["task"] == "multilabel" else size  # all labels of all rows together
    return torchmetrics.CalibrationError(**kind, n_bins=CALIBRATION_BINS, norm="l1")


def _errors(outputs: Outputs) -> NDArray:
    return (outputs.predicted.astype(np.float64) - outputs.truth)[:, None]


def _ranks(values: NDArray) -> NDArray:
    from scipy.stats import rankdata  # half a second, which reports of classes need not wait for

    return rankdata(values)


def _moments(of: Callable[[NDArray], NDArray]) -> Callable[[Outputs], NDArray]:
    """What a correlation is made of, (N, 5): predictions, truth, their squares and their product."""

    def rows(outputs: Outputs) -> NDArray:
        x, y = (of(each.astype(np.float64)) for each in (outputs.predicted, outputs.truth))
        x, y = x - x.mean(), y - y.mean()  # for precision; a correlation is the same
        return np.stack([x, y, x * x, y * y, x * y], axis=1)

    return rows


def _correlation(means: NDArray, task: Task) -> NDArray:
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    spread = np.sqrt(np.maximum((xx - x * x) * (yy - y * y), 0))
    return np.divide(xy - x * y, spread, out=np.full(np.shape(spread), np.nan), where=spread > 0)


def _averaged(metric: str, average: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    return lambda t, size: getattr(t, metric)(**size, average=average)


#: Metric by name. The average is part of the name; "_per_class" gives one value a label, logged as "<metric>/<label>".
#: The first of a task that is a mean of one value a row is what its models are compared by.
METRICS: dict[str, MetricSpec] = {
    "accuracy": MetricSpec(_averaged("Accuracy", "micro"), "accuracy", _hits, hub_type="accuracy"),
    # By row; a text without labels to which none is given counts as 1 (scikit-learn's zero_division=1).
    "f1_samples": MetricSpec(
        lambda t, size: t.F1Score("binary", multidim_average="samplewise", zero_division=1),
        "F1 (by text)",
        _f1_of_rows,
        tasks=MULTI,
        of_training=False,
    ),
    "f1_micro": MetricSpec(_averaged("F1Score", "micro"), "F1 (micro)", _class_counts, _micro(_f1), MULTI),
    "f1_macro": MetricSpec(
        _averaged("F1Score", "macro"), "F1 (macro)", _class_counts, _macro(_f1), CLASSES, hub_type="f1"
    ),
    "precision_macro": MetricSpec(
        _averaged("Precision", "macro"),
        "precision (macro)",
        _class_counts,
        _macro(_precision),
        CLASSES,
        hub_type="precision",
    ),
    "recall_macro": MetricSpec(
        _averaged("Recall", "macro"), "recall (macro)", _class_counts, _macro(_recall), CLASSES, hub_type="recall"
    ),
    "matthews_correlation": MetricSpec(
        _matthews_metric,
        "Matthews corr.",
        _class_counts,
        _matthews,
        hub_type="matthews_correlation",
    ),
    "subset_accuracy": MetricSpec(
        lambda t, size: t.ExactMatch(**size), "subset accuracy", _hits, tasks=MULTI, of_training=False
    ),
    "hamming_loss": MetricSpec(
        lambda t, size: t.HammingDistance(**size),
        "Hamming loss",
        lambda outputs: 1 - outputs.right.mean(axis=1, keepdims=True),
        tasks=MULTI,
        higher_is_better=False,
    ),
    "average_precision": MetricSpec(
        lambda t, size: t.AveragePrecision(**size, average="macro"),
        "average precision (macro)",
        tasks=MULTI,
        of_training=False,
        of_scores=True,
    ),
    "loss": MetricSpec(None, "loss", _losses, tasks=CLASSES, higher_is_better=False),
    # Naeini et al. 2015: bins of equal width over the probability of the predicted class; of several labels over that
    # of each label of each text, whether it is predicted or not.
    "calibration_error": MetricSpec(
        _calibration_error,
        "calibration error",
        _calibration_gaps,
        lambda means, _: np.abs(means).sum(axis=-1),
        CLASSES,
        higher_is_better=False,
        of_training=False,
        of_scores=True,
        compared=False,
    ),
    # Of regression; the loss of validation and test rows is the mean squared error too.
    "mse": MetricSpec(
        lambda t, _: t.MeanSquaredError(),
        "mean squared error",
        lambda outputs: _errors(outputs) ** 2,
        tasks=NUMBERS,
        higher_is_better=False,
        of_training=False,
        hub_type="mse",
        unit=("variance", lambda truth: float(truth.var())),
    ),
    "mae": MetricSpec(
        lambda t, _: t.MeanAbsoluteError(),
        "mean absolute error",
        lambda outputs: np.abs(_errors(outputs)),
        tasks=NUMBERS,
        higher_is_better=False,
        of_training=False,
        hub_type="mae",
        unit=("standard deviation", lambda truth: float(truth.std())),
    ),
    "pearson": MetricSpec(
        _correlation_metric("Pearson"),
        "Pearson correlation",
        _moments(lambda values: values),
        _correlation,
        NUMBERS,
        of_training=False,
        hub_type="pearsonr",
    ),
    # Its interval draws rows with the ranks that they have among all.
    "spearman": MetricSpec(
        _correlation_metric("Spearman"),
        "Spearman correlation",
        _moments(_ranks),
        _correlation,
        NUMBERS,
        of_training=False,
        hub_type="spearmanr",
        compared=False,
    ),
    "f1_per_class": MetricSpec(_averaged("F1Score", "none"), tasks=CLASSES),
    "precision_per_class": MetricSpec(_averaged("Precision", "none"), tasks=CLASSES),
    "recall_per_class": MetricSpec(_averaged("Recall", "none"), tasks=CLASSES),
}


def metrics_for(task: Task) -> dict[str, MetricSpec]:
    """Return the metrics of a task by name."""
    return {name: spec for name, spec in METRICS.items() if task in spec.tasks}


def primary_metric(task: Task) -> tuple[str, str]:
    """Return the metric by which weights are chosen on validation rows, and its name in words."""
    name = MONITORED[task]
    return name, "F1" if name == "f1_macro" else METRICS[name].heading


def row_metrics(task: Task | None = None) -> list[str]:
    """Return the metrics of a task, or of all, that are a mean of one value a row."""
    return [
        name
        for name, spec in METRICS.items()
        if spec.rows is not None and spec.value is None and (task is None or task in spec.tasks)
    ]


def compared_metrics(task: Task | None = None) -> list[str]:
    """Return the metrics of a task, or of all, by which arms can be compared, those of one value a row first."""
    means = row_metrics(task)
    known = METRICS if task is None else metrics_for(task)
    return [*means, *(name for name, spec in known.items() if spec.rows and spec.compared and name not in means)]
