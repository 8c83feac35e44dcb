"""How long a run trains where that is left open: its rows set the number of epochs, validation may stop it earlier.

What a model has learnt depends on the number of optimizer steps, and few rows make few steps an epoch. So there are as
many epochs as ``enough_steps`` take, at least one; and as few rows that are seen often may be learnt by heart,
validation says when to stop and which weights to keep (``training/saving.py``).
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lightning_lora.data.batching import batches_per_epoch
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.models.methods import find_method
from lightning_lora.tasks import Task
from lightning_lora.training.saving import monitored
from lightning_lora.units import duration

#: Optimizer steps that a run gets at least (docs/LOG.md: on 64 to 2,500 rows 150 are as good, and 600 no better).
ENOUGH_STEPS = 300
#: And for each class or label: rare ones of many are not learnt in fewer (docs/LOG.md: 42 classes).
STEPS_A_CLASS = 16
#: A run of so many epochs or more is validated at least so many times, and less than twice as many.
VALIDATIONS = 10
#: Validation passes in a row without a better value of the metric that is ``monitored`` after which training stops.
PATIENCE = 4
#: With fewer validation rows that metric is too coarse to stop by.
ROWS_TO_STOP_BY = 100


@dataclass(frozen=True)
class TrainingLength:
    """How long a run trains, and when it validates.

    Args:
        epochs: At most.
        check_every: Validation passes come after so many epochs each; None where typed settings say when.
        patience: Validation passes in a row without a better value that stop training; None where none do.
        task: What is predicted, which says what is monitored.
    """

    epochs: int
    check_every: int | None
    patience: int | None
    task: Task = "single_label"

    @property
    def settings(self) -> dict[str, Any]:
        """The trainer's settings that say so, but for its callbacks."""
        found: dict[str, Any] = {"max_epochs": self.epochs}
        return found if self.check_every is None else {**found, "check_val_every_n_epoch": self.check_every}

    @property
    def stopping(self) -> dict[str, Any] | None:
        """All arguments of the EarlyStopping that stops training; None where nothing does."""
        if self.patience is None:
            return None
        parameters = inspect.signature(EarlyStopping).parameters
        defaults = {name: each.default for name, each in parameters.items()}
        return {**defaults, **monitored(self.task), "patience": self.patience}


def enough_steps(classes: int) -> int:
    """Return how many optimizer steps a run gets at least, by the number of classes or labels."""
    return max(ENOUGH_STEPS, STEPS_A_CLASS * classes)


def plan_length(
    steps_per_epoch: int,
    val_rows: int,
    typed_interval: float | None = None,
    min_epochs: int = 1,
    min_steps: int = 0,
    task: Task = "single_label",
    classes: int = 1,
) -> TrainingLength:
    """Return how long to train: a pure function of these numbers.

    Args:
        steps_per_epoch: Optimizer steps of an epoch, at least 1.
        val_rows: Rows that a validation pass evaluates; 0 where there is none.
        typed_interval: Epochs from one validation pass to the next, where typed settings say so. Training then stops
            after as many epochs without a better value as it would by itself, and never after fewer than ``PATIENCE``
            passes.
        min_epochs: Train for so many epochs at least.
        min_steps: Train for so many optimizer steps at least.
        task: What is predicted.
        classes: Classes or labels.
    """
    epochs = max(min_epochs, math.ceil(max(enough_steps(classes), min_steps) / steps_per_epoch))
    own = max(1, epochs // VALIDATIONS)
    interval = own if typed_interval is None else typed_interval
    whole = int(interval) if float(interval).is_integer() else 1
    epochs = math.ceil(epochs / whole) * whole  # the last epoch is validated
    patience: int | None = max(PATIENCE, math.ceil(PATIENCE * own / interval))
    if val_rows < ROWS_TO_STOP_BY or epochs / interval <= (patience or 0):  # too few rows or passes to stop by
        patience = None
    return TrainingLength(epochs, own if typed_interval is None else None, patience, task)


def length_of(
    trainer: Mapping[str, Any], data: TextDataModule, callbacks: Iterable[Callback] = (), stops_early: bool = True
) -> TrainingLength | None:
    """Return how long a run trains by the number of its rows; None where settings say how long.

    They do by ``max_epochs`` (-1: no limit), ``max_steps`` or ``fast_dev_run``. Typed settings of when to validate, and
    an EarlyStopping, stay as they are too.

    Args:
        trainer: Settings of a ``lightning.Trainer``; what is not there has Lightning's default.
        data: Read here, where it has not been.
        callbacks: Those of the trainer.
        stops_early: Whether the method can stop before the last step (``models/methods.py``).

    Raises:
        UserError: There is a fault in the data.
    """
    if trainer.get("max_epochs") is not None or trainer.get("max_steps", -1) != -1 or trainer.get("fast_dev_run"):
        return None
    batches = _batches(trainer, data)
    length = plan_length(
        math.ceil(batches / trainer.get("accumulate_grad_batches", 1)),
        _validated_rows(trainer, data),
        _typed_interval(trainer, batches),
        trainer.get("min_epochs") or 1,
        trainer.get("min_steps") or 0,
        data.task,
        len(data.label_names),
    )
    if not stops_early or any(isinstance(callback, EarlyStopping) for callback in callbacks):
        length = replace(length, patience=None)
    return length


def training_length(data: TextDataModule, method: str = "lora", **trainer: Any) -> dict[str, Any]:
    """Return arguments for ``lightning.Trainer`` with which it trains as long as ``main.py fit`` does by default.

    ``Trainer(**training_length(data), gradient_clip_val=1.0)``: as many epochs as the training rows take for enough
    optimizer steps, when to validate, and an EarlyStopping where there are enough validation rows to stop by.

    Args:
        data: Read here, where it has not been.
        method: How the model is trained; AdaLoRA does not stop early.
        trainer: Other arguments for the Trainer, which are returned too and have priority: callbacks of your own,
            ``accumulate_grad_batches`` and ``limit_train_batches``, on which the number of steps depends.

    Raises:
        UserError: There is a fault in the data.
    """
    given = trainer.get("callbacks") or []
    callbacks = list(given) if isinstance(given, list | tuple) else [given]
    length = length_of(trainer, data, callbacks, find_method(method).stops_early)
    trainer = {"use_distributed_sampler": False, **trainer}  # the data's own batches are shared out by length
    if length is None:
        return {**trainer, "callbacks": callbacks}
    stopping = [] if length.stopping is None else [EarlyStopping(**length.stopping)]
    return {**trainer, **length.settings, "callbacks": [*callbacks, *stopping]}


def describe_length(trainer: Mapping[str, Any], data: TextDataModule, length: TrainingLength | None) -> dict[str, Any]:
    """Return plain values for the run record: how long a run is to train, and why.

    Args:
        trainer: Its trainer's settings, with those of the length.
        data: Its data.
        length: What its rows say; None where settings say how long.
    """
    batches, epochs, most = _batches(trainer, data), trainer["max_epochs"], trainer["max_steps"]
    limits = [] if epochs in (None, -1) else [math.ceil(batches / trainer["accumulate_grad_batches"]) * epochs]
    limits += [] if most == -1 else [most]
    typed = {"max_epochs": None, "max_steps": -1, "max_time": None}
    found: dict[str, Any] = {
        "by": "rule" if length else "typed",
        "epochs": None if epochs == -1 else epochs,
        "steps": min(limits) if limits else None,
        "typed": {name: trainer[name] for name, none in typed.items() if trainer[name] != none},
        "train_rows": len(data.rows("train")),
        "val_rows": _validated_rows(trainer, data),
        "validated_every_epochs": _typed_interval(trainer, batches) or 1,
    }
    if (why := _why_not_validated(trainer, batches, found)) is not None:
        found["not_validated"] = why
    if length is None:
        return found
    found["typed"].pop("max_epochs")
    return {
        **found,
        "at_least_steps": enough_steps(len(data.label_names)),
        "patience": length.patience,
        **monitored(data.task),
    }


def _why_not_validated(trainer: Mapping[str, Any], batches: int, planned: Mapping[str, Any]) -> str | None:
    """Return why training ends before the first validation pass, and what to change; None where it does not."""
    if not planned["val_rows"]:
        return "trainer.limit_val_batches leaves no validation rows, so no checkpoint is the best one; leave it out"
    every, together = planned["validated_every_epochs"], trainer["accumulate_grad_batches"]
    first = max(1, int(batches * every / together)) if every % 1 else math.ceil(batches / together) * int(every)
    steps = planned["steps"]
    if steps is None or steps >= first:
        return None
    by_steps = "max_steps" in planned["typed"] and steps == trainer["max_steps"]
    remedy = f"trainer.max_steps to {first}" if by_steps else f"trainer.max_epochs to {math.ceil(every)}"
    other = f"set trainer.val_check_interval to {steps * together}" if every <= 1 else "validate more often"
    return (
        f"training ends after {steps:,} steps, before the first validation pass (after {first:,}), so no checkpoint is "
        f"the best one: raise {remedy}, or {other}"
    )


def length_words(planned: Mapping[str, Any]) -> str:
    """Return what to print of how long a run is to train, as ``describe_length`` has planned."""
    epochs, steps, typed, rows = (planned[key] for key in ("epochs", "steps", "typed", "val_rows"))
    words = "no number of steps" if steps is None else f"{steps:,} step{'s' * (steps != 1)}"
    if epochs is not None:
        least = "at most " if "max_steps" in typed else ""
        words = f"{least}{epochs:,} epoch{'s' * (epochs != 1)} {'and' if least else '='} {words}"
    if planned["by"] == "rule":
        most = f", {STEPS_A_CLASS} a class" if planned["at_least_steps"] > ENOUGH_STEPS else ""
        least = f"at least {planned['at_least_steps']:,} steps{most}; trainer.max_epochs"
        words += f", for {planned['train_rows']:,} rows ({least})"
    if typed:
        words += f" ({', '.join(f'trainer.{name} {value}' for name, value in typed.items())})"
    if planned["by"] == "typed" or epochs == 1 or not rows:
        return words
    every = planned["validated_every_epochs"]
    words += f", validated every {'epoch' if every == 1 else f'{every:g} epochs'}"
    if (patience := planned["patience"]) is not None:
        return f"{words}; stops early when {patience} validations in a row bring no better {planned['monitor']}"
    if rows < ROWS_TO_STOP_BY:
        few = f"{rows} validation rows are too few to judge by ({ROWS_TO_STOP_BY} are enough)"
        return f"{words}; does not stop early, as {few}"
    return words


def stay_stopped(trainer: Trainer, longer: bool) -> None:
    """Let a run that early stopping has ended stay so when it is resumed, which Lightning (2.6.6) does not.

    Args:
        trainer: Whose callbacks have the state that is resumed from.
        longer: Whether it is to train for longer than planned: then validation passes are counted from there.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a list, which Lightning hides
        if not _has_stopped(callback):
            continue
        if longer:
            callback.wait_count = callback.stopped_epoch = 0
            callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            callback.stopping_reason_message = None
        else:
            trainer.should_stop = True


def stopped_by(trainer: Trainer) -> str | None:
    """Return in words why training ended before its last epoch and step, or None."""
    # An epoch that was cut counts as done.
    epochs = trainer.current_epoch - (not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
    limits = ((epochs, trainer.max_epochs), (trainer.global_step, trainer.max_steps))
    if any(limit not in (None, -1) and done >= limit for done, limit in limits):
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _has_stopped(callback):
            reasons = {
                EarlyStoppingReason.NON_FINITE_METRIC: "was not finite",
                EarlyStoppingReason.STOPPING_THRESHOLD: f"reached {callback.stopping_threshold}",
                EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"was worse than {callback.divergence_threshold}",
            }
            patience = f"did not improve in {callback.patience} validations"
            return f"EarlyStopping: {callback.monitor} {reasons.get(callback.stopping_reason, patience)}"
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            return f"the time limit of {duration(callback.time_elapsed() + (callback.time_remaining() or 0))}"
    return None


def _has_stopped(callback: Callback) -> TypeGuard[EarlyStopping]:
    """Whether this is what has ended training."""
    return isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED


def _batches(trainer: Mapping[str, Any], data: TextDataModule) -> int:
    """Return the training batches of an epoch, at least 1."""
    accumulate = trainer.get("accumulate_grad_batches", 1)
    batches = batches_per_epoch(len(data.rows("train")), data.batch_size, accumulate, data.batch_by)
    return max(1, _limited(trainer, "limit_train_batches", batches))


def _validated_rows(trainer: Mapping[str, Any], data: TextDataModule) -> int:
    """Return about how many rows a validation pass evaluates."""
    return _limited(trainer, "limit_val_batches", len(data.rows("val")), data.eval_batch_size)


def _limited(trainer: Mapping[str, Any], name: str, count: int, a_batch: int = 1) -> int:
    """Return how many of so many, with so many in a batch, a limit on batches leaves."""
    limit = trainer.get("overfit_batches") or trainer.get(name)
    if limit is None:
        return count
    return int(count * limit) if _is_share(limit) else min(count, int(limit) * a_batch)


def _is_share(limit: float) -> bool:
    """Whether Lightning takes a number for a share of all batches; else it is a number of them, also as 4.0."""
    return isinstance(limit, float) and limit <= 1


def _typed_interval(trainer: Mapping[str, Any], batches: int) -> float | None:
    """Return the epochs, of so many batches, from one validation pass to the next; None for one, the default."""
    epochs, within = trainer.get("check_val_every_n_epoch", 1), trainer.get("val_check_interval")
    if isinstance(within, int | float) and not (_is_share(within) and within == 1):
        share = within if _is_share(within) else within / batches
        return max(1, epochs or 1) * max(share, 1 / batches)
    return None if epochs == 1 else epochs or 1
