"""Which rows stand together in a batch, and in which order: a fixed function of lengths, seed and epoch."""

import math
from collections.abc import Iterator
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
#: What the batches of an epoch have in equal number.
BatchBy = Literal["texts", "tokens"]


def rounded_lengths(lengths: Any) -> Any:
    """What texts of so many tokens are padded to: multiples of an eighth of the next power of two, and of LENGTH_STEP.

    Few different lengths: each costs time once, and memory that is kept, as oneDNN generates code for its products.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    steps = np.maximum(2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64) // 8, LENGTH_STEP)
    return -(-lengths // steps) * steps


def training_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, by: BatchBy = "texts"
) -> Iterator[np.ndarray]:
    """Yield every position once, in random batches of similar length; a fixed function of its arguments.

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
        cuts, places = equal_cuts(lengths, order, count, batch_size // 8), rng.permutation(count)
    else:
        cuts, full = np.minimum(np.arange(count + 1) * batch_size, len(order)), len(order) // batch_size
        places = np.append(rng.permutation(full), np.arange(full, count))
    for place in places:
        yield order[cuts[place] : cuts[place + 1]]


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
    padded_lengths, unit = rounded_lengths(lengths[order]), max(unit, 1)
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


def evaluation_batches(lengths: np.ndarray, batch_size: int, max_tokens: int | None = None) -> list[np.ndarray]:
    """Every position once, longest first: the least padding, and the largest batch shows itself at once.

    Args:
        lengths: Tokens of each row; for padded batches those that it is padded to (``TokenDataset.padded_lengths``).
        batch_size: Rows of the first padded batch. Those of shorter rows have more, up to ``EVALUATION_FACTOR`` times
            as many, for at most as many tokens. Packed ones have up to ``PACKED_EVALUATION_FACTOR`` times as many.
        max_tokens: Tokens of a packed batch at most, but for a longer row, which is a batch of its own; None of padded
            batches.
    """
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    ends = np.cumsum(lengths)
    batches, start = [], 0
    while start < len(order):
        if max_tokens is None:
            most = batch_size * int(lengths[0]) // max(int(lengths[start]), 1)
            count = min(most, batch_size * EVALUATION_FACTOR)
        else:
            end = np.searchsorted(ends, ends[start] - lengths[start] + max_tokens, side="right")
            count = min(max(int(end) - start, 1), batch_size * PACKED_EVALUATION_FACTOR)
        batches.append(order[start : start + count])
        start += count
    return batches
