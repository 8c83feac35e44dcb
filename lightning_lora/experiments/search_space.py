"""A search space of an ablation, as Optuna's distributions. Imports no torch, and Optuna only where there is a search.

search:
  space:
    model.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    model.adapter.rank: [2, 8, 32]
    # or, for each value of an axis: {method: {lora: {low: ..., high: ...}, full: {low: ..., high: ...}}}
  trials: 12          # of each arm
  sampler: tpe        # or random
  pruner: none        # or median, halving: stops trials within an epoch that validation shows to be poor
  seed: 0
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.errors import UserError
from lightning_lora.studies import PRUNERS, SAMPLERS, import_optuna

Arm = tuple[tuple[str, str], ...]
_KEYS = ("space", "trials", "sampler", "pruner", "seed")
#: A best value so near to an end of its range (as a share of the range) lies on its edge.
_EDGE = 0.05


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        space: One of Optuna's distributions for each setting; or the name of an axis with a distribution for each of
            its values.
        trials: Settings tried for each arm.
        sampler: A key of ``SAMPLERS``.
        pruner: A key of ``PRUNERS``.
        seed: Of the sampler.
    """

    space: Mapping[str, Any]
    trials: int
    sampler: str
    pruner: str
    seed: int

    def for_arm(self, arm: Arm) -> dict[str, Any]:
        """Return the distribution of each setting for one arm.

        Raises:
            UserError: There is none for it.
        """
        here = dict(arm)
        found: dict[str, Any] = {}
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
class Found:
    """What the search of one arm has found.

    Args:
        trials: All of Optuna's trials; their parameters are settings, as flat keys.
        best: The best one, once the search has ended; None before, or where none was complete.
        edges: Searched settings whose best value lies at an end of its range.
    """

    trials: Sequence[Any] = ()
    best: Any = None
    edges: Sequence[str] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The best trial's."""
        return self.best.params if self.best is not None else {}


def make_search(described: Any, axes: Sequence[str]) -> Search:
    """Make the search that a config describes.

    Args:
        described: The config's ``search``.
        axes: Names of the ablation's axes.

    Raises:
        UserError: Something is missing, unknown or does not fit together, or Optuna is not installed.
    """
    if not isinstance(described, dict) or not isinstance(described.get("space"), dict) or not described["space"]:
        raise UserError("search: a space is needed, such as space: {model.learning_rate: {low: 1.0e-4, high: 1.0e-2}}")
    if unknown := sorted(set(map(str, described)) - set(_KEYS)):
        raise UserError(f"search: unknown key '{unknown[0]}'; there are {', '.join(_KEYS)}")
    sampler, pruner = described.get("sampler", "tpe"), described.get("pruner", "none")
    for key, value, choices in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS)):
        if value not in choices:
            raise UserError(f"search.{key}: '{value}' is none of {', '.join(choices)}")
    trials, seed = described.get("trials", 10), described.get("seed", 0)
    if type(trials) is not int or trials < 1 or type(seed) is not int or seed < 0:
        raise UserError("search: trials and seed are whole numbers, trials at least 1")
    space: dict[str, Any] = {}
    for key, values in described["space"].items():
        if isinstance(values, dict) and len(values) == 1 and (axis := str(next(iter(values)))) in axes:
            inner = values[next(iter(values))]
            if not isinstance(inner, dict):
                raise UserError(f"search.space.{key}.{axis}: a range for each value of the axis is needed")
            space[str(key)] = (axis, {str(name): _distribution(key, value) for name, value in inner.items()})
        else:
            space[str(key)] = _distribution(key, values)
    return Search(space, trials, sampler, pruner, seed)


def _distribution(key: str, described: Any) -> Any:
    distributions = import_optuna().distributions
    if isinstance(described, list) and described:
        return distributions.CategoricalDistribution(described)
    if not isinstance(described, dict) or not {"low", "high"} <= set(described) <= {"low", "high", "log", "step"}:
        raise UserError(
            f"search.space.{key}: a list of choices, or a range {{low: ..., high: ..., log: true}}, is needed"
        )
    numbers = {name: value for name, value in described.items() if name != "log" and value is not None}
    log = described.get("log") or False
    if not all(type(value) in (int, float) for value in numbers.values()) or not isinstance(log, bool):
        raise UserError(
            f"search.space.{key}: low, high and step are numbers, and log is true or false, got {described}"
        )
    whole = all(isinstance(value, int) for value in numbers.values())
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    try:
        return kind(**numbers, log=log)
    except ValueError as error:
        raise UserError(f"search.space.{key}: {error}") from error


def at_edge(distribution: Any, value: Any) -> bool:
    """Return whether a value lies at an end of what was searched: of a range, or of numbers that were listed."""
    if (choices := getattr(distribution, "choices", None)) is not None:
        numbers = [each for each in choices if type(each) in (int, float)]
        return len(numbers) == len(choices) > 2 and value in (min(numbers), max(numbers))
    low, high, at = (math.log(v) if distribution.log else v for v in (distribution.low, distribution.high, value))
    return high > low and not _EDGE <= (at - low) / (high - low) <= 1 - _EDGE
