"""The plan of an ablation: its axes, and a cell for each training run.

An arm is one combination of the compared axes, a variant of it one of the chosen axes, a cell a variant with a seed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_lora.evaluation.metric_table import METRICS
from lightning_lora.experiments.search_space import Arm, Found, Search

#: The axis of arms that are named one by one.
ARM = "arm"


@dataclass(frozen=True)
class Axis:
    """What is varied.

    Args:
        name: Its name.
        values: Settings (flat keys) by the name of each value, in order.
        chosen: Whether each arm takes the value that is best on validation, instead of being compared.
        numbers: Whether the values are numbers in order, so that the best may lie on an edge.
    """

    name: str
    values: dict[str, dict[str, Any]]
    chosen: bool
    numbers: bool


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        arm: Name of the value of each compared axis.
        variant: Name of the value of each chosen axis.
        seed: ``seed_everything``.
        change: What differs from the base recipe, as flat keys.
    """

    arm: Arm
    variant: Arm
    seed: int
    change: Mapping[str, Any]

    @property
    def searched(self) -> bool:
        """Whether its settings are known: not while no trial of the search has finished."""
        return dict(self.variant).get("trial") != "none"

    @property
    def name(self) -> str:
        """A folder's name: "rank-8__rate-0.0005__seed-1"."""
        parts = [f"{axis}-{value}" for axis, value in (*self.arm, *self.variant)]
        return re.sub(r"[^A-Za-z0-9_.\-]", "_", "__".join([*parts, f"seed-{self.seed}"]))


@dataclass(frozen=True)
class Plan:
    """What is asked, and all cells.

    Args:
        question: In words.
        base: The config of the base recipe, or None for the embedded default.
        settings: What differs from it in every cell, as flat keys.
        axes: What is varied.
        baseline: The arm that the others are compared with.
        seeds: Of every arm.
        metric: What is chosen and compared by; one of ``row_metrics``.
        margin: Differences under this count as none.
        cells: In the order in which they are run: seed by seed, so that early stops leave whole comparisons.
        search: What is searched for each arm before it is compared, or None.
        found: What the search has found of each arm.
    """

    question: str
    base: Path | None
    settings: dict[str, Any]
    axes: list[Axis]
    baseline: Arm
    seeds: list[int]
    metric: str
    margin: float
    cells: list[Cell] = field(default_factory=list)
    search: Search | None = None
    found: Mapping[Arm, Found] = field(default_factory=dict)

    @property
    def arms(self) -> list[Arm]:
        """The arms in the order of the axes."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def arm_settings(self, arm: Arm) -> Mapping[str, Any]:
        """The settings by which the axes define an arm, as flat keys."""
        values = dict(arm)
        return {k: v for axis in self.axes if axis.name in values for k, v in axis.values[values[axis.name]].items()}

    @property
    def tried(self) -> int:
        """Variants of each arm: its budget of tuning."""
        return self.search.trials if self.search is not None else len({cell.variant for cell in self.cells})

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return METRICS[self.metric].higher_is_better


def trial_cell(plan: Plan, arm: Arm, number: int | None, settings: Mapping[str, Any], seed: int | None = None) -> Cell:
    """Return the cell of a trial of the search; the number is None for the best one before there is one."""
    change = {**next(cell.change for cell in plan.cells if cell.arm == arm), **settings}
    variant = (("trial", "none" if number is None else str(number)),)
    return Cell(arm, variant, plan.seeds[0] if seed is None else seed, change)


def with_found(plan: Plan, found: Mapping[Arm, Found]) -> Plan:
    """Return the plan whose cells are those of each arm's best trial, with every seed."""
    if plan.search is None:
        return plan
    cells = []
    for seed in plan.seeds:
        for arm in plan.arms:
            one = found.get(arm, Found())
            cells.append(trial_cell(plan, arm, None if one.best is None else one.best.number, one.settings, seed))
    return replace(plan, cells=cells, found=found)


def arm_label(arm: Sequence[tuple[str, str]]) -> str:
    """Return an arm in words: the values alone where there is one axis, else "rank 8, method lora"."""
    return arm[0][1] if len(arm) == 1 else ", ".join(f"{axis} {value}" for axis, value in arm)
