"""In what every arm differs from the baseline, and what differs beside what its axis names."""

from collections.abc import Mapping, Sequence
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
        named: Whether an axis of the ablation names it.
    """

    key: str
    baseline: Any
    arm: Any
    named: bool

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.baseline)} -> {_shown(self.arm)}"


def changes(baseline: Mapping[str, Any], arm: Mapping[str, Any], named: Sequence[str]) -> list[Change]:
    """Return what differs.

    Args:
        baseline: The baseline's resolved settings, flat, with what follows from them (the ratio of two of them, a
            default that depends on the method), by name.
        arm: The arm's.
        named: Keys that the axes name.
    """
    keys = [key for key in {**baseline, **arm} if key not in _OF_SEEDS]
    pairs = {key: (baseline.get(key), arm.get(key)) for key in keys}
    return [Change(key, one, other, key in named) for key, (one, other) in pairs.items() if one != other]


def second_differences(found: Sequence[Change]) -> list[Change]:
    """Return what differs although no axis names it: a reader would take its effect for that of the axis."""
    return [change for change in found if not change.named]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)
