"""Documents of several windows: what all of them say together."""

import torch
from torch import Tensor


def wide(values: Tensor) -> torch.dtype:
    """The widest number format of the values' device: Apple's GPUs have no double precision."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def pooled(logits: Tensor, documents: Tensor, count: int) -> Tensor:
    """Logits (B, C) whose softmax is the mean of the probabilities of each document's windows.

    Args:
        logits: Of all windows, (W, C).
        documents: The document of each window, (W,), from 0 to ``count`` - 1.
        count: Documents B.
    """
    probabilities = logits.softmax(dim=-1, dtype=wide(logits))  # the log of a small mean stays exact
    # The sum is the mean but for a factor, and the softmax of its log is the same.
    sums = probabilities.new_zeros(count, logits.shape[-1]).index_add(0, documents, probabilities)
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).log().float()
