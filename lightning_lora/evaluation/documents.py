"""Documents of several windows: what all of them say together."""

import torch
from torch import Tensor

from lightning_lora.tasks import Task


def wide(values: Tensor) -> torch.dtype:
    """The widest dtype of the values' device: Apple's GPUs have no double precision."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def pooled(logits: Tensor, documents: Tensor, count: int, task: Task = "single_label") -> Tensor:
    """Logits (B, C) of the mean of the probabilities of each document's windows; of regression the mean of the numbers.

    Args:
        logits: Of all windows, (W, C).
        documents: The document of each window, (W,), from 0 to ``count`` - 1.
        count: Documents B.
        task: What is predicted.
    """
    if task != "single_label":
        values = logits.to(wide(logits))
        values = values.sigmoid() if task == "multi_label" else values
        sums = values.new_zeros(count, logits.shape[-1]).index_add(0, documents, values)
        windows = values.new_zeros(count).index_add(0, documents, torch.ones_like(values[:, 0]))
        means = sums / windows.clamp(min=1)[:, None]
        return (means.logit(torch.finfo(means.dtype).eps) if task == "multi_label" else means).float()
    probabilities = logits.softmax(dim=-1, dtype=wide(logits))  # the log of a small mean stays exact
    # The sum is the mean but for a factor, and the softmax of its log is the same.
    sums = probabilities.new_zeros(count, logits.shape[-1]).index_add(0, documents, probabilities)
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).log().float()
