"""A trained run, loaded once, that classifies texts: what Python code, ``predict`` and its workers share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.checking import is_blank, is_unicode, row_text
from lightning_lora.data.datamodule import evaluation_sampler, make_loader
from lightning_lora.data.order import default_eval_batch_size
from lightning_lora.data.pairs import Text, is_pair
from lightning_lora.data.tokens import InputFormat, base_tokenizer, tokenize
from lightning_lora.devices import keep_freed_memory
from lightning_lora.errors import UserError
from lightning_lora.evaluation.predictions import PredictionCollector, Predictions
from lightning_lora.export.weights import load_weights, trained_for
from lightning_lora.inference.explain import Explanation, explain
from lightning_lora.quiet import quiet_libraries
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.baselines import TextBaseline, make_classifier
from lightning_lora.training.module import TextClassifier


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with its tokenizer and its way of reading texts.

    Args:
        model: The model, with its trained weights.
        tokenizer: The base model's.
        input_format: How texts are truncated and framed by special tokens.
        padding: To the "longest" text of a batch, or to "max_length".
        eval_batch_size: Texts in a batch; None for what suits the machine.
        trainer: What runs the prediction loop.
    """

    model: TextClassifier | TextBaseline
    tokenizer: Any
    input_format: InputFormat
    padding: str
    eval_batch_size: int | None
    trainer: Trainer

    def __post_init__(self) -> None:
        self.model.stays_on_device = True

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their numbers."""
        return self.model.label_names

    @property
    def packed(self) -> bool:
        """Whether its batches are packed."""
        model = self.model
        return (
            isinstance(model, TextClassifier)
            and self.padding != "max_length"
            and model.packed_batches.wanted(self.trainer)
        )

    def predict(self, texts: Sequence[Text]) -> Predictions:
        """Classify texts.

        Args:
            texts: N texts, or N pairs of texts for a run that reads pairs.

        Returns:
            Logits (N, C), probabilities (N, C) and predicted names (N), in the order of the texts; the names are lists
            where a text may have several labels, and numbers where these are predicted.
        """
        return self.predict_dataset(self.dataset(self.checked(texts)))

    def checked(self, texts: Sequence[Text]) -> list[Text]:
        """The texts or pairs of texts as the model reads them.

        Raises:
            UserError: A text is not a string, is blank, or no Unicode; or is a pair where a text is needed, or not one
                where that is.
        """
        pair, checked = is_pair(self.input_format.keep), list[Text]()
        for i, text in enumerate([texts] if isinstance(texts, str) else texts):
            sides = list(text) if pair and isinstance(text, list | tuple) else [text]
            if len(sides) != 1 + pair or any(not isinstance(s, str) or is_blank(s) or not is_unicode(s) for s in sides):
                kind = "a pair of texts" if pair else "a text"
                raise UserError(f"text {i}: {kind} is needed, got {text!r:.40}")
            checked.append(row_text(sides, pair))
        return checked

    def explain(self, texts: Sequence[Text], label: str | None = None, **options: Any) -> list[Explanation]:
        """Return what each word of the texts adds to their predictions, by leaving it out.

        Args:
            texts: As of ``predict``.
            label: What is explained; by default the predicted label, of several each, or the number.
            options: ``advance``, called with 1 after each text.

        Returns:
            An explanation of each text and label, in the order of the texts.
        """
        return explain(self, self.checked(texts), label, **options)

    def dataset(self, texts: Sequence[Text]) -> TokenDataset:
        """The texts, tokenized."""
        dataset = TokenDataset(tokenize(texts, self.tokenizer), self.input_format, None, self.padding == "max_length")
        dataset.batch_texts = texts if isinstance(self.model, TextBaseline) else None
        return dataset

    def predict_dataset(self, dataset: TokenDataset) -> Predictions:
        """Classify tokenized texts; as ``predict``."""
        names, task = self.model.label_names, self.model.task
        if not len(dataset):
            return Predictions(np.zeros((0, len(names))), None, names, np.zeros(0, dtype=np.int64), task=task)
        packed = self.packed
        sampler = evaluation_sampler(dataset, default_eval_batch_size(self.eval_batch_size), packed)
        loader = make_loader(dataset, sampler, packed)
        # To put a prediction into its list, the trainer waits for a GPU after each batch (Lightning 2.6.6).
        collector = PredictionCollector()
        self.trainer.callbacks.append(collector)  # type: ignore[attr-defined]
        try:
            with torch.inference_mode():
                self.trainer.predict(self.model, loader, return_predictions=False)
        finally:
            self.trainer.callbacks.remove(collector)  # type: ignore[attr-defined]
        return collector.last["predict"]


def assemble(
    model: Mapping[str, Any], data: Mapping[str, Any], checkpoint: Path, labels: Mapping[str, Any], trainer: Trainer
) -> LoadedRun:
    """Build a run's model from settings of ``TextClassifier`` and ``TextDataModule``, and put its weights into it.

    Raises:
        UserError: The weights do not belong to the model, or are damaged.
    """
    classifier = make_classifier(**model, **labels)
    load_weights(classifier, checkpoint)
    keep_freed_memory()
    tokenizer = base_tokenizer(model["base_model"])
    input_format = InputFormat.of(tokenizer, data["max_length"], data["truncation"], data["window_overlap"])
    return LoadedRun(classifier, tokenizer, input_format, data["padding"], data["eval_batch_size"], trainer)


def load_run(folder: str | Path, checkpoint: str = "best", **trainer: Any) -> LoadedRun:
    """Load a trained run for prediction.

    Args:
        folder: A folder that ``main.py fit`` made, such as "logs/reviews".
        checkpoint: "best", "last", or the path of a checkpoint or exported adapter.
        trainer: Options of ``lightning.Trainer`` in place of the run's, such as ``accelerator="cpu"``.

    Raises:
        UserError: It is not a run, has no such checkpoint, or its base model cannot be loaded.
    """
    quiet_libraries()
    run = RunFolder.open(Path(folder), "load_run")
    settings = run.settings()
    path = run.checkpoint(checkpoint)
    options = {name: settings["trainer"][name] for name in ("accelerator", "precision")} | trainer
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 1}
    if options.get("devices", 1) not in (1, "1", [0]):
        raise UserError("load_run: devices: a loaded run predicts on one device; give accelerator, or one process each")
    return assemble(settings["model"], settings["data"], path, trained_for(path), Trainer(**(quiet | options)))


def predict(run: str | Path | LoadedRun, texts: Sequence[Text]) -> Predictions:
    """Classify texts by a trained run: ``predict("logs/reviews", ["What a film!"]).names``.

    Args:
        run: A folder that ``main.py fit`` made, or what ``load_run`` returned.
        texts: N texts, or N pairs of texts.
    """
    return (run if isinstance(run, LoadedRun) else load_run(run)).predict(texts)
