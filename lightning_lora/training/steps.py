"""How an optimizer step is run: its random numbers, its guard, captured as CUDA graphs or plainly."""

import contextlib
import sys
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lightning_lora import processes
from lightning_lora.errors import UserError
from lightning_lora.models.methods import AdaptedModel
from lightning_lora.models.packed import deterministic_as_before
from lightning_lora.models.speedups import Speedups
from lightning_lora.seeding import stream_seed
from lightning_lora.training.evaluation_steps import EvaluationSteps
from lightning_lora.training.graphs import CannotCaptureError, GraphedSteps, why_not_captured
from lightning_lora.training.guard import NotFiniteError, StepGuard, stepped
from lightning_lora.training.optim import AdamW
from lightning_lora.training.packed_batches import PackedBatches

#: On a GPU the loss of every so many batches is logged.
SHOW_EVERY = 10


class StepRunner(EvaluationSteps):
    """Run the optimizer steps of ``TextClassifier``, which defines what a step computes."""

    tuned: AdaptedModel
    packed_batches: PackedBatches
    speedups: Speedups
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.step_guard = StepGuard()
        #: Whether training itself has started, and with it its first step; a search for a learning rate comes before.
        self.fit_started = self.step_started = False
        #: The captured steps of this training, or why steps are not captured.
        self.graphs: GraphedSteps | None = None
        self.not_captured: str | None = None
        #: Whether it stays on its device when a pass is over.
        self.stays_on_device = False
        #: The loss in the progress bar on a GPU.
        self._shown: Tensor | None = None

    def cpu(self) -> Self:
        """Moves to the CPU, which Lightning (2.6.6) has it do after each pass, but for a loaded run."""
        return self if self.stays_on_device else super().cpu()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Starts dropout's random stream of this batch: a resumed run draws what it would have drawn."""
        self.step_started = self.fit_started
        self.seed_step()

    def seed_step(self) -> None:
        """Starts dropout's random stream of the current batch."""
        rank = f"/{self.trainer.global_rank}" if self.trainer.global_rank else ""
        seed = stream_seed(self.seed, f"dropout/{self.trainer.fit_loop.total_batch_idx}{rank}")
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":  # torch.manual_seed asks every kind of device, which takes 3 ms
            torch.cuda.default_generators[self.device.index].manual_seed(seed)
        elif self.device.type != "cpu":
            torch.manual_seed(seed)

    def show_loss(self, loss: Tensor, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the loss; on a GPU of every ``SHOW_EVERY`` batches, and to the progress bar as it was then."""
        on_gpu = self.device.type == "cuda"
        if on_gpu and (batch_idx + 1) % SHOW_EVERY:
            return
        # Lightning's own sync_dist has all processes wait for each other before each number.
        shown = processes.mean(loss.detach() * batch["micro_batch_weight"])
        common: dict[str, Any] = {"batch_size": len(batch["rows"])}
        # What is in the progress bar Lightning (2.6.6) takes to the CPU in each step, and waits for the GPU.
        self.log("train/loss_step", shown, prog_bar=not on_gpu, **common)
        if on_gpu:
            if self._shown is None:
                self._shown = shown.to("cpu").pin_memory()
            self.log("loss", self._shown, prog_bar=True, logger=False, **common)
            self._shown.copy_(shown, non_blocking=True)

    def captured_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Computes the loss and the gradients by a captured pass; None where steps are not captured."""
        if self.graphs is None:
            return None
        try:
            loss, _ = self.graphs.take(batch)
        except CannotCaptureError as error:
            self.not_captured = str(error)
            print(f"warning: training steps are not captured as CUDA graphs: {error}", file=sys.stderr, flush=True)
            self.graphs.close()
            self.graphs = None
            return None
        self.graphs.guard.add(batch["rows"])
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Computes the gradients, where ``training_step`` has not."""
        if self.graphs is None:
            with deterministic_as_before():
                super().backward(loss, *args, **kwargs)

    def on_validation_model_zero_grad(self) -> None:
        """Frees gradients for a validation pass, where captured steps do not know their addresses."""
        if self.graphs is None:
            super().on_validation_model_zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Sets gradients to none, where a captured step does not set them to zero."""
        if self.graphs is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stops before a step that would corrupt the weights.

        Raises:
            NotFiniteError: The loss or the gradient of the step is not finite.
        """
        if self.graphs is not None:
            if self.graphs.guard.due:  # the steps before this one, which is checked when it is done
                self.graphs.guard.check()
            self.graphs.guard.end_step(self.trainer.global_step + 1)
            return
        # A search for a learning rate goes up to rates at which the weights are lost; they are restored after it.
        with contextlib.nullcontext() if self.fit_started else contextlib.suppress(NotFiniteError):
            # A scaler of the loss meets infinite gradients, and leaves them out.
            self.step_guard.check(optimizer, self.trainer.global_step + 1, gradients=not self.scales_loss)

    @property
    def scales_loss(self) -> bool:
        """Whether Lightning multiplies the loss, so that small gradients are not lost in float16."""
        return str(self.trainer.precision) == "16-mixed"

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips as Lightning does, which refuses it to a fused optimizer even where no loss is scaled (2.6.6)."""
        if self.graphs is not None:  # a captured step does
            return
        if self.scales_loss or not gradient_clip_val or gradient_clip_val < 0:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(stepped(optimizer), gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(stepped(optimizer), gradient_clip_val, self.step_guard.gradient_norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Steps, and lets the method do what it does after a step."""
        if not self.fit_started:  # a search for a learning rate gives all groups of weights the same
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_factor", 1.0)
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        if self.tuned.steps is not None:
            self.tuned.steps.after_step(self.trainer.global_step + 1)

    def wait_for_steps(self) -> None:
        """Waits for captured steps, one of which may not have been finite."""
        if self.graphs is not None:
            self.graphs.guard.check()

    def start_graphs(self) -> None:
        """Gets ready to capture steps, where that is possible.

        Raises:
            UserError: It was asked for and is not possible.
        """
        asked, optimizers = self.speedups.cuda_graphs, self.trainer.optimizers
        self.not_captured = why_not_captured(self, optimizers) if asked else "model.speedups.cuda_graphs is off"
        if asked is True and self.not_captured is not None:
            raise UserError(f"model.speedups.cuda_graphs: {self.not_captured}; leave it out")
        self.graphs = None
        if self.not_captured is None and self.fit_started:
            self.graphs = GraphedSteps(self, cast(AdamW, optimizers[0]))

    def how_steps_ran(self) -> dict[str, str]:
        """Whether steps were captured, or why not, and what else was not used, for the run record."""
        steps = "captured as CUDA graphs" if self.not_captured is None else f"plain: {self.not_captured}"
        return {"steps": steps, **self.packed_batches.not_used}

    def on_train_end(self) -> None:
        """Waits for captured steps."""
        self.wait_for_steps()

    def teardown(self, stage: str) -> None:
        """Gives back what captured steps hold."""
        if self.graphs is not None:
            self.graphs.close()
            for parameter in self.graphs.parameters:
                parameter.grad = None
            self.graphs = None
