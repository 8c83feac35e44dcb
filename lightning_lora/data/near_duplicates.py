"""Texts that are nearly the same: the Jaccard similarity of their 5-grams, found by MinHash (Broder 1997).

The 5-grams are of the bytes that count of a text (``counted_bytes``: letters and digits, in any language). Texts that
agree in one of ``BANDS`` groups of ``BAND`` minima are candidates (a pair at the threshold is one with a probability of
0.998); the similarity of the best candidate of a text is then computed exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lora.data.pairs import Text, as_texts
from lightning_lora.data.rows import Rows
from lightning_lora.data.splits import counted_bytes

#: Texts are nearly the same from this similarity on (as in Lee et al. 2022, arXiv:2107.06499).
LEAST_SIMILARITY = 0.8
GRAM = 5
BANDS, BAND = 16, 5
#: Of a band's bucket so many texts are compared at most: made from one template, thousands may be in one.
MOST_IN_A_BUCKET = 4
#: Rows of a split that are compared, spread evenly; of each, 320 bytes are held.
MOST_ROWS = 200_000
#: A candidate whose estimate (its standard deviation is 0.045) lies further below the threshold is not verified.
_DOUBT = 0.15
_RNG = np.random.Generator(np.random.PCG64(0))
_FACTORS = _RNG.integers(2**63, size=BANDS * BAND, dtype=np.uint64) | np.uint64(1)
_WEIGHTS = _FACTORS[:BAND]


@dataclass(frozen=True)
class Sketch:
    """The minima of the hashed 5-grams of a split's texts.

    Args:
        rows: The split.
        positions: The rows that are compared, ascending, shape (N,).
        minima: Of each, uint32, shape (N, BANDS * BAND).
    """

    rows: Rows
    positions: np.ndarray
    minima: np.ndarray

    @classmethod
    def of(cls, rows: Rows, advance: Callable[[int], Any] = lambda n: None, most: int = MOST_ROWS) -> "Sketch":
        """The sketch of a split, read a batch at a time; ``advance(n)`` is called after n rows."""
        positions = np.arange(len(rows))
        if len(rows) > most:
            positions = np.linspace(0, len(rows) - 1, most).astype(np.int64)
        parts = [np.zeros((0, len(_FACTORS)), np.uint32)]
        for texts in rows.select(positions).text_batches():
            parts.append(_minima(*_grams(texts)))
            advance(len(texts))
        return cls(rows, positions, np.concatenate(parts))

    def bands(self, number: int) -> np.ndarray:
        """The bucket of each text in a band, uint64, shape (N,)."""
        return (self.minima[:, number * BAND : (number + 1) * BAND] * _WEIGHTS).sum(axis=1, dtype=np.uint64)


def near_duplicates(sketch: Sketch, others: Sketch) -> np.ndarray:
    """Positions of the rows with a near-duplicate among other rows, each with that of a near-duplicate of it, (N, 2).

    It is the most similar one of those compared. Where buckets are full, a row can be missed.
    """
    nearest = np.zeros(len(sketch.minima), np.int64)
    estimates = np.zeros(len(sketch.minima))
    for number in range(BANDS):
        buckets, other_buckets = sketch.bands(number), others.bands(number)
        order = np.argsort(other_buckets, kind="stable")
        sorted_buckets = other_buckets[order]
        first, end = (np.searchsorted(sorted_buckets, buckets, side) for side in ("left", "right"))
        for place in range(MOST_IN_A_BUCKET):
            filled = np.flatnonzero(first + place < end)
            candidates = order[first[filled] + place]
            estimated = (sketch.minima[filled] == others.minima[candidates]).mean(axis=1)
            better = estimated > estimates[filled]
            nearest[filled[better]], estimates[filled[better]] = candidates[better], estimated[better]
    found = np.flatnonzero(estimates >= LEAST_SIMILARITY - _DOUBT)
    rows, other_rows = sketch.positions[found], others.positions[nearest[found]]
    texts = sketch.rows.select(rows).texts
    different, which = np.unique(other_rows, return_inverse=True)
    other_texts = others.rows.select(different).texts
    near = [similarity(text, other_texts[i]) >= LEAST_SIMILARITY for text, i in zip(texts, which, strict=True)]
    return np.stack([rows, other_rows], axis=1)[np.array(near, bool)]


def similarity(first: Text, second: Text) -> float:
    """The share of the 5-grams of two texts that both have, from 0 to 1."""
    one, other = (np.unique(_grams([text])[0]) for text in (first, second))
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _grams(texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
    """The 5-grams of texts as numbers, one text after another, and where those of each text start."""
    plain = [counted_bytes(text).ljust(GRAM, b"\0") for text in as_texts(texts)]
    lengths = np.fromiter(map(len, plain), np.int64, len(plain))
    joined = b"".join([*plain, bytes(8)])
    windows: np.ndarray = np.ndarray(len(joined) - 8, "<u8", joined, strides=(1,))  # 8 bytes from each byte on
    inside = np.ones(len(windows), bool)
    inside[(np.cumsum(lengths)[:, None] - np.arange(1, GRAM)).ravel()] = False  # these reach into the next text
    starts = np.cumsum(lengths - GRAM + 1) - (lengths - GRAM + 1)
    return windows[inside] & np.uint64(2 ** (8 * GRAM) - 1), starts


def _minima(grams: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each text the least of each hash of its 5-grams, uint32."""
    mixed = grams * np.uint64(0x9E3779B97F4A7C15)  # as splitmix64 does, so that similar grams have unlike hashes
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    least = [np.minimum.reduceat((mixed * factor) >> np.uint64(32), starts) for factor in _FACTORS]
    return np.stack(least, axis=1).astype(np.uint32)
