"""Batches of texts of similar length."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_lora.data.order import (
    PACKED_EVALUATION_FACTOR,
    BatchBy,
    equal_cuts,
    evaluation_batches,
    rounded_lengths,
    training_batches,
)
from lightning_lora.data.packing import PackedShape, evaluation_shapes, pack, training_shapes
from lightning_lora.data.pairs import Text
from lightning_lora.data.tokens import InputFormat, TokenRows


class MicroBatch(list[int]):
    """Positions of the rows of one batch: of an optimizer step, or of a part of it where gradients accumulate.

    Args:
        rows: The positions.
        step_weight: What the mean loss of these rows is multiplied by, so that the average over the micro-batches of
            the step, and over the processes, is the mean over the rows of the step. 0 for a row that is only there
            because none was left for this process.
        micro_batch_weight: The same within the micro-batch: the average over processes is the mean over its rows.
        epoch: The epoch that they are seen in.
    """

    def __init__(
        self, rows: Iterable[int], step_weight: float = 1.0, micro_batch_weight: float = 1.0, epoch: int = 0
    ) -> None:
        super().__init__(rows)
        self.step_weight = step_weight
        self.micro_batch_weight = micro_batch_weight
        self.epoch = epoch


class TextBatch(dict[str, Any]):
    """A batch; what is asked of it by name is in the docstring of ``TokenDataset``."""

    #: What is read on the CPU.
    STAYS = ("rows", "shape")

    def to(self, device: Any, **kwargs: Any) -> "TextBatch":
        """Move what the model reads; a packed batch holds the labels once more, and its ``labels`` stay."""
        stay = (*self.STAYS, "labels") if "packed" in self else self.STAYS
        moves = {n: v for n, v in self.items() if isinstance(v, torch.Tensor) and n not in stay}
        return TextBatch(self | {name: value.to(device, non_blocking=True) for name, value in moves.items()})


@dataclass(eq=False)
class TokenDataset(Dataset):
    """Rows of one split as the model sees them; a batch is asked for whole, by its positions.

    A batch is a dict: ``input_ids`` and ``attention_mask`` (int64, (B, T)), ``labels`` (absent when unknown; int64
    (B,), float32 (B, C) with 0 or 1 for each of several labels, float32 (B,) of numbers), ``rows`` (int64, (B,),
    position in the split), ``num_tokens`` (int, without padding), ``step_weight`` and ``micro_batch_weight`` (float,
    see ``MicroBatch``). Where long texts are split, ``input_ids`` and ``attention_mask`` hold W windows instead of B
    texts, and ``documents`` (int64, (W,)) says to which of the B rows each belongs. Where ``packing`` is set,
    ``packed`` (int64, flat) and its ``shape`` (a ``PackedShape``), and whether that is ``static``, stand in place of
    ``input_ids``, ``attention_mask`` and ``documents``. Where ``batch_texts`` is set, ``texts`` (B strings, or pairs of
    them). For a model that reads the token types of pairs, ``token_type_ids`` (int64, (B, T)), or as many more in
    ``packed``.
    """

    tokens: TokenRows
    input_format: InputFormat
    labels: np.ndarray | None
    pad_to_max: bool

    def __post_init__(self) -> None:
        self.lengths = self.input_format.input_lengths(self.tokens)
        #: The static shapes of packed batches, ascending; None for padded ones.
        self.packing: tuple[PackedShape, ...] | None = None
        #: The texts, where batches are to hold them.
        self.batch_texts: Sequence[Text] | None = None

    def pack_like(self, batches: Sequence[Sequence[int]], share: float = 1.0) -> None:
        """Pack batches from now on, in shapes chosen for batches of rows like these, a share of those of an epoch."""
        several = [np.asarray(batch) for batch in batches]
        self.packing = training_shapes(self._layout(self.longest), self.lengths, several, share)

    def pack_evaluation(self, max_tokens: int, texts: int) -> None:
        """Pack batches from now on, of at most so many tokens and texts, in shapes that do not depend on the texts."""
        self.packing = evaluation_shapes(self._layout(self.input_format.max_length), max_tokens, texts)

    def _layout(self, longest: int) -> PackedShape:
        """What packed batches have in common, without room for a text."""
        width = self.labels.shape[1] if self.labels is not None and self.labels.ndim == 2 else 0
        ours = self.input_format
        layout = ours.keep == "windows", bool(ours.types), width, self.label_type is np.float32
        return PackedShape(0, 0, 0, longest, ours.pad_id, *layout)

    @property
    def label_type(self) -> type[np.generic]:
        """The dtype of a batch's labels."""
        several = self.labels is not None and (self.labels.ndim == 2 or self.labels.dtype.kind == "f")
        return np.float32 if several else np.int64

    @property
    def longest(self) -> int:
        """Tokens of the longest text or window."""
        return min(int(self.lengths.max()), self.input_format.max_length)

    @property
    def padded_lengths(self) -> np.ndarray:
        """Tokens that each row is padded to among rows of its length; of a row of several windows, in all of them."""
        if self.input_format.keep == "windows":
            return np.maximum(rounded_lengths(self.lengths), self.input_format.max_length if self.pad_to_max else 0)
        return np.full(len(self), self.input_format.max_length) if self.pad_to_max else self._capped(self.lengths)

    def _capped(self, lengths: Any) -> Any:
        return np.minimum(rounded_lengths(lengths), self.input_format.max_length)

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, rows: Sequence[int], epoch: int) -> list[Any]:
        """Token ids of the rows' whole texts, of a pair two arrays; the same in every epoch."""
        del epoch
        return [self.tokens[row] for row in rows]

    def __getitems__(self, rows: Sequence[int]) -> TextBatch:
        """The batch of the given rows: packed, or padded to about its longest input, or to ``max_length`` if asked."""
        part = rows if isinstance(rows, MicroBatch) else MicroBatch(rows)
        whole = self.ids(part, part.epoch)
        documents = [self.input_format.inputs(ids) for ids in whole]
        types = [self.input_format.token_types(ids) for ids in whole] if self.input_format.types else []
        inputs = list(itertools.chain.from_iterable(documents))
        owners = np.repeat(np.arange(len(documents)), [len(windows) for windows in documents])
        labels = None if self.labels is None else self.labels[rows].astype(self.label_type, copy=False)
        batch = TextBatch(
            rows=torch.as_tensor(np.asarray(rows, dtype=np.int64)),
            num_tokens=sum(map(len, inputs)),
            step_weight=part.step_weight,
            micro_batch_weight=part.micro_batch_weight,
        )
        if self.packing is not None:
            flat, shape = pack(self.packing, inputs, owners, labels, len(documents), part.step_weight, types)
            batch |= {"packed": flat, "shape": shape, "static": shape in self.packing}
        else:
            batch |= self._padded(inputs, types)
            if self.input_format.keep == "windows":
                batch["documents"] = torch.from_numpy(owners)
        if labels is not None:
            batch["labels"] = torch.from_numpy(labels)
        if self.batch_texts is not None:
            batch["texts"] = [self.batch_texts[row] for row in rows]
        return batch

    def _padded(self, inputs: Sequence[np.ndarray], types: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(ids) for ids in inputs])
        width = self.input_format.max_length if self.pad_to_max else int(self._capped(lengths.max()))
        input_ids = np.full((len(inputs), width), self.input_format.pad_id, dtype=np.int64)
        for i, ids in enumerate(inputs):
            input_ids[i, : len(ids)] = ids
        mask = np.arange(width) < lengths[:, None]
        batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask).long()}
        if types:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            batch["token_type_ids"][torch.from_numpy(mask)] = torch.from_numpy(np.concatenate(types))
        return batch


class ResumableLoader(DataLoader):
    """A loader that resumes within an epoch, with the batches that were not taken yet.

    Its batches must be made in this process (``num_workers=0``): then those taken are those that were trained on.
    """

    batch_sampler: "LengthBatchSampler"
    #: Called before each batch of an epoch and at its end, with the number of those that were taken.
    before_batch: Callable[[int], None] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            if self.before_batch is not None:
                self.before_batch(self.batch_sampler.taken)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch."""
        return {"position": list(self.batch_sampler.resume_at or self.batch_sampler.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes where ``state_dict`` was taken."""
        self.batch_sampler.resume_at = tuple(state["position"])


def batches_per_epoch(rows: int, batch_size: int, accumulate: int = 1, by: BatchBy = "texts") -> int:
    """Return the number of training batches that so many rows make; those of one process, however many there are.

    Args:
        rows: Training rows.
        batch_size: Rows a batch, of all processes together.
        accumulate: Batches a step.
        by: What batches have in equal number; with "tokens" each step has all its parts.
    """
    if by == "tokens":
        return math.ceil(rows / (batch_size * accumulate)) * accumulate
    return math.ceil(rows / batch_size)


@dataclass(eq=False)
class LengthBatchSampler(Sampler[list[int]]):
    """Batches of similar length: shuffled in each epoch with a seed, sorted by length without one.

    With ``accumulate`` parts a step, what one step sees is cut into parts of ``batch_size``: the rows of a
    step are those of a batch of ``accumulate * batch_size``. Several processes deal the rows of each part out in
    turn: sorted by length as they are, each gets as much to do, and as many batches.

    Where batches have as many tokens, and not as many texts, a step's loss counts as much as it has texts: each text
    weighs the same in an epoch, as it does with batches of as many texts.

    Args:
        lengths: Tokens of each row; for evaluation what it is padded to.
        batch_size: Rows a batch, of all processes together; for evaluation see ``evaluation_batches``.
        seed: Of the order, or None for evaluation.
        accumulate: Parts a step.
        rank: Of this process.
        processes: Their number.
        by: What batches have in equal number.
        max_tokens: Tokens of an evaluation batch at most, where these are packed.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int | None
    accumulate: int = 1
    rank: int = 0
    processes: int = 1
    by: BatchBy = "texts"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        self.epoch = 0
        #: The epoch of the latest pass, and how many of its batches have been taken.
        self.position = (0, 0)
        #: Where the next pass resumes: the batches of that epoch that were taken before are left out.
        self.resume_at: tuple[int, int] | None = None
        # Lightning sets the epoch of ``loader.batch_sampler.sampler``.
        self.sampler = self
        self._evaluated: list[np.ndarray] = []
        if self.seed is None:
            self._evaluated = evaluation_batches(self.lengths, self.batch_size, self.max_tokens)

    @property
    def most_texts(self) -> int:
        """Texts of a packed evaluation batch at most."""
        return self.batch_size * PACKED_EVALUATION_FACTOR

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, so that each epoch has its own order."""
        self.epoch = epoch

    @property
    def taken(self) -> int:
        """Batches of this epoch that were taken, before it was resumed too."""
        epoch, taken = self.resume_at or self.position
        return taken if epoch == self.epoch else 0

    def __len__(self) -> int:
        if self.seed is None:
            return len(self._evaluated)
        return batches_per_epoch(len(self.lengths), self.batch_size, self.accumulate, self.by)

    @property
    def _steps(self) -> int:
        return math.ceil(len(self.lengths) / (self.batch_size * self.accumulate))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, taken = self.resume_at or (self.epoch, 0)
        taken = taken if epoch == self.epoch else 0
        self.resume_at = None
        for i, batch in enumerate(self._batches()):
            if i >= taken:
                self.position = (self.epoch, i + 1)
                yield batch

    def largest(self) -> list[int]:
        """The batch of this epoch with the most tokens, padding included, among the first ten thousand."""
        return max(self.sample(), key=lambda batch: len(batch) * int(rounded_lengths(self.lengths[batch]).max()))

    def sample(self) -> list[MicroBatch]:
        """The first ten thousand batches of this epoch at most."""
        return list(itertools.islice(self._batches(), 10_000))

    def _batches(self) -> Iterator[MicroBatch]:
        if self.seed is None:
            for batch in self._evaluated:
                yield self._mine(batch, 1.0)
            return
        for step in training_batches(self.lengths, self.accumulate * self.batch_size, self.seed, self.epoch, self.by):
            if self.by == "tokens":
                weight = self._steps * self.accumulate / len(self.lengths)
                cuts = equal_cuts(self.lengths, step, min(self.accumulate, len(step)), self.batch_size // 8)
            else:
                weight = self.accumulate / len(step)
                cuts = np.append(np.arange(0, len(step), self.batch_size), len(step))
            for start, end in itertools.pairwise(cuts):
                yield self._mine(step[start:end], (end - start) * weight)
            for _ in range(self.accumulate - len(step) if self.by == "tokens" else 0):  # a step of few, long texts
                yield MicroBatch(step[:1].tolist(), 0.0, 0.0, self.epoch)

    def _mine(self, part: np.ndarray, step_weight: float) -> MicroBatch:
        """The rows of a part that this process gets."""
        mine = part[self.rank :: self.processes]
        fraction = len(mine) * self.processes / len(part)
        return MicroBatch((mine if len(mine) else part[:1]).tolist(), step_weight * fraction, fraction, self.epoch)
