"""The training loss. Elsewhere it is the plain cross-entropy, so that it can be compared between runs."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.errors import UserError

ClassWeights = Literal["balanced"] | list[float]


def row_losses(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy of each row, (B,), with label smoothing and class weights.

    Its mean is over rows, also with class weights, so that it does not depend on how a step is cut up.

    Args:
        logits: (B, C).
        labels: (B,).
        weights: Of the classes, (C,).
        smoothing: From 0 up to 1.
    """
    return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="none")


def make_class_weights(asked: ClassWeights, class_counts: list[int]) -> Tensor:
    """Weights of the classes, float32 (C,), under which a training row weighs 1 on average.

    Args:
        asked: "balanced", inverse to a class's share of the rows, or one number a class.
        class_counts: Training rows of each class.

    Raises:
        UserError: They are not as many as classes, or not all above 0.
    """
    counts = torch.tensor(class_counts, dtype=torch.float32)
    weights = 1 / counts.clamp(min=1) if asked == "balanced" else torch.tensor(asked, dtype=torch.float32)
    if not (weights.isfinite() & (weights > 0)).all():
        raise UserError(f"model.class_weights: numbers above 0 are needed, got {asked}")
    if len(weights) != len(counts):
        raise UserError(f"model.class_weights: {len(weights)} weights for {len(counts)} classes")
    return weights * counts.sum() / (weights * counts).sum()
