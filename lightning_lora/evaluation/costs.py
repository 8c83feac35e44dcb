"""What a run costs: time, tokens, memory, parameters."""

import sys
import time
from typing import Any

import psutil
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_lora import processes


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count the trainable parameters, and all that the model is made of.

    PEFT keeps an untouched copy of each module that it saves whole (the head); these copies are not part
    of the model and not counted. Weights of 4 bits are counted as the weights that they stand for.
    """
    counted = {n: p for n, p in model.named_parameters() if ".original_module." not in n}
    return {
        "trainable_params": sum(p.numel() for p in counted.values() if p.requires_grad),
        "total_params": sum(_weights(p) for p in counted.values()),
    }


def _weights(parameter: nn.Parameter) -> int:
    # bitsandbytes packs 4-bit weights into a tensor of bytes (Params4bit), two in each.
    packed = 2 * parameter.itemsize if type(parameter).__name__ == "Params4bit" else 1
    return parameter.numel() * packed


def peak_memory_mb() -> dict[str, float]:
    """Return the process's peak resident memory so far, and that of a CUDA device in use, in MiB."""
    peaks: dict[str, float] = {}
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["peak_memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    if torch.cuda.is_initialized():
        peaks["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


class CostMeter(Callback):
    """Counts seconds and tokens of training apart from validation, without synchronizing the device."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.train_tokens = 0
        self.train_rows = 0
        #: Of this process, since the counts of all were last added up.
        self._own_tokens = 0
        self._own_rows = 0
        self.startup_s: float | None = None
        self._mark = 0.0
        self._training = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock with the first step; what comes before is the startup."""
        if not self._training:
            self._mark, self._training = time.perf_counter(), True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what the batch held."""
        if self.startup_s is None:
            self.startup_s = time.time() - psutil.Process().create_time()
        if batch["step_weight"]:
            self._own_tokens += batch["num_tokens"]
            self._own_rows += len(batch["rows"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        if not trainer.sanity_checking:
            self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again, where a step was done before."""
        self._mark, self._training = time.perf_counter(), trainer.state.fn == "fit" and self.startup_s is not None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()
        self._add()

    def _stop(self) -> None:
        if self._training:
            self.train_s += time.perf_counter() - self._mark
            self._training = False

    def _add(self) -> None:
        """Add what all processes have counted."""
        tokens, rows = processes.total(self._own_tokens, self._own_rows)
        self.train_tokens += int(tokens)
        self.train_rows += int(rows)
        self._own_tokens = self._own_rows = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted until now."""
        self._add()
        seconds = self.train_s + time.perf_counter() - self._mark if self._training else self.train_s
        return {**self._counted(), "train_s": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a saved state."""
        vars(self).update(state_dict)

    def _counted(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("train_s", "train_tokens", "train_rows", "startup_s")}

    def costs(self) -> dict[str, float]:
        """Return seconds of training, tokens (without padding) and rows, their rates, and seconds to the first step."""
        costs = {name: value for name, value in self._counted().items() if value is not None}
        if self.train_s > 0:
            if self.train_tokens:
                costs["train_tokens_per_s"] = self.train_tokens / self.train_s
            costs["train_rows_per_s"] = self.train_rows / self.train_s
        return costs
