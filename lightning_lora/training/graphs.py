"""Training steps as CUDA graphs: forward, backward and optimizer are captured once a shape, and replayed after.

A step of an encoder is over a thousand kernels, which a CPU launches one by one; with small batches a GPU waits for it.
A graph launches them as one. What is captured is the same computation on static tensors, so the result is the same.
"""

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_lora.data.packing import PackedShape, empty, unpack
from lightning_lora.errors import first_line
from lightning_lora.models.packed import compile_attention, deterministic_as_before
from lightning_lora.training.capture import callback_is_ours, capture, ours
from lightning_lora.training.guard import DeferredGuard
from lightning_lora.training.optim import AdamW

#: Callbacks that replace parameters, whose addresses a graph knows, or change which of them are trained.
CHANGE_PARAMETERS = (BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging)
#: Methods of the module whose work a captured step does.
STEP_HOOKS = (
    "training_step",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
)
#: Others, in which code may change what a captured step has frozen.
OTHER_HOOKS = (
    "configure_optimizers",
    "lr_scheduler_step",
    "on_after_backward",
    "on_before_backward",
    "on_before_zero_grad",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
)
#: Largest relative difference, of the loss and of the gradient's norm, between a captured step and a plain one.
GRAPH_TOLERANCE = 1e-3


class CannotCaptureError(RuntimeError):
    """A step cannot be captured, or gives something else than a plain one."""


@dataclass
class CapturedPass:
    """A captured forward and backward pass.

    Args:
        flat: What goes in.
        run: Runs it.
        out: What comes out: the loss, (), and logits (B, C).
    """

    flat: Tensor
    run: Callable[[], None]
    out: list[Tensor]


class GraphedSteps:
    """Runs the steps of a training, captured or, for batches of a shape of their own, as they are.

    Gradients are summed into tensors that keep their addresses, which a captured optimizer step clips, applies and sets
    to zero.

    Args:
        module: A ``TextClassifier`` that trains on packed batches.
        optimizer: Its optimizer.
    """

    def __init__(self, module: Any, optimizer: AdamW) -> None:
        self.module = module
        self.optimizer = optimizer
        self.device: torch.device = module.device
        self.guard = DeferredGuard(self.device)
        self.passes: dict[tuple[PackedShape, int], CapturedPass] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.gradients = [p.grad for p in self.parameters]
        self.proven = False

    def close(self) -> None:
        """Give training back to plain steps; what the parts of a step before have added stays in the gradients."""
        self.optimizer.release()
        self.passes.clear()

    def take(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Run the forward and backward pass of a batch and count it.

        Args:
            batch: A packed batch on the device.

        Returns:
            The mean loss, (), and logits of all texts that there is room for, (B, C); the next batch overwrites both.

        Raises:
            CannotCaptureError: On the first batch, if a step cannot be captured.
        """
        flat, shape, parts = batch["packed"], batch["shape"], self.module.trainer.accumulate_grad_batches
        if (reason := self.module.packed_batches.checked(batch)) is not None:
            raise CannotCaptureError(reason)
        if not self.proven:
            self._prove(batch, parts)
        count = len(batch["rows"])
        if not batch["static"] or (self.module.own_criterion and count < shape.texts):
            return self._pass(flat, shape, parts, count)
        captured = self._captured_pass(shape, parts)
        captured.flat.copy_(flat)
        captured.run()
        return captured.out[0], captured.out[1]

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture what a function launches, without running it; return what runs it.

        Args:
            function: Works on tensors that keep their addresses.
        """
        return capture(function, self.pool, self.device)

    def _pass(self, flat: Tensor, shape: PackedShape, parts: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Forward and backward pass; adds to the gradients and to the epoch's metrics."""
        module, views = self.module, unpack(flat, shape)
        logits = module.packed_batches.all_logits(views, shape)[:count]
        loss = module.packed_loss(logits, views.labels[:count], views.count)
        scaled = loss * (views.scale / parts).float()
        with torch.autocast(self.device.type, enabled=False), deterministic_as_before():
            found = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        used = [(own, new) for own, new in zip(self.gradients, found, strict=True) if new is not None]
        with torch.no_grad():
            torch._foreach_add_([own for own, _ in used], [new for _, new in used])
            there = views.count * (views.scale != 0)  # a row that is only there because none was left counts nothing
            module.train_counter.count(logits, views.labels[:count], loss, there)
            self.guard.loss += scaled.detach()
        return loss.detach(), logits.detach()

    def _capture_pass(self, shape: PackedShape, parts: int) -> CapturedPass:
        static, out = torch.from_numpy(empty(shape)).to(self.device), list[Tensor]()

        def function() -> None:
            out[:] = self._pass(static, shape, parts)

        return CapturedPass(static, self.capture(function), out)

    def _prove(self, batch: dict[str, Any], parts: int) -> None:
        """Capture everything before the first batch; on the first static one compare captured with plain."""
        # An error of the compiler is met again where the kernels are used.
        wait(compile_attention(self.module.model, [shape.longest for shape in self._shapes]))
        kept = [*self.gradients, *self.module.train_counter.buffers(), self.guard.loss]
        values = [tensor.clone() for tensor in kept]

        def forget() -> None:
            for tensor, value in zip(kept, values, strict=True):
                tensor.copy_(value)
            self.module.seed_step()

        try:
            if not self.passes:
                self._capture_all(batch, parts)
                forget()
                self._capture_optimizer()
            if batch["static"]:
                self._compare(batch, parts, forget)
                self.proven = True
        except Exception as error:  # of kernels, of the capture, of what a loss does in it
            raise CannotCaptureError(first_line(error, 160)) from error
        finally:
            forget()

    @property
    def _shapes(self) -> tuple[PackedShape, ...]:
        """The static shapes of the batches, ascending."""
        return self.module.trainer.train_dataloader.dataset.packing

    def _capture_all(self, batch: dict[str, Any], parts: int) -> None:
        compiled = set()
        # Largest first: a smaller one finds its memory in that of a larger one.
        for each in reversed(self._shapes):
            if each.longest not in compiled:  # kernels for texts of that length are compiled before they are captured
                self._pass(torch.from_numpy(empty(each)).to(self.device), each, parts)
                compiled.add(each.longest)
            self.passes[each, parts] = self._capture_pass(each, parts)

    def _compare(self, batch: dict[str, Any], parts: int, forget: Callable[[], None]) -> None:
        flat, shape = batch["packed"], batch["shape"]
        forget()
        plain, _ = self._pass(flat, shape, parts)
        wanted = (plain.clone(), [gradient.clone() for gradient in self.gradients])
        forget()
        captured = self._captured_pass(shape, parts)
        captured.flat.copy_(flat)
        captured.run()
        difference = relative_difference((captured.out[0], self.gradients), wanted)
        if not difference <= GRAPH_TOLERANCE:
            raise CannotCaptureError(f"a captured step differs from a plain one by {difference:.1e}")

    def _captured_pass(self, shape: PackedShape, parts: int) -> CapturedPass:
        if (shape, parts) not in self.passes:  # accumulation that changes between epochs
            self.passes[shape, parts] = self._capture_pass(shape, parts)
        return self.passes[shape, parts]

    def _capture_optimizer(self) -> None:
        trainer = self.module.trainer
        clip, by = trainer.gradient_clip_val, trainer.gradient_clip_algorithm

        def step() -> None:
            norm = nn.utils.get_total_norm(self.gradients)
            self.guard.update(norm)
            if clip and clip > 0 and by == "value":
                nn.utils.clip_grad_value_(self.parameters, clip)
            elif clip and clip > 0:
                nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
            self.optimizer.apply()
            torch._foreach_zero_(self.gradients)

        self.optimizer.capture(step, self.guard.found_inf, self.capture)


def relative_difference(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> float:
    """Return the larger relative difference of two losses, and of two gradients in their norm; NaN if one is NaN.

    Args:
        found: A loss, (), and its gradients.
        wanted: The same of another pass.
    """
    losses = (found[0] - wanted[0]).abs() / wanted[0].abs().clamp(min=1e-3)
    apart = nn.utils.get_total_norm([a - b for a, b in zip(found[1], wanted[1], strict=True)])
    gradients = apart / nn.utils.get_total_norm(wanted[1]).clamp(min=1e-12)
    return float(torch.stack([losses.float(), gradients.float()]).amax())


def why_not_captured(module: Any, optimizers: list[Any]) -> str | None:
    """Say why the steps of a run cannot be captured; None where they may."""
    trainer = module.trainer
    if getattr(getattr(trainer.train_dataloader, "dataset", None), "packing", None) is None:
        return "batches are padded, and their shapes vary"
    if module.device.type != "cuda":
        return f"the device is {module.device.type}"
    if trainer.world_size > 1:
        return "several devices add up their gradients between the passes"
    if module.scales_loss:
        return "float16 scales the loss by a factor that depends on the steps before"
    if module.quantization.bits == 8:
        return "bitsandbytes looks for outliers on the CPU in each product of 8 bits"
    if module.tuned.steps is not None:
        return f"{module.hparams['method']} changes ranks between steps"
    if len(optimizers) != 1 or not isinstance(optimizers[0], AdamW) or not optimizers[0].defaults["fused"]:
        return "the optimizer is not the project's AdamW"
    if changing := [type(c).__name__ for c in trainer.callbacks if isinstance(c, CHANGE_PARAMETERS)]:
        return f"{changing[0]} replaces or freezes parameters"
    return what_python_does(module)


def what_python_does(module: Any) -> str | None:
    """Say what code outside this package does in a step that a capture would leave out or freeze, if there is any."""
    if hooks := [name for name in STEP_HOOKS if not ours(getattr(type(module), name))]:
        return f"{hooks[0]} is overridden"
    own = [f"a callback of your own ({type(c).__name__})" for c in module.trainer.callbacks if not callback_is_ours(c)]
    own += [f"{name} of your own" for name in OTHER_HOOKS if not ours(getattr(type(module), name), "lightning.")]
    own += ["a loss of your own"] if module.own_criterion else []
    if own and module.speedups.cuda_graphs is not True:
        return f"{own[0]} may change what a capture freezes; model.speedups.cuda_graphs: true captures all the same"
    return None
