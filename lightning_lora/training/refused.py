"""Which of Lightning's callbacks and trainer options are refused, and why; all others work."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import METRICS
from lightning_lora.evaluation.metrics import metric_names
from lightning_lora.tasks import Task

_ABSTRACT = "does nothing by itself; name one of its subclasses, or leave it out"
_AVERAGED = "what is validated and what is kept as the best checkpoint would be different weights; leave it out"
#: Callbacks of Lightning (2.6) that are refused, and the reason.
CALLBACKS: Mapping[str, str] = {
    "BackboneFinetuning": "model.method says which weights are trained; leave it out",
    "BaseFinetuning": "model.method says which weights are trained; leave it out",
    "BasePredictionWriter": "fit predicts nothing; use: predict --run RUN --output FILE",
    "BatchSizeFinder": "what it finds depends on the free memory of the machine, and what is learnt depends on it; set "
    "data.batch_size, which is tried on the largest batch before the first step",
    "Callback": _ABSTRACT,
    "Checkpoint": _ABSTRACT,
    "EMAWeightAveraging": _AVERAGED,
    "GradientAccumulationScheduler": "the schedule needs to know the number of steps; "
    "set trainer.accumulate_grad_batches",
    "LambdaCallback": "a config cannot hold functions; write a callback class, and allow its package by "
    "LIGHTNING_LORA_ALLOW",
    "ModelPruning": "checkpoints and exports hold no pruning masks; leave it out",
    "OnExceptionCheckpoint": "the last state is always kept; resume with: fit --resume RUN",
    "ProgressBar": _ABSTRACT,
    "SpikeDetection": "nothing leaves out the batches that it lists, and such a run cannot be resumed; "
    "use EarlyStopping with divergence_threshold",
    "StochasticWeightAveraging": _AVERAGED,
    "ThroughputMonitor": "it needs a function, which a config cannot hold; run.json has train_tokens_per_s",
    "WeightAveraging": _AVERAGED,
}
#: Trainer options of which only one value is allowed: the value, and the reason.
OPTIONS: Mapping[str, tuple[Any, str]] = {
    "barebones": (False, "such a run logs and keeps nothing; leave it out"),
    "default_root_dir": (None, "a run writes into its own folder only; use --logs_dir and --name"),
    "model_registry": (None, "a run is kept in its own folder; use export --push_to_hub"),
    "overfit_batches": (0.0, "it validates on training rows; set data.train_rows to train on a few rows"),
    "reload_dataloaders_every_n_epochs": (0, "every epoch has an order of its own already; leave it out"),
    "sync_batchnorm": (False, "the base models have no batch normalization; leave it out"),
    "use_distributed_sampler": (False, "batches are shared out by length; leave it out"),
}
#: Trainer options with a lowest value; None and -1 mean "no limit" where Lightning says so.
_LOWEST: Mapping[str, tuple[float, tuple[Any, ...]]] = {
    "max_epochs": (1, (None, -1)),
    "max_steps": (1, (-1,)),
    "accumulate_grad_batches": (1, ()),
    "check_val_every_n_epoch": (1, (None,)),
    "gradient_clip_val": (0, (None,)),
}


def refuse_options(trainer: Mapping[str, Any], trains: bool = True) -> None:
    """Refuse values of trainer options that would be ignored, or would do something else than they say.

    Args:
        trainer: The trainer's settings.
        trains: Whether weights are trained by it.

    Raises:
        UserError: An option has such a value.
    """
    for name, (allowed, reason) in OPTIONS.items():
        if trainer[name] != allowed:
            raise UserError(f"trainer.{name}: {trainer[name]}, but {reason}")
    for name, (lowest, others) in _LOWEST.items():
        value = trainer[name]
        if value not in others and not (value is not None and value >= lowest):
            also = "".join(f" or {'null' if other is None else other}" for other in others)
            raise UserError(f"trainer.{name}: a number of at least {lowest:g}{also} is needed, got {value}")
    if trainer["limit_train_batches"] == 0:
        raise UserError("trainer.limit_train_batches: 0 leaves nothing to train on; model.method none trains nothing")
    if trainer["gradient_clip_algorithm"] not in (None, "norm") and not trainer["gradient_clip_val"]:
        raise UserError("trainer.gradient_clip_algorithm: nothing is clipped without trainer.gradient_clip_val")
    if trains and (precision := str(trainer["precision"])) in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision: {precision} keeps trained weights in 16 bits, in which small updates are lost; "
            f"use {precision.replace('true', 'mixed')}, which computes in 16 bits and keeps trained weights in 32"
        )
    if not isinstance(trainer["val_check_interval"], int | float | None):
        raise UserError(
            "trainer.val_check_interval: a time is refused, as a resumed run would validate after other steps; give a "
            "number of batches (5) or a share of an epoch (0.5)"
        )
    callbacks = trainer["callbacks"]
    for each in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        if not each["class_path"].endswith(".LearningRateFinder"):
            continue
        start, given = "trainer.callbacks: LearningRateFinder:", each["init_args"]
        if given["attr_name"] not in ("", "learning_rate"):
            raise UserError(f"{start} attr_name: '{given['attr_name']}' is no learning rate; leave it out")
        if not 0 < given["min_lr"] < given["max_lr"]:
            raise UserError(f"{start} 0 < min_lr < max_lr is needed, got {given['min_lr']:g} and {given['max_lr']:g}")


def check_monitors(
    callbacks: Iterable[Callback], label_names: list[str], trainer: Mapping[str, Any], task: Task = "single_label"
) -> None:
    """Refuse a callback that averages weights, or monitors what is not logged when it is read, or in a wrong direction.

    Settings of the trainer that are not there have Lightning's default.

    Raises:
        UserError: There is no such metric, or none yet, or ``mode`` prefers worse values.
    """
    names = metric_names(label_names, task)
    of_training = [name for name in names if name not in METRICS or METRICS[name].of_training]
    logged = [f"train/{name}" for name in [*of_training, "loss_step"]]
    validates = trainer.get("limit_val_batches") != 0
    logged += [f"val/{name}" for name in names] if validates else []
    each_epoch = trainer.get("check_val_every_n_epoch", 1) == 1
    at_end = not validates or (each_epoch and trainer.get("val_check_interval") in (None, 1.0))
    for callback in callbacks:
        if isinstance(
            callback, StochasticWeightAveraging | WeightAveraging
        ):  # of one's own, as Lightning's are refused by name
            raise UserError(f"trainer.callbacks: {type(callback).__name__}: {_AVERAGED}")
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or monitor is None:
            continue
        kind, stops = type(callback).__name__, isinstance(callback, EarlyStopping)
        if re.fullmatch(r"learning_rate(/\w+)?" + "|epoch|step" * (not stops), monitor):
            continue
        if monitor not in logged:
            raise UserError(f"trainer.callbacks: {kind}: no metric '{monitor}'; there are {', '.join(logged)}")
        spec = METRICS.get(monitor.rpartition("/")[2].removesuffix("_step"))
        better = "max" if spec is None or spec.higher_is_better else "min"
        if callback.mode != better:
            raise UserError(
                f"trainer.callbacks: {kind}: with mode {callback.mode} a worse {monitor} counts as better; "
                f"give mode: {better}"
            )
        option = "check_on_train_epoch_end" if stops else "save_on_train_epoch_end"
        given = getattr(callback, f"_{option}")  # for which Lightning (2.6.6) has no public name
        reads_at_end = at_end if given is None else given
        if monitor in logged[: len(of_training)] and not reads_at_end:
            raise UserError(f"trainer.callbacks: {kind}: {monitor} is of a whole epoch; give {option}: true")
        if monitor.startswith("val/") and stops and reads_at_end and not each_epoch:
            raise UserError(f"trainer.callbacks: {kind}: not every epoch has a {monitor}; give {option}: false")
