"""The training loss. Elsewhere it is the plain cross-entropy, so that it can be compared between runs."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.errors import UserError, check_range
from lightning_lora.tasks import Task

ClassWeights = Literal["balanced"] | list[float]
Calibrate = bool | Literal["auto"]


def plain_loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Cross-entropy, binary cross-entropy or mean squared error, (): that of validation and test rows.

    Of logits and labels as for ``row_losses``.
    """
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.mse_loss(logits[:, 0], labels) if task == "regression" else F.cross_entropy(logits, labels)


def row_losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float, task: Task = "single_label"
) -> Tensor:
    """The training loss of each row, (B,), with label smoothing and weights.

    Its mean is over rows, also with class weights, so that it does not depend on how a step is cut up.

    Args:
        logits: (B, C); of regression (B, 1).
        labels: Class numbers (B,), 0 or 1 by label (B, C), or numbers (B,).
        weights: Of the classes, or of the rows that have each label, (C,); of squared errors, ().
        smoothing: From 0 up to 1.
        task: What is predicted.
    """
    if task == "multi_label":
        smooth = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction="none").mean(-1)
    if task == "regression":
        errors = F.mse_loss(logits[:, 0], labels, reduction="none")
        return errors if weights is None else errors * weights
    return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="none")


def check_task(
    task: Task, outputs: int, smoothing: float, weights: ClassWeights | None, threshold: str | float
) -> None:
    """Refuse settings of a model that mean nothing for its task, which has so many outputs.

    Raises:
        UserError: A setting does not go with the task.
    """
    if task == "regression" and (smoothing or weights is not None):
        name = "label_smoothing" if smoothing else "class_weights"
        raise UserError(f"model.{name}: numbers (task regression) are no classes; leave it out")
    if (task == "regression") != (outputs == 1):
        raise UserError(f"model.task: {task} with {outputs} label names; regression has one, the others two or more")
    if task != "multi_label" and threshold != "one":
        raise UserError(f"model.threshold: only labels of which a text may have several have one (task {task})")
    if not isinstance(threshold, str):
        check_range("model.threshold", threshold, 0, 1)


def has_temperature(calibrate: Calibrate, task: Task, threshold: str | float, method: str) -> bool:
    """Whether a model has a temperature; not by "auto" where it means nothing, or changes what a threshold means.

    Raises:
        UserError: It is to have one, but nothing is fitted, or the task has no probabilities; or a typed threshold
            would change labels.
    """
    why = None
    if task == "regression" or method == "none":
        why = "numbers (task regression) are no probabilities" if task == "regression" else "method 'none' fits nothing"
        why = f"model.calibrate: {why}; leave it out"
    elif not isinstance(threshold, str) and threshold != 0.5:
        why = (
            f"model.threshold: {threshold}, but calibration would change the labels that have this probability; give "
            "one, per_label or 0.5, or leave out model.calibrate"
        )
    if why and calibrate is True:
        raise UserError(why)
    return bool(calibrate) and not why


def make_class_weights(asked: ClassWeights, class_counts: list[int], rows: int | None = None) -> Tensor:
    """Weights of the classes, float32 (C,), under which a training row weighs 1 on average.

    Args:
        asked: "balanced", inverse to a class's share of the rows, or one number a class. Of several labels the weight
            of the rows that have a label, beside 1 of those that do not; "balanced" is how many times more these are.
        class_counts: Training rows of each class.
        rows: All training rows, where each may have several labels.

    Raises:
        UserError: They are not as many as classes, or not all above 0.
    """
    counts = torch.tensor(class_counts, dtype=torch.float32)
    whole = 1 if rows is None else (rows - counts).clamp(min=1)
    weights = whole / counts.clamp(min=1) if asked == "balanced" else torch.tensor(asked, dtype=torch.float32)
    if not (weights.isfinite() & (weights > 0)).all():
        raise UserError(f"model.class_weights: numbers above 0 are needed, got {asked}")
    if len(weights) != len(counts):
        raise UserError(f"model.class_weights: {len(weights)} weights for {len(counts)} classes")
    return weights if rows is not None else weights * counts.sum() / (weights * counts).sum()
