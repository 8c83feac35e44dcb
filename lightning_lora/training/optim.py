"""AdamW with warm-up."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW

Schedule = Literal["linear", "cosine", "constant"]
_TRANSFORMERS_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    lr_factors: Mapping[str, float] | None = None,
    fused: bool = False,
) -> AdamW:
    """AdamW over the trainable parameters; no weight decay on biases and norms (all that is one-dimensional).

    Args:
        model: Of its parameters those that require a gradient are taken.
        learning_rate: The peak.
        weight_decay: Of the matrices.
        lr_factors: The learning rate of parameters whose name holds the key is multiplied by the value.
        fused: Step in one pass over each parameter, where torch can on its device.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = math.prod(value for part, value in (lr_factors or {}).items() if part in name)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    fused = fused and all(p.device.type in ("cpu", "cuda") for parameters in groups.values() for p in parameters)
    return AdamW(
        [
            {"params": parameters, "lr": learning_rate * factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ],
        lr=learning_rate,
        fused=fused,
    )


def make_schedule(optimizer: AdamW, schedule: Schedule, warmup_ratio: float, total_steps: int) -> Any:
    """A schedule counted in optimizer steps: warm-up over the first share of them, then as named."""
    from transformers import get_scheduler

    warmup_steps = round(warmup_ratio * total_steps)
    return get_scheduler(_TRANSFORMERS_NAMES[schedule], optimizer, warmup_steps, total_steps)
