"""Parity of an exported model with the trained one, on the same raw texts: differences, flipped labels, speed."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: An export in full precision is the same model where no logit is further off than this.
TOLERANCE = 1e-4
#: And is another one where some logit is further off than this.
BROKEN = 1e-2
#: Texts that a padded batch has.
BATCH = 32
#: Texts that are also given one by one, without padding.
SINGLE_TEXTS = 100


@dataclass(frozen=True)
class ParityTexts:
    """The texts that the forms are compared on.

    Args:
        texts: Raw texts.
        labels: True class numbers, int64, shape (rows,); -1 where a text is made up.
        long: Whether a text is longer than ``max_length``, shape (rows,).
    """

    texts: list[str]
    labels: NDArray
    long: NDArray

    @property
    def singles(self) -> NDArray:
        """Positions of the texts that are also given one by one, evenly spread."""
        return np.unique(np.linspace(0, len(self.texts) - 1, min(SINGLE_TEXTS, len(self.texts))).astype(int))


@dataclass(frozen=True)
class Measured:
    """Logits that one form gives the texts, and how fast.

    Args:
        logits: In padded batches; float32, shape (rows, C), in the order of the texts.
        single_logits: Of ``ParityTexts.singles``, one by one.
        texts_per_s: In batches.
        latency_ms: Median for one text alone.
    """

    logits: NDArray
    single_logits: NDArray
    texts_per_s: float
    latency_ms: float


@dataclass(frozen=True)
class Comparison:
    """An exported model against the trained one.

    Args:
        max_logit_difference: Largest over texts and classes, in batches and one by one.
        labels_flipped: Texts with another prediction, in batches.
        rows: How many texts were compared in batches.
        labels_flipped_single: Texts with another prediction, one by one.
        single_rows: How many texts were also compared one by one.
        long_rows: How many of the texts are longer than ``max_length``.
        labels_flipped_long: Those of them with another prediction, in batches.
        made_up: How many of the texts are made up, so that they have no label.
        accuracy: Of the form on the other texts; None where there is none.
        accuracy_long: The same on those longer than ``max_length``.
        texts_per_s: In batches.
        latency_ms: Median for one text alone.
    """

    max_logit_difference: float
    labels_flipped: int
    rows: int
    labels_flipped_single: int
    single_rows: int
    long_rows: int
    labels_flipped_long: int
    made_up: int
    accuracy: float | None
    accuracy_long: float | None
    texts_per_s: float
    latency_ms: float

    @property
    def plain(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def measure(client: Callable[[list[str]], NDArray], given: ParityTexts) -> Measured:
    """Gives the texts to a client in padded batches, in their order, and some of them one by one.

    Args:
        client: Gives the logits (B, C) of texts.
        given: The texts.
    """
    client(given.texts[:BATCH])  # the first call also prepares things
    started = time.perf_counter()
    logits = [client(given.texts[start : start + BATCH]) for start in range(0, len(given.texts), BATCH)]
    seconds = time.perf_counter() - started
    singles, times = [], []
    for position in given.singles:
        start = time.perf_counter()
        singles.append(client([given.texts[position]]))
        times.append(time.perf_counter() - start)
    return Measured(
        np.concatenate(logits),
        np.concatenate(singles),
        len(given.texts) / seconds,
        1000 * float(np.median(times)),
    )


def compare(measured: Measured, reference: NDArray, given: ParityTexts) -> Comparison:
    """Compares a form's logits with the trained model's (rows, C)."""
    expected, found = reference.argmax(1), measured.logits.argmax(1)
    single = reference[given.singles]
    differences = [np.abs(measured.logits - reference), np.abs(measured.single_logits - single)]
    right, real = found == given.labels, given.labels >= 0
    return Comparison(
        max_logit_difference=float(np.max(np.concatenate(differences))),
        labels_flipped=int((found != expected).sum()),
        rows=len(given.texts),
        labels_flipped_single=int((measured.single_logits.argmax(1) != single.argmax(1)).sum()),
        single_rows=len(given.singles),
        long_rows=int(given.long.sum()),
        labels_flipped_long=int((found != expected)[given.long].sum()),
        made_up=int((~real).sum()),
        accuracy=_share(right[real]),
        accuracy_long=_share(right[real & given.long]),
        texts_per_s=measured.texts_per_s,
        latency_ms=measured.latency_ms,
    )


def _share(right: NDArray) -> float | None:
    return float(right.mean()) if len(right) else None
