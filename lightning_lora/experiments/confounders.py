"""In what an arm differs from the baseline, beside what its axis names. Imports no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

#: Keys that differ between cells by design.
_OF_SEEDS = ("seed_everything", "data.seed", "model.seed")


@dataclass(frozen=True)
class Change:
    """One setting, or one thing that follows from settings, that an arm has otherwise than the baseline.

    Args:
        key: The setting, such as ``model.adapter.rank``, or what follows, such as "alpha / rank".
        baseline: Its value in the baseline.
        arm: Its value in the arm.
        named: Whether an axis names it; else it is a confounder, whose effect a reader would take for the axis's.
    """

    key: str
    baseline: Any
    arm: Any
    named: bool

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.baseline)} -> {_shown(self.arm)}"


def changes(baseline: Mapping[str, Any], arm: Mapping[str, Any], named: Collection[str]) -> list[Change]:
    """Return what differs.

    Args:
        baseline: The baseline's resolved settings, flat, with what follows from them (the ratio of two of them, a
            default that depends on the method), by name.
        arm: The arm's.
        named: Keys that the axes name.
    """
    keys = [key for key in {**baseline, **arm} if key not in _OF_SEEDS and baseline.get(key) != arm.get(key)]
    return [Change(key, baseline.get(key), arm.get(key), key in named) for key in keys]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)
