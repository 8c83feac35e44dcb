"""From which probability on a label is predicted, where a text may have several: chosen on validation rows."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_lora.evaluation.documents import wide

#: "one" for all labels, one "per_label", or a number that is not chosen.
Threshold = Literal["one", "per_label"] | float
#: What is tried: 0.01, 0.02, ... 0.99.
GRID = np.arange(1, 100, dtype=np.float32) / np.float32(100)


def choose_thresholds(logits: Tensor, labels: Tensor, kind: Threshold) -> Tensor:
    """Return the thresholds, float32 (C,), of ``GRID`` with the highest F1; of equal ones that nearest to 0.5.

    "one" maximizes the macro F1, "per_label" each label's own (Yang 2001, https://doi.org/10.1145/383952.383975, which
    warns that of few rows the latter overfits).

    Args:
        logits: (N, C).
        labels: 0 or 1, (N, C).
        kind: Which.
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
