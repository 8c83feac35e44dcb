"""Checks before an optimizer step: one that would corrupt the weights is not done."""

import math
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn

from lightning_lora import processes
from lightning_lora.data.batching import ResumableLoader
from lightning_lora.errors import UserError
from lightning_lora.training.loss import plain_loss


class NotFiniteError(UserError):
    """A step would have made the weights useless; it was not done.

    Args:
        what: What was not finite: "loss" or "gradient".
        said: The losses of the step, for the message.
        step: The step, counted from 1.
        rows: Positions of its rows in the training split.
    """

    def __init__(self, what: str, said: str, step: int, rows: list[int]) -> None:
        super().__init__(f"the {what} of step {step} is not finite (loss {said}); the step was not done")
        self.step = step
        self.rows = rows


class StepGuard:
    """Losses and rows of the parts of the step that is being computed."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.rows: list[Tensor] = []
        #: Of the step that was checked last.
        self.gradient_norm = torch.zeros(())

    def add(self, loss: Tensor, rows: Tensor) -> None:
        """Add a part of the step.

        Args:
            loss: Its loss.
            rows: Positions of its rows in the training split.
        """
        self.losses.append(loss.detach())
        self.rows.append(rows)

    def check(self, optimizer: torch.optim.Optimizer, step: int, gradients: bool) -> None:
        """Stops before a step that would corrupt the weights; all processes stop, or none.

        Args:
            optimizer: Which is to do it.
            step: Its number, counted from 1.
            gradients: Whether to check the gradient too; a scaler of the loss skips infinite ones itself.

        Raises:
            NotFiniteError: The loss or the gradient of the step is not finite.
        """
        # Of a ``training_step`` of one's own neither loss nor rows are known.
        nothing = torch.zeros(0, device=stepped(optimizer)[0].device)
        losses, rows = (torch.stack(self.losses), torch.cat(self.rows)) if self.losses else (nothing, nothing)
        self.losses, self.rows = [], []
        checked = {"loss": losses}
        if gradients:
            self.gradient_norm = nn.utils.get_total_norm([p.grad for p in stepped(optimizer) if p.grad is not None])
            checked["gradient"] = self.gradient_norm
        finite = torch.stack([values.isfinite().all() for values in checked.values()])
        not_finite = processes.all_reduce_max(*(~finite).tolist())
        if not any(not_finite):
            return
        what = next(name for name, bad in zip(checked, not_finite, strict=True) if bad)
        parts = processes.gathered((losses.tolist(), rows.cpu().tolist()))
        said = ", ".join(f"{loss:g}" for part, _ in parts for loss in part)
        raise NotFiniteError(what, said, step, [row for _, part in parts for row in part])


class DeferredGuard:
    """Keeps the weights from a step that is not finite without waiting for the device after each step.

    The device skips the step that is not finite, and all after it; ``check`` raises later.

    Args:
        device: Of the weights.
    """

    #: Steps between two checks.
    EVERY = 64

    def __init__(self, device: torch.device) -> None:
        #: Loss of the step that is being computed.
        self.loss = torch.zeros((), device=device)
        #: Whether a step was not finite: 0 or 1, as optimizers of torch take it.
        self.found_inf = torch.zeros((), device=device)
        self._finite_steps = torch.zeros((), device=device)
        self._bad_loss = torch.zeros((), device=device)
        self._rows: list[Tensor] = []
        self._taken: list[tuple[int, list[Tensor]]] = []

    def add(self, rows: Tensor) -> None:
        """Add the rows of a part of a step: their positions in the training split."""
        self._rows.append(rows)

    def end_step(self, step: int) -> None:
        """Note that a step, counted from 1, has all its parts."""
        self._taken.append((step, self._rows))
        self._rows = []

    def update(self, norm: Tensor) -> None:
        """Record on the device whether the step is finite.

        Args:
            norm: Of its gradient, ().
        """
        bad = ~(self.loss.isfinite() & norm.isfinite())
        first = bad & (self.found_inf == 0)
        self._bad_loss.copy_(torch.where(first, self.loss, self._bad_loss))
        self.found_inf.copy_(torch.maximum(self.found_inf, bad.float()))
        self._finite_steps += 1 - self.found_inf
        self.loss.zero_()

    @property
    def due(self) -> bool:
        """Whether it is time to check."""
        return len(self._taken) >= self.EVERY

    def check(self) -> None:
        """Wait for the steps so far and check them.

        Raises:
            NotFiniteError: One of them was not finite; it and those after it were not done.
        """
        if not self._taken:
            return
        taken, self._taken = self._taken, []
        found, finite, loss = torch.stack([self.found_inf, self._finite_steps, self._bad_loss]).tolist()
        self._finite_steps.zero_()
        if found:
            step, rows = taken[int(finite)]
            what = "gradient" if math.isfinite(loss) else "loss"
            raise NotFiniteError(what, f"{loss:g}", step, torch.cat(rows).tolist())


def stepped(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_whole_steps(trainer: Trainer) -> None:
    """Refuses a limit on training batches that cuts the last step of an epoch, whose parts would count too little.

    Raises:
        UserError: ``trainer.limit_train_batches`` is no multiple of ``accumulate_grad_batches``.
    """
    batches, parts, loader = trainer.num_training_batches, trainer.accumulate_grad_batches, trainer.train_dataloader
    if batches % parts and loader is not None and batches < len(loader):
        raise UserError(
            f"trainer.limit_train_batches: {batches} batches are no whole number of steps of {parts} "
            "(trainer.accumulate_grad_batches); give a multiple"
        )


def compute_largest_batch(module: Any) -> None:
    """Computes the gradients of the epoch's largest batch once and forgets them.

    If it does not fit, that is known before anything is learnt; and memory is laid out by it: where batches grow one
    after the other, freed pieces are too small for the next (a fifth more, without a GPU).
    """
    trainer: Any = module.trainer
    loader = trainer.train_dataloader
    if not isinstance(loader, ResumableLoader):
        return
    data: Any = loader.dataset
    loader.batch_sampler.set_epoch(trainer.current_epoch)  # as Lightning does, but later
    trained = [p for p in module.parameters() if p.requires_grad]
    largest = loader.batch_sampler.largest()
    # Two rows first: what is made once and stays must not lie between what comes and goes.
    for rows in (largest[:2], largest):
        batch = trainer.strategy.batch_to_device(data.__getitems__(rows))
        with trainer.precision_plugin.forward_context():
            logits = module.document_logits(batch)
            loss = plain_loss(logits, batch["labels"].to(logits.device), module.task)
        torch.autograd.grad(loss, trained, allow_unused=True)
