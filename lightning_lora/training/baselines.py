"""Baselines as LightningModules: validated, tested and saved like a fine-tuned model, but fitted without steps."""

from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.pairs import as_texts
from lightning_lora.errors import UserError
from lightning_lora.evaluation.predictions import PredictionCollector
from lightning_lora.evaluation.thresholds import Threshold
from lightning_lora.models.base import Base
from lightning_lora.models.baselines import TEXT_BASELINES, Probe
from lightning_lora.models.methods import BASELINES
from lightning_lora.runs.checkpoints import CheckpointIdentity
from lightning_lora.tasks import Task
from lightning_lora.training.evaluation_steps import EvaluationSteps
from lightning_lora.training.loss import Calibrate, ClassWeights, has_temperature
from lightning_lora.training.module import TextClassifier

#: The settings of a model that baselines take which read texts.
_OF_TEXT_BASELINES = ("task", "threshold", "calibrate", "class_weights")


class TextBaseline(EvaluationSteps):
    """A baseline that reads texts and no token ids: the majority class, or TF-IDF with logistic regression.

    The texts of a pair are joined by a space.

    It takes these arguments of a ``TextClassifier``; the method is "majority" or "tfidf", which alone weighs classes.
    """

    #: As of a ``TextClassifier``, for the run record.
    head_origin = "no weights"
    target_modules: tuple[str, ...] = ()
    head_modules: tuple[str, ...] = ()
    learning_rate = 0.0
    step_started = False

    def __init__(
        self,
        label_names: list[str],
        method: str = "tfidf",
        task: Task = "single_label",
        threshold: Threshold = "one",
        calibrate: Calibrate = "auto",
        class_weights: ClassWeights | None = None,
    ) -> None:
        super().__init__()
        self.has_temperature = has_temperature(calibrate, task, threshold, method)
        given = {"label_names": list(label_names), "method": method, "task": task, "threshold": threshold}
        self.save_hyperparameters({**given, "calibrate": calibrate, "class_weights": class_weights}, logger=False)
        self.label_names, self.task, self.threshold = list(label_names), task, threshold
        self.calibrate, self.class_weights = calibrate, class_weights
        self.model = TEXT_BASELINES[method](len(label_names))
        self.identity = CheckpointIdentity("none", "none", self.label_names, method, task=task)
        self.stays_on_device = False
        #: What was chosen on validation rows.
        self.chosen: dict[str, Any] = {}
        self.configure_metrics()

    def setup(self, stage: str) -> None:
        """Asks for the texts of each batch."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextDataModule):
            data.with_texts = True

    def fit_rows(self, data: TextDataModule, trainer: Trainer) -> dict[str, Any]:
        """Fits to the training rows; what can be chosen is chosen on validation rows, and returned."""
        del trainer
        train, val = data.rows("train"), data.rows("val")
        texts, val_texts, weights = as_texts(train.texts), as_texts(val.texts), self.weigh_classes(data)
        chosen = self.model.fit(texts, train.labels, val_texts, val.labels, weights)
        return fitted(self, chosen, val.labels)

    def document_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits, float32 (B, C), of the batch's texts."""
        return self.model(as_texts(batch["texts"]))

    @property
    def device(self) -> torch.device:
        """The CPU, where scikit-learn computes; Lightning (2.6.6) takes it that a module is on the trainer's device."""
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Stays on the CPU."""
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says what the weights belong to."""
        checkpoint["state_dict"] = {
            k: v for k, v in checkpoint["state_dict"].items() if k.startswith(("model.", "thresholds", "temperature"))
        }
        self.identity.write_to(checkpoint)
        metrics = self.trainer.callback_metrics
        checkpoint["metrics"] = {name: float(v) for name, v in metrics.items() if name.startswith("val/")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other labels or another method."""
        self.identity.check(checkpoint)

    def check_int8(self, precision: str) -> int:
        """Refuses an evaluation in int8."""
        raise UserError(f"--int8: method '{self.identity.method}' has no layers; leave it out")


def fitted(module: EvaluationSteps, chosen: dict[str, Any], val_labels: np.ndarray) -> dict[str, Any]:
    """Take thresholds and temperature from validation rows too; return what was chosen, for the run record."""
    if module.thresholds is not None or module.temperature is not None:
        model: Any = module.model
        module.calibrate_on(model.val_logits, torch.from_numpy(val_labels))
    return chosen


class LinearProbe(TextClassifier):
    """Logistic regression on pooled states of the frozen base model; takes what ``TextClassifier`` takes."""

    baselines = ("probe",)
    #: What was chosen on validation rows.
    chosen: dict[str, Any]

    def configure_models(self) -> None:
        """Leaves the states of all tokens there, to be pooled."""
        self.speedups = replace(self.speedups, first_token_only=False, packing=False)
        super().configure_models()

    def load_base_model(self) -> Base:
        """Loads the base model, whose head is not used."""
        base = super().load_base_model()
        self.hparams["pooling"] = "last" if base.reads_last else "first"
        return base

    def fit_rows(self, data: TextDataModule, trainer: Trainer) -> dict[str, Any]:
        """Fits to the training rows; pooling and C are chosen on validation rows, and returned."""
        probe: Probe = self.model
        data.packed = False  # ``setup`` says so too late for these loaders, and a model before this may have packed
        train, val = (self._states(data, trainer, split) for split in ("train", "val"))
        labels, val_labels = data.rows("train").labels, data.rows("val").labels
        return fitted(self, probe.fit(train, labels, val, val_labels, self.weigh_classes(data)), val_labels)

    def _states(self, data: TextDataModule, trainer: Trainer, split: str) -> np.ndarray:
        """Pooled states of a split, (N, P D) in the order of its rows."""
        collector, probe = PredictionCollector(), self.model
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(collector)
        probe.gives_states = True
        try:
            trainer.predict(self, data.evaluation_loader(split), return_predictions=False)
        finally:
            probe.gives_states = False
            callbacks.remove(collector)
        return collector.last["predict"].logits

    def document_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, C) of the batch's documents, of windows by the mean of their states; while fitting, the states."""
        if "documents" not in batch:
            return super().document_logits(batch)
        probe, documents = self.model, batch["documents"]
        fitting, probe.gives_states = probe.gives_states, True
        try:
            states = self(batch["input_ids"], batch["attention_mask"])
        finally:
            probe.gives_states = fitting
        total = torch.zeros(len(batch["rows"]), states.shape[1], device=states.device).index_add_(0, documents, states)
        means = total / documents.bincount(minlength=len(total))[:, None]
        return means if fitting else probe.classify(means)


def make_classifier(base_model: str, label_names: list[str], method: str = "lora", **settings: Any) -> Any:
    """The module of a method or baseline: a ``TextClassifier``, ``LinearProbe`` or ``TextBaseline``.

    It takes what a ``TextClassifier`` takes; baselines that read texts do not load the base model.
    """
    if method in TEXT_BASELINES:
        own = {name: settings[name] for name in _OF_TEXT_BASELINES if name in settings}
        return TextBaseline(label_names, method, **own)
    kind = LinearProbe if method in BASELINES else TextClassifier
    return kind(base_model, label_names, method, **settings)
