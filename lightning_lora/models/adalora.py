"""What AdaLoRA does beside the gradient step (Zhang et al. 2023, arXiv:2303.10512)."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import UserError

#: Shares of all steps before ranks begin to move, and after they have settled.
WARM_UP, SETTLED = 0.1, 0.3
MIN_STEPS = 10
#: What PEFT's allocator keeps of each rank: importance, its running mean and that of its uncertainty.
_LEARNT = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraSteps:
    """Keeps the factors of PEFT's wrapper orthogonal and moves the rank budget; its allocator does the counting."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.peft_config["default"]

    def plan(self, total_steps: int) -> None:
        """Lays the budget's schedule out over the steps of the run.

        Raises:
            UserError: There are too few steps to move ranks in.
        """
        if total_steps < MIN_STEPS:
            raise UserError(
                f"model.method: adalora moves ranks over the steps of a run, and {total_steps} steps are too few "
                f"(at least {MIN_STEPS}); train longer or use lora"
            )
        self.config.total_step = total_steps
        self.config.tinit = round(WARM_UP * total_steps)
        self.config.tfinal = round(SETTLED * total_steps)
        self.config.deltaT = max(1, total_steps // 100)

    def settled(self, step: int) -> bool:
        """Whether the ranks are those that the run ends with, after so many optimizer steps."""
        return step >= self.config.total_step - self.config.tfinal

    def penalty(self) -> Tensor:
        """The mean distance of the factors from orthogonality (equation 4), weighted as in PEFT."""
        distances = []
        for name, factor in self.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                distances.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.config.orth_reg_weight * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Updates the importance of each rank and drops the least ones; the step's gradients must still be there."""
        self.model.base_model.update_and_allocate(step)

    def state_dict(self) -> dict[str, Any]:
        """What the allocator has learnt of each rank's importance, and which ranks are left."""
        allocator = self.model.base_model.rankallocator
        return {name: dict(getattr(allocator, name)) for name in _LEARNT} | {"ranks": self.config.rank_pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken."""
        for name in _LEARNT:
            setattr(self.model.base_model.rankallocator, name, dict(state[name]))
        self.config.rank_pattern = state["ranks"]
