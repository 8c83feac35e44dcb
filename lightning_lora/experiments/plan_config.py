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
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import row_metrics
from lightning_lora.experiments.plan import ARM, Axis, Cell, Plan
from lightning_lora.experiments.search_space import Search, make_search

MOST_CELLS = 10_000
_KEYS = ("question", "base", "settings", "axes", "arms", "search", "baseline", "seeds", "metric", "margin", "small")
_SMALL_KEYS = ("settings", "seeds", "axes", "trials")


@dataclass(frozen=True)
class ByArm:
    """A value that depends on another axis.

    Args:
        axis: The other axis.
        values: The value for each of its values' names.
    """

    axis: str
    values: dict[str, Any]


def make_plan(content: Mapping[str, Any], path: Path, small: bool = False) -> Plan:
    """Make the plan that a config describes.

    Args:
        content: The config.
        path: Its path, for messages and for ``base``.
        small: Take the small size that it describes.

    Raises:
        UserError: Something is missing, unknown or does not fit together.
    """
    try:
        return _make_plan(content, path.parent, small)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _make_plan(content: Mapping[str, Any], folder: Path, small: bool) -> Plan:
    _check_keys(content, _KEYS, "")
    question, metric, margin = _aim(content)
    axes = _axes(content)
    if all(axis.chosen for axis in axes):
        raise UserError("axes: all are chosen, so nothing is compared; leave 'chosen' out of one")
    settings = flatten(content.get("settings"), "settings")
    seeds = content.get("seeds", [1, 2, 3])
    if small:
        change = content.get("small")
        if not isinstance(change, dict):
            raise UserError("small: not described in this config")
        _check_keys(change, _SMALL_KEYS, "small: ")
        settings |= flatten(change.get("settings"), "small.settings")
        fewer = change.get("axes") or {}
        if not isinstance(fewer, dict) or set(map(str, fewer)) - {axis.name for axis in axes}:
            raise UserError(f"small.axes: of the axes {', '.join(axis.name for axis in axes)}, a list of values each")
        seeds = change.get("seeds", seeds)
        if "trials" in change and isinstance(content.get("search"), dict):
            content = {**content, "search": {**content["search"], "trials": change["trials"]}}
        axes = [_fewer(axis, fewer.get(axis.name)) for axis in axes]
    _check_seeds(seeds)
    _check_settings(settings, axes)
    base = content.get("base")
    plan = Plan(
        question,
        (folder / str(base)).resolve() if base else None,
        settings,
        axes,
        _baseline(content.get("baseline"), [axis for axis in axes if not axis.chosen]),
        list(seeds),
        metric,
        margin,
        search=_search(content["search"], axes) if "search" in content else None,
    )
    plan.cells.extend(_cells(plan))
    _check_cells(plan)
    return plan


def flatten(described: Any, key: str = "settings") -> dict[str, Any]:
    """Return settings as flat keys, whether they are written flat or as a tree.

    Args:
        described: The settings; None for none.
        key: Where they are given, for the message.

    Raises:
        UserError: They are no settings.
    """
    if not isinstance(described, Mapping | None):
        raise UserError(f"{key}: settings are needed, such as {{data.train_rows: 200}}")
    found: dict[str, Any] = {}
    for name, value in (described or {}).items():
        if isinstance(value, Mapping) and value:
            found |= {f"{name}.{inner}": v for inner, v in flatten(value, key).items()}
        else:
            found[str(name)] = value
    return found


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(content) - set(known)):
        raise UserError(f"{where}unknown key '{unknown[0]}'; there are {', '.join(known)}")


def _aim(content: Mapping[str, Any]) -> tuple[str, str, float]:
    """The question, the metric and the margin."""
    question = str(content.get("question") or "").strip()
    if not question:
        raise UserError("question: say in a sentence what the ablation asks")
    metric = str(content.get("metric", "accuracy"))
    if metric not in row_metrics():
        raise UserError(f"metric: '{metric}' is none of {', '.join(row_metrics())}")
    margin = content.get("margin", 0.01)
    if type(margin) not in (int, float) or not 0 < margin < 1:
        raise UserError(f"margin: a number between 0 and 1 is needed, got {margin}")
    return question, metric, float(margin)


def _axes(content: Mapping[str, Any]) -> list[Axis]:
    described, arms = content.get("axes") or {}, content.get("arms") or {}
    if not isinstance(described, dict) or not isinstance(arms, dict) or not {**described, **arms}:
        raise UserError("axes: at least one axis is needed, such as rank: {model.adapter.rank: [2, 8]}; or arms")
    axes = [_axis(str(name), value) for name, value in described.items()]
    if not arms:
        return axes
    if any(axis.name == ARM or not axis.chosen for axis in axes):
        raise UserError("arms: beside them axes need 'chosen: true'; else list the combinations as arms")
    return [Axis(ARM, {str(name): flatten(v, f"arms.{name}") for name, v in arms.items()}, False, False), *axes]


def _axis(name: str, described: Any) -> Axis:
    if not isinstance(described, dict):
        raise UserError(f"axes.{name}: settings with a list of values each are needed")
    content = dict(described)
    chosen, names = content.pop("chosen", False), content.pop("names", None)
    if not isinstance(chosen, bool):
        raise UserError(f"axes.{name}.chosen: true or false is needed")
    content = {key: _by_arm(values) if isinstance(values, dict) else values for key, values in content.items()}
    if not content or not all(isinstance(values, list) and values for values in content.values()):
        raise UserError(f"axes.{name}: settings with a list of values each are needed")
    lengths = {key: len(values) for key, values in content.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"axes.{name}: settings that change together need as many values each, got {lengths}")
    first = next(iter(content.values()))
    if not isinstance(names, list | None):
        raise UserError(f"axes.{name}.names: a list of words is needed, got {names}")
    words = [str(word) for word in (names if names is not None else first)]
    if len(words) != len(first) or len(set(words)) < len(words):
        raise UserError(f"axes.{name}: each value needs a name of its own, got {words}")
    if names is None and any(isinstance(value, ByArm) for value in first):
        raise UserError(f"axes.{name}: values that depend on an axis need names, such as names: [low, middle, high]")
    values = {word: {key: column[i] for key, column in content.items()} for i, word in enumerate(words)}
    single = [v for value in first for v in (value.values.values() if isinstance(value, ByArm) else [value])]
    return Axis(name, values, chosen, all(type(value) in (int, float) for value in single))


def _by_arm(described: dict[str, Any]) -> list[ByArm] | None:
    """Values for each value of another axis, {axis: {value: [...]}}, as a list of values; None where it is none."""
    if len(described) != 1:
        return None
    (axis, columns), *_ = described.items()
    if not isinstance(columns, dict) or not columns or not all(isinstance(c, list) for c in columns.values()):
        return None
    if len({len(column) for column in columns.values()}) > 1:
        return None
    rows = zip(*columns.values(), strict=True)
    return [ByArm(str(axis), dict(zip(map(str, columns), row, strict=True))) for row in rows]


def _fewer(axis: Axis, names: Any) -> Axis:
    if names is None:
        return axis
    wanted = [str(name) for name in names] if isinstance(names, list) else []
    if not wanted or set(wanted) - set(axis.values):
        raise UserError(f"small.axes.{axis.name}: a list of its values is needed ({', '.join(axis.values)})")
    return replace(axis, values={name: axis.values[name] for name in wanted})


def _search(described: Any, axes: Sequence[Axis]) -> Search:
    if any(axis.chosen for axis in axes):
        raise UserError("search: what is chosen is searched; leave chosen axes out, or the search")
    search = make_search(described, [axis.name for axis in axes])
    if taken := _varied(axes) & set(search.space):
        raise UserError(f"search.space: {sorted(taken)[0]} is varied by an axis")
    return search


def _varied(axes: Sequence[Axis]) -> set[str]:
    return {key for axis in axes for change in axis.values.values() for key in change}


def _check_seeds(seeds: Any) -> None:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError("seeds: a list of whole numbers is needed, such as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds: one is duplicated")


def _check_settings(settings: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    varied = _varied(axes)
    keys = sorted(varied | set(settings))
    for key in keys:
        if inner := next((other for other in keys if other.startswith(f"{key}.")), None):
            raise UserError(f"{key} and {inner} are both given: one is a part of the other; give the parts")
    if taken := varied & set(settings):
        raise UserError(f"settings: {sorted(taken)[0]} is varied by an axis")


def _baseline(described: Any, compared: Sequence[Axis]) -> tuple[tuple[str, str], ...]:
    if not isinstance(described, dict | None):
        raise UserError("baseline: a value of each axis is needed, such as {rank: 8}")
    given = {str(name): str(value) for name, value in (described or {}).items()}
    if unknown := sorted(set(given) - {axis.name for axis in compared}):
        raise UserError(f"baseline: '{unknown[0]}' is no compared axis")
    found = [(axis.name, given.get(axis.name, next(iter(axis.values)))) for axis in compared]
    for axis, (name, value) in zip(compared, found, strict=True):
        if value not in axis.values:
            raise UserError(f"baseline: {name} {value} is none of {', '.join(axis.values)}")
    return tuple(found)


def _cells(plan: Plan) -> list[Cell]:
    compared = [axis for axis in plan.axes if not axis.chosen]
    axes = [*compared, *(axis for axis in plan.axes if axis.chosen)]
    cells = []
    for seed, *names in itertools.product(plan.seeds, *(axis.values for axis in axes)):
        here = {axis.name: name for axis, name in zip(axes, names, strict=True)}
        change = dict(plan.settings)
        for axis in axes:
            for key, value in axis.values[here[axis.name]].items():
                change[key] = _for_arm(value, here, f"axes.{axis.name}.{key}")
        pairs = tuple(here.items())
        cells.append(Cell(pairs[: len(compared)], pairs[len(compared) :], seed, change))
    return cells


def _for_arm(value: Any, here: Mapping[str, str], key: str) -> Any:
    """The value that a setting has where the axes have these values."""
    if not isinstance(value, ByArm):
        return value
    if here.get(value.axis) not in value.values:
        raise UserError(f"{key}: no value for {value.axis} {here.get(value.axis)}")
    return value.values[here[value.axis]]


def _check_cells(plan: Plan) -> None:
    if len(plan.cells) > MOST_CELLS:
        raise UserError(f"{len(plan.cells):,} cells; at most {MOST_CELLS:,} make sense")
    if plan.search is not None:
        for arm in plan.arms:
            plan.search.for_arm(arm)  # there must be a space for each
    if len(plan.arms) < 2:
        raise UserError("axes: one arm only; there is nothing to compare")
    if odd := [cell.name for cell in plan.cells if not re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,90}", cell.name)]:
        raise UserError(f"axes: '{odd[0]:.120}' would be a cell's folder; give axes and values shorter names")
    if len({cell.name for cell in plan.cells}) < len(plan.cells):
        raise UserError("axes: two cells have the same name; give the values of an axis names of their own")
