"""What others report for the arms of an ablation: shown beside what was measured, never compared with it.

    published: {base: 0.634, large: 0.682}      # of the metric, by the arm's label
    published_in: Hu et al. 2022, Table 2

Imports no torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.experiments.search_space import require


@dataclass(frozen=True)
class Published:
    """Figures of others.

    Args:
        figures: Of the metric, by the arm's label.
        source: Where they are from.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def shown(self, arm: str) -> str:
        """Return the figure of an arm in words, a hyphen where there is none."""
        return f"{self.figures[arm]:.3f}" if arm in self.figures else "-"


def make_published(content: Mapping[str, Any], arms: Collection[str]) -> Published:
    """Return what an ablation's config says of published figures.

    Args:
        content: The config.
        arms: The labels that there are.

    Raises:
        UserError: They are no numbers, of no arm, or of no source.
    """
    figures, source = content.get("published") or {}, str(content.get("published_in") or "").strip()
    require(isinstance(figures, dict), "published: a figure for each arm is needed, such as {lora: 0.93}")
    for arm, figure in figures.items():
        require(str(arm) in arms, f"published: there is no arm '{arm}'; there are {', '.join(arms)}")
        require(type(figure) in (int, float), f"published.{arm}: a number is needed, got {figure}")
    require(source or not figures, "published_in: say where the published figures are from")
    return Published({str(arm): float(figure) for arm, figure in figures.items()}, source)
