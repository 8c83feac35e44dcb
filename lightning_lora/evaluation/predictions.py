"""Logits of every evaluated row, in the order of the rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from scipy.special import softmax

from lightning_lora import processes
from lightning_lora.files import atomic_path


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for some rows.

    Args:
        logits: float32, shape (rows, C).
        labels: True class numbers, shape (rows,), or None when unknown.
        label_names: Names of the C classes.
        rows: Position of each row in its split, ascending, shape (rows,): all of them, or fewer when the
            pass was limited.
    """

    logits: np.ndarray
    labels: np.ndarray | None
    label_names: Sequence[str]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, float64, shape (rows, C)."""
        return softmax(self.logits.astype(np.float64), axis=1)

    @property
    def classes(self) -> np.ndarray:
        """The class number with the largest logit, shape (rows,)."""
        return self.logits.argmax(axis=1)

    @property
    def names(self) -> list[str]:
        """The name of each predicted class."""
        return [self.label_names[i] for i in self.classes]

    def columns(self) -> dict[str, Any]:
        """Return columns for a table: label (if known), prediction, probability of the prediction and of each class."""
        probabilities, classes = self.probabilities, self.classes
        columns: dict[str, Any] = {}
        if self.labels is not None:
            columns["label"] = [self.label_names[i] for i in self.labels]
        columns["prediction"] = self.names
        columns["probability"] = probabilities[np.arange(len(classes)), classes]
        for i, name in enumerate(self.label_names):
            columns[f"p({name})"] = probabilities[:, i]
        return columns

    def write_parquet(self, path: Path, **extra: Any) -> None:
        """Write the columns and the logits, whole or not at all; extra columns are of the whole split."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: [values[i] for i in self.rows] for name, values in extra.items()} | self.columns()
        columns |= {f"logit({name})": self.logits[:, i] for i, name in enumerate(self.label_names)}
        with atomic_path(path) as staging:
            pq.write_table(pa.table(columns), staging)


def in_row_order(batches: Sequence[dict[str, torch.Tensor]], label_names: Sequence[str]) -> Predictions:
    """Return the predictions of all batches, sorted by each batch's ``rows``."""
    rows = torch.cat([batch["rows"] for batch in batches]).numpy()
    order = np.argsort(rows, kind="stable")
    logits = torch.cat([batch["logits"] for batch in batches]).float().cpu().numpy()[order]
    known = "labels" in batches[0]
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()[order] if known else None
    return Predictions(logits, labels, label_names, rows[order])


class PredictionCollector(Callback):
    """Keeps the logits of the last validation, test and prediction pass.

    ``keep`` has by split what each pass's predictions are given to.
    """

    def __init__(self) -> None:
        self.last: dict[str, Predictions] = {}
        self.keep: dict[str, Callable[[Predictions], None]] = {}
        self._batches: list[dict[str, torch.Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the pass before."""
        self._batches = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep the batch's logits, where they are: taking them to the CPU waits for a GPU."""
        if not batch["share"]:
            return
        values = {"logits": outputs["logits"], **{name: batch[name] for name in ("rows", "labels") if name in batch}}
        self._batches.append({name: value.detach() for name, value in values.items()})

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]  # *args takes dataloader_idx

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the rows of the pass in order."""
        own = [{name: value.cpu() for name, value in batch.items()} for batch in self._batches]
        batches = [batch for each in processes.gathered(own) for batch in each]
        self._batches = []
        if batches:
            stage, label_names = trainer.state.stage, cast(Sequence[str], pl_module.label_names)
            split = {RunningStage.TESTING: "test", RunningStage.PREDICTING: "predict"}.get(cast(Any, stage), "val")
            self.last[split] = in_row_order(batches, label_names)
            if split in self.keep and processes.is_leader():
                self.keep[split](self.last[split])

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
