"""What any classifier does with validation, test and prediction batches, however it was trained."""

from typing import Any, cast

from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_lora.evaluation.metrics import EvaluationCounter, TrainCounter


class EvaluationSteps(LightningModule):
    """Counts the metrics of validation and test rows; a subclass says what a batch's logits are."""

    label_names: list[str]
    train_counter: TrainCounter

    def document_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits, float32 (B, C), of the batch's documents."""
        raise NotImplementedError

    def configure_metrics(self) -> None:
        """Set the metrics of each stage; override to add some: ``self.add_metric("mcc", MulticlassMatthews...(C))``."""
        classes = len(self.label_names)
        self.stage_counters = nn.ModuleDict({f"{s}_counter": EvaluationCounter(classes) for s in ("val", "test")})

    def add_metric(self, name: str, metric: Metric) -> None:
        """Log a torchmetrics metric of probabilities (B, C) and labels (B,) as "val/NAME" and "test/NAME"."""
        for stage in ("val", "test"):
            self._evaluation_counter(stage).metrics.add_metrics({name: metric.clone()})

    def shared_step(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Loss and logits of a batch; counts the metrics of the stage ("val" or "test")."""
        logits = self.document_logits(batch)
        labels = batch["labels"].to(logits.device, non_blocking=True)
        loss = F.cross_entropy(logits, labels)
        if batch["share"]:  # else this process had no row of the part
            self._evaluation_counter(stage).count(logits, labels, loss)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss and logits."""
        return self.shared_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss and logits."""
        return self.shared_step(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Logits and the rows they belong to."""
        logits = self.document_logits(batch)
        return {"logits": logits.detach(), "rows": batch["rows"]}

    def on_validation_epoch_end(self) -> None:
        """Logs the validation loss and metrics."""
        self.log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Logs the test loss and metrics."""
        self.log_epoch("test")

    def log_epoch(self, stage: str) -> None:
        """Logs the loss and the metrics of a stage, and resets them."""
        for name, value in self.counter(stage).take_values(self.label_names).items():
            self.log(f"{stage}/{name}", value, prog_bar=stage != "train" and name == "accuracy", sync_dist=False)

    def counter(self, stage: str) -> TrainCounter | EvaluationCounter:
        """What counts the metrics of a stage ("train", "val" or "test")."""
        return self.train_counter if stage == "train" else self._evaluation_counter(stage)

    def _evaluation_counter(self, stage: str) -> EvaluationCounter:
        return cast(EvaluationCounter, self.stage_counters[f"{stage}_counter"])
