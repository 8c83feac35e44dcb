"""Packed batches: texts laid end to end in one row, without padding between them.

A batch is one flat int64 tensor, so that it reaches a GPU in one copy, and has one of few static shapes, so that one
captured CUDA graph serves all batches of that shape. Krell et al. 2021 (arXiv:2107.02027) pack for the same reason.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

#: Static sizes chosen for a data set; more of them waste fewer tokens and take longer to capture (docs/LOG.md).
MOST_SIZES = 12
#: Sizes of evaluation batches, as shares of the largest; most batches have that one.
EVALUATION_SHARES = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
#: A size more must save so many unused tokens an epoch: what a GPU computes while it is captured (docs/LOG.md).
CAPTURE_TOKENS = 32_768
#: Sizes are multiples of so many tokens: what matrix units work on at a time.
SIZE_STEP = 64


@dataclass(unsafe_hash=True)  # not frozen, which Lightning refuses to cast (64-true, bf16-true)
class PackedShape:
    """The static shape of a packed batch.

    Args:
        tokens: T, tokens of the row, those that belong to no text included.
        inputs: W, texts or windows of texts that it has room for.
        texts: B, texts that it has room for.
        longest: Tokens of the longest text (or window) that there can be.
        pad_id: The token of what belongs to no text.
        windows: Whether several inputs may belong to one text.
        token_types: Whether each token has a type.
        label_width: C, where a text may have several labels, else 0.
        numbers: Whether labels are float32.
    """

    tokens: int
    inputs: int
    texts: int
    longest: int
    pad_id: int
    windows: bool
    token_types: bool = False
    label_width: int = 0
    numbers: bool = False

    @property
    def offsets(self) -> int:
        """Length of ``PackedViews.offsets``: what is left of the row is cut into texts of ``longest`` tokens too."""
        return self.inputs + 1 + -(-self.tokens // self.longest)

    @property
    def parts(self) -> list[int]:
        """Lengths of the flat tensor's parts: tokens, positions, types, offsets, documents, labels, count and scale."""
        types, labels = self.tokens * self.token_types, self.texts * max(1, self.label_width)
        return [self.tokens, self.tokens, types, self.offsets, self.inputs, labels, 1, 1]


@dataclass(frozen=True)
class PackedViews:
    """Views of the parts of a packed batch's flat tensor.

    Args:
        input_ids: (1, T).
        position_ids: Counted from 0 in each text, (1, T).
        token_type_ids: (1, T); None where tokens have no types.
        offsets: Where each text or window begins and the last one ends, from W + 2 on: texts that are not there have no
            token, and behind them comes what is left of the row, cut into texts of no more than ``longest`` tokens.
        documents: The text that each window belongs to, (W,); B for one that is not there.
        labels: (B,), of several labels (B, C).
        count: Texts that are there, ().
        scale: What the mean loss of the texts is multiplied by, float64, ().
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    offsets: Tensor
    documents: Tensor
    labels: Tensor
    count: Tensor
    scale: Tensor


def unpack(flat: Tensor, shape: PackedShape) -> PackedViews:
    """View the parts of a flat tensor that ``pack`` made."""
    ids, positions, types, offsets, documents, labels, count, scale = flat.split(shape.parts)
    if shape.numbers:
        labels = labels.view(torch.float64).float()
    labels = labels.view(-1, shape.label_width) if shape.label_width else labels
    rows = ids[None], positions[None], types[None] if shape.token_types else None
    return PackedViews(*rows, offsets, documents, labels, count[0], scale.view(torch.float64)[0])


def training_shapes(
    layout: PackedShape, lengths: np.ndarray, batches: Sequence[np.ndarray], share: float = 1.0
) -> tuple[PackedShape, ...]:
    """Choose static shapes, ascending, for batches like the given ones.

    Args:
        layout: What they have in common; its ``longest`` is that of all rows.
        lengths: Tokens of each row, in all its windows.
        batches: Positions of the rows of each batch; other batches may be as large.
        share: Of the batches of an epoch that these are.
    """
    totals = np.array([int(lengths[batch].sum()) for batch in batches])
    windows = -(-lengths // layout.longest)
    texts, inputs = max(map(len, batches)), max(int(windows[batch].sum()) for batch in batches)
    sizes = choose_sizes(totals, MOST_SIZES, CAPTURE_TOKENS * share)
    longest_of = np.zeros(len(sizes), np.int64)
    np.maximum.at(longest_of, np.searchsorted(sizes, totals), [lengths[batch].max() for batch in batches])
    cut = [min(_power_of_two(int(each)), layout.longest) for each in longest_of]
    room = replace(layout, inputs=inputs, texts=texts)
    return tuple(replace(room, tokens=size, longest=each) for size, each in zip(sizes, cut, strict=True))


def evaluation_shapes(layout: PackedShape, max_tokens: int, texts: int) -> tuple[PackedShape, ...]:
    """The static shapes, ascending, of evaluation batches of any texts: a pass that was captured serves others too.

    Args:
        layout: What they have in common; its ``longest`` is that of any text.
        max_tokens: Tokens of a batch at most, but for a single text that is longer in all its windows.
        texts: Texts of a batch at most.
    """
    longest = layout.longest
    sizes = {math.ceil(max_tokens * share / SIZE_STEP) * SIZE_STEP for share in EVALUATION_SHARES}
    # Kernels for short texts are faster.
    lengths = {min(1 << power, longest) for power in range(6, max(longest.bit_length() + 1, 7))}
    room = replace(layout, inputs=texts + max_tokens // longest if layout.windows else texts, texts=texts)
    pairs = sorted(itertools.product(sizes, lengths))
    return tuple(replace(room, tokens=size, longest=each) for size, each in pairs)


def _shape_for(shapes: Sequence[PackedShape], tokens: int, inputs: int, texts: int, longest: int) -> PackedShape:
    """The first of ascending shapes that has room; a larger one where none has."""
    for each in shapes:
        if each.tokens >= tokens and each.longest >= longest and each.inputs >= inputs and each.texts >= texts:
            return each
    last, size = shapes[-1], math.ceil(tokens / SIZE_STEP) * SIZE_STEP
    inputs, texts, longest = max(inputs, last.inputs), max(texts, last.texts), max(longest, last.longest)
    return replace(last, tokens=size, inputs=inputs, texts=texts, longest=longest)


def pack(
    shapes: Sequence[PackedShape],
    inputs: Sequence[np.ndarray],
    documents: np.ndarray,
    labels: np.ndarray | None,
    count: int,
    scale: float = 1.0,
    types: Sequence[np.ndarray] = (),
) -> tuple[Tensor, PackedShape]:
    """Lay texts end to end.

    Args:
        shapes: The static shapes, ascending: the first that has room is taken, or one of its own where none has.
        inputs: Token ids of each text or window.
        documents: The text, from 0, that each belongs to.
        labels: Of the texts, if they are known.
        count: Texts.
        scale: What the mean loss is multiplied by.
        types: Token types of each text, where tokens have any.

    Returns:
        The flat tensor, int64 (``sum(shape.parts)``,), and its shape.
    """
    lengths = np.fromiter((len(ids) for ids in inputs), np.int64, len(inputs))
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    shape = _shape_for(shapes, total, len(inputs), count, int(lengths.max()))
    flat = empty(shape)
    row, positions, kinds, offsets, owners, classes, number, factor = np.split(flat, np.cumsum(shape.parts)[:-1])
    np.concatenate(inputs, out=row[:total], casting="unsafe")
    if types:
        kinds[:total] = np.concatenate(types)
    positions[:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
    offsets[shape.inputs :] = np.minimum(offsets[shape.inputs :] + total, shape.tokens)
    offsets[1 : len(inputs) + 1] = ends
    offsets[len(inputs) + 1 : shape.inputs] = total
    owners[: len(inputs)] = documents
    if labels is not None:
        values = labels.astype(np.float64).view(np.int64) if shape.numbers else labels
        classes[: labels.size] = values.ravel()
    number[0], factor[:] = count, np.array([scale]).view(np.int64)
    return torch.from_numpy(flat), shape


def _power_of_two(number: int) -> int:
    """The next power of two, from 64 on: for each, kernels are compiled when they are first used on a machine."""
    return max(64, 1 << (number - 1).bit_length())


def empty(shape: PackedShape) -> np.ndarray:
    """Make the flat tensor of a batch without texts, int64; as it is divided by, its count is 1."""
    flat = np.zeros(sum(shape.parts), np.int64)
    row, _, _, offsets, owners, _, number, _ = np.split(flat, np.cumsum(shape.parts)[:-1])
    row[:] = shape.pad_id
    offsets[shape.inputs :] = np.minimum(np.arange(len(offsets) - shape.inputs) * shape.longest, shape.tokens)
    owners[:] = shape.texts  # of windows that are not there
    number[0] = 1
    return flat


def padded(views: PackedViews, shape: PackedShape, inputs: int) -> tuple[Tensor, ...]:
    """Turn a packed batch into a padded one.

    Args:
        views: The packed batch.
        shape: Its shape.
        inputs: W, texts or windows that are there.

    Returns:
        Token ids, their mask, and their types where they have any, (W, longest).
    """
    lengths = views.offsets[: inputs + 1].diff()
    at = torch.arange(shape.longest, device=lengths.device)
    mask = at < lengths[:, None]
    tokens = (views.offsets[:inputs, None] + at).clamp(max=shape.tokens - 1)
    types = () if views.token_type_ids is None else (views.token_type_ids[0][tokens].masked_fill(~mask, 0),)
    return views.input_ids[0][tokens].masked_fill(~mask, shape.pad_id), mask.long(), *types


def choose_sizes(totals: np.ndarray, most: int, size_cost: float = 0.0) -> tuple[int, ...]:
    """Choose at most so many sizes, ascending multiples of ``SIZE_STEP``, that leave the fewest tokens unused.

    Args:
        totals: Tokens of each batch; each takes the smallest size that holds it.
        most: Sizes at most.
        size_cost: Tokens that each size counts as; those of all batches are weighed against it.
    """
    steps, counts = np.unique(-(-totals // SIZE_STEP), return_counts=True)
    if len(steps) > 512:  # the search below is quadratic
        width = SIZE_STEP * math.ceil((int(steps[-1]) - int(steps[0]) + 1) / 512)
        return choose_sizes(np.ceil(totals / width).astype(np.int64) * width, most, size_cost)
    before = np.concatenate(([0], np.cumsum(counts)))
    # cost[j]: tokens (in steps) of all batches up to j, with so many sizes, the last of which is steps[j].
    cost = steps * before[1:]
    chosen, costs = [], [int(cost[-1])]
    for _ in range(min(most, len(steps)) - 1):
        # Up to i by one size fewer, and from i + 1 to j by steps[j].
        options = cost[:, None] + steps[None, :] * (before[1:][None, :] - before[1:][:, None])
        options[np.tril_indices(len(steps))] = np.iinfo(np.int64).max
        best = options.argmin(axis=0)
        better = options[best, np.arange(len(steps))] < cost
        chosen.append(np.where(better, best, -1))
        cost = np.where(better, options[best, np.arange(len(steps))], cost)
        costs.append(int(cost[-1]))
    more = int(np.argmin(np.array(costs) + np.arange(len(costs)) * size_cost / SIZE_STEP))
    at, sizes = len(steps) - 1, [int(steps[-1])]
    for best in reversed(chosen[:more]):
        if best[at] >= 0:
            at = int(best[at])
            sizes.append(int(steps[at]))
    return tuple(size * SIZE_STEP for size in reversed(sizes))
