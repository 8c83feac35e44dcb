"""The plan of an ablation, as a person writes it (a question, a base recipe, axes, seeds) and as cells to train.

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
    folds: 5                             # cross-validation: each labelled row is tested once for each arm and seed
    metric: accuracy
    margin: 0.01                         # smaller differences count as none; of mse a share of the labels' variance
    published: {rank 8: 0.93}               # of others, for an arm: ``published.py``
    search: {space: {...}, trials: 12}   # instead of chosen axes: ``search_space.py``
    small: {seeds: [1, 2], settings: {data.train_rows: 200}, axes: {rank: ["2", "8"]}, trials: 3}

Instead of axes, or beside chosen ones, ``arms: {NAME: settings}`` names the arms and what each changes.

An arm is one combination of values of the compared axes, a variant of it one of the chosen axes, a cell a variant with
a seed, and a fold where there are folds. Imports no torch.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import METRICS, compared_metrics
from lightning_lora.experiments.published import Published, make_published
from lightning_lora.experiments.search_space import ByAxis, Search, SearchResult, make_search, require

#: The axis of arms that are named one by one.
ARM = "arm"
MOST_CELLS = 10_000
_KEYS = (
    "question",
    "base",
    "settings",
    "axes",
    "arms",
    "search",
    "baseline",
    "seeds",
    "folds",
    "metric",
    "margin",
    "published",
    "published_in",
    "small",
)
_SMALL_KEYS = ("settings", "seeds", "folds", "axes", "trials")


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
        arm: The label of its arm.
        variant: The label of its variant; empty where nothing is chosen.
        values: The name of the value of each axis, the compared ones first.
        seed: ``seed_everything``.
        change: What differs from the base recipe, as flat keys.
        fold: The fold whose rows it is tested on, from 1; None without folds.
    """

    arm: str
    variant: str
    values: Mapping[str, str]
    seed: int
    change: Mapping[str, Any]
    fold: int | None = None

    @property
    def searched(self) -> bool:
        """Whether its settings are known: not while no trial of the search has finished."""
        return self.values.get("trial") != "none"

    @property
    def name(self) -> str:
        """A folder's name: "rank-8__rate-0.0005__seed-1"."""
        parts = [f"{axis}-{value}" for axis, value in self.values.items()]
        fold = [] if self.fold is None else [f"fold-{self.fold}"]
        return re.sub(r"[^A-Za-z0-9_.\-]", "_", "__".join([*parts, f"seed-{self.seed}", *fold]))


@dataclass(frozen=True)
class Plan:
    """What is asked, and all cells.

    Args:
        question: In words.
        base: The config of the base recipe, or None for the embedded default.
        axes: What is varied.
        baseline: The label of the arm that the others are compared with.
        seeds: Of every arm.
        metric: What is chosen and compared by; one of ``compared_metrics``.
        margin: Differences under this count as none; of an error of numbers a share of their spread (``margin_on``).
        cells: In the order in which they are run: seed by seed, so that early stops leave whole comparisons.
        search: What is searched for each arm before it is compared, or None.
        found: What the search has found of each arm.
        folds: Their number, or None: then all cells are tested on the same rows.
        published: What others report.
    """

    question: str
    base: Path | None
    axes: list[Axis]
    baseline: str
    seeds: list[int]
    metric: str
    margin: float
    cells: list[Cell]
    search: Search | None = None
    found: Mapping[str, SearchResult] = field(default_factory=dict)
    folds: int | None = None
    published: Published = field(default_factory=Published)

    @property
    def arms(self) -> dict[str, Cell]:
        """The first cell of each arm, by its label, in the order of the axes."""
        found: dict[str, Cell] = {}
        for cell in self.cells:
            found.setdefault(cell.arm, cell)
        return found

    @property
    def tried(self) -> int:
        """Variants of each arm: its budget of tuning."""
        return self.search.trials if self.search is not None else len({cell.variant for cell in self.cells})

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return METRICS[self.metric].higher_is_better

    def margin_on(self, truth: NDArray) -> float:
        """Return the margin in the metric's units, for rows with this truth, (N,)."""
        unit = METRICS[self.metric].unit
        return self.margin * ((unit[1](truth) or 1.0) if unit is not None else 1.0)

    def trial_cell(self, arm: str, number: int | None, settings: Mapping[str, Any], seed: int | None = None) -> Cell:
        """Return the cell of a trial of the search; the number is None for the best one before there is one."""
        first = self.arms[arm]
        trial = "none" if number is None else str(number)
        values = {axis: value for axis, value in first.values.items() if axis != "trial"} | {"trial": trial}
        return Cell(arm, trial, values, self.seeds[0] if seed is None else seed, {**first.change, **settings})

    def with_found(self, found: Mapping[str, SearchResult]) -> "Plan":
        """Return the plan whose cells are those of each arm's best trial, with every seed."""
        if self.search is None:
            return self
        cells = []
        for seed, arm in itertools.product(self.seeds, self.arms):
            best = found.get(arm, SearchResult()).best
            cells.append(self.trial_cell(arm, best and best.number, best.params if best else {}, seed))
        return replace(self, cells=cells, found=found)


def label_of(values: Mapping[str, str]) -> str:
    """Return values of axes in words: "rank 8, method lora", and a word alone where there is one axis."""
    words = [f"{axis} {value}" for axis, value in values.items()]
    return ", ".join(values.values() if len(words) == 1 and not _is_number(*values.values()) else words)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text) is not None


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
    axes = _axes(content)
    # Those that the small size leaves out may have published figures too.
    labels = dict.fromkeys(cell.arm for cell in _cells(axes, [0], {}, None))
    if small:
        content, axes = _smaller(content, axes)
    compared = [axis for axis in axes if not axis.chosen]
    require(compared, "axes: all are chosen, so nothing is compared; leave 'chosen' out of one")
    question = str(content.get("question") or "").strip()
    require(question, "question: say in a sentence what the ablation asks")
    metric, margin = str(content.get("metric", "accuracy")), content.get("margin", 0.01)
    require(metric in compared_metrics(), f"metric: '{metric}' is none of {', '.join(compared_metrics())}")
    known = type(margin) in (int, float) and 0 < margin < 1
    require(known, f"margin: a number between 0 and 1 is needed, got {margin}")
    seeds = content.get("seeds", [1, 2, 3])
    known = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(known, "seeds: a list of whole numbers is needed, such as [1, 2, 3]")
    require(len(set(seeds)) == len(seeds), "seeds: one is duplicated")
    settings, folds = flatten(content.get("settings")), content.get("folds")
    require(folds is None or (type(folds) is int and folds > 1), f"folds: a number from 2 on is needed, got {folds}")
    search = None
    if "search" in content:
        require(len(compared) == len(axes), "search: what is chosen is searched; leave chosen axes out, or the search")
        require(folds is None, "search: with folds its trials would see test rows of other folds; use chosen axes")
        search = make_search(content["search"], [axis.name for axis in axes])
    _check_settings(axes, settings=settings, **{"search.space": search.space if search is not None else {}})
    base = content.get("base")
    cells = _cells(axes, seeds, settings, folds)
    given = folds is not None and settings.keys() | {key for axis in axes for v in axis.values.values() for key in v}
    if given and (key := next((key for key in ("data.fold", "data.test_size") if key in given), None)):
        raise UserError(f"{key}: folds say which rows are tested; leave it out")
    plan = Plan(
        question,
        (folder / str(base)).resolve() if base else None,
        axes,
        _baseline(content.get("baseline"), compared),
        list(seeds),
        metric,
        float(margin),
        cells,
        search,
        folds=folds,
        published=make_published(content, labels),
    )
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
    require(isinstance(described, Mapping | None), f"{key}: settings are needed, such as {{data.train_rows: 200}}")
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


def _axes(content: Mapping[str, Any]) -> list[Axis]:
    described, arms = content.get("axes") or {}, content.get("arms") or {}
    known = isinstance(described, dict) and isinstance(arms, dict) and {**described, **arms}
    require(known, "axes: at least one axis is needed, such as rank: {model.adapter.rank: [2, 8]}; or arms")
    axes = [_axis(str(name), value) for name, value in described.items()]
    if not arms:
        return axes
    beside = all(axis.chosen and axis.name != ARM for axis in axes)
    require(beside, "arms: beside them axes need 'chosen: true'; else list the combinations as arms")
    return [Axis(ARM, {str(name): flatten(v, f"arms.{name}") for name, v in arms.items()}, False, False), *axes]


def _axis(name: str, described: Any) -> Axis:
    where, needed = f"axes.{name}", f"axes.{name}: settings with a list of values each are needed"
    require(isinstance(described, dict), needed)
    chosen, names = described.get("chosen", False), described.get("names")
    columns = {key: _column(values) for key, values in described.items() if key not in ("chosen", "names")}
    require(columns and all(isinstance(values, list) and values for values in columns.values()), needed)
    lengths = {key: len(values) for key, values in columns.items()}
    require(
        len(set(lengths.values())) == 1,
        f"{where}: settings that change together need as many values each, got {lengths}",
    )
    require(isinstance(chosen, bool), f"{where}.chosen: true or false is needed")
    require(isinstance(names, list | None), f"{where}.names: a list of words is needed, got {names}")
    first = next(iter(columns.values()))
    by_arm = any(isinstance(value, ByAxis) for value in first)
    require(names or not by_arm, f"{where}: values that depend on an axis need names, such as names: [low, high]")
    words = [str(word) for word in (first if names is None else names)]
    require(len(first) == len(words) == len(set(words)), f"{where}: each value needs a name of its own, got {words}")
    values = {word: {key: column[i] for key, column in columns.items()} for i, word in enumerate(words)}
    single = [v for value in first for v in (value.values.values() if isinstance(value, ByAxis) else [value])]
    return Axis(name, values, chosen, all(type(value) in (int, float) for value in single))


def _column(values: Any) -> Any:
    """The values of a setting; those that are given for each value of another axis, {axis: {value: [...]}}, in rows."""
    if not isinstance(values, dict) or len(values) != 1:
        return values
    ((axis, columns),) = values.items()
    try:
        rows = list(zip(*columns.values(), strict=True))
    except (AttributeError, TypeError, ValueError):
        return None
    return [ByAxis(str(axis), dict(zip(map(str, columns), row, strict=True))) for row in rows]


def _smaller(content: Mapping[str, Any], axes: list[Axis]) -> tuple[dict[str, Any], list[Axis]]:
    """The content and the axes at the small size."""
    small = content.get("small")
    require(isinstance(small, dict), "small: not described in this config")
    assert isinstance(small, dict)
    _check_keys(small, _SMALL_KEYS, "small: ")
    changed = {**content, "seeds": small.get("seeds", content.get("seeds", [1, 2, 3]))}
    changed |= {"folds": small["folds"]} if "folds" in small else {}
    changed["settings"] = flatten(content.get("settings")) | flatten(small.get("settings"), "small.settings")
    if "trials" in small and isinstance(content.get("search"), dict):
        changed["search"] = {**content["search"], "trials": small["trials"]}
    fewer = {axis.name: {name: name for name in axis.values} for axis in axes} | (small.get("axes") or {})
    kept = []
    for axis in axes:
        wanted = [str(name) for name in fewer.pop(axis.name)]
        known = wanted and set(wanted) <= set(axis.values)
        require(known, f"small.axes.{axis.name}: a list of its values is needed ({', '.join(axis.values)})")
        kept.append(replace(axis, values={name: axis.values[name] for name in wanted}))
    require(not fewer, f"small.axes: there is no axis {', '.join(map(str, fewer))}")
    return changed, kept


def _check_settings(axes: Sequence[Axis], **given: Iterable[str]) -> None:
    """Refuse settings that axes vary too, and a setting that is a part of another."""
    varied = {key for axis in axes for change in axis.values.values() for key in change}
    for where, keys in given.items():
        if taken := sorted(varied & set(keys)):
            raise UserError(f"{where}: {taken[0]} is varied by an axis")
    keys = sorted({*varied, *(key for each in given.values() for key in each)})
    for key, inner in itertools.product(keys, keys):
        require(not inner.startswith(f"{key}."), f"{key} and {inner} are both given: one is a part of the other")


def _baseline(described: Any, compared: Sequence[Axis]) -> str:
    require(isinstance(described, dict | None), "baseline: a value of each axis is needed, such as {rank: 8}")
    given = {str(name): str(value) for name, value in (described or {}).items()}
    found = {axis.name: given.pop(axis.name, next(iter(axis.values))) for axis in compared}
    require(not given, f"baseline: '{next(iter(given), None)}' is no compared axis")
    for axis in compared:
        value = found[axis.name]
        require(value in axis.values, f"baseline: {axis.name} {value} is none of {', '.join(axis.values)}")
    return label_of(found)


def _cells(axes: Sequence[Axis], seeds: Sequence[int], settings: Mapping[str, Any], folds: int | None) -> list[Cell]:
    axes = sorted(axes, key=lambda axis: axis.chosen)
    cells = []
    numbers = [None] if folds is None else range(1, folds + 1)
    for seed, fold, *names in itertools.product(seeds, numbers, *(axis.values for axis in axes)):
        here = {axis.name: name for axis, name in zip(axes, names, strict=True)}
        change = dict(settings) | ({} if fold is None else {"data.fold": [fold, folds]})
        for axis in axes:
            for key, value in axis.values[here[axis.name]].items():
                change[key] = value.of(here, f"axes.{axis.name}.{key}") if isinstance(value, ByAxis) else value
        arm, variant = (
            label_of({a.name: here[a.name] for a in axes if a.chosen is chosen}) for chosen in (False, True)
        )
        cells.append(Cell(arm, variant, here, seed, change, fold))
    return cells


def _check_cells(plan: Plan) -> None:
    count = len(plan.cells)
    require(count <= MOST_CELLS, f"{count:,} cells; at most {MOST_CELLS:,} make sense")
    if plan.search is not None:
        for cell in plan.arms.values():
            plan.search.for_arm(cell.values)  # there must be a space for each
    for cell in plan.cells:
        usable = re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,90}", cell.name)
        require(usable, f"axes: '{cell.name:.120}' would be a cell's folder; give axes and values shorter names")
    distinct = len({cell.name for cell in plan.cells}) == count
    require(distinct, "axes: two cells have the same name; give the values of an axis names of their own")
