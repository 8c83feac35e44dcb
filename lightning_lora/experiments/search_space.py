"""A search space of an ablation, and what a search has found in it. Imports no torch and no Optuna.

search:
  space:
    model.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    model.adapter.rank: [2, 8, 32]
    # or, for each value of an axis: {method: {lora: {low: ..., high: ...}, full: {low: ..., high: ...}}}
  trials: 12          # of each arm
  sampler: tpe        # or random
  pruner: none        # or median, halving: ends trials within an epoch that validation shows to be poor
  seed: 0
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError

Arm = tuple[tuple[str, str], ...]
SAMPLERS = ("tpe", "random")
PRUNERS = ("none", "median", "halving")
FOUND = "search.json"
_KEYS = ("space", "trials", "sampler", "pruner", "seed")
#: A best value so near to an end of its range (as a share of the range) lies on its edge.
_EDGE = 0.05


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``.

    Args:
        low: The smallest.
        high: The largest.
        log: Whether they are drawn evenly in their logarithm.
        step: What they are multiples of from ``low`` on, or None.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether they are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 0))

    def at_edge(self, value: float) -> bool:
        """Whether a value lies at an end."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return high > low and not _EDGE <= (at - low) / (high - low) <= 1 - _EDGE


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        space: A range or a list of choices for each setting; or, by the name of an axis, one for each of its values.
        trials: Settings tried for each arm.
        sampler: One of ``SAMPLERS``.
        pruner: One of ``PRUNERS``.
        seed: Of the sampler.
    """

    space: Mapping[str, Any]
    trials: int
    sampler: str
    pruner: str
    seed: int

    def for_arm(self, arm: Arm) -> dict[str, Range | list[Any]]:
        """The space of one arm.

        Raises:
            UserError: There is none for it.
        """
        here = dict(arm)
        found: dict[str, Range | list[Any]] = {}
        for key, described in self.space.items():
            if isinstance(described, tuple):
                axis, spaces = described
                if here.get(axis) not in spaces:
                    raise UserError(f"search.space.{key}: no range for {axis} {here.get(axis)}")
                found[key] = spaces[here[axis]]
            else:
                found[key] = described
        return found


@dataclass(frozen=True)
class Trial:
    """One tried setting.

    Args:
        number: From 0 on.
        settings: What was tried, as flat keys.
        state: "complete", "pruned", "failed" or "running".
        value: The metric on validation rows, or None.
        reason: Why it failed.
    """

    number: int
    settings: Mapping[str, Any]
    state: str
    value: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Found:
    """What the search of one arm has come to.

    Args:
        trials: All of them.
        best: The best one's number, once the search has ended; None before, or where none was complete.
        edges: Searched settings whose best value lies at an end of its range.
    """

    trials: Sequence[Trial] = ()
    best: int | None = None
    edges: Sequence[str] = field(default=())

    @property
    def settings(self) -> Mapping[str, Any]:
        """The best trial's."""
        return next((trial.settings for trial in self.trials if trial.number == self.best), {})


def make_search(described: Any, axes: Sequence[str], fail: Any) -> Search:
    """The search that a config describes.

    Args:
        described: What stands under ``search``.
        axes: Names of the ablation's axes.
        fail: Makes the error of a message.
    """
    if not isinstance(described, dict) or not isinstance(described.get("space"), dict) or not described["space"]:
        raise fail("search: a space is needed, such as space: {model.learning_rate: {low: 1.0e-4, high: 1.0e-2}}")
    if unknown := sorted(set(map(str, described)) - set(_KEYS)):
        raise fail(f"search: unknown key '{unknown[0]}'; there are {', '.join(_KEYS)}")
    for key, choices in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if described.get(key, choices[0]) not in choices:
            raise fail(f"search.{key}: '{described[key]}' is none of {', '.join(choices)}")
    trials, seed = described.get("trials", 10), described.get("seed", 0)
    if type(trials) is not int or trials < 1 or type(seed) is not int or seed < 0:
        raise fail("search: trials and seed are whole numbers, trials at least 1")
    space: dict[str, Any] = {}
    for key, values in described["space"].items():
        if isinstance(values, dict) and len(values) == 1 and (axis := str(next(iter(values)))) in axes:
            inner = values[next(iter(values))]
            if not isinstance(inner, dict):
                raise fail(f"search.space.{key}.{axis}: a range for each value of the axis is needed")
            space[str(key)] = (axis, {str(name): _one(key, value, fail) for name, value in inner.items()})
        else:
            space[str(key)] = _one(key, values, fail)
    return Search(space, trials, described.get("sampler", "tpe"), described.get("pruner", "none"), seed)


def _one(key: str, described: Any, fail: Any) -> Range | list[Any]:
    if isinstance(described, list) and described:
        return described
    if not isinstance(described, dict) or not {"low", "high"} <= set(described) <= {"low", "high", "log", "step"}:
        raise fail(f"search.space.{key}: a list of choices, or a range {{low: ..., high: ..., log: true}}, is needed")
    log, step = described.get("log"), described.get("step")
    low, high = described["low"], described["high"]
    numbers = [value for value in (low, high, step) if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers) or not low < high:
        raise fail(f"search.space.{key}: low and high are numbers, low the smaller, got {low} and {high}")
    if not isinstance(log, bool | None) or (log and (low <= 0 or step is not None)):
        raise fail(f"search.space.{key}: log is true or false, takes no step, and needs low above 0")
    return Range(low, high, bool(log), step)


def write_found(found: Mapping[Arm, Found]) -> str:
    """What was found as JSON, for ``read_found``."""
    arms = [
        {"arm": arm, "best": one.best, "edges": list(one.edges), "trials": [vars(trial) for trial in one.trials]}
        for arm, one in found.items()
    ]
    return json.dumps({"format": 1, "arms": arms}, indent=2, ensure_ascii=False) + "\n"


def read_found(folder: Path) -> dict[Arm, Found]:
    """What an ablation's search has found; nothing where it has not begun.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / FOUND
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            tuple((str(axis), str(value)) for axis, value in arm["arm"]): Found(
                [Trial(**trial) for trial in arm["trials"]], arm["best"], arm["edges"]
            )
            for arm in content["arms"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
