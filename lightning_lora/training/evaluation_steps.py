"""What any classifier does with validation, test and prediction batches, however it was trained."""

from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.evaluation.metric_table import SHOWN
from lightning_lora.evaluation.metrics import EvaluationCounter, TrainCounter
from lightning_lora.evaluation.temperature import ROWS_TO_FIT, fit_temperature, scale_thresholds
from lightning_lora.evaluation.thresholds import Threshold, choose_thresholds
from lightning_lora.tasks import Task
from lightning_lora.training.loss import Calibrate, ClassWeights, make_class_weights, plain_loss


class EvaluationSteps(LightningModule):
    """Counts the metrics of validation and test rows; a subclass says what a batch's logits are."""

    label_names: list[str]
    task: Task
    threshold: Threshold
    #: Of several labels the probabilities from which on each is predicted, (C,); saved with the weights.
    thresholds: Tensor | None
    #: Whether a temperature is fitted; by "auto" to enough rows.
    calibrate: Calibrate
    has_temperature: bool
    #: What logits are divided by, (), but while training; saved with the weights.
    temperature: Tensor | None
    class_weights: ClassWeights | None
    train_counter: TrainCounter

    def document_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits, float32 (B, C), of the batch's documents."""
        raise NotImplementedError

    def calibrated_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits, float32 (B, C), of the batch's documents, divided by the temperature; within training as they are."""
        logits = self.document_logits(batch)
        return logits if self.temperature is None or self._fits else logits / self.temperature

    def configure_metrics(self) -> None:
        """Set the metrics of each stage; override to add some: ``self.add_metric("mcc", MulticlassMatthews...(C))``."""
        classes, several = len(self.label_names), self.task == "multi_label"
        counters = {f"{stage}_counter": EvaluationCounter(classes, self.task) for stage in ("val", "test")}
        self.stage_counters = nn.ModuleDict(counters)
        start = 0.5 if isinstance(self.threshold, str) else float(self.threshold)
        self.register_buffer("thresholds", torch.full((classes,), start) if several else None)
        self.register_buffer("temperature", torch.ones(()) if self.has_temperature else None)

    def add_metric(self, name: str, metric: Metric) -> None:
        """Log a torchmetrics metric of probabilities (B, C) and labels as "val/NAME" and "test/NAME"."""
        for stage in ("val", "test"):
            self._evaluation_counter(stage).metrics.add_metrics({name: metric.clone()})

    def shared_step(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Loss and logits of a batch; counts the metrics of the stage ("val" or "test")."""
        logits = self.calibrated_logits(batch)
        # Back from a GPU, for a baseline on the CPU, they would be read before they are there.
        labels = batch["labels"].to(logits.device, non_blocking=logits.device.type != "cpu")
        loss = plain_loss(logits, labels, self.task)
        if batch["step_weight"]:  # else this process had no row of the part
            self._evaluation_counter(stage).count(logits, labels, loss)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss and logits."""
        return self.shared_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss and logits."""
        return self.shared_step(batch, "test")

    @property
    def weights_settled(self) -> bool:
        """Whether the weights as they are now may be the run's result."""
        return True

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Logits and the rows they belong to."""
        logits = self.calibrated_logits(batch)
        return {"logits": logits.detach(), "rows": batch["rows"]}

    def on_validation_epoch_end(self) -> None:
        """Logs the validation loss and metrics."""
        self.log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Logs the test loss and metrics."""
        self.log_epoch("test")

    def log_epoch(self, stage: str) -> None:
        """Logs the loss and the metrics of a stage, and resets them."""
        if stage == "train":
            values = self.train_counter.take_values(self.label_names)
        else:
            values = self._evaluation_counter(stage).take_values(self.label_names, self.decision_thresholds(stage))
        for name, value in values.items():
            self.log(
                f"{stage}/{name}", value, prog_bar=stage != "train" and name == SHOWN[self.task][0], sync_dist=False
            )

    def decision_thresholds(self, stage: str) -> Tensor | None:
        """The thresholds at the end of a pass, in all processes; those of validation rows within training are new."""
        settles = stage == "val" and self._fits and (self.thresholds is not None or self.temperature is not None)
        if settles and (rows := self._evaluation_counter(stage).gathered()):
            self.calibrate_on(*rows)
        if self.thresholds is None or self.temperature is None or self._fits:
            return self.thresholds
        return scale_thresholds(self.thresholds, self.temperature)

    def calibrate_on(self, logits: Tensor, labels: Tensor) -> None:
        """Take the thresholds and the temperature that are best on validation rows.

        Args:
            logits: Not divided by a temperature, (N, C).
            labels: (N,), of several labels (N, C).
        """
        if self.thresholds is not None:
            self.thresholds.copy_(choose_thresholds(logits, labels, self.threshold))
        enough = self.calibrate is True or (self.calibrate == "auto" and len(labels) >= ROWS_TO_FIT)
        if self.temperature is not None and enough:
            self.temperature.fill_(fit_temperature(logits, labels, self.task))

    def weigh_classes(self, data: TextDataModule) -> Tensor | None:
        """Weights of the classes in fitting, (C,), from the training rows; None where all rows weigh the same."""
        if self.class_weights is None:
            return None
        rows = len(data.rows("train")) if self.task == "multi_label" else None
        return make_class_weights(self.class_weights, data.class_counts, rows)

    @property
    def _fits(self) -> bool:
        """Whether training is under way, validation passes included."""
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def counter(self, stage: str) -> TrainCounter | EvaluationCounter:
        """What counts the metrics of a stage ("train", "val" or "test")."""
        return self.train_counter if stage == "train" else self._evaluation_counter(stage)

    def _evaluation_counter(self, stage: str) -> EvaluationCounter:
        return cast(EvaluationCounter, self.stage_counters[f"{stage}_counter"])
