"""What TensorBoard shows beside the curves: confusion matrix, precision-recall curves, hyperparameters."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora.evaluation.metrics import label_tags
from lightning_lora.evaluation.predictions import PredictionCollector, Predictions

_SHOWN_CLASSES = 30  # a matrix of more is no readable picture


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
                logger.log_hyperparams(settings)  # hparams.yaml
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
            if not isinstance(logger, TensorBoardLogger):
                continue
            if len(predictions.label_names) <= _SHOWN_CLASSES:
                logger.experiment.add_figure(f"{split}/confusion_matrix", confusion_figure(predictions), step)
            for i, tag in enumerate(label_tags(predictions.label_names)[:_SHOWN_CLASSES]):
                scores = predictions.probabilities[:, i]
                logger.experiment.add_pr_curve(f"{split}_pr/{tag}", predictions.labels == i, scores, step)


def confusion_figure(predictions: Predictions) -> Any:
    """Return a picture of the confusion matrix: rows are the truth, with shares within each row."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    side = 2.5 + 0.8 * len(predictions.label_names)
    figure = Figure(figsize=(side + 0.6, side), layout="compressed")
    ConfusionMatrixDisplay.from_predictions(
        predictions.labels,
        predictions.classes,
        labels=range(len(predictions.label_names)),
        display_labels=predictions.label_names,
        normalize="true",
        values_format=".0%",
        xticks_rotation=45,
        cmap="Blues",
        im_kw={"vmin": 0, "vmax": 1},
        ax=figure.subplots(),
    )
    return figure
