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
    """Trainable parameters, and all that the model is made of.

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
    """The process's peak resident memory so far, and the peak of each CUDA device in use, in MiB."""
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


class PassClock(Callback):
    """Seconds of an evaluation from its first batch to its metrics; what others do with them comes after it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    @classmethod
    def on(cls, trainer: Any) -> "PassClock":
        """A clock before all other callbacks of the trainer."""
        clock = cls()
        trainer.callbacks.insert(0, clock)
        return clock

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops it."""
        self.seconds = time.perf_counter() - self._started

    on_validation_start, on_validation_end = on_test_start, on_test_end


class CostMeter(Callback):
    """Counts seconds and tokens of training apart from validation, without asking the device."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.train_tokens = 0
        self.train_rows = 0
        #: Of this process, since the others were last asked.
        self._own_tokens = 0
        self._own_rows = 0
        self.startup_s: float | None = None
        self._mark = 0.0
        self._training = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock with the first step; what comes before is the start."""
        if not self._training:
            self._mark, self._training = time.perf_counter(), True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts what the batch held."""
        if self.startup_s is None:
            self.startup_s = time.time() - psutil.Process().create_time()
        if batch["share"]:
            self._own_tokens += batch["num_tokens"]
            self._own_rows += len(batch["rows"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock while validating."""
        if self._training and not trainer.sanity_checking:
            self.train_s += time.perf_counter() - self._mark
            self._training = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on, where a step was done before."""
        self._mark, self._training = time.perf_counter(), trainer.state.fn == "fit" and self.startup_s is not None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        if self._training:
            self.train_s += time.perf_counter() - self._mark
            self._training = False
        self._add()

    def _add(self) -> None:
        """Adds what all processes have counted."""
        tokens, rows = processes.total(self._own_tokens, self._own_rows)
        self.train_tokens += int(tokens)
        self.train_rows += int(rows)
        self._own_tokens = self._own_rows = 0

    def state_dict(self) -> dict[str, Any]:
        """What was counted until now."""
        self._add()
        seconds = self.train_s + time.perf_counter() - self._mark if self._training else self.train_s
        counted = {"train_tokens": self.train_tokens, "train_rows": self.train_rows, "startup_s": self.startup_s}
        return {"train_s": seconds, **counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where a state was saved."""
        vars(self).update(state_dict)

    def costs(self) -> dict[str, float]:
        """Seconds of training, tokens (padding not counted) and rows, their rates, and seconds to the first step."""
        costs: dict[str, float] = {
            "train_s": self.train_s,
            "train_tokens": self.train_tokens,
            "train_rows": self.train_rows,
        }
        if self.startup_s is not None:
            costs["startup_s"] = self.startup_s
        if self.train_s > 0:
            costs["train_tokens_per_s"] = self.train_tokens / self.train_s
            costs["train_rows_per_s"] = self.train_rows / self.train_s
        return costs
