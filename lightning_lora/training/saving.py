"""Saves the state of training (so often that little is lost, so seldom that it costs little) and the best weights."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_lora import processes
from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import METRICS, MONITORED
from lightning_lora.interrupts import StopRequest
from lightning_lora.runs.checkpoints import ResumePoints, read_checkpoint
from lightning_lora.runs.folder import RunFolder
from lightning_lora.tasks import Task

#: Saving may take this share of the time of training.
SHARE = 0.01


class StateSaver(Checkpoint):
    """Saves between steps and at the end; ends training between steps when that was asked for.

    Between steps means before the next batch is taken: all of the step before is done then, also what it logs, which
    no hook of Lightning's comes after. Never between the parts of an accumulated step, whose gradients no checkpoint
    holds, and neither at the beginning of an epoch nor right after a validation pass, from where Lightning (2.6.6) does
    not continue as it would have: the steps before and after are saved instead.

    Args:
        points: Where the states lie.
        request: What asks training to stop.
    """

    def __init__(self, points: ResumePoints, request: StopRequest) -> None:
        self.points = points
        self.request = request
        #: The metrics when the state was saved.
        self.metrics: dict[str, float] = {}
        self._first = True
        self._saved_at = 0.0
        self._took = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume with the batches that are left of the epoch; from here on signals wait for the end of a step."""
        self._first = True
        loader: Any = trainer.train_dataloader
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.ready == epochs.processed:  # with max_steps Lightning (2.6.6) resumes within an epoch that has ended
            trainer.fit_loop.epoch_loop.restarting = False
        loader.before_batch = partial(self._between_batches, trainer)
        self.request.install()
        self.request.deferred = True

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop within a validation pass where that was asked for; it is run again from the state before it."""
        self._grant()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the next chance, as the pass may have taken long."""
        self._saved_at = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state."""
        self.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let signals end the run at once from here on."""
        self.request.deferred = False

    def _between_batches(self, trainer: Trainer, taken: int) -> None:
        """Save where it is due or the last chance before a validation pass, and stop where that was asked for."""
        steps = trainer.accumulate_grad_batches
        if taken % steps:
            return
        first, self._first = self._first, False  # nothing is new yet
        if taken and not first and not validates_within(trainer, taken - steps):
            due = trainer.is_global_zero and time.perf_counter() - self._saved_at >= self._took / SHARE
            save, asked = processes.all_reduce_max(due, self.request.number or 0)
            if save or asked or validates_within(trainer, taken):
                self.save(trainer)
            self.request.deliver(int(asked))
        else:
            self._grant()

    def _grant(self) -> None:
        """End the run if one of its processes was asked to, in all of them."""
        (asked,) = processes.all_reduce_max(self.request.number or 0)
        self.request.deliver(int(asked))

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics, for a run that was killed behind its last step."""
        return {"metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.metrics = state_dict["metrics"]

    def save(self, trainer: Trainer) -> None:
        """Save the state; the newest before it becomes the one before."""
        started = time.perf_counter()
        for logger in trainer.loggers:  # what was logged until here is not logged again
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
            elif isinstance(logger, CSVLogger):
                logger.save()
        # What was logged before an interruption is no longer there.
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.save_checkpoint(self.points.next)
        if trainer.is_global_zero:
            self.points.rotate()
        self._saved_at = time.perf_counter()
        self._took = self._saved_at - started


def validates_within(trainer: Trainer, taken: int) -> bool:
    """Whether the epoch ends or a validation pass begins with the next step, after so many batches of the epoch."""
    following = taken + trainer.accumulate_grad_batches
    if following >= trainer.num_training_batches:
        return True
    every = trainer.val_check_batch
    if not isinstance(every, int):
        return False
    # Without check_val_every_n_epoch the interval counts through all epochs.
    progress = trainer.fit_loop.epoch_loop.batch_progress
    before = 0 if trainer.check_val_every_n_epoch is not None else progress.total.ready - progress.current.ready
    return (before + following) // every > (before + taken) // every


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best weights so far, and of equally good ones the latest, which have learnt from more.

    On few validation rows a metric takes few values, so that ties are common. A class of its own, so that its state
    cannot be taken for that of a checkpoint callback in a config.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether to keep the weights that have this value, in all processes alike."""
        if not getattr(trainer.lightning_module, "weights_settled", True):
            return False
        if super().check_monitor_top_k(trainer, current):
            return True
        tied = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return trainer.strategy.reduce_boolean_decision(tied)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep comparing with the best so far, also where the run's folder has been moved."""
        here = self.dirpath or ""
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if state_dict.get(key):
                state_dict[key] = str(Path(here) / Path(state_dict[key]).name)
        best = {str(Path(here) / Path(path).name): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, "dirpath": self.dirpath, "best_k_models": best})


def monitored(task: Task) -> dict[str, Any]:
    """Return by what the best checkpoint is chosen, on validation rows, as callbacks take it: monitor and mode."""
    name = MONITORED[task]
    return {"monitor": f"val/{name}", "mode": "max" if METRICS[name].higher_is_better else "min"}


def best_checkpoint(folder: RunFolder, task: Task = "single_label") -> BestCheckpoint:
    """Return what keeps the best weights on validation; the last state is kept by ``StateSaver``.

    It saves at the end of a validation pass. At that of an epoch, as by Lightning's default, weights that were trained
    since would have the metrics of the pass before, where ``max_steps`` ends the epoch early.
    """
    where: dict[str, Any] = {"dirpath": folder.checkpoints, "filename": "best", "enable_version_counter": False}
    return BestCheckpoint(**monitored(task), save_weights_only=True, save_on_train_epoch_end=False, **where)


def place_checkpoints(callbacks: Iterable[Callback], folder: RunFolder) -> None:
    """Give checkpoint callbacks of a config a folder of their own in the run.

    Raises:
        UserError: One of them names that of the run's own checkpoints.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = callback.dirpath or str(folder.path / "model_checkpoints")
            if Path(callback.dirpath).resolve() == folder.checkpoints.resolve():
                raise UserError(
                    f"trainer.callbacks: ModelCheckpoint: {callback.dirpath} holds the run's own; leave "
                    "dirpath out, or name another folder"
                )


def describe_best(folder: RunFolder, task: Task = "single_label") -> dict[str, Any] | None:
    """Return where in training the best checkpoint is from, and its validation metrics; None without one."""
    path = folder.checkpoints / "best.ckpt"
    if not path.is_file():
        return None
    checkpoint = read_checkpoint(path)
    metrics = checkpoint.get("metrics", {})
    epoch = int(checkpoint["epoch"]) + 1 if checkpoint["global_step"] else 0
    name, step = monitored(task)["monitor"], int(checkpoint["global_step"])
    found = {"monitor": name, "value": metrics.get(name), "epoch": epoch, "step": step, "metrics": metrics}
    temperature = checkpoint["state_dict"].get("temperature")
    return found if temperature is None else {**found, "temperature": temperature.item()}
