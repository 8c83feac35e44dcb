"""AdamW with warm-up."""

from typing import Any, Literal

from torch import nn
from torch.optim import AdamW

Schedule = Literal["linear", "cosine", "constant"]
_TRANSFORMERS_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over the trainable parameters; no weight decay on biases and norms (all that is one-dimensional)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate)


def make_schedule(optimizer: AdamW, schedule: Schedule, warmup_ratio: float, total_steps: int) -> Any:
    """A schedule counted in optimizer steps: warm-up over the first share of them, then as named."""
    from transformers import get_scheduler

    warmup_steps = round(warmup_ratio * total_steps)
    return get_scheduler(_TRANSFORMERS_NAMES[schedule], optimizer, warmup_steps, total_steps)
