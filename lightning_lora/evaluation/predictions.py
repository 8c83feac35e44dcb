"""Logits of every evaluated row, in the order of the rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from lightning_lora import processes
from lightning_lora.evaluation.outputs import OUTPUTS_KEY, Outputs
from lightning_lora.files import atomic_path
from lightning_lora.tasks import Task


@dataclass(frozen=True)
class Predictions(Outputs):
    """What a model predicts for some rows.

    Args:
        label_names: Names of the C classes or labels; of regression that of the number.
        rows: Position of each row in its split, ascending, shape (rows,): all of them, or fewer when the
            pass was limited.
    """

    label_names: Sequence[str]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[Any]:
        """The name of each predicted class, the list of names of the labels, or the number."""
        return self._named(self.predicted)

    def of_rows(self, keep: np.ndarray) -> "Predictions":
        """Return the predictions of some of the rows, (rows,) of truth values."""
        labels = None if self.labels is None else self.labels[keep]
        return replace(self, logits=self.logits[keep], labels=labels, rows=self.rows[keep])

    def _named(self, values: np.ndarray) -> list[Any]:
        if self.task == "single_label":
            return [self.label_names[i] for i in values]
        if self.task == "regression":
            return values.tolist()
        return [[name for name, has in zip(self.label_names, row, strict=True) if has] for row in values]

    def columns(self) -> dict[str, Any]:
        """Return columns for a table: label (if known), prediction, and probabilities.

        These are of the predicted class, if a text has one, and of each class or label; there are none of numbers.
        """
        columns: dict[str, Any] = {}
        if self.labels is not None:
            columns["label"] = self._named(self.labels)
        columns["prediction"] = self.names
        if self.task == "regression":
            return columns
        probabilities = self.probabilities
        if self.task == "single_label":
            columns["probability"] = probabilities[np.arange(len(probabilities)), self.predicted]
        for i, name in enumerate(self.label_names):
            columns[f"p({name})"] = probabilities[:, i]
        return columns

    def write_parquet(self, path: Path, **extra: Any) -> None:
        """Write the columns and the logits, whole or not at all; extra columns are of the whole split."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: [values[i] for i in self.rows] for name, values in extra.items()} | self.columns()
        columns |= {f"logit({name})": self.logits[:, i] for i, name in enumerate(self.label_names)}
        facts = {"task": self.task, "thresholds": None if self.thresholds is None else self.thresholds.tolist()}
        table = pa.table(columns)
        if self.task == "multi_label":  # also where no row has any
            strings = pa.list_(pa.string())
            types = {
                field.name: strings if field.name in ("label", "prediction") else field.type for field in table.schema
            }
            table = table.cast(pa.schema(types))
        with atomic_path(path) as staging:
            pq.write_table(table.replace_schema_metadata({OUTPUTS_KEY: json.dumps(facts)}), staging)


def in_row_order(
    batches: Sequence[dict[str, torch.Tensor]],
    label_names: Sequence[str],
    task: Task = "single_label",
    thresholds: torch.Tensor | None = None,
) -> Predictions:
    """Return the predictions of all batches, sorted by each batch's ``rows``."""
    rows = torch.cat([batch["rows"] for batch in batches]).numpy()
    order = np.argsort(rows, kind="stable")
    logits = torch.cat([batch["logits"] for batch in batches]).float().cpu().numpy()[order]
    known = "labels" in batches[0]
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()[order] if known else None
    from_p = None if thresholds is None else thresholds.cpu().double().numpy()  # NumPy has no bfloat16
    return Predictions(logits, labels, label_names, rows[order], task=task, thresholds=from_p)


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
        if not batch["step_weight"]:
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
        model = cast(Any, pl_module)
        split = {RunningStage.TESTING: "test", RunningStage.PREDICTING: "predict"}.get(
            cast(Any, trainer.state.stage), "val"
        )
        thresholds = model.decision_thresholds(split)
        if batches:
            self.last[split] = in_row_order(batches, model.label_names, model.task, thresholds)
            if split in self.keep and processes.is_rank_zero():
                self.keep[split](self.last[split])

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
