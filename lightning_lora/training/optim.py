"""AdamW with warm-up."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from transformers import get_scheduler

from lightning_lora.errors import UserError

Schedule = Literal["linear", "cosine", "constant"]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose step may be captured as a CUDA graph; learning rates may still change between steps."""

    captured_step: Callable[[], None] | None = None
    _rates: Tensor
    _captured_rates: list[float]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, after the closure has computed the gradients."""
        loss = None
        if closure is not None:  # the first one captures the step
            with torch.enable_grad():
                loss = closure()
        if self.captured_step is None:
            super().step()
            return loss
        rates = [float(group["lr"]) for group in self.param_groups]
        for i, rate in enumerate(rates):  # each is filled in by a kernel: copying them would wait for the device
            if rate != self._captured_rates[i]:
                self._rates[i].fill_(rate)
        self._captured_rates = rates
        self.captured_step()
        return loss

    def apply(self) -> None:
        """Step plainly on the gradients that are there."""
        super().step()

    def capture(self, step: Callable[[], None], found_inf: Tensor, capture: Callable[..., Callable[[], None]]) -> None:
        """Capture a step.

        Args:
            step: What to do in one; calls ``apply``.
            found_inf: Steps change nothing where it is 1, ().
            capture: Captures a function without running it, and returns what runs it.
        """
        self.found_inf = found_inf  # read by torch's fused step
        found_inf.fill_(1)
        self.apply()  # makes the moments, and changes nothing
        found_inf.zero_()
        floats: list[float] = [group["lr"] for group in self.param_groups]
        self._rates, self._captured_rates = torch.tensor(floats, device=found_inf.device), floats
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group |= {"lr": rate, "capturable": True}
        try:
            self.captured_step = capture(step)
        finally:
            for group, value in zip(self.param_groups, floats, strict=True):
                group |= {"lr": value, "capturable": False}

    def release(self) -> None:
        """Step plainly from here on."""
        self.captured_step = None
        self.found_inf = None  # type: ignore[assignment]


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
            {"params": parameters, "lr": learning_rate * factor, "lr_factor": factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ],
        lr=learning_rate,
        fused=fused,
    )


def make_schedule(optimizer: AdamW, schedule: Schedule, warmup_ratio: float, total_steps: int) -> Any:
    """A schedule counted in optimizer steps: warm-up over the first share of them, then as named."""
    name = "constant_with_warmup" if schedule == "constant" else schedule
    return get_scheduler(name, optimizer, warmup_steps(warmup_ratio, total_steps), total_steps)


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Steps over which the learning rate rises."""
    return round(warmup_ratio * total_steps)


def same_schedule(schedule: Schedule, warmup_ratio: float, total: int, other: int) -> bool:
    """Whether a schedule gives the same rates for another total number of steps."""
    return schedule == "constant" and warmup_steps(warmup_ratio, total) == warmup_steps(warmup_ratio, other)


def set_rates(scheduler: Any) -> None:
    """Sets each rate to what the schedule says for the step that it is at, where a state held that of another."""
    groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, peak, factor in groups:
        group["lr"] = peak * factor(scheduler.last_epoch)


def count_steps(trainer: Trainer, schedule: Schedule, warmup_ratio: float, moves_ranks: bool) -> int:
    """Optimizer steps of the whole run; 0 where there is no limit and neither schedule nor method depends on it.

    Raises:
        UserError: There is no limit, and something depends on it.
    """
    total = trainer.estimated_stepping_batches
    if not math.isinf(total):
        return int(total)
    if moves_ranks or schedule != "constant" or warmup_ratio:
        without = "" if moves_ranks else ", or --model.schedule constant --model.warmup_ratio 0"
        raise UserError(
            "trainer.max_epochs: -1 gives no number of steps to lay the schedule out over; give trainer.max_steps"
            f"{without}"
        )
    return 0


def take_found_rate(module: LightningModule) -> None:
    """Makes the learning rate that a ``LearningRateFinder`` has found the peak of the schedule.

    By itself it sets the rate of the next step only, and the same for all groups of weights (Lightning 2.6.6).

    Raises:
        UserError: It tried too few rates to find one.
    """
    trainer, planned = module.trainer, module.planned_steps
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateFinder) and (search := callback.optimal_lr) is not None:
            trainer.callback_metrics.clear()  # it validates, also where the run does not
            trainer.fit_loop.epoch_loop.val_loop._has_run = False  # else callbacks would miss what it gave
            tried, asked = len(search.results["lr"]), search.num_training
            if search.suggestion() is None or planned == tried < asked:
                raise UserError(
                    f"trainer.callbacks: LearningRateFinder: {tried} of {asked} rates (num_training_steps) were tried, "
                    f"as the run has {planned} steps; give a num_training_steps from 20 to {planned}, or train longer"
                )
    if module.learning_rate != module.scheduled_rate:
        trainer.strategy.setup_optimizers(trainer)
