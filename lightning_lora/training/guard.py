"""What is looked at before an optimizer step: one that would spoil the weights is not done."""

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import processes
from lightning_lora.data.batching import ResumableLoader
from lightning_lora.errors import UserError


class NotFiniteError(UserError):
    """A step would have made the weights useless; it was not done.

    Args:
        what: What was not finite: "loss" or "gradient".
        said: The losses of the step, in words.
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
        """Takes in a part.

        Args:
            loss: Its loss.
            rows: Positions of its rows in the training split.
        """
        self.losses.append(loss.detach())
        self.rows.append(rows)

    def check(self, optimizer: torch.optim.Optimizer, step: int, gradients: bool) -> None:
        """Stops before a step that would spoil the weights; all processes stop, or none.

        Args:
            optimizer: Which is to do it.
            step: Its number, counted from 1.
            gradients: Whether these are looked at too, or something else meets infinite ones.

        Raises:
            NotFiniteError: The loss or the gradient of the step is not finite.
        """
        losses, rows = torch.stack(self.losses), torch.cat(self.rows)
        self.losses, self.rows = [], []
        checked = {"loss": losses}
        if gradients:
            self.gradient_norm = nn.utils.get_total_norm([p.grad for p in stepped(optimizer) if p.grad is not None])
            checked["gradient"] = self.gradient_norm
        finite = torch.stack([values.isfinite().all() for values in checked.values()])
        spoilt = processes.agreed(*(~finite).tolist())
        if not any(spoilt):
            return
        what = next(name for name, bad in zip(checked, spoilt, strict=True) if bad)
        parts = processes.gathered((losses.tolist(), rows.cpu().tolist()))
        said = ", ".join(f"{loss:g}" for part, _ in parts for loss in part)
        raise NotFiniteError(what, said, step, [row for _, part in parts for row in part])


def stepped(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_whole_steps(trainer: Trainer) -> None:
    """Refuses a limit on training batches that cuts the last step of an epoch, whose parts would count too little.

    Raises:
        UserError: It does.
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
    # One row first: what is made once and stays must not lie between what comes and goes.
    for rows in (largest[:1], largest):
        batch = trainer.strategy.batch_to_device(data.__getitems__(rows))
        with trainer.precision_plugin.forward_context():
            loss = F.cross_entropy(module.document_logits(batch), batch["labels"])
        torch.autograd.grad(loss, trained, allow_unused=True)
