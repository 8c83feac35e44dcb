"""Encodes texts as in training, where the tokenizer's own truncation cannot: keeps both ends, or reads windows.

lightning_lora copies this file into exports. It needs numpy and tokenizers; the README.md beside it shows its use.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


class Encoder:
    """Turns texts into token ids and computes their logits.

    Args:
        folder: Holds ``tokenizer.json`` and ``lightning_lora.json``.
        batch_size: Sequences that the model is given at a time.
    """

    def __init__(self, folder: str | Path, batch_size: int = 32) -> None:
        self.settings = json.loads((Path(folder) / "lightning_lora.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.batch_size = batch_size

    def sequences(self, ids: list[int]) -> list[list[int]]:
        """The ids of one text, cut to ``max_length`` and with special tokens; or all of it, in windows."""
        prefix, suffix = self.settings["prefix"], self.settings["suffix"]
        room = self.settings["max_length"] - len(prefix) - len(suffix)
        parts = [ids]
        if len(ids) > room and self.settings["truncation"] == "windows":
            starts = [*range(0, len(ids) - room, room - self.settings["window_overlap"]), len(ids) - room]
            parts = [ids[start : start + room] for start in starts]
        elif len(ids) > room:
            head = {"head": room, "tail": 0, "both": room // 4}[self.settings["truncation"]]
            parts = [ids[:head] + ids[len(ids) - (room - head) :]]
        return [prefix + part + suffix or [self.settings["pad_id"]] for part in parts]

    def logits(self, texts: Sequence[str], run: Callable[..., NDArray]) -> NDArray:
        """Logits (texts, classes); their softmax gives the probabilities, of several labels a text their sigmoid.

        Args:
            texts: The texts.
            run: The model: takes ``input_ids`` and ``attention_mask`` (B, T) and returns logits (B, classes).
        """
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        documents = [self.sequences(each.ids) for each in encoded]
        rows = [ids for sequences in documents for ids in sequences]
        lengths = np.array([len(ids) for ids in rows])
        width = self.settings["max_length"] if self.settings["padding"] == "max_length" else lengths.max()
        input_ids = np.full((len(rows), width), self.settings["pad_id"], dtype=np.int64)
        for row, ids in zip(input_ids, rows, strict=True):
            row[: len(ids)] = ids
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        parts = [slice(start, start + self.batch_size) for start in range(0, len(rows), self.batch_size)]
        logits = np.concatenate([run(input_ids=input_ids[part], attention_mask=mask[part]) for part in parts])
        if self.settings["truncation"] != "windows":
            return logits
        starts = np.cumsum([0] + [len(sequences) for sequences in documents[:-1]])
        if self.settings.get("task", "single_label") != "single_label":  # the mean of probabilities, or of numbers
            several = self.settings["task"] == "multi_label"
            values = 1 / (1 + np.exp(-logits.astype(np.float64))) if several else logits.astype(np.float64)
            counts = np.array([len(sequences) for sequences in documents])[:, None]
            means, eps = np.add.reduceat(values, starts) / counts, np.finfo(np.float64).eps
            clipped = np.clip(means, eps, 1 - eps) if several else means
            return (np.log(clipped / (1 - clipped)) if several else means).astype(np.float32)
        # A document's probabilities are the mean of its windows'; the softmax of their sum's log is the same.
        exponents = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
        sums = np.add.reduceat(exponents / exponents.sum(axis=1, keepdims=True), starts)
        return np.log(np.maximum(sums, np.finfo(np.float64).tiny)).astype(np.float32)
