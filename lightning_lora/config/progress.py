"""How far a run is and how long it will take, on standard error: standard output is for results."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_lora.evaluation.metric_table import SHOWN
from lightning_lora.processes import is_rank_zero
from lightning_lora.units import duration


class Progress(RichProgressBar):
    """Rich progress bars with time left."""

    def __init__(self) -> None:
        # By default a thread draws it 100 times a second, for which steps on a CPU wait (5% of their time).
        super().__init__(refresh_rate=4, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics beside the bar, by short names, which a narrow terminal has room for."""
        short = {
            "train/loss_step": "loss",
            **{f"{s}/{names[0]}": s for s in ("val", "test") for names in SHOWN.values()},
        }
        metrics = super().get_metrics(trainer, pl_module)
        return {short.get(name, name): value for name, value in metrics.items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        """Count epochs from one, as all else here does; Lightning's are from zero, and up to -2 with max_steps."""
        most = self.trainer.max_epochs
        told = f"Epoch {current_epoch + 1}" + (f" of {most}" if most is not None and most > 0 else "")
        return told.ljust(len(self.validation_description))


class ProgressLines(Callback):
    """A line with the time left every half a minute: where there is no terminal, a bar is drawn at its end alone."""

    #: Seconds between two lines.
    EVERY_S = 30.0

    def __init__(self) -> None:
        self._started = self._told = 0.0
        self._before = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock; steps of before a resumption are not counted."""
        self._start(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Tells the steps."""
        self._tell(trainer.global_step, "step", lambda: trainer.estimated_stepping_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, where nothing is trained."""
        if trainer.state.fn != "fit":
            self._start(0)

    def on_validation_batch_end(self, trainer: Trainer, *given: Any) -> None:
        """Tells the batches, where nothing is trained."""
        if trainer.state.fn != "fit":
            self._tell(given[3] + 1, "batch", lambda: sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start(0)

    def on_test_batch_end(self, trainer: Trainer, *given: Any) -> None:
        """Tells the batches."""
        self._tell(given[3] + 1, "batch", lambda: sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start(0)

    def on_predict_batch_end(self, trainer: Trainer, *given: Any) -> None:
        """Tells the batches."""
        self._tell(given[3] + 1, "batch", lambda: sum(trainer.num_predict_batches))

    def _start(self, before: int) -> None:
        self._started = self._told = time.monotonic()
        self._before = before

    def _tell(self, done: int, unit: str, count: Callable[[], float]) -> None:
        now = time.monotonic()
        if now - self._told < self.EVERY_S or done <= self._before or not is_rank_zero():
            return
        self._told, spent, total = now, now - self._started, count()
        line = f"{unit} {done:,}"
        if math.isfinite(total):
            left = spent / (done - self._before) * (total - done)
            line += f" of {int(total):,}, about {duration(left)} left"
        print(line, file=sys.stderr, flush=True)
