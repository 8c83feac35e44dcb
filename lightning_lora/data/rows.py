"""The rows of one split: their texts, labels and places."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from lightning_lora.data.splits import not_in, text_keys
from lightning_lora.data.tokens import TokenRows, cached_tokens


class SplitRows(Protocol):
    """What may be asked of the rows of one split, whether their texts are held (``Rows``) or not (``StreamedRows``)."""

    def __len__(self) -> int: ...

    @property
    def texts(self) -> list[str]:
        """The texts."""

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, shape (rows,)."""

    @property
    def origins(self) -> list[str]:
        """The file or Hub split of each row."""

    @property
    def numbers(self) -> np.ndarray:
        """The 1-based line or row of each row in its origin, int64, shape (rows,)."""

    def select(self, keep: np.ndarray) -> Self:
        """The rows at the given ascending positions."""

    def not_in(self, other: "SplitRows") -> np.ndarray:
        """Ascending positions of the rows whose text is no repeat of one of the other rows, whose texts are held."""

    def fingerprint(self) -> str:
        """A hash of texts and labels in their order."""

    def places(self) -> Iterator[dict[str, Any]]:
        """Columns ``origin``, ``row`` and ``key`` (``text_keys``), a piece of the rows at a time."""

    def tokens(self, tokenizer: Any, cache_dir: Path, advance: Callable[[int], None]) -> tuple[TokenRows, bool]:
        """The tokens of the texts, and whether they came from the cache."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split, held in memory.

    Args:
        texts: The texts.
        labels: Class numbers, int64, shape (rows,).
        origins: The file or Hub split of each row.
        numbers: The 1-based line or row of each row in its origin, int64, shape (rows,).
    """

    texts: list[str]
    labels: np.ndarray
    origins: list[str]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, keep: np.ndarray) -> "Rows":
        """The rows at the given positions."""
        texts = [self.texts[i] for i in keep]
        return Rows(texts, self.labels[keep], [self.origins[i] for i in keep], self.numbers[keep])

    def fingerprint(self) -> str:
        """A hash of texts and labels in their order."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for text in self.texts:
            digest.update(text_digest(text))
        return digest.hexdigest()

    def not_in(self, other: SplitRows) -> np.ndarray:
        """Positions of the rows that are no repeats of the other rows."""
        return not_in(text_keys(self.texts), text_keys(other.texts))

    def places(self) -> Iterator[dict[str, Any]]:
        """All of them at once."""
        yield {"origin": self.origins, "row": self.numbers, "key": text_keys(self.texts)}

    def tokens(self, tokenizer: Any, cache_dir: Path, advance: Callable[[int], None]) -> tuple[TokenRows, bool]:
        """The tokens of the texts, and whether they came from the cache."""
        return cached_tokens(self.texts, tokenizer, cache_dir, advance)


def text_digest(text: str) -> bytes:
    """What a text adds to the fingerprint of a split, 32 bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
