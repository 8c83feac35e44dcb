"""The report of an ablation: its answer and its notes, in words. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_lora.experiments.plan import Axis, Plan
from lightning_lora.experiments.results import Answers, ArmResult, CellResult
from lightning_lora.units import duration


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Args:
        name: The ablation's name.
        plan: What was asked.
        command: The exact command.
        arms: The arms, compared.
        cells: Every cell.
        looks: How often test rows were evaluated, and of how many cells.
        differences: In what each arm differs from the baseline, by its label.
        curves: Points (step, value) of each finished cell's validation metric and training loss, by its name.
        remarks: What is to be said of how the cells were made, where that was not this ablation.
    """

    name: str
    plan: Plan
    command: str
    arms: Sequence[ArmResult]
    cells: Sequence[CellResult]
    looks: tuple[int, int]
    differences: Mapping[str, Sequence[Mapping[str, Any]]]
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    remarks: Sequence[str] = ()

    @property
    def split_key(self) -> str:
        """The rows that the arms are compared on, as records name them: "test" or "val"."""
        return self.arms[0].split

    @property
    def split(self) -> str:
        """The same in words."""
        return "test" if self.split_key == "test" else "validation"

    @property
    def baseline(self) -> ArmResult:
        """The baseline's arm."""
        return next(arm for arm in self.arms if arm.arm == self.plan.baseline)

    def answers(self, cell: CellResult) -> Answers | None:
        """Return a cell's answers to the rows that the arms are compared on."""
        return cell.test if self.split_key == "test" else cell.val


def answer(report: Report) -> str:
    """Return the answer in words, with its uncertainty."""
    base, metric = report.baseline, report.plan.metric
    own = base.own
    if own is None:
        return "No answer yet: the baseline has no finished cell."
    start = f"The baseline, {base.label}, has {report.split} {metric} {own.mean:.4f} {interval_text(own, metric)}"
    compared = [arm for arm in report.arms if arm.against is not None]
    if not compared:
        return f"{start}. No other arm has finished with a seed that the baseline has."
    if own.seeds < 2:
        return f"{start}. With one seed nothing can be called better or worse."
    phrases = {
        "better": "better than it: {}",
        "worse": "worse than it: {}",
        "equivalent": f"equivalent to it within {report.plan.margin:g}: {{}}",
        "inconclusive": "inconclusive: {}; in brackets the minimum detectable effect at 80% power",
        "same predictions": "with the same predictions on every row: {}",
        "one seed": "one seed in common with it only, which does not support a conclusion: {}",
    }
    parts = []
    for verdict, phrase in phrases.items():
        named = [_with_effect(arm, metric) for arm in compared if arm.against and arm.against.verdict == verdict]
        parts += [phrase.format(", ".join(named))] if named else []
    parts += _not_compared(report)
    return f"{start}. {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _with_effect(arm: ArmResult, metric: str) -> str:
    """An arm with what its verdict rests on, where that says something."""
    assert arm.against is not None
    if arm.against.verdict == "inconclusive":
        return f"{arm.label} ({arm.against.detectable:.3f})"
    if arm.against.verdict not in ("better", "worse"):
        return arm.label
    found = arm.against.estimate
    if found.mean < 0:  # by how much it is worse, with the interval of just that
        found = replace(found, mean=-found.mean, low=-found.high, high=-found.low)
    return f"{arm.label} by {found.mean:.4f} {interval_text(found, metric, signed=True)}"


def _not_compared(report: Report) -> list[str]:
    """The arms that could not be compared with the baseline, by the reason."""
    apart = [arm for arm in report.arms if arm.against is None and arm is not report.baseline]
    missing = [arm for arm in apart if arm.own is None]
    reasons = {
        "without a seed in common with it": [arm for arm in apart if arm.own is not None],
        "not tested, as not all their seeds have finished": [arm for arm in missing if arm.val is not None],
        "without a finished cell": [arm for arm in missing if arm.val is None],
    }
    return [f"{reason}: {', '.join(arm.label for arm in arms)}" for reason, arms in reasons.items() if arms]


def notes(report: Report) -> list[str]:
    """Return what a reader should know beside the numbers."""
    looks, cells = report.looks
    chosen = f"Variants are chosen by validation {report.plan.metric}, checkpoints by validation F1."
    said = [
        f"command: {report.command}",
        *(report.remarks or [chosen]),
        f"Test rows were evaluated {looks} times, for {cells} cells.",
        f"Intervals and p-values are over seeds and {report.split} rows together; p-values, also those behind "
        "'equivalent', are corrected for the number of arms (Holm), intervals are of each arm by itself. The "
        "minimum detectable effect is the smallest true difference found with 80% power; 'seeds to settle' is how many "
        "seeds would find one as large as was seen ('more rows': over a thousand); both for a single comparison.",
        "All seeds learn from the same choice of rows (data.split_seed) and are tested on the same: how much the "
        "result depends on that choice is not in the intervals.",
    ]
    if (search := report.plan.search) is not None:
        pruned = "" if search.pruner == "none" else f", pruner {search.pruner}"
        said.append(
            f"Each arm was given {search.trials} trials (Optuna, {search.sampler}, seed {search.seed}{pruned}), with "
            f"seed {report.plan.seeds[0]}; the best on validation rows is then trained with every seed."
        )
    said += _cautions(report)
    records = [cell.record for cell in report.cells if cell.record.get("machine")]
    machines = {f"{r['machine']['cores']} cores, {r['machine']['processor']}" for r in records}
    said += [f"machine: {'; '.join(sorted(machines))}"] if machines else []
    seconds = sum(c.record.get("wall_s", 0.0) for c in report.cells)
    said.append(f"{len(report.cells)} cells, {duration(seconds)} in all")
    if records:
        found_versions = ", ".join(f"{name} {value}" for name, value in records[0]["versions"].items())
        commits = dict.fromkeys(
            f"{str(record['code'].get('commit'))[:12]}{' with changes' * bool(record['code'].get('dirty'))}"
            for record in records
        )
        said.append(f"versions: {found_versions}; code {', '.join(commits)}")
    return said


def _cautions(report: Report) -> list[str]:
    """What limits the comparison."""
    said = []
    for axis in report.plan.axes:
        if (edge := _best_at_edge(report, axis)) is not None:
            said.append(f"warning: of {axis.name} the best value is at the edge of those compared ({edge})")
    if report.split == "validation":
        said.append(
            "warning: compared on the validation rows that chose checkpoints and variants: optimistically biased"
        )
    for arm in report.arms:
        if not arm.complete:
            said.append(f"warning: {arm.label} has seeds that have not finished; it is not tested before they have")
        if arm.edges:
            said.append(f"warning: {arm.label} is best at the edge of what was tried ({', '.join(arm.edges)})")
    for label, found in report.differences.items():
        for change in found:
            if not change["named"]:
                what = f"{change['key']} ({change['baseline']} -> {change['arm']})"
                said.append(f"warning: {label} also differs from the baseline in {what}")
    said += _made_differently(report)
    one_sided = [cell for cell in report.cells if cell.status == "finished" and cell.reason]
    if one_sided:
        said.append(f"warning: {len(one_sided)} of {len(report.cells)} cells predict one class only")
    unfinished = [cell for cell in report.cells if cell.status != "finished"]
    if unfinished:
        said.append(f"{len(unfinished)} of {len(report.cells)} cells have not finished; the table of cells says why")
    return said


def _made_differently(report: Report) -> list[str]:
    """Cells or runs that were not made by the same code and versions on the same machine."""
    said = []
    having = [cell.record for cell in report.cells if cell.status == "finished"]
    for what, value in (
        ("by different code", lambda record: record.get("code", {}).get("fingerprint")),
        ("with different versions", lambda record: record.get("versions")),
        ("on different machines", lambda record: record.get("machine")),
    ):
        if odd := [record for record in having if value(record) != value(having[0])]:
            said.append(f"warning: {having[0].get('name')} and {odd[0].get('name')} were made {what}")
    return said


def _best_at_edge(report: Report, axis: Axis) -> str | None:
    """The value of a compared axis of three numbers or more that did best, if it is the first or last of them."""
    names = list(axis.values)
    means = {arm.arm: arm.own.mean for arm in report.arms if arm.own is not None}
    if axis.chosen or not axis.numbers or len(names) < 3 or len(means) < len(report.arms):
        return None
    best_first = sorted(means, key=lambda arm: means[arm], reverse=report.plan.higher_is_better)
    best = dict(best_first[0])[axis.name]
    return best if best in (names[0], names[-1]) else None


def interval_text(found: Any, metric: str, signed: bool = False) -> str:
    """Return an interval in brackets, with signs where it is of a difference."""
    low, high = found.low, found.high
    if metric == "accuracy":  # of which no value lies outside
        low, high = max(low, -1.0 if signed else 0.0), min(high, 1.0)
    form = "+.4f" if signed else ".4f"
    return f"[{low:{form}}, {high:{form}}]"


def number_text(value: float, digits: int = 0) -> str:
    """Return a number with thousands separated, a hyphen where there is none."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
