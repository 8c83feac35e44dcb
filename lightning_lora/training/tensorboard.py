"""What TensorBoard shows beside the curves: confusion matrix, precision-recall, wrong texts, hyperparameters."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora.evaluation.metrics import label_tags
from lightning_lora.evaluation.predictions import PredictionCollector, Predictions

WRONG_TEXTS = 10
_MATRIX_CLASSES = 30  # more do not fit a readable picture
_TEXT_CHARS = 400


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
        """Logs the hyperparameters of a method that trains nothing."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin_session(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the hyperparameters, as they are once a learning rate has been searched for."""
        self._begin_session(trainer)

    def _begin_session(self, trainer: Trainer) -> None:
        """Begins the run's session on the HPARAMS page.

        Without TensorBoard's list of an experiment's metrics, which holds for all sessions and is that of the first: it
        then looks at all of them itself, and so finds which settings differ and what was measured later.
        """
        if self.hyperparameters is None or not trainer.is_global_zero:
            return
        settings = dict(self.hyperparameters())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings)  # hparams.yaml
                _add(logger, _session_summaries(settings)[0])
            elif not self.steps:  # a service keeps those of a run that is resumed
                logger.log_hyperparams(settings)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the pages of the validation split."""
        if not trainer.sanity_checking:
            self._write(trainer, "val")
        if trainer.state.fn == TrainerFn.VALIDATING:  # all there is of a method that trains nothing
            self._end_session(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the pages of the test split."""
        self._write(trainer, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the session well; one that was interrupted or failed has no end, so that it may go on."""
        self._end_session(trainer)

    def _end_session(self, trainer: Trainer) -> None:
        if self.hyperparameters is not None:
            for logger in self._loggers(trainer):
                _add(logger, _session_summaries({})[1])

    @staticmethod
    def _loggers(trainer: Trainer) -> list[TensorBoardLogger]:
        if not trainer.is_global_zero:
            return []
        return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def _write(self, trainer: Trainer, split: str) -> None:
        predictions = self.collector.last.get(split)
        if predictions is None or predictions.labels is None:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        # As Lightning counts the metrics of an epoch: the step that was done last.
        step = max((trainer.global_step or self.steps) - 1, 0)
        for logger in self._loggers(trainer):
            writer = logger.experiment
            if len(predictions.label_names) <= _MATRIX_CLASSES:
                writer.add_figure(f"{split}/confusion_matrix", confusion_figure(predictions), step)
            probabilities = predictions.probabilities
            tags = label_tags(predictions.label_names)
            for i, tag in enumerate(tags[:_MATRIX_CLASSES]):
                writer.add_pr_curve(f"{split}_pr/{tag}", predictions.labels == i, probabilities[:, i], step)
            if datamodule is not None:
                texts = datamodule.rows(split).texts
                writer.add_text(f"{split}/wrong_texts", wrong_texts(predictions, texts), step)


def _session_summaries(hyperparameters: Mapping[str, Any]) -> tuple[Any, Any]:
    """What begins and what ends a session."""
    from torch.utils.tensorboard.summary import hparams  # not before it is needed: it takes half a second

    _, start, end = hparams(dict(hyperparameters), {})
    return start, end


def _add(logger: TensorBoardLogger, summary: Any) -> None:
    logger.experiment._get_file_writer().add_summary(summary)  # as SummaryWriter.add_hparams does


def confusion_figure(predictions: Predictions) -> Any:
    """A picture of the confusion matrix: rows are the truth, shares within each row, counts written in."""
    from matplotlib.figure import Figure

    names, labels = list(predictions.label_names), predictions.labels
    assert labels is not None
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, predictions.classes), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.8 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for i in range(len(names)):
        for j in range(len(names)):
            axes.text(
                j, i, f"{counts[i, j]}\n{shares[i, j]:.0%}", ha="center", va="center",
                color="white" if shares[i, j] > 0.5 else "black",
            )  # fmt: skip
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    return figure


def wrong_texts(predictions: Predictions, texts: list[str]) -> str:
    """A Markdown table of the wrongly classified texts that the model was surest of.

    Args:
        predictions: Of some or all rows of a split.
        texts: The texts of the whole split.
    """
    labels = predictions.labels
    assert labels is not None
    classes, probabilities = predictions.classes, predictions.probabilities
    sureness = probabilities[np.arange(len(classes)), classes]
    wrong = np.flatnonzero(classes != labels)
    wrong = wrong[np.argsort(-sureness[wrong], kind="stable")][:WRONG_TEXTS]
    lines = ["| true | predicted | probability | text |", "| --- | --- | --- | --- |"]
    for i in wrong:
        text = " ".join(texts[predictions.rows[i]].split())
        text = text if len(text) <= _TEXT_CHARS else f"{text[:_TEXT_CHARS]} ..."
        for sign, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;")):
            text = text.replace(sign, entity)
        names = predictions.label_names
        lines.append(f"| {names[labels[i]]} | {names[classes[i]]} | {sureness[i]:.3f} | {text} |")
    return "\n".join(lines)
