"""A search space of an ablation, as Optuna's distributions. Imports no torch, and Optuna only where there is a search.

search:
  space:
    model.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    model.adapter.rank: [2, 8, 32]
    # or, for each value of an axis: {method: {lora: {low: ..., high: ...}, full: {low: ..., high: ...}}}
  trials: 12          # of each arm
  sampler: tpe        # or random
  seed: 0
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lora.errors import UserError, first_line
from lightning_lora.program import install_line

#: Optuna's class of each sampler.
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}
_KEYS = ("space", "trials", "sampler", "seed")
#: A best value so near to an end of its range (as a share of the range) lies on its edge.
_EDGE = 0.05


def require(condition: object, message: str) -> None:
    """Raise a ``UserError`` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


class ByAxis(NamedTuple):
    """A value for each value of an axis.

    Args:
        axis: The axis.
        values: By the name of the axis's value.
    """

    axis: str
    values: dict[str, Any]

    def of(self, here: Mapping[str, str], key: str) -> Any:
        """Return the value where the axes have these values.

        Raises:
            UserError: There is none; the key is named.
        """
        found = here.get(self.axis)
        require(found in self.values, f"{key}: no value for {self.axis} {found}")
        return self.values[str(found)]


def column_of(values: Any) -> Any:
    """Return the values of a setting one by one; {axis: {value: [...]}} gives them for each value of another axis."""
    if not isinstance(values, dict) or len(values) != 1:
        return values
    ((axis, columns),) = values.items()
    try:
        rows = list(zip(*columns.values(), strict=True))
    except (AttributeError, TypeError, ValueError):
        return None
    return [ByAxis(str(axis), dict(zip(map(str, columns), row, strict=True))) for row in rows]


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        space: One of Optuna's distributions for each setting, or one for each value of an axis.
        trials: Settings tried for each arm.
        sampler: A key of ``SAMPLERS``.
        seed: Of the sampler.
    """

    space: Mapping[str, Any]
    trials: int
    sampler: str
    seed: int

    def for_arm(self, values: Mapping[str, str]) -> dict[str, Any]:
        """Return the distribution of each setting for the arm with these values of the axes.

        Raises:
            UserError: There is none for it.
        """
        return {
            key: space.of(values, f"search.space.{key}") if isinstance(space, ByAxis) else space
            for key, space in self.space.items()
        }


@dataclass(frozen=True)
class SearchResult:
    """What the search of one arm has found.

    Args:
        trials: All of Optuna's trials; their parameters are settings, as flat keys.
        best: The best one, once the search has ended; None before, or where none was complete.
        edges: Searched settings whose best value lies at an end of its range.
    """

    trials: Sequence[Any] = ()
    best: Any = None
    edges: Sequence[str] = ()


def make_search(described: Any, axes: Sequence[str]) -> Search:
    """Make the search that a config describes.

    Args:
        described: The config's ``search``.
        axes: Names of the ablation's axes.

    Raises:
        UserError: Something is missing, unknown or does not fit together, or Optuna is not installed.
    """
    given = isinstance(described, dict) and isinstance(described.get("space"), dict) and described["space"]
    require(given, "search: a space is needed, such as space: {model.learning_rate: {low: 1.0e-4, high: 1.0e-2}}")
    unknown = sorted(set(map(str, described)) - set(_KEYS))
    require(not unknown, f"search: unknown key '{''.join(unknown[:1])}'; there are {', '.join(_KEYS)}")
    sampler, trials, seed = described.get("sampler", "tpe"), described.get("trials", 10), described.get("seed", 0)
    require(sampler in SAMPLERS, f"search.sampler: '{sampler}' is none of {', '.join(SAMPLERS)}")
    whole = type(trials) is int and trials >= 1 and type(seed) is int and seed >= 0
    require(whole, "search: trials and seed are whole numbers, trials at least 1")
    space: dict[str, Any] = {}
    for key, values in described["space"].items():
        axis = next(iter(values)) if isinstance(values, dict) and len(values) == 1 else None
        if str(axis) in axes and isinstance(values[axis], dict):
            each = {str(name): _distribution(key, value) for name, value in values[axis].items()}
            space[str(key)] = ByAxis(str(axis), each)
        else:
            space[str(key)] = _distribution(key, values)
    return Search(space, trials, sampler, seed)


def _distribution(key: str, described: Any) -> Any:
    distributions = import_optuna().distributions
    try:
        if isinstance(described, list):
            return distributions.CategoricalDistribution(described)
        whole = all(isinstance(value, int) for name, value in described.items() if name != "log")
        return (distributions.IntDistribution if whole else distributions.FloatDistribution)(**described)
    except (AttributeError, TypeError, ValueError) as error:
        needed = "a list of choices, or a range of numbers {low: ..., high: ..., log: true}, is needed"
        raise UserError(f"search.space.{key}: {needed} ({first_line(error)})") from error


def at_edge(distribution: Any, value: Any) -> bool:
    """Return whether a value lies at an end of what was searched: of a range, or of numbers that were listed."""
    if (choices := getattr(distribution, "choices", None)) is not None:
        numbers = [each for each in choices if type(each) in (int, float)]
        return len(numbers) == len(choices) > 2 and value in (min(numbers), max(numbers))
    low, high, at = (math.log(v) if distribution.log else v for v in (distribution.low, distribution.high, value))
    return high > low and not _EDGE <= (at - low) / (high - low) <= 1 - _EDGE


def import_optuna() -> Any:
    """Import Optuna, which then prints nothing.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"search: needs Optuna; {install_line('search')}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A list of target modules is a choice like any other: JSON, in which the journal is written, can hold it.
    warnings.filterwarnings("ignore", message="Choices for a categorical distribution")
    return optuna
