"""An ablation as a person writes it: a question, a base recipe, axes, seeds.

    question: How much rank does LoRA need?
    base: ../ag_news.yaml                # a config for fit; relative to this file
    settings: {data.train_rows: 2000}    # what differs from it in every cell
    axes:
      rank:                              # settings that change together, value by value
        model.adapter.rank: [2, 8, 32]
        model.adapter.alpha: [4, 16, 64]
      rate:
        model.learning_rate: [2.0e-4, 5.0e-4]
        chosen: true                     # not compared: each arm takes what is best on validation
        # or, with values of their own for each arm: {method: {lora: [2.0e-4, 5.0e-4], head: [5.0e-3, 1.0e-2]}}
    baseline: {rank: 8}
    seeds: [1, 2, 3]
    metric: accuracy
    margin: 0.01                         # smaller differences count as none
    search: {space: {...}, trials: 12}   # instead of chosen axes: ``search_space.py``
    small: {seeds: [1, 2], settings: {data.train_rows: 200}, axes: {rank: ["2", "8"]}, trials: 3}

Instead of axes, or beside chosen ones, ``arms: {NAME: settings}`` names the arms and what each changes.

An arm is one combination of the compared axes, a variant of it one of the chosen axes, a cell a variant with a seed.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError
from lightning_lora.experiments.search_space import Arm, Found, Search, make_search

#: Metric by name, and whether more of it is better.
METRICS = {"accuracy": True, "loss": False}
_KEYS = ("question", "base", "settings", "axes", "arms", "search", "baseline", "seeds", "metric", "margin", "small")
_SMALL_KEYS = ("settings", "seeds", "axes", "trials")
MOST_CELLS = 10_000
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
class ByArm:
    """A value that depends on another axis.

    Args:
        axis: The other axis.
        values: The value for each of its values' names.
    """

    axis: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        arm: Name of the value of each compared axis.
        variant: Name of the value of each chosen axis.
        seed: ``seed_everything``.
        change: What differs from the base recipe, as flat keys.
    """

    arm: tuple[tuple[str, str], ...]
    variant: tuple[tuple[str, str], ...]
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
        metric: What is chosen and compared by; a key of ``METRICS``.
        margin: Differences under this count as none.
        cells: In the order in which they are run: seed by seed, so that early stops leave whole comparisons.
        search: What is searched for each arm before it is compared, or None.
        found: What the search has found of each arm.
    """

    question: str
    base: Path | None
    settings: dict[str, Any]
    axes: list[Axis]
    baseline: tuple[tuple[str, str], ...]
    seeds: list[int]
    metric: str
    margin: float
    cells: list[Cell] = field(default_factory=list)
    search: Search | None = None
    found: Mapping[Arm, Found] = field(default_factory=dict)

    @property
    def arms(self) -> list[tuple[tuple[str, str], ...]]:
        """The arms in the order of the axes."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def arm_settings(self, arm: tuple[tuple[str, str], ...]) -> Mapping[str, Any]:
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
        return METRICS[self.metric]


def trial_cell(plan: Plan, arm: Arm, number: int | None, settings: Mapping[str, Any], seed: int | None = None) -> Cell:
    """The cell of a trial of the search; None for the best one's number before there is one."""
    change = {**next(cell.change for cell in plan.cells if cell.arm == arm), **settings}
    variant = (("trial", "none" if number is None else str(number)),)
    return Cell(arm, variant, plan.seeds[0] if seed is None else seed, change)


def with_found(plan: Plan, found: Mapping[Arm, Found]) -> Plan:
    """The plan whose cells are those of each arm's best trial, with every seed."""
    if plan.search is None:
        return plan
    cells = []
    for seed in plan.seeds:
        for arm in plan.arms:
            one = found.get(arm, Found())
            cells.append(trial_cell(plan, arm, None if one.best is None else one.best.number, one.settings, seed))
    return replace(plan, cells=cells, found=found)


def arm_label(arm: Sequence[tuple[str, str]]) -> str:
    """An arm in words: the values alone where there is one axis, else "rank 8, method lora"."""
    return arm[0][1] if len(arm) == 1 else ", ".join(f"{axis} {value}" for axis, value in arm)


def make_plan(content: Mapping[str, Any], path: Path, small: bool = False) -> Plan:
    """The plan that a config describes.

    Args:
        content: The config.
        path: Where it stands, for messages and for ``base``.
        small: Take the small size that it describes.

    Raises:
        UserError: Something is missing, unknown or does not fit together.
    """

    def fail(message: str) -> UserError:
        return UserError(f"{path}: {message}")

    if unknown := sorted(set(content) - set(_KEYS)):
        raise fail(f"unknown key '{unknown[0]}'; there are {', '.join(_KEYS)}")
    question, metric, margin = _aim(content, fail)
    axes = _axes(content, fail)
    if all(axis.chosen for axis in axes):
        raise fail("axes: all are chosen, so nothing is compared; leave 'chosen' out of one")
    settings = _flat(content.get("settings"), "settings", fail)
    seeds = content.get("seeds", [1, 2, 3])
    if small:
        change = content.get("small")
        if not isinstance(change, dict):
            raise fail("small: not described in this config")
        if unknown := sorted(set(change) - set(_SMALL_KEYS)):
            raise fail(f"small: unknown key '{unknown[0]}'; there are {', '.join(_SMALL_KEYS)}")
        settings |= _flat(change.get("settings"), "small.settings", fail)
        fewer = change.get("axes") or {}
        if not isinstance(fewer, dict) or set(map(str, fewer)) - {axis.name for axis in axes}:
            raise fail(f"small.axes: of the axes {', '.join(axis.name for axis in axes)}, a list of values each")
        seeds = change.get("seeds", seeds)
        if "trials" in change and isinstance(content.get("search"), dict):
            content = {**content, "search": {**content["search"], "trials": change["trials"]}}
        axes = [_fewer(axis, (change.get("axes") or {}).get(axis.name), fail) for axis in axes]
    _check_seeds(seeds, fail)
    varied = {key for axis in axes for change in axis.values.values() for key in change}
    for key in sorted(varied | set(settings)):
        if inner := next((other for other in sorted(varied | set(settings)) if other.startswith(f"{key}.")), None):
            raise fail(f"{key} and {inner} are both given: one is a part of the other; give the parts")
    if taken := varied & set(settings):
        raise fail(f"settings: {sorted(taken)[0]} is varied by an axis")
    base = content.get("base")
    compared = [axis for axis in axes if not axis.chosen]
    plan = Plan(
        question,
        (path.parent / str(base)).resolve() if base else None,
        settings,
        axes,
        _baseline(content.get("baseline"), compared, fail),
        list(seeds),
        metric,
        margin,
        search=_search(content["search"], axes, fail) if "search" in content else None,
    )
    plan.cells.extend(_cells(plan, fail))
    _check_cells(plan, fail)
    return plan


def _aim(content: Mapping[str, Any], fail: Any) -> tuple[str, str, float]:
    """The question, the metric and the margin."""
    question = str(content.get("question") or "").strip()
    if not question:
        raise fail("question: say in a sentence what the ablation asks")
    metric = str(content.get("metric", "accuracy"))
    if metric not in METRICS:
        raise fail(f"metric: '{metric}' is none of {', '.join(METRICS)}")
    margin = content.get("margin", 0.01)
    if not isinstance(margin, int | float) or isinstance(margin, bool) or not 0 < margin < 1:
        raise fail(f"margin: a number between 0 and 1 is needed, got {margin}")
    return question, metric, float(margin)


def _axes(content: Mapping[str, Any], fail: Any) -> list[Axis]:
    described, arms = content.get("axes") or {}, content.get("arms") or {}
    if not isinstance(described, dict) or not isinstance(arms, dict) or not {**described, **arms}:
        raise fail("axes: at least one axis is needed, such as rank: {model.adapter.rank: [2, 8]}; or arms")
    axes = [_axis(str(name), value, fail) for name, value in described.items()]
    if not arms:
        return axes
    if any(axis.name == ARM or not axis.chosen for axis in axes):
        raise fail("arms: beside them axes need 'chosen: true'; else list the combinations as arms")
    return [Axis(ARM, {str(name): _flat(v, f"arms.{name}", fail) for name, v in arms.items()}, False, False), *axes]


def _search(described: Any, axes: Sequence[Axis], fail: Any) -> Search:
    if any(axis.chosen for axis in axes):
        raise fail("search: what is chosen is searched; leave chosen axes out, or the search")
    search = make_search(described, [axis.name for axis in axes], fail)
    if taken := {key for axis in axes for change in axis.values.values() for key in change} & set(search.space):
        raise fail(f"search.space: {sorted(taken)[0]} is varied by an axis")
    return search


def _check_seeds(seeds: Any, fail: Any) -> None:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise fail("seeds: a list of whole numbers is needed, such as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise fail("seeds: one is duplicated")


def _check_cells(plan: Plan, fail: Any) -> None:
    if len(plan.cells) > MOST_CELLS:
        raise fail(f"{len(plan.cells):,} cells; at most {MOST_CELLS:,} make sense")
    for arm in plan.arms if plan.search is not None else []:
        plan.search.for_arm(arm)  # type: ignore[union-attr]  # there must be a space for each
    if len(plan.arms) < 2:
        raise fail("axes: one arm only; there is nothing to compare")
    if odd := [cell.name for cell in plan.cells if not re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,90}", cell.name)]:
        raise fail(f"axes: '{odd[0]:.120}' would be a cell's folder; give axes and values shorter names")
    if len({cell.name for cell in plan.cells}) < len(plan.cells):
        raise fail("axes: two cells have the same name; give the values of an axis names of their own")


def _axis(name: str, described: Any, fail: Any) -> Axis:
    if not isinstance(described, dict):
        raise fail(f"axes.{name}: settings with a list of values each are needed")
    content = dict(described)
    chosen = content.pop("chosen", False)
    names = content.pop("names", None)
    if not isinstance(chosen, bool):
        raise fail(f"axes.{name}.chosen: true or false is needed")
    content = {key: _by_arm(values) if isinstance(values, dict) else values for key, values in content.items()}
    if not content or not all(isinstance(values, list) and values for values in content.values()):
        raise fail(f"axes.{name}: settings with a list of values each are needed")
    lengths = {key: len(values) for key, values in content.items()}
    if len(set(lengths.values())) > 1:
        raise fail(f"axes.{name}: settings that change together need as many values each, got {lengths}")
    first = next(iter(content.values()))
    if not isinstance(names, list | None):
        raise fail(f"axes.{name}.names: a list of words is needed, got {names}")
    words = [str(word) for word in (names if names is not None else first)]
    if len(words) != len(first) or len(set(words)) < len(words):
        raise fail(f"axes.{name}: each value needs a name of its own, got {words}")
    values = {word: {key: column[i] for key, column in content.items()} for i, word in enumerate(words)}
    if names is None and any(isinstance(value, ByArm) for value in first):
        raise fail(f"axes.{name}: values that depend on an axis need names, such as names: [low, middle, high]")
    flat = [v for value in first for v in (value.values.values() if isinstance(value, ByArm) else [value])]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in flat)
    return Axis(name, values, chosen, numbers)


def _by_arm(described: dict[str, Any]) -> list[ByArm] | None:
    """Values for each value of another axis, {axis: {value: [...]}}, as a list of values; None where it is none."""
    if len(described) != 1:
        return None
    (axis, columns), *_ = described.items()
    if not isinstance(columns, dict) or not columns or not all(isinstance(c, list) for c in columns.values()):
        return None
    if len({len(column) for column in columns.values()}) > 1:
        return None
    count = len(next(iter(columns.values())))
    return [ByArm(str(axis), {str(name): column[i] for name, column in columns.items()}) for i in range(count)]


def _flat(described: Any, key: str, fail: Any) -> dict[str, Any]:
    """Settings as flat keys, whether they are written flat or as a tree."""
    if not isinstance(described, dict | None):
        raise fail(f"{key}: settings are needed, such as {{data.train_rows: 200}}")
    found: dict[str, Any] = {}
    for name, value in (described or {}).items():
        if isinstance(value, dict) and value:
            found |= {f"{name}.{inner}": v for inner, v in _flat(value, key, fail).items()}
        else:
            found[str(name)] = value
    return found


def _fewer(axis: Axis, names: Any, fail: Any) -> Axis:
    if names is None:
        return axis
    wanted = [str(name) for name in names] if isinstance(names, list) else []
    if not wanted or set(wanted) - set(axis.values):
        raise fail(f"small.axes.{axis.name}: a list of its values is needed ({', '.join(axis.values)})")
    return Axis(axis.name, {name: axis.values[name] for name in wanted}, axis.chosen, axis.numbers)


def _baseline(described: Any, compared: Sequence[Axis], fail: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(described, dict | None):
        raise fail("baseline: a value of each axis is needed, such as {rank: 8}")
    given = {str(name): str(value) for name, value in (described or {}).items()}
    if unknown := sorted(set(given) - {axis.name for axis in compared}):
        raise fail(f"baseline: '{unknown[0]}' is no compared axis")
    found = []
    for axis in compared:
        value = given.get(axis.name, next(iter(axis.values)))
        if value not in axis.values:
            raise fail(f"baseline: {axis.name} {value} is none of {', '.join(axis.values)}")
        found.append((axis.name, value))
    return tuple(found)


def _cells(plan: Plan, fail: Any) -> list[Cell]:
    compared = [axis for axis in plan.axes if not axis.chosen]
    chosen = [axis for axis in plan.axes if axis.chosen]
    cells = []
    for seed in plan.seeds:
        for arm in itertools.product(*(axis.values for axis in compared)):
            for variant in itertools.product(*(axis.values for axis in chosen)):
                change = dict(plan.settings)
                here = dict(zip([a.name for a in [*compared, *chosen]], [*arm, *variant], strict=True))
                for axis in [*compared, *chosen]:
                    for key, value in axis.values[here[axis.name]].items():
                        change[key] = _for_arm(value, here, f"axes.{axis.name}.{key}", fail)
                names = zip([a.name for a in compared], arm, strict=True)
                variants = zip([a.name for a in chosen], variant, strict=True)
                cells.append(Cell(tuple(names), tuple(variants), seed, change))
    return cells


def _for_arm(value: Any, here: Mapping[str, str], key: str, fail: Any) -> Any:
    """The value that a setting has where the axes have these values."""
    if not isinstance(value, ByArm):
        return value
    if here.get(value.axis) not in value.values:
        raise fail(f"{key}: no value for {value.axis} {here.get(value.axis)}")
    return value.values[here[value.axis]]
