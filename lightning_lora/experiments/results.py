"""What the cells of an ablation say: every one a row, also those that failed; and the arms, compared.

The sole reader of cells. Imports no torch.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lightning_lora.errors import UserError
from lightning_lora.evaluation.intervals import intervals, metrics_of, pseudo_values
from lightning_lora.evaluation.metric_table import compared_metrics
from lightning_lora.evaluation.outputs import OUTPUTS_KEY, Outputs
from lightning_lora.evaluation.significance import Difference, Estimate, corrected, difference, estimate
from lightning_lora.experiments.plan import Cell, Plan, flatten, make_plan
from lightning_lora.experiments.search_space import SearchResult
from lightning_lora.experiments.searcher import read_found
from lightning_lora.runs.folder import RunFolder, best_evaluation, best_predictions

#: Many configs are read; libyaml takes a tenth of the time.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class CellPredictions(Outputs):
    """What a model predicts for the rows of a split, in the order of their keys.

    Args:
        keys: Fingerprint of each row's text and its place, shape (N,).
        label_names: Names of the C classes or labels.
        lengths: Characters of each text, (N,); None where they were not kept.
        folds: Which fold's model predicts each row, from 0, (N,); None where one model predicts all.
    """

    keys: NDArray
    label_names: Sequence[str]
    lengths: NDArray | None = None
    folds: NDArray | None = None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics of all rows."""
        return metrics_of(self)

    @cached_property
    def intervals(self) -> dict[str, list[float]]:
        """The interval of each metric over the rows."""
        return intervals(self)

    def values(self, metric: str) -> NDArray:
        """Return the metric's value of each row, (N,): its mean is the metric.

        Raises:
            UserError: The task has no such metric.
        """
        if metric not in (known := compared_metrics(self.task)):
            raise UserError(f"metric: '{metric}' is none of task {self.task}; it has {', '.join(known)}")
        return pseudo_values(self, metric)

    def of_rows(self, keep: NDArray) -> "CellPredictions":
        """Return the answers to some of the rows, (N,) of truth values."""
        kept = {name: getattr(self, name)[keep] for name in ("logits", "labels", "keys")}
        if self.thresholds is not None and self.thresholds.ndim == 2:  # those of each row's fold
            kept["thresholds"] = self.thresholds[keep]
        return replace(self, **kept, lengths=None, folds=None)

    @cached_property
    def origins(self) -> NDArray:
        """The file or Hub split that each row is from, (N,)."""
        return np.array([key.partition("\0")[2].partition("\0")[0] for key in self.keys])


@dataclass(frozen=True)
class CellResult:
    """One cell with what lies in its folder.

    Args:
        cell: The cell.
        status: "finished", "running", "interrupted", "failed", "stale", or "missing".
        reason: Why it is not finished, or what is odd about it; empty where all is well.
        record: Its run record.
        answers: Its answers by split: "val" where it has finished, "test" where it was tested.
        place: Its folder.
    """

    cell: Cell
    status: str
    reason: str
    record: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, CellPredictions] = field(default_factory=dict)
    place: Path | None = None

    def curve(self, metric: str) -> dict[int, float]:
        """Return a metric's value on validation rows by optimizer step, as ``metrics.csv`` has it."""
        path = None if self.place is None else self.place / "metrics.csv"
        if path is None or not path.is_file():
            return {}
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(f"val/{metric}") and row.get("step")]
        return {int(row["step"]) + 1: float(row[f"val/{metric}"]) for row in rows}

    def cost(self, name: str) -> float:
        """Return a cost from the record, NaN where it has none."""
        return float((self.record.get("costs") or {}).get(name, math.nan))


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds.

    Args:
        label: The arm's.
        tried: How many variants had the chance.
        edges: Chosen axes whose best value is the first or last of its numbers.
        cells: Of the variant that is best on validation rows, one a seed and fold; of folds of each one's best.
        estimates: The metric by split, over the seeds that have answers of it.
        split: What all arms are compared on: "test" where the baseline and every arm that is complete were tested,
            else "val".
        against: Against the baseline, on the rows of the split.
        seeds: Seeds that ``against`` is over.
    """

    label: str
    tried: int
    edges: Sequence[str]
    cells: Sequence[CellResult]
    estimates: Mapping[str, Estimate]
    split: str = "val"
    against: Difference | None = None
    seeds: Sequence[int] = ()

    @cached_property
    def by_seed(self) -> list[CellResult]:
        """The cells, those of the folds of a seed as one that has answers where all folds have them."""
        seeds: dict[int, list[CellResult]] = {}
        for cell in self.cells:
            seeds.setdefault(cell.cell.seed, []).append(cell)
        return [cells[0] if len(cells) == 1 else _pool_folds(cells) for cells in seeds.values()]

    @property
    def variant(self) -> str:
        """The variant that is best on validation rows; of several folds those that are best on each one's."""
        return " / ".join(dict.fromkeys(cell.cell.variant for cell in self.cells))

    @property
    def own(self) -> Estimate | None:
        """The metric on the rows that the arms are compared on."""
        return self.estimates.get(self.split)

    @property
    def complete(self) -> bool:
        """Whether every seed of the chosen variant has finished."""
        return all("val" in cell.answers for cell in self.cells)

    def mean_cost(self, name: str) -> float:
        """Return a cost's mean over the finished seeds."""
        values = [c.cost(name) for c in self.cells if c.status == "finished" and not math.isnan(c.cost(name))]
        return float(np.mean(values)) if values else math.nan


def read_plan(folder: Path) -> tuple[dict[str, Any], Plan]:
    """Read what was asked of an ablation, and its plan.

    Raises:
        UserError: The folder is none of an ablation, or what it says is damaged.
    """
    path = folder / "ablation.json"
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(asked["config"], dict) or not isinstance(asked["command"], str):
            raise TypeError("its config is a tree and its command are words")
        plan = make_plan(asked["config"], Path(asked["path"]), asked["small"])
        return asked, plan.with_found(read_found(plan, folder))
    except FileNotFoundError:
        raise UserError(f"report: {folder} is no ablation's folder (no ablation.json in it)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_cells(plan: Plan, folder: Path) -> list[CellResult]:
    """Read every cell of the plan."""
    return [_read_cell(cell, folder / "cells" / cell.name) for cell in plan.cells]


def _read_cell(cell: Cell, place: Path) -> CellResult:
    if not cell.searched:
        return CellResult(cell, "missing", "no trial of the search has finished")
    if not (place / "run.json").is_file():
        return CellResult(cell, "missing", "not started")
    record = RunFolder(place).read()
    status = str(record.get("status"))
    if status != "finished":
        running = "running, or killed" if status == "running" else status
        return CellResult(cell, status, str(record.get("error") or running), record)
    settings = yaml.load((place / "config.yaml").read_text(encoding="utf-8"), Loader=_YAML)
    if (found := first_difference(settings, {**cell.change, "seed_everything": cell.seed})) is not None:
        key, value, wanted = found
        return CellResult(cell, "stale", f"trained with other settings: {key} {value} instead of {wanted}", record)
    answers = read_run_predictions(place, record)
    if "val" not in answers:
        return CellResult(cell, "interrupted", "trained, but not validated", record)
    return CellResult(cell, status, one_class(answers["val"]), record, answers, place)


def read_run_predictions(place: Path, record: Mapping[str, Any]) -> dict[str, CellPredictions]:
    """Read the answers by the best weights of a run, by split.

    Raises:
        UserError: A file is damaged.
    """
    names = {split: best_evaluation(record, split) for split in ("val", "test")}
    found = {split: read_cell_predictions(best_predictions(place, name)) for split, name in names.items() if name}
    return {split: answers for split, answers in found.items() if answers is not None}


def read_cell_predictions(path: Path) -> CellPredictions | None:
    """Read the answers in a run's predictions file; None where there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            read = file.read()
        facts = json.loads((read.schema.metadata or {}).get(OUTPUTS_KEY.encode(), b"{}"))
        table, task = read.to_pydict(), facts.get("task", "single_label")
        names = [name[6:-1] for name in table if name.startswith("logit(")]
        logits = np.array([table[f"logit({name})"] for name in names], np.float32).T
        if task == "regression":
            labels = np.array(table["label"], np.float64)
        elif task == "multi_label":
            labels = np.array([[name in each for name in names] for each in table["label"]], np.uint8)
        else:
            labels = np.array([names.index(label) for label in table["label"]])
        keys = ["\0".join(map(str, row)) for row in zip(table["key"], table["origin"], table["row"], strict=True)]
        lengths = np.array(table["characters"]) if "characters" in table else None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable file of predictions ({error})") from error
    order = np.argsort(keys, kind="stable")
    thresholds = None if facts.get("thresholds") is None else np.array(facts["thresholds"])
    lengths = None if lengths is None else lengths[order]
    columns = (logits[order], labels[order], np.array(keys)[order], names, lengths)
    return CellPredictions(*columns, task=task, thresholds=thresholds)


def first_difference(settings: Any, wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first flat key that a tree of settings has otherwise, its value there, and the one that is wanted."""
    here = flatten(settings)
    return next(((key, here.get(key), v) for key, v in flatten(wanted).items() if not _same(here.get(key), v)), None)


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are the same, however they are written (1 and 1.0, 1e-4 and "1e-4")."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return one == other or float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def count_tests(folder: Path) -> tuple[int, int]:
    """Count evaluations of test rows, also of stale cells and by hand, and the cells they are of."""
    tests: dict[str, int] = {}
    for path in [*folder.glob("cells/*/run.json"), *folder.glob("stale/*/run.json")]:
        name = path.parent.name if path.parts[-3] == "cells" else path.parent.name.rpartition(".")[0]
        count = sum(each.startswith("test") for each in RunFolder(path.parent).read().get("evaluations", {}))
        tests[name] = tests.get(name, 0) + count
    return sum(tests.values()), sum(map(bool, tests.values()))


def compare_arms(plan: Plan, cells: Sequence[CellResult]) -> list[ArmResult]:
    """Compare the arms, in the plan's order: each with its best variant by validation, against the baseline.

    Raises:
        UserError: Cells have answers to other rows.
    """
    arms = [_best_variant(plan, label, [c for c in cells if c.cell.arm == label]) for label in plan.arms]
    base = next(arm for arm in arms if arm.label == plan.baseline)
    # An arm that is not complete is never tested: the others are compared without it.
    tested = all("test" in cell.answers for arm in arms if arm.complete for cell in arm.cells)
    split = "test" if base.complete and tested else "val"
    arms = [replace(arm if arm is base else _paired(plan, arm, base, split), split=split) for arm in arms]
    against = iter(corrected([arm.against for arm in arms if arm.against is not None]))
    return [arm if arm.against is None else replace(arm, against=next(against)) for arm in arms]


def _best_variant(plan: Plan, label: str, cells: Sequence[CellResult]) -> ArmResult:
    # A fold's choice is of its own validation rows: those of another fold are test rows of this one.
    folds: dict[int | None, dict[str, list[CellResult]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.cell.fold or 0):
        folds.setdefault(cell.cell.fold, {}).setdefault(cell.cell.variant, []).append(cell)

    def score(variant: list[CellResult]) -> tuple[float, int]:
        """Mean over the seeds; without all of them it cannot be the best, and then what there is most of is taken."""
        values = [c.answers["val"].values(plan.metric).mean() for c in variant if "val" in c.answers]
        complete = len(values) == len(variant) and not np.isnan(values).any()
        sign = 1 if plan.higher_is_better else -1
        return (sign * float(np.mean(values)) if complete else -math.inf), len(values)

    chosen = [max(variants.values(), key=score) for variants in folds.values()]
    own, tried, edges = [cell for variant in chosen for cell in variant], plan.tried, list[str]()
    for axis in plan.axes:
        names = list(axis.values)
        if axis.chosen and axis.numbers and len(names) > 1:
            best = dict.fromkeys(cell.cell.values[axis.name] for cell in own)
            edges += [f"{axis.name} {name}" for name in best if name in (names[0], names[-1])]
    if plan.search is not None:
        found = plan.found.get(label, SearchResult())
        tried, edges = len(found.trials), list(found.edges)
    arm = ArmResult(label, tried, edges, own, {})
    stacks = {split: [c for c in arm.by_seed if split in c.answers] for split in ("val", "test")}
    estimates = {split: estimate(*_stack(plan, cells, split)) for split, cells in stacks.items() if cells}
    return replace(arm, estimates=estimates)


def _pool_folds(cells: Sequence[CellResult]) -> CellResult:
    """The cells of a seed's folds as one, whose answers are those of all folds together."""
    first = next((cell for cell in cells if cell.status != "finished"), cells[0])
    answers = {}
    for split in ("val", "test"):
        parts = [cell.answers[split] for cell in cells if split in cell.answers]
        if len(parts) == len(cells):
            order = np.argsort(np.concatenate([part.keys for part in parts]), kind="stable")

            def joined(values: Sequence[Any], order: NDArray = order) -> Any:
                return None if any(each is None for each in values) else np.concatenate(values)[order]

            names = ("logits", "labels", "keys", "lengths")
            columns = {name: joined([getattr(part, name) for part in parts]) for name in names}
            columns["folds"] = joined([np.full(len(part.keys), number) for number, part in enumerate(parts)])
            if parts[0].thresholds is not None:  # each fold's model predicts labels from its own on
                own = [(part.thresholds, part.logits.shape) for part in parts]
                columns["thresholds"] = joined([np.broadcast_to(np.array(each), shape) for each, shape in own])
            answers[split] = replace(parts[0], **columns)
    change = {key: value for key, value in first.cell.change.items() if key != "data.fold"}
    return replace(first, cell=replace(first.cell, change=change, fold=None), record={}, answers=answers)


def _stack(plan: Plan, cells: Sequence[CellResult], split: str) -> tuple[NDArray, NDArray | None]:
    """The metric of each row of the split, (cells, rows), and the fold of each, (rows,), or None."""
    first = cells[0].answers[split]
    for cell in cells:
        # Arms of other data or lengths are still tested on the same texts, or they cannot be paired.
        own = cell.answers[split]
        if not (np.array_equal(own.keys, first.keys) and np.array_equal(np.array(own.folds), np.array(first.folds))):
            names = f"{cell.cell.name}: its {split} rows are not those of {cells[0].cell.name}"
            raise UserError(f"{names}; they cannot be compared")
    return np.array([cell.answers[split].values(plan.metric) for cell in cells]), first.folds


def _paired(plan: Plan, arm: ArmResult, base: ArmResult, split: str) -> ArmResult:
    """The arm with its difference from the baseline over the seeds that both have, each with its own."""
    one, other = ({c.cell.seed: c for c in each.by_seed if split in c.answers} for each in (base, arm))
    seeds = [seed for seed in plan.seeds if seed in one and seed in other]
    if not seeds:
        return arm
    values, folds = _stack(plan, [each[seed] for each in (one, other) for seed in seeds], split)
    margin = plan.margin_on(one[seeds[0]].answers[split].truth)
    against = difference(values[len(seeds) :], values[: len(seeds)], margin, plan.higher_is_better, folds)
    return replace(arm, against=against, seeds=seeds)


def one_class(answers: CellPredictions) -> str:
    """Return what is odd about answers that are all the same class; empty where they are not."""
    if len(np.unique(answers.predicted, axis=0)) > 1 or len(np.unique(answers.truth, axis=0)) < 2:
        return ""
    return "predicts one class only" if answers.task == "single_label" else "predicts the same for every text"
