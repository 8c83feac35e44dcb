"""A loaded run that predicts batch after batch without a trainer's pass around each; weights shared between runs."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from lightning_lora.data.batching import LengthBatchSampler, TokenDataset
from lightning_lora.data.order import default_eval_batch_size
from lightning_lora.data.pairs import Text, is_pair
from lightning_lora.data.tokens import TokenRows
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.inference.loaded_run import load_run
from lightning_lora.inference.predict_files import fingerprint
from lightning_lora.models.kernel_plugins import kernel_plugins
from lightning_lora.runs.folder import RunFolder, best_metrics
from lightning_lora.training.module import TextClassifier

#: Tokens of a batch on a CPU, padding included: larger ones are no faster there (docs/LOG.md).
CPU_BATCH_TOKENS = 1024


class ServedRun:
    """A run that is loaded, on its device, and ready to predict.

    Args:
        folder: That of the run.
        checkpoint: As for ``load_run``.
        shared: Weights of other runs, whose memory is used where this run has the same.
        batch_tokens: Tokens of a batch at most; None for what suits the machine.
        merged: Whether LoRA's product is added to the weights, as it is by ``predict``: then a batch takes less time,
            and changing between runs more.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: str,
        shared: "SharedWeights",
        batch_tokens: int | None = None,
        merged: bool = True,
    ) -> None:
        run = RunFolder.open(folder)
        self.name = folder.resolve().name
        self.fingerprint = fingerprint(run.checkpoint(checkpoint))
        loaded = load_run(folder, checkpoint)
        self.loaded = loaded = replace(loaded, tokenizer=shared.tokenizer(loaded.tokenizer))
        self.model: Any = loaded.model
        if isinstance(self.model, TextClassifier) and not merged:  # before a pass on a GPU, which keeps what it merged
            self.model.speedups = replace(self.model.speedups, merged_evaluation=False)
        # A pass of the trainer brings the model to its device and its precision, and checks packed batches, which two
        # texts that are alike would pass.
        loaded.predict([("a", text) if self.pairs else text for text in ("a", "another, longer text")])
        self.model.eval()
        self.weight_bytes, self.shared_bytes = shared.share(self.model)
        self.packed = loaded.packed
        self._together = default_eval_batch_size(loaded.eval_batch_size)
        on_gpu = loaded.trainer.strategy.root_device.type == "cuda"
        max_tokens = self._together * loaded.input_format.max_length
        self.batch_tokens = batch_tokens or (max_tokens if on_gpu else min(max_tokens, CPU_BATCH_TOKENS))
        thresholds = self.model.decision_thresholds("predict")
        self.thresholds = None if thresholds is None else thresholds.cpu().double().numpy()
        record = run.read() if run.record.is_file() else {}
        of_best = dict(best_metrics(record, "test") or best_metrics(record, "val")) if checkpoint == "best" else {}
        self.metrics = {name: value for name, value in of_best.items() if isinstance(value, int | float)}
        # Adapters stay merged, and kernels ready, as within an evaluation pass.
        self.model.on_predict_start()

    @property
    def concurrent(self) -> bool:
        """Whether several threads may compute batches at once: nothing is kept in the model within a forward pass."""
        model = self.model
        if not isinstance(model, TextClassifier):
            return True
        kernels = model.speedups.kernels and kernel_plugins()
        on_cpu = self.loaded.trainer.strategy.root_device.type == "cpu"
        return on_cpu and not self.packed and not kernels and model.quantization.bits is None

    @property
    def pairs(self) -> bool:
        """Whether it reads pairs of texts."""
        return is_pair(self.loaded.input_format.keep)

    def logits(self, ids: Sequence[Any], texts: Sequence[Text]) -> np.ndarray:
        """Compute the logits of N texts, float32 (N, C), in inference mode; ``ids`` have no special tokens."""
        loaded = self.loaded
        dataset = TokenDataset(as_tokens(ids), loaded.input_format, None, loaded.padding == "max_length")
        dataset.batch_texts = texts
        if self.packed:
            most = LengthBatchSampler(dataset.lengths, self._together, None, max_tokens=self.batch_tokens).most_texts
            dataset.pack_evaluation(self.batch_tokens, most)
        device = loaded.trainer.strategy.root_device
        with loaded.trainer.precision_plugin.predict_step_context():
            output = self.model.predict_step(dataset.__getitems__(range(len(ids))).to(device), 0)
        return output["logits"].float().cpu().numpy()

    def predictions(self, logits: np.ndarray) -> Predictions:
        """Return what logits (N, C) mean, as ``LoadedRun.predict`` does."""
        names, task = self.model.label_names, self.model.task
        return Predictions(logits, None, names, np.arange(len(logits)), task=task, thresholds=self.thresholds)


class SharedWeights:
    """Weights in memory, each once, whatever the number of models that have it."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}
        self._tokenizers: dict[str, Any] = {}

    def tokenizer(self, tokenizer: Any) -> Any:
        """Return the one that makes the same tokens, if there is one, or the tokenizer itself."""
        return self._tokenizers.setdefault(tokenizer.backend_tokenizer.to_str(), tokenizer)

    def share(self, model: nn.Module) -> tuple[int, int]:
        """Let a model's weights be those that are known where they are equal, and know the others from now on.

        Nothing may change a weight in place from then on. Returns the bytes of all its weights, and of the known ones.
        """
        total = known = 0
        for weight in model.parameters():
            data = weight.data
            # As bytes, since NumPy has no bfloat16.
            content = data.cpu().contiguous().view(-1).view(torch.uint8).numpy()
            key = hashlib.sha256(content.data).digest(), data.shape, data.dtype, data.device
            first = self._known.setdefault(key, data)
            total += data.nbytes
            if first is not data:
                weight.data = first
                known += data.nbytes
        return total, known


def as_tokens(ids: Sequence[Any]) -> TokenRows:
    """Return token ids of texts of several requests as ``tokenize`` gives them."""
    sides = zip(*ids, strict=True) if isinstance(ids[0], tuple) else [ids]
    return TokenRows(*(pa.chunked_array([pa.array(side, pa.list_(pa.int32()))]) for side in sides))
