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
    published: {rank 8: 0.93}            # of others, for an arm: shown beside what is measured, never compared with it
    published_in: Hu et al. 2022, Table 2
    search: {space: {...}, trials: 12}   # instead of chosen axes: ``search_space.py``
    small: {seeds: [1, 2], settings: {data.train_rows: 200}, axes: {rank: ["2", "8"]}, trials: 3}

Instead of axes, or beside chosen ones, ``arms: {NAME: settings}`` names the arms and what each changes. With
``sets: {NAME: settings}`` each data set has an ablation of its own, as arms are paired on the same rows.

An arm is one combination of values of the compared axes, a variant of it one of the chosen axes, a cell a variant with
a seed, and a fold where there are folds. Imports no torch.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import METRICS, compared_metrics
from lightning_lora.experiments.search_space import ByAxis, Search, SearchResult, column_of, make_search, require

#: The axis of arms that are named one by one.
ARM = "arm"
_KEYS = (
    *("question", "base", "settings", "axes", "arms", "search", "baseline", "seeds", "folds"),
    *("metric", "margin", "published", "published_in", "small"),
)


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
        parts = {**self.values, "seed": self.seed, **({} if self.fold is None else {"fold": self.fold})}
        return re.sub(r"[^A-Za-z0-9_.\-]", "_", "__".join(f"{axis}-{value}" for axis, value in parts.items()))


@dataclass(frozen=True)
class Published:
    """Figures of others, shown beside what was measured.

    Args:
        figures: Of the metric, by the arm's label.
        source: Where they are from.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def shown(self, arm: str) -> str:
        """Return the figure of an arm in words, a hyphen where there is none."""
        return f"{self.figures[arm]:.3f}" if arm in self.figures else "-"


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

    def space_of(self, arm: str) -> dict[str, Any]:
        """Return what is searched for an arm: one of Optuna's distributions for each setting."""
        assert self.search is not None
        return self.search.for_arm(self.arms[arm].values)

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
        first, trial = self.arms[arm], "none" if number is None else str(number)
        values = {**first.values, "trial": trial}
        return Cell(arm, trial, values, self.seeds[0] if seed is None else seed, {**first.change, **settings})

    def with_found(self, found: Mapping[str, SearchResult]) -> "Plan":
        """Return the plan whose cells are those of each arm's best trial, with every seed."""
        if self.search is None:
            return self
        best = {arm: found.get(arm, SearchResult()).best for arm in self.arms}
        cells = [
            self.trial_cell(arm, trial and trial.number, trial.params if trial else {}, seed)
            for seed, (arm, trial) in itertools.product(self.seeds, best.items())
        ]
        return replace(self, cells=cells, found=found)


def label_of(values: Mapping[str, str]) -> str:
    """Return values of axes in words: "rank 8, method lora", and a word alone where there is one axis."""
    if len(values) == 1 and not re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", word := next(iter(values.values()))):
        return word
    return ", ".join(f"{axis} {value}" for axis, value in values.items())


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
    labels = {cell.arm: None for cell in _cells(axes, [0], {}, None)}
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
    seeds, folds = content.get("seeds", [1, 2, 3]), content.get("folds")
    known = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(known, "seeds: a list of whole numbers is needed, such as [1, 2, 3]")
    require(folds is None or (type(folds) is int and folds > 1), f"folds: a number from 2 on is needed, got {folds}")
    search = None
    if "search" in content:
        require(len(compared) == len(axes), "search: what is chosen is searched; leave chosen axes out, or the search")
        require(folds is None, "search: with folds its trials would see test rows of other folds; use chosen axes")
        search = make_search(content["search"], [axis.name for axis in axes])
    settings = flatten(content.get("settings"))
    _check_settings(axes, settings, search.space if search is not None else {}, folds)
    plan = Plan(
        question,
        (folder / str(content["base"])).resolve() if content.get("base") else None,
        axes,
        _baseline(content.get("baseline") or {}, compared),
        seeds,
        metric,
        float(margin),
        _cells(axes, seeds, settings, folds),
        search,
        folds=folds,
        published=_published(content, labels),
    )
    for cell in plan.cells:
        usable = re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,90}", cell.name)
        require(usable, f"axes: '{cell.name:.120}' would be a cell's folder; give axes and values shorter names")
        if search is not None:
            search.for_arm(cell.values)  # there must be a space for each
    distinct = len({cell.name for cell in plan.cells}) == len(plan.cells)
    require(distinct, "two cells have the same name; leave out the second of two seeds, or give values other names")
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
    for key in content:
        require(key in known, f"{where}unknown key '{key}'; there are {', '.join(known)}")


def _axes(content: Mapping[str, Any]) -> list[Axis]:
    described, arms = content.get("axes") or {}, content.get("arms") or {}
    known = isinstance(described, dict) and isinstance(arms, dict) and {**described, **arms}
    require(known, "axes: at least one axis is needed, such as rank: {model.adapter.rank: [2, 8]}; or arms")
    for name in ("seed", "fold", "trial"):
        require(name not in described, f"axes.{name}: the name of an axis of every ablation; take another")
    axes = [_axis(str(name), value) for name, value in described.items()]
    if not arms:
        return axes
    beside = all(axis.chosen and axis.name != ARM for axis in axes)
    require(beside, "arms: beside them axes need 'chosen: true'; else list the combinations as arms")
    return [Axis(ARM, {str(name): flatten(v, f"arms.{name}") for name, v in arms.items()}, False, False), *axes]


def _axis(name: str, described: Any) -> Axis:
    where, needed = f"axes.{name}", f"axes.{name}: settings with a list of values each are needed"
    require(isinstance(described, dict), needed)
    columns = {key: column_of(values) for key, values in described.items() if key not in ("chosen", "names")}
    require(columns and all(isinstance(values, list) and values for values in columns.values()), needed)
    lengths = {key: len(values) for key, values in columns.items()}
    together = len(set(lengths.values())) == 1
    require(together, f"{where}: settings that change together need as many values each, got {lengths}")
    first, names, chosen = next(iter(columns.values())), described.get("names"), described.get("chosen", False)
    require(isinstance(chosen, bool), f"{where}.chosen: true or false is needed, got {chosen}")
    require(isinstance(names, list | None), f"{where}.names: a list of words is needed, got {names}")
    by_arm = any(isinstance(value, ByAxis) for value in first)
    require(names or not by_arm, f"{where}: values that depend on an axis need names, such as names: [low, high]")
    words = [str(word) for word in (first if names is None else names)]
    require(len(first) == len(words) == len(set(words)), f"{where}: each value needs a name of its own, got {words}")
    rows = zip(*columns.values(), strict=True)
    values = {word: dict(zip(columns, row, strict=True)) for word, row in zip(words, rows, strict=True)}
    single = [v for value in first for v in (value.values.values() if isinstance(value, ByAxis) else [value])]
    return Axis(name, values, chosen, all(type(value) in (int, float) for value in single))


def _smaller(content: Mapping[str, Any], axes: list[Axis]) -> tuple[dict[str, Any], list[Axis]]:
    """The content and the axes at the small size."""
    small: Any = content.get("small")
    require(isinstance(small, dict), "small: not described in this config")
    _check_keys(small, ("settings", "seeds", "folds", "axes", "trials"), "small: ")
    changed = {**content, **{key: small[key] for key in ("seeds", "folds") if key in small}}
    changed["settings"] = flatten(content.get("settings")) | flatten(small.get("settings"), "small.settings")
    if "trials" in small and isinstance(content.get("search"), dict):
        changed["search"] = {**content["search"], "trials": small["trials"]}
    fewer = dict(small.get("axes") or {})
    kept = []
    for axis in axes:
        wanted = list(map(str, fewer.pop(axis.name, axis.values)))
        known = wanted and set(wanted) <= set(axis.values)
        require(known, f"small.axes.{axis.name}: a list of its values is needed ({', '.join(axis.values)})")
        kept.append(replace(axis, values={name: axis.values[name] for name in wanted}))
    require(not fewer, f"small.axes: there is no axis {', '.join(map(str, fewer))}")
    return changed, kept


def _check_settings(
    axes: Sequence[Axis], settings: Collection[str], searched: Collection[str], folds: int | None
) -> None:
    """Refuse settings that axes or folds vary too, and a setting that is a part of another."""
    varied = dict[str, str]()
    for axis in axes:
        for key in {key for change in axis.values.values() for key in change}:
            first = varied.setdefault(key, axis.name)
            require(first == axis.name, f"axes: {key} is varied by {first} and by {axis.name}; leave it out of one")
    for where, given in {"settings": settings, "search.space": searched}.items():
        for key in given:
            require(key not in varied, f"{where}: {key} is varied by an axis")
    keys = sorted({*varied, *settings, *searched})
    for key, inner in itertools.product(keys, keys):
        require(not inner.startswith(f"{key}."), f"{key} and {inner} are both given: one is a part of the other")
    for key in ("data.fold", "data.test_size") if folds is not None else ():
        require(key not in keys, f"{key}: folds say which rows are tested; leave it out")


def _baseline(described: Mapping[str, Any], compared: Sequence[Axis]) -> str:
    require(isinstance(described, dict), "baseline: a value of each axis is needed, such as {rank: 8}")
    given = {str(name): str(value) for name, value in described.items()}
    found = {axis.name: given.pop(axis.name, next(iter(axis.values))) for axis in compared}
    require(not given, f"baseline: '{next(iter(given), None)}' is no compared axis")
    for axis in compared:
        known = found[axis.name] in axis.values
        require(known, f"baseline: {axis.name} {found[axis.name]} is none of {', '.join(axis.values)}")
    return label_of(found)


def _published(content: Mapping[str, Any], arms: Collection[str]) -> Published:
    figures, source = content.get("published") or {}, str(content.get("published_in") or "").strip()
    require(isinstance(figures, dict), "published: a figure for each arm is needed, such as {lora: 0.93}")
    for arm, figure in figures.items():
        require(str(arm) in arms, f"published: there is no arm '{arm}'; there are {', '.join(arms)}")
        require(type(figure) in (int, float), f"published.{arm}: a number is needed, got {figure}")
    require(source or not figures, "published_in: say where the published figures are from")
    return Published({str(arm): float(figure) for arm, figure in figures.items()}, source)


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
