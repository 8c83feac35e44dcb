"""What an exported model says beside the trained one, on the same rows: differences, flips, speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: An export in full precision is the same model where no logit is further off than this.
TOLERANCE = 1e-4
#: And is another one where some logit is further off than this.
BROKEN = 1e-2
LATENCY_TEXTS = 30


@dataclass(frozen=True)
class Said:
    """What one form of the model says of the rows, and how fast.

    Args:
        logits: float32, shape (rows, C), in the order of the rows.
        texts_per_s: In batches.
        latency_ms: Median for one text alone.
    """

    logits: NDArray
    texts_per_s: float
    latency_ms: float


@dataclass(frozen=True)
class Comparison:
    """An exported model against the trained one.

    Args:
        max_logit_difference: Largest over rows and classes.
        labels_flipped: Rows with another prediction.
        rows: How many were compared.
        accuracy: Of the exported model on these rows.
        texts_per_s: In batches.
        latency_ms: Median for one text alone.
    """

    max_logit_difference: float
    labels_flipped: int
    rows: int
    accuracy: float
    texts_per_s: float
    latency_ms: float

    @property
    def plain(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def measure(
    client: Callable[[dict[str, Any]], NDArray], batches: Sequence[dict[str, Any]], singles: Sequence[dict[str, Any]]
) -> Said:
    """Runs a model over batches, and over single texts for the latency.

    Args:
        client: Gives the logits (B, C) of a batch.
        batches: The contract of ``TokenDataset``; ``rows`` says where each row belongs.
        singles: Batches of one text each.
    """
    client(batches[0])  # the first call also prepares things
    started = time.perf_counter()
    logits = [client(batch) for batch in batches]
    seconds = time.perf_counter() - started
    rows = np.concatenate([batch["rows"].numpy() for batch in batches])
    times = []
    for single in singles[:LATENCY_TEXTS]:
        begun = time.perf_counter()
        client(single)
        times.append(time.perf_counter() - begun)
    return Said(
        np.concatenate(logits)[np.argsort(rows, kind="stable")], len(rows) / seconds, 1000 * float(np.median(times))
    )


def compare(said: Said, reference: NDArray, labels: NDArray) -> Comparison:
    """What was said against the trained model's logits (rows, C) and the true labels (rows,)."""
    return Comparison(
        max_logit_difference=float(np.abs(said.logits - reference).max()),
        labels_flipped=int((said.logits.argmax(1) != reference.argmax(1)).sum()),
        rows=len(labels),
        accuracy=float((said.logits.argmax(1) == labels).mean()),
        texts_per_s=said.texts_per_s,
        latency_ms=said.latency_ms,
    )
