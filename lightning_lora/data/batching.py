"""Batches of texts of similar length."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from lightning_lora.data.tokens import InputFormat, Tokens
from lightning_lora.seeding import stream_seed

#: So many batches are sorted by length together: enough for little padding, few enough for a random order.
POOL_BATCHES = 50


class TokenDataset(Dataset):
    """Rows of one split as the model sees them; a batch is asked for whole, by its positions.

    A batch is a dict: ``input_ids`` and ``attention_mask`` (int64, (B, T)), ``labels`` (int64, (B,), absent
    when unknown), ``rows`` (int64, (B,), position in the split) and ``num_tokens`` (int, without padding).
    """

    def __init__(self, tokens: Tokens, frame: InputFormat, labels: np.ndarray | None, pad_to_max: bool) -> None:
        self.tokens = tokens
        self.frame = frame
        self.labels = labels
        self.pad_to_max = pad_to_max
        self.lengths = frame.input_lengths(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Any]:
        """The batch of the given rows, padded to its longest text, or to ``max_length`` if asked for."""
        frame = self.frame
        lengths = self.lengths[rows]
        width = frame.max_length if self.pad_to_max else int(lengths.max())
        input_ids = np.full((len(rows), width), frame.pad_id, dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : lengths[i]] = frame.input_ids(self.tokens[row])
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
            "rows": torch.as_tensor(np.asarray(rows, dtype=np.int64)),
            "num_tokens": int(lengths.sum()),
        }
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every position once, in random batches of similar length; a fixed function of its arguments.

    Positions are shuffled, cut into pools of ``POOL_BATCHES`` batches, sorted by length within each pool,
    cut into batches, and the batches shuffled.
    """
    rng = np.random.Generator(np.random.PCG64(stream_seed(seed, f"order/{epoch}")))
    order = rng.permutation(len(lengths))
    pool = batch_size * POOL_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Every position once, longest first: the least padding, and the largest batch shows itself at once."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of similar length: shuffled anew each epoch with a seed, sorted by length without one."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int | None) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        # Lightning tells the epoch to ``loader.batch_sampler.sampler``, as torch's own batch samplers have one.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, so that each epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            batches = evaluation_batches(self.lengths, self.batch_size)
        else:
            batches = training_batches(self.lengths, self.batch_size, self.seed, self.epoch)
        return (batch.tolist() for batch in batches)
