"""Which rows stand together in a batch, and in which order: a fixed function of lengths, seed and epoch."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from lightning_lora.data.splits import position_type
from lightning_lora.seeding import stream_seed

#: A batch is padded to a multiple of so many tokens, up to eight times as many; see ``rounded_lengths``.
LENGTH_STEP = 8
#: So many batches are sorted by length together: enough for little padding, few enough for a random order.
POOL_BATCHES = 50
#: Evaluation takes up to so many times as many short rows together as of the longest (measured: docs/LOG.md).
EVALUATION_FACTOR = 2
#: Texts of a packed batch at most, over those of the largest padded one.
PACKED_EVALUATION_FACTOR = 4
#: Rows whose lengths are summed at once.
_ROWS_AT_ONCE = 2**20
#: What the batches of an epoch have in equal number.
BatchBy = Literal["texts", "tokens"]


def rounded_lengths(lengths: Any) -> Any:
    """What texts of so many tokens are padded to: multiples of an eighth of the next power of two, and of LENGTH_STEP.

    Few different lengths: each costs time once, and memory that is kept, as oneDNN generates code for its products.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    steps = np.maximum(2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64) // 8, LENGTH_STEP)
    return -(-lengths // steps) * steps


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
    tokens = np.cumsum([rounded_lengths(lengths[part]).sum() for part in parts])
    counts = np.diff(np.rint(count * tokens / tokens[-1]).astype(np.int64), prepend=0)
    cuts, before = [np.zeros(1, np.int64)], 0
    for part, number in zip(parts, counts, strict=True):
        cuts.append(before + _cuts(rounded_lengths(lengths[part]), int(number), max(unit, 1))[1:])
        before += len(part)
    return np.concatenate(cuts)


def _cuts(padded_lengths: np.ndarray, count: int, unit: int) -> np.ndarray:
    costs, steps = padded_lengths, np.arange(count + 1)
    for _ in range(3):
        ends = np.cumsum(costs)
        wanted = ends[-1] * steps[1:-1] / count
        row = np.searchsorted(ends, wanted)
        # The cut is before or after the row in which it falls, whichever is nearer.
        inner = row + (wanted - (ends[row] - costs[row]) > ends[row] - wanted)
        rounded = np.concatenate(([0], (inner + unit // 2) // unit * unit, [len(padded_lengths)]))
        # One row a part at least, and as many left as there are parts to come.
        cuts = np.minimum(np.maximum.accumulate(rounded - steps), len(padded_lengths) - count) + steps
        # Once more, with what each row is padded to there.
        costs = np.repeat(np.maximum.reduceat(padded_lengths, cuts[:-1]), np.diff(cuts))
    return cuts


def default_eval_batch_size(wanted: int | None) -> int:
    """How many texts are evaluated together: as wanted, or where that is left open what is fast on this machine."""
    return (256 if torch.cuda.is_available() else 32) if wanted is None else wanted


def evaluation_batches(padded_lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Every position once, longest first: the least padding, and the largest batch shows itself at once.

    Args:
        padded_lengths: Tokens that each row is padded to, as by ``TokenDataset.padded_lengths``.
        batch_size: Rows of the first batch. Those of shorter rows have more, up to ``EVALUATION_FACTOR`` times as many,
            for at most as many tokens.
    """
    order = np.argsort(-padded_lengths, kind="stable")
    padded_lengths = padded_lengths[order]
    batches, start = [], 0
    while start < len(order):
        count = min(
            batch_size * int(padded_lengths[0]) // max(int(padded_lengths[start]), 1), batch_size * EVALUATION_FACTOR
        )
        batches.append(order[start : start + count])
        start += count
    return batches


def packed_evaluation_batches(lengths: np.ndarray, max_tokens: int, texts: int) -> list[np.ndarray]:
    """Every position once, longest first, with about as many tokens in each batch, as nothing is padded.

    Args:
        lengths: Tokens of each row.
        max_tokens: Tokens of a batch at most, but for a longer row, which is a batch of its own.
        texts: Rows of a batch at most.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    batches, start, before = [], 0, 0
    while start < len(order):
        end = int(np.searchsorted(ends, before + max_tokens, side="right"))
        end = min(max(end, start + 1), start + texts)
        batches.append(order[start:end])
        start, before = end, int(ends[end - 1])
    return batches
