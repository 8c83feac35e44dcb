"""What validation rows settle: what logits are divided by, and the probability from which a label is predicted.

Temperature scaling (Guo et al. 2017) divides logits by one number, so that probabilities are right.
"""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_lora.evaluation.documents import wide
from lightning_lora.evaluation.metric_table import row_losses
from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.tasks import Task

#: The temperatures that are searched.
LOWEST, HIGHEST = 0.2, 10.0
#: On fewer rows one that is fitted can do worse than none (docs/LOG.md).
ROWS_TO_FIT = 100
#: "one" for all labels, one "per_label", or a number that is not chosen.
Threshold = Literal["one", "per_label"] | float
#: What is tried: 0.01, 0.02, ... 0.99.
GRID = np.arange(1, 100, dtype=np.float32) / np.float32(100)


def fit_temperature(logits: Tensor, labels: Tensor, task: Task = "single_label") -> float:
    """Return the temperature with the lowest loss on these rows (https://arxiv.org/abs/1706.04599), or 1.

    It is 1 where no label is wrong: the loss then falls as far as the temperature does. Otherwise the loss is convex in
    the inverse of the temperature, so that what is found is the minimum within the bounds.

    Args:
        logits: (N, C).
        labels: Class numbers (N,); or 0 or 1 for each label, (N, C).
        task: Which of them; not regression.
    """
    from scipy.optimize import minimize_scalar  # which takes a tenth of a second

    outputs = Outputs(logits.cpu().double().numpy(), labels.cpu().numpy(), task=task)
    right = (outputs.logits > 0) == (outputs.truth > 0) if task == "multi_label" else outputs.right

    def loss(log_temperature: float) -> float:
        return float(row_losses(replace(outputs, logits=outputs.logits / math.exp(log_temperature))).mean())

    if right.all() or not np.isfinite(outputs.logits).all():
        return 1.0
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def scale_thresholds(thresholds: Tensor, temperature: Tensor) -> Tensor:
    """Return what thresholds (C,) become when logits are divided by a temperature (): the same labels are predicted."""
    return (thresholds.to(wide(thresholds)).logit() / temperature).sigmoid()


def temperature_words(temperature: float) -> str:
    """Return a temperature in words: the number, and why it is none that validation rows have settled."""
    if temperature == 1:
        return "1 (no validation row is wrong, or no other is better)"
    bound = next((b for b in (LOWEST, HIGHEST) if math.isclose(temperature, b, rel_tol=1e-3)), None)
    return f"{temperature:.3f}" + ("" if bound is None else f" (the bound of the search is {bound:g})")


def choose_thresholds(logits: Tensor, labels: Tensor, kind: Threshold) -> Tensor:
    """Return the thresholds, float32 (C,), of ``GRID`` with the highest F1; of equal ones that nearest to 0.5.

    "one" maximizes the macro F1, "per_label" each label's own (Yang 2001, https://doi.org/10.1145/383952.383975, which
    warns that of few rows the latter overfits). Logits and labels, 0 or 1, are (N, C).
    """
    classes = logits.shape[1]
    if isinstance(kind, float | int):
        return torch.full((classes,), float(kind))
    # How many values of the grid each probability reaches, and of how many rows of each label that is so.
    reached = np.searchsorted(GRID, logits.to(wide(logits)).sigmoid().cpu().numpy(), side="right")
    cells = (np.arange(classes) * (len(GRID) + 1) + reached).ravel()
    truth = labels.cpu().numpy().astype(float)

    def at_each(weights: np.ndarray | None) -> np.ndarray:
        """The sum over the rows that reach each value of the grid, (C, values)."""
        counts = np.bincount(cells, weights, minlength=classes * (len(GRID) + 1)).reshape(classes, -1)
        return counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]

    predicted, hits = at_each(None), at_each(truth.ravel())
    whole = predicted + truth.sum(axis=0)[:, None]
    scores = np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0)
    if kind == "one":
        scores = np.broadcast_to(scores.mean(axis=0), scores.shape)
    best = np.isclose(scores, scores.max(axis=1, keepdims=True), rtol=0, atol=1e-12)
    return torch.from_numpy(GRID[np.where(best, np.abs(GRID - 0.5), np.inf).argmin(axis=1)])
