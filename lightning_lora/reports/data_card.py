"""A data card as a page that needs no network. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_lora.reports.ablation_tables import TextTable
from lightning_lora.reports.templates import template

#: Bars of a histogram.
_BARS = 40


@dataclass(frozen=True)
class Histogram:
    """How often values occur.

    Args:
        title: Of what.
        values: Shape (N,).
        limit: Bars from here on are marked, where there is a limit.
    """

    title: str
    values: np.ndarray
    limit: float | None = None

    @property
    def bars(self) -> list[dict[str, str | float | bool]]:
        """Each bar's height in percent of the highest, what it says, and whether it lies beyond the limit."""
        bins: int | np.ndarray = _BARS
        if self.values.dtype.kind == "i":  # as many whole numbers to each bar
            low, high = int(self.values.min()), int(self.values.max())
            width = -(-(high - low + 1) // _BARS)
            bins = np.arange(low, high + width + 1, width)
        counts, edges = np.histogram(self.values, bins)
        return [
            {
                "height": round(100 * float(count) / float(counts.max()), 1),
                "said": f"from {low:.4g}, below {high:.4g}: {count:,} rows",
                "beyond": self.limit is not None and bool(low >= self.limit),
            }
            for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        ]


@dataclass(frozen=True)
class DataCard:
    """What a card shows.

    Args:
        source: The data set.
        about: Names and values that stand for the whole of it.
        suspicious: What is suspicious, the gravest first.
        splits: The facts by split, header first.
        classes: The rows of each class by split, header first; empty where there are none.
        histograms: Pictures of the training rows.
    """

    source: str
    about: Sequence[tuple[str, str]]
    suspicious: Sequence[str]
    splits: TextTable
    classes: TextTable
    histograms: Sequence[Histogram]


def as_page(card: DataCard) -> str:
    """Return the card as HTML."""
    return template("data_card.html.j2").render(card=card)
