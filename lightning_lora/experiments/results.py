"""What the cells of an ablation say: every one a row, also those that failed; and the arms, compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lora.errors import UserError
from lightning_lora.evaluation.intervals import row_values
from lightning_lora.evaluation.significance import Difference, Estimate, corrected, difference, estimate
from lightning_lora.experiments.plan import Cell, Plan, arm_label
from lightning_lora.experiments.search_space import Arm, Found


@dataclass(frozen=True)
class Answers:
    """What a model said of the rows of a split, in the order of their keys.

    Args:
        keys: Fingerprint of each row's text and its place, shape (N,).
        labels: True class numbers, (N,).
        logits: float32, (N, C).
        lengths: Characters of each text, (N,); None where they were not kept.
    """

    keys: NDArray
    labels: NDArray
    logits: NDArray
    lengths: NDArray | None = None

    @property
    def right(self) -> NDArray:
        """1.0 where the largest logit is the label's, else 0.0; (N,)."""
        return (self.logits.argmax(axis=1) == self.labels).astype(float)

    def values(self, metric: str) -> NDArray:
        """Return the metric's value of each row, (N,): its mean is the metric."""
        return row_values(self.logits, self.labels)[metric][:, 0]


@dataclass(frozen=True)
class CellResult:
    """One cell's row.

    Args:
        cell: The cell.
        status: "finished", "running", "interrupted", "failed", or "missing".
        reason: Why it is not finished, or what is odd about it; empty where all is well.
        record: Its run record.
        val: Its answers on validation rows, where it has finished.
        test: Its answers on test rows, where they were evaluated.
        label_names: Names of the classes.
    """

    cell: Cell
    status: str
    reason: str
    record: Mapping[str, Any]
    val: Answers | None
    test: Answers | None
    label_names: Sequence[str] = ()

    def cost(self, name: str) -> float:
        """A cost from the record, NaN where it has none."""
        return float((self.record.get("costs") or {}).get(name, math.nan))


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds.

    Args:
        arm: Its values.
        variant: The variant that is best on validation rows.
        tried: How many variants had the chance.
        edges: Chosen axes whose best value is the first or last of its numbers.
        cells: Of the chosen variant, one a seed.
        val: The metric on validation rows; None where no seed has finished.
        test: The metric on test rows; None where they were not evaluated.
        split: What all arms are compared on: "test" where the baseline and every arm that is complete were tested,
            else "val".
        against: Against the baseline, on the rows of the split.
        seeds: Seeds that ``against`` is over.
    """

    arm: Arm
    variant: Arm
    tried: int
    edges: list[str]
    cells: list[CellResult]
    val: Estimate | None
    test: Estimate | None
    split: str = "val"
    against: Difference | None = None
    seeds: list[int] = field(default_factory=list)

    @property
    def own(self) -> Estimate | None:
        """The metric on the rows that the arms are compared on."""
        return self.test if self.split == "test" else self.val

    @property
    def complete(self) -> bool:
        """Whether every seed of the chosen variant has finished."""
        return all(cell.val is not None for cell in self.cells)

    @property
    def label(self) -> str:
        """The arm in words."""
        return arm_label(self.arm)

    def mean_cost(self, name: str) -> float:
        """A cost's mean over the finished seeds."""
        values = [c.cost(name) for c in self.cells if c.status == "finished" and not math.isnan(c.cost(name))]
        return float(np.mean(values)) if values else math.nan


def read_answers(path: Path) -> tuple[Answers, list[str]] | None:
    """The answers in a run's predictions file and the label names, or None where there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        names = [name[6:-1] for name in table.column_names if name.startswith("logit(")]
        logits = np.column_stack([np.asarray(table.column(f"logit({name})").to_pylist(), np.float32) for name in names])
        number = {name: i for i, name in enumerate(names)}
        labels = np.array([number[label] for label in table.column("label").to_pylist()])
        keys = [
            f"{key}\0{origin}\0{row}"
            for key, origin, row in zip(*(table.column(c).to_pylist() for c in ("key", "origin", "row")), strict=True)
        ]
        lengths = np.array(table.column("characters").to_pylist()) if "characters" in table.column_names else None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable file of predictions ({error})") from error
    order = np.argsort(keys, kind="stable")
    lengths = None if lengths is None else lengths[order]
    return Answers(np.array(keys)[order], labels[order], logits[order], lengths), names


def compare_arms(plan: Plan, cells: Sequence[CellResult]) -> list[ArmResult]:
    """The arms in the plan's order: each with its best variant by validation, then compared with the baseline."""
    arms = {arm: _best_variant(plan, arm, [c for c in cells if c.cell.arm == arm]) for arm in plan.arms}
    base = arms[plan.baseline]
    complete = [result for result in arms.values() if result.complete]
    # An arm that is not complete is never tested: the others are compared without it.
    tested = [arm.test is not None and all(cell.test is not None for cell in arm.cells) for arm in complete]
    split = "test" if base.complete and all(tested) else "val"
    found: dict[Arm, tuple[Difference, list[int]]] = {}
    for arm, result in arms.items():
        if arm != plan.baseline and (paired := _paired(plan, result, base, split)) is not None:
            found[arm] = paired
    holm = dict(zip(found, corrected([each for each, _ in found.values()]), strict=True))
    return [
        ArmResult(
            **{**vars(result), "split": split, "against": holm.get(arm), "seeds": found[arm][1] if arm in found else []}
        )
        for arm, result in arms.items()
    ]


def _best_variant(plan: Plan, arm: Arm, cells: Sequence[CellResult]) -> ArmResult:
    variants = list(dict.fromkeys(c.cell.variant for c in cells))
    sign = 1 if plan.higher_is_better else -1

    def score(variant: Arm) -> float:
        """Mean over the seeds; a variant that has not finished with all of them cannot be the best."""
        own = [c for c in cells if c.cell.variant == variant]
        if any(c.val is None for c in own):
            return -math.inf
        return sign * float(np.mean([c.val.values(plan.metric).mean() for c in own if c.val is not None]))

    best = max(variants, key=score)
    if score(best) == -math.inf:  # none is complete: what there is most of
        best = max(variants, key=lambda v: sum(c.val is not None for c in cells if c.cell.variant == v))
    own = [c for c in cells if c.cell.variant == best]
    edges = []
    for axis in plan.axes:
        names = list(axis.values)
        if axis.chosen and axis.numbers and len(names) > 1 and dict(best)[axis.name] in (names[0], names[-1]):
            edges.append(f"{axis.name} {dict(best)[axis.name]}")
    stacked = {split: _stack(plan, own, split) for split in ("val", "test")}
    estimates = {split: estimate(values) if values is not None else None for split, values in stacked.items()}
    tried = len(variants)
    if plan.search is not None:
        found = plan.found.get(arm, Found())
        tried, edges = len(found.trials), list(found.edges)
    return ArmResult(arm, best, tried, edges, own, estimates["val"], estimates["test"])


def _stack(plan: Plan, cells: Sequence[CellResult], split: str) -> NDArray | None:
    """Values (seeds, rows) of the cells that have answers of the split."""
    having = [(c, getattr(c, split)) for c in cells if getattr(c, split) is not None]
    if not having:
        return None
    for cell, answers in having[1:]:
        if not np.array_equal(answers.keys, having[0][1].keys):
            raise UserError(f"{cell.cell.name}: its {split} rows are not those of {having[0][0].cell.name}")
    return np.stack([a.values(plan.metric) for _, a in having])


def _paired(plan: Plan, arm: ArmResult, base: ArmResult, split: str) -> tuple[Difference, list[int]] | None:
    """The arm against the baseline over the seeds that both have, each with its own; and these seeds."""
    one, other = (
        {c.cell.seed: getattr(c, split) for c in r.cells if getattr(c, split) is not None} for r in (arm, base)
    )
    seeds = [seed for seed in plan.seeds if seed in one and seed in other]
    if not seeds:
        return None
    if any(not np.array_equal(one[seed].keys, other[seed].keys) for seed in seeds):
        # Arms of other data or lengths are still tested on the same texts, or they cannot be paired.
        raise UserError(f"{arm.label}: its {split} rows are not those of the baseline; they cannot be compared")
    values, base_values = (np.stack([side[seed].values(plan.metric) for seed in seeds]) for side in (one, other))
    return difference(values, base_values, plan.margin, plan.higher_is_better), seeds


def one_class(answers: Answers) -> str:
    """What is odd about answers that are all the same class; empty where they are not."""
    classes = np.unique(answers.logits.argmax(axis=1))
    return "predicts one class only" if len(classes) == 1 and len(np.unique(answers.labels)) > 1 else ""
