"""Batches of texts of similar length."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_lora.data.splits import position_type
from lightning_lora.data.tokens import InputFormat, TokenRows
from lightning_lora.seeding import stream_seed

#: A batch is padded to a multiple of so many tokens, up to eight times as many; see ``padded_widths``.
WIDTH_STEP = 8
#: So many batches are sorted by length together: enough for little padding, few enough for a random order.
POOL_BATCHES = 50
#: Evaluation takes up to so many times as many short rows together as of the longest (measured: docs/LOG.md).
EVALUATION_FACTOR = 2
#: So many rows' lengths are looked at together.
_ROWS_AT_ONCE = 2**20
#: What the batches of an epoch have in equal number.
BatchBy = Literal["texts", "tokens"]


def padded_widths(lengths: Any) -> Any:
    """What texts of so many tokens are padded to: multiples of an eighth of the next power of two, and of WIDTH_STEP.

    Few different widths: each costs time once, and memory that is kept, as oneDNN generates code for its products.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    steps = np.maximum(2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64) // 8, WIDTH_STEP)
    return -(-lengths // steps) * steps


class StepPart(list[int]):
    """Positions of the rows of one batch: an optimizer step's, or a part of it.

    Args:
        rows: The positions.
        share: What the mean loss of these rows is multiplied by, so that the average over the parts of the
            step, and over the processes that share it, is the mean over the rows of the step. Nought where there was
            no row left for this process: it then gets one that is not counted.
        part_share: The same within the part: so the average over processes is the mean over the rows of the part.
        epoch: The epoch that they are seen in.
    """

    def __init__(self, rows: Iterable[int], share: float = 1.0, part_share: float = 1.0, epoch: int = 0) -> None:
        super().__init__(rows)
        self.share = share
        self.part_share = part_share
        self.epoch = epoch


class TokenDataset(Dataset):
    """Rows of one split as the model sees them; a batch is asked for whole, by its positions.

    A batch is a dict: ``input_ids`` and ``attention_mask`` (int64, (B, T)), ``labels`` (int64, (B,), absent
    when unknown), ``rows`` (int64, (B,), position in the split), ``num_tokens`` (int, without padding),
    ``share`` and ``part_share`` (float, see ``StepPart``). Where long texts are split, ``input_ids`` and
    ``attention_mask`` hold W windows instead of B texts, and ``documents`` (int64, (W,)) says to which of the B rows
    each belongs.
    """

    def __init__(self, tokens: TokenRows, frame: InputFormat, labels: np.ndarray | None, pad_to_max: bool) -> None:
        self.tokens = tokens
        self.frame = frame
        self.labels = labels
        self.pad_to_max = pad_to_max
        self.lengths = frame.input_lengths(tokens)

    @property
    def widths(self) -> np.ndarray:
        """Tokens that each row is padded to among rows of its length; of a row of several windows, in all of them."""
        if self.frame.keep == "windows":
            return np.maximum(padded_widths(self.lengths), self.frame.max_length if self.pad_to_max else 0)
        return np.full(len(self), self.frame.max_length) if self.pad_to_max else self._capped(self.lengths)

    def _capped(self, lengths: Any) -> Any:
        return np.minimum(padded_widths(lengths), self.frame.max_length)

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, rows: Sequence[int], epoch: int) -> list[np.ndarray]:
        """Token ids of the rows' whole texts; the same in every epoch."""
        del epoch
        return [self.tokens[row] for row in rows]

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Any]:
        """The batch of the given rows, padded to about its longest input, or to ``max_length`` if asked for."""
        frame = self.frame
        part = rows if isinstance(rows, StepPart) else StepPart(rows)
        documents = [frame.inputs(ids) for ids in self.ids(part, part.epoch)]
        inputs = [ids for windows in documents for ids in windows]
        lengths = np.array([len(ids) for ids in inputs])
        width = frame.max_length if self.pad_to_max else int(self._capped(lengths.max()))
        input_ids = np.full((len(inputs), width), frame.pad_id, dtype=np.int64)
        for i, ids in enumerate(inputs):
            input_ids[i, : len(ids)] = ids
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
            "rows": torch.as_tensor(np.asarray(rows, dtype=np.int64)),
            "num_tokens": int(lengths.sum()),
            "share": part.share,
            "part_share": part.part_share,
        }
        if frame.keep == "windows":
            counts = torch.tensor([len(windows) for windows in documents])
            batch["documents"] = torch.repeat_interleave(torch.arange(len(documents)), counts)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows].astype(np.int64, copy=False))
        return batch


class OrderedBatches(Sequence[np.ndarray]):
    """Batches that are cut from one array as they are asked for; a list of them takes twenty times its memory.

    Args:
        order: Positions of rows.
        cuts: Where each batch begins, and the last one ends.
        places: Which batch comes when; where there are more they follow.
    """

    def __init__(self, order: np.ndarray, cuts: np.ndarray, places: np.ndarray) -> None:
        self.order = order
        self.cuts = cuts
        self.places = places

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(self.places[index]) if index < len(self.places) else index
        return self.order[self.cuts[place] : self.cuts[place + 1]]


def training_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, by: BatchBy = "texts"
) -> Sequence[np.ndarray]:
    """Every position once, in random batches of similar length; a fixed function of its arguments.

    Positions are shuffled, cut into pools of ``POOL_BATCHES`` batches, sorted by length within each pool,
    cut into batches, and the batches shuffled.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch; with "tokens", on average over the batches.
        seed: Of the order.
        epoch: Of which the order is.
        by: What batches have in equal number: "texts" (one that is not full comes last) or "tokens" (as nearly as
            whole texts allow). Their number is the same.
    """
    rng = np.random.Generator(np.random.PCG64(stream_seed(seed, f"order/{epoch}")))
    order = rng.permutation(np.arange(len(lengths), dtype=position_type(len(lengths))))
    pool = batch_size * POOL_BATCHES
    for i, start in enumerate(range(0, len(order), pool)):
        part = order[start : start + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        # Batches by tokens run on into the next pool: there and back, so that neighbours are alike.
        order[start : start + pool] = part[::-1] if by == "tokens" and i % 2 else part
    count = math.ceil(len(order) / batch_size)
    if by == "tokens":
        return OrderedBatches(order, equal_cuts(lengths, order, count, batch_size // 8), rng.permutation(count))
    cuts = np.minimum(np.arange(count + 1) * batch_size, len(order))
    return OrderedBatches(order, cuts, rng.permutation(len(order) // batch_size))


def equal_cuts(lengths: np.ndarray, order: np.ndarray, count: int, unit: int = 1) -> np.ndarray:
    """Where to cut rows, sorted by length, into so many parts with nearly as many tokens each, none without a row.

    A text counts with the tokens that it is padded to.

    Args:
        lengths: Tokens of each row.
        order: Positions of at least ``count`` rows.
        count: Parts.
        unit: Parts have a multiple of so many rows, but for the last and where there are too few: what several
            processes share out evenly.
    """
    at_once = max(_ROWS_AT_ONCE, 4 * math.ceil(len(order) / count))
    parts = np.array_split(order, math.ceil(len(order) / at_once))
    tokens = np.cumsum([padded_widths(lengths[part]).sum() for part in parts])
    counts = np.diff(np.rint(count * tokens / tokens[-1]).astype(np.int64), prepend=0)
    cuts, before = [np.zeros(1, np.int64)], 0
    for part, number in zip(parts, counts, strict=True):
        cuts.append(before + _cuts(padded_widths(lengths[part]), int(number), max(unit, 1))[1:])
        before += len(part)
    return np.concatenate(cuts)


def _cuts(widths: np.ndarray, count: int, unit: int) -> np.ndarray:
    costs, steps = widths, np.arange(count + 1)
    for _ in range(3):
        ends = np.cumsum(costs)
        wanted = ends[-1] * steps[1:-1] / count
        row = np.searchsorted(ends, wanted)
        # The cut is before or after the row in which it falls, whichever is nearer.
        inner = row + (wanted - (ends[row] - costs[row]) > ends[row] - wanted)
        rounded = np.concatenate(([0], (inner + unit // 2) // unit * unit, [len(widths)]))
        # One row a part at least, and as many left as there are parts to come.
        cuts = np.minimum(np.maximum.accumulate(rounded - steps), len(widths) - count) + steps
        # Once more, with what each row is padded to there.
        costs = np.repeat(np.maximum.reduceat(widths, cuts[:-1]), np.diff(cuts))
    return cuts


def evaluated_together(wanted: int | None) -> int:
    """How many texts are evaluated together: as wanted, or where that is left open what is fast on this machine."""
    return (256 if torch.cuda.is_available() else 32) if wanted is None else wanted


def evaluation_batches(widths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Every position once, longest first: the least padding, and the largest batch shows itself at once.

    Args:
        widths: Tokens that each row is padded to, as by ``TokenDataset.widths``.
        batch_size: Rows of the first batch. Those of shorter rows have more, up to ``EVALUATION_FACTOR`` times as many,
            for at most as many tokens.
    """
    order = np.argsort(-widths, kind="stable")
    widths = widths[order]
    batches, start = [], 0
    while start < len(order):
        count = min(batch_size * int(widths[0]) // max(int(widths[start]), 1), batch_size * EVALUATION_FACTOR)
        batches.append(order[start : start + count])
        start += count
    return batches


class ResumableLoader(DataLoader):
    """A loader that goes on within an epoch, with the batches that were not taken yet.

    Its batches must be made in this process (``num_workers=0``): then those taken are those that were trained on.
    """

    batch_sampler: "LengthBatchSampler"
    #: Called before each batch is taken, with the number of those that were taken in this epoch.
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
        """Where it is."""
        return {"position": list(self.batch_sampler.go_on_position or self.batch_sampler.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken."""
        epoch, taken = state["position"]
        self.batch_sampler.go_on_at((epoch, taken))


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of similar length: shuffled anew each epoch with a seed, sorted by length without one.

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
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int | None,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
        by: BatchBy = "texts",
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.processes = processes
        self.by: BatchBy = by
        self.epoch = 0
        #: The epoch of the latest pass, and how many of its batches have been taken.
        self.position = (0, 0)
        self._go_on_at: tuple[int, int] | None = None
        # Lightning tells the epoch to ``loader.batch_sampler.sampler``, as torch's own batch samplers have one.
        self.sampler = self
        self._evaluated = evaluation_batches(lengths, batch_size) if seed is None else []

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, so that each epoch has its own order."""
        self.epoch = epoch

    @property
    def go_on_position(self) -> tuple[int, int] | None:
        """Where the next pass goes on, if it was told so."""
        return self._go_on_at

    @property
    def taken(self) -> int:
        """Batches of this epoch that were taken, or that are left out as they were taken before."""
        epoch, taken = self._go_on_at or self.position
        return taken if epoch == self.epoch else 0

    def go_on_at(self, position: tuple[int, int]) -> None:
        """Leaves out, in that epoch, the batches that were taken before."""
        self._go_on_at = position

    def __len__(self) -> int:
        if self.seed is None:
            return len(self._evaluated)
        if self.by == "tokens":
            return self._steps * self.accumulate
        return math.ceil(len(self.lengths) / self.batch_size)

    @property
    def _steps(self) -> int:
        return math.ceil(len(self.lengths) / (self.batch_size * self.accumulate))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, taken = self._go_on_at or (self.epoch, 0)
        taken = taken if epoch == self.epoch else 0
        self._go_on_at = None
        for i, batch in enumerate(self._batches()):
            if i >= taken:
                self.position = (self.epoch, i + 1)
                yield batch

    def largest(self) -> list[int]:
        """The batch of this epoch with the most tokens, padding included, among the first ten thousand."""
        batches = itertools.islice(self._batches(), 10_000)
        return max(batches, key=lambda batch: len(batch) * int(padded_widths(self.lengths[batch]).max()))

    def _batches(self) -> Iterator[list[int]]:
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
                yield StepPart(step[:1].tolist(), 0.0, 0.0, self.epoch)

    def _mine(self, part: np.ndarray, share: float) -> StepPart:
        """The rows of a part that this process gets."""
        mine = part[self.rank :: self.processes]
        fraction = len(mine) * self.processes / len(part)
        return StepPart((mine if len(mine) else part[:1]).tolist(), share * fraction, fraction, self.epoch)
