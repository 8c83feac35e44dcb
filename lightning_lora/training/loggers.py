"""Where a run's numbers go: TensorBoard and ``metrics.csv``, each step once, also when training is resumed.

Beside the curves TensorBoard shows confusion matrices, precision-recall curves and hyperparameters.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.utilities.plot import plot_confusion_matrix

from lightning_lora.evaluation.metrics import label_tags
from lightning_lora.evaluation.predictions import PredictionCollector, Predictions
from lightning_lora.files import write_text

#: Loggers of services whose runs have an id, and the argument that resumes one.
RUN_ARGUMENTS = {"CometLogger": "experiment_key", "MLFlowLogger": "run_id", "WandbLogger": "id"}
_SHOWN_CLASSES = 30  # a matrix of more is no readable picture


def make_loggers(folder: Path, training: bool, steps: int) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        folder: The run's folder.
        training: Whether the run trains; a test pass writes to TensorBoard only.
        steps: Steps that were done before; what was logged of later ones is logged again, and so left out. Without
            training, those that the weights have been trained for.
    """
    if not training:
        return [RunBoard(folder, at=max(steps - 1, 0))]
    return [RunBoard(folder, purge_step=steps or None), MetricsFile(folder, steps)]


def run_ids(loggers: Iterable[Logger]) -> dict[str, str]:
    """Return the ids of the runs that loggers of ``RUN_ARGUMENTS`` have started, by class."""
    return {type(each).__name__: str(each.version) for each in loggers if type(each).__name__ in RUN_ARGUMENTS}


def rejoin_loggers(settings: Any, ids: Mapping[str, str]) -> None:
    """Have loggers resume the runs that they have started, instead of starting others.

    Args:
        settings: The parsed setting ``trainer.logger``; changed in place.
        ids: What the record knows: the run of each class of loggers.
    """
    for logger in settings if isinstance(settings, list) else [settings]:
        name = str(getattr(logger, "class_path", "")).rpartition(".")[2]
        if name in ids:
            logger.init_args[RUN_ARGUMENTS[name]] = ids[name]


class MetricsFile(CSVLogger):
    """``metrics.csv`` of a run, of which whole rows of steps before ``steps`` are kept."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, name="", version="")
        path = folder / "metrics.csv"
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines())) if steps and path.is_file() else []
        if rows and "step" in (header := rows[0]):
            at = header.index("step")
            kept = [r for r in rows[1:] if len(r) == len(header) and r[at].isdigit() and int(r[at]) < steps]
            self.experiment.metrics_keys = list(header)  # Lightning's writer begins by removing the file
            text = io.StringIO()
            csv.writer(text, lineterminator="\r\n").writerows([header, *kept])
            write_text(path, text.getvalue())

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: the settings are in ``config.yaml``."""


class RunBoard(TensorBoardLogger):
    """TensorBoard of a run: its files lie in the run's folder itself, so that TensorBoard calls it by its name.

    Args:
        folder: The run's folder.
        at: The step that trained weights to evaluate were trained to, counted as Lightning does: a pass over them would
            otherwise stand at step 0 of their curves.
        options: Of ``TensorBoardLogger``.
    """

    def __init__(self, folder: Path, at: int | None = None, **options: Any) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, **options)
        self.at = at

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics at a step, of trained weights at theirs."""
        super().log_metrics(metrics, step if self.at is None else self.at)

    def save(self) -> None:
        """Write no ``hparams.yaml``: the settings are in ``config.yaml``."""


class LearningRateCurve(Callback):
    """Logs the learning rate as one curve, ``learning_rate``, and one more for each multiple of it (LoRA+)."""

    logged = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rates of the step that comes, once, where Lightning logs a step."""
        step, each = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self.logged or (step + 1) % each:
            return
        self.logged = step
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        factors = [group.get("lr_factor", 1) for group in groups]
        names = ["learning_rate" if factor == 1 else f"learning_rate/x{factor:g}" for factor in factors]
        rates = {name: float(group["lr"]) for name, group in zip(names, groups, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step)
        trainer.callback_metrics.update({name: torch.tensor(rate) for name, rate in rates.items()})


class TensorBoardPages(Callback):
    """Writes the pages after each validation and test pass.

    Args:
        collector: Where the logits of the pass are.
        hyperparameters: Gives the flat settings of the run, for the HPARAMS page and for other loggers; None where
            they are not logged.
        steps: Steps that the weights have been trained for before.
    """

    def __init__(
        self, collector: PredictionCollector, hyperparameters: Callable[[], Mapping[str, Any]] | None, steps: int = 0
    ) -> None:
        self.collector = collector
        self.hyperparameters = hyperparameters
        self.steps = steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the hyperparameters of a method that trains nothing."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the hyperparameters, as they are once a learning rate has been searched for.

        Without TensorBoard's list of an experiment's metrics, which holds for all sessions and is that of the first: it
        then reads all of them itself, and so finds which settings differ and what was measured later.
        """
        if self.hyperparameters is None or not trainer.is_global_zero:
            return
        from torch.utils.tensorboard.summary import hparams  # not before it is needed: it takes half a second

        settings = dict(self.hyperparameters())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                session = hparams(settings, {})[1]
                logger.experiment._get_file_writer().add_summary(session)  # as SummaryWriter.add_hparams does
            elif not self.steps:  # a service keeps those of a run that is resumed
                logger.log_hyperparams(settings)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the pages of the validation split."""
        if not trainer.sanity_checking:
            self._write(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the pages of the test split."""
        self._write(trainer, "test")

    def _write(self, trainer: Trainer, split: str) -> None:
        predictions = self.collector.last.get(split)
        if predictions is None or predictions.labels is None:
            return
        # As Lightning counts the metrics of an epoch: the step that was done last.
        step = max((trainer.global_step or self.steps) - 1, 0)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger) or predictions.task == "regression":
                continue
            if predictions.task == "single_label" and len(predictions.label_names) <= _SHOWN_CLASSES:
                logger.experiment.add_figure(f"{split}/confusion_matrix", confusion_figure(predictions), step)
            for i, tag in enumerate(label_tags(predictions.label_names)[:_SHOWN_CLASSES]):
                scores, truth = predictions.probabilities[:, i], predictions.truth
                logger.experiment.add_pr_curve(
                    f"{split}_pr/{tag}", truth == i if truth.ndim == 1 else truth[:, i], scores, step
                )


def confusion_figure(predictions: Predictions) -> Any:
    """Return a picture of the confusion matrix: rows are the truth, with shares within each row."""
    from matplotlib.figure import Figure

    count = len(predictions.label_names)
    preds, target = torch.as_tensor(predictions.predicted), torch.as_tensor(predictions.labels)
    counts = multiclass_confusion_matrix(preds, target, count)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.8 * count
    figure = Figure(figsize=(side, side), layout="compressed")
    plot_confusion_matrix(shares, ax=figure.subplots(), labels=list(predictions.label_names), cmap="Blues")
    return figure
