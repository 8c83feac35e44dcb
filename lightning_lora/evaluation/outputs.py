"""What a model gives for rows, and what is predicted by it. Imports no torch."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

from lightning_lora.tasks import Task

#: The metadata of a Parquet file of predictions that holds task and thresholds.
OUTPUTS_KEY = "lightning_lora"


@dataclass(frozen=True)
class Outputs:
    """Logits of N rows with what turns them into predictions.

    Args:
        logits: float32, (N, C); of regression (N, 1), the predicted numbers in the units of the data.
        labels: The truth: class numbers (N,), 0 or 1 by label (N, C), or numbers (N,); None where it is not known.
        task: What is predicted.
        thresholds: Of several labels the probabilities from which on each is predicted, (C,); or by row, (N, C).
    """

    logits: NDArray
    labels: NDArray | None
    task: Task = field(default="single_label", kw_only=True)
    thresholds: NDArray | None = field(default=None, kw_only=True)

    @cached_property
    def truth(self) -> NDArray:
        """The labels, where they must be known."""
        assert self.labels is not None
        return self.labels

    @cached_property
    def log_p(self) -> NDArray:
        """The logarithm of each class's probability, float64, (N, C)."""
        return log_softmax(self.logits.astype(np.float64), axis=1)

    @property
    def probabilities(self) -> NDArray:
        """Of each class or label, float64, (N, C); of regression the numbers themselves."""
        logits = self.logits.astype(np.float64)
        if self.task == "single_label":
            return softmax(logits, axis=1)
        return expit(logits) if self.task == "multi_label" else logits

    @cached_property
    def predicted(self) -> NDArray:
        """The class with the largest logit (N,), whether each label is predicted (N, C), or the number (N,)."""
        if self.task == "multi_label":
            return self.probabilities >= (0.5 if self.thresholds is None else self.thresholds)
        return self.logits.argmax(axis=1) if self.task == "single_label" else self.logits[:, 0]

    @property
    def right(self) -> NDArray:
        """1.0 where the prediction is right, else 0.0: by row (N,), or by row and label (N, C); not of regression."""
        return (self.predicted == self.truth).astype(float)

    def changed(self, other: "Outputs") -> NDArray:
        """Whether the prediction of each row, (N,), differs from another model's; never of regression."""
        if self.task == "regression":
            return np.zeros(len(self.logits), bool)
        return (self.predicted != other.predicted).reshape(len(self.logits), -1).any(axis=1)
