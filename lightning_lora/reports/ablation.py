"""The report of an ablation: its answer, tables and notes. Imports no torch."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lightning_lora.evaluation.significance import LEVEL
from lightning_lora.experiments.plan import Axis, Plan, arm_label
from lightning_lora.experiments.results import Answers, ArmResult, CellResult
from lightning_lora.reports.tables import COLUMNS, Column
from lightning_lora.runs.folder import kept_evaluation, kept_metrics
from lightning_lora.units import duration

VERDICTS = {
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent",
    "inconclusive": "inconclusive",
    "one seed": "one seed",
    "same answers": "same predictions",
}


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Args:
        name: The ablation's name.
        plan: What was asked.
        command: The exact command.
        arms: The arms, compared.
        cells: Every cell.
        looks: How often test rows were looked at, and of how many cells.
        differences: In what each arm differs from the baseline, by its label.
        curves: Points (step, value) of each finished cell's validation metric and training loss, by its name.
        remarks: What is to be said of how the cells came about, where that was not this ablation.
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
    def split(self) -> str:
        """The rows that the arms are compared on."""
        return "test" if self.arms[0].split == "test" else "validation"

    @property
    def baseline(self) -> ArmResult:
        """The baseline's arm."""
        return next(arm for arm in self.arms if arm.arm == self.plan.baseline)


def answer(report: Report) -> str:
    """The answer in words, with its uncertainty."""
    base, metric = report.baseline, report.plan.metric
    own = base.own
    if own is None:
        return "No answer yet: the baseline has no finished cell."
    start = f"The baseline, {base.label}, has {report.split} {metric} {_number(own.mean)} {_interval(own, metric)}"
    compared = [arm for arm in report.arms if arm.against is not None]
    if not compared:
        return f"{start}. No other arm has finished with a seed that the baseline has."
    if own.seeds < 2:
        return f"{start}. With one seed nothing can be called better or worse."
    parts = []
    for verdict in ("better", "worse", "equivalent", "inconclusive", "same answers", "one seed"):
        arms = [arm for arm in compared if arm.against is not None and arm.against.verdict == verdict]
        if not arms:
            continue
        if verdict in ("better", "worse"):
            named = ", ".join(f"{arm.label} by {_signed_interval(arm, metric)}" for arm in arms)
            parts.append(f"{verdict} than it: {named}")
        elif verdict == "equivalent":
            parts.append(f"equivalent to it within {report.plan.margin:g}: {', '.join(arm.label for arm in arms)}")
        elif verdict == "same answers":
            parts.append(f"with the same predictions on every row: {', '.join(arm.label for arm in arms)}")
        elif verdict == "one seed":
            parts.append(f"one seed in common with it only, which does not support a conclusion: {_labels(arms)}")
        else:
            named = ", ".join(f"{arm.label} ({arm.against.detectable:.3f})" for arm in arms if arm.against is not None)
            parts.append(f"inconclusive: {named}; in brackets the minimum detectable effect at 80% power")
    parts += _not_compared(report)
    return f"{start}. {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _not_compared(report: Report) -> list[str]:
    """The arms that could not be compared with the baseline, by the reason."""
    apart = [arm for arm in report.arms if arm.against is None and arm is not report.baseline]
    missing = [arm for arm in apart if arm.own is None]
    reasons = {
        "without a seed in common with it": [arm for arm in apart if arm.own is not None],
        "not tested, as not all their seeds have finished": [arm for arm in missing if arm.val is not None],
        "without a finished cell": [arm for arm in missing if arm.val is None],
    }
    return [f"{reason}: {_labels(arms)}" for reason, arms in reasons.items() if arms]


def _labels(arms: Sequence[ArmResult]) -> str:
    return ", ".join(arm.label for arm in arms)


def table(report: Report) -> list[list[str]]:
    """The main table: a header, then a row for each arm."""
    metric = report.plan.metric
    header = [
        "arm",
        "seeds",
        f"{report.split} {metric}",
        f"{LEVEL:.0%} interval",
        "SD of seeds",
        "better than baseline by",
    ]
    header += [f"{LEVEL:.0%} interval", "p (Holm)", "verdict", "minimum detectable effect", "seeds to settle"]
    header += ["settings tried"]
    rows = [header]
    for arm in report.arms:
        own = arm.own
        row = [f"**{arm.label}** (baseline)" if arm.arm == report.plan.baseline else arm.label]
        if own is None:
            rows.append([*row, "0", *["-"] * 6, _why_not(arm), *["-"] * (len(header) - 9)])
            continue
        row += [
            str(own.seeds),
            _number(own.mean),
            _interval(own, metric),
            "-" if math.isnan(own.sd) else _number(own.sd),
        ]
        if (found := arm.against) is None:
            row += ["-"] * 6
        else:
            settled = found.verdict in ("better", "worse", "equivalent", "same answers")
            needed = "settled" if settled else "more rows" if found.seeds_needed is None else str(found.seeds_needed)
            row += [f"{found.estimate.mean:+.4f}", _interval(found.estimate, metric, True), _p(found.p_corrected)]
            row += [VERDICTS[found.verdict], f"{found.detectable:.4f}", "-" if found.estimate.seeds < 2 else needed]
        rows.append([*row, str(arm.tried)])
    return rows


def measured(report: Report, arm: ArmResult, column: Column) -> tuple[float, list[float] | None]:
    """A metric or cost of an arm, the mean over its finished seeds (NaN without), and the interval of a single seed."""
    if not column.is_metric:
        return arm.mean_cost(column.key), None
    split = "test" if report.split == "test" else "val"
    records = [cell.record for cell in arm.cells if cell.status == "finished"]
    values = [metrics[column.key] for record in records if column.key in (metrics := kept_metrics(record, split))]
    if not values:
        return math.nan, None
    interval = None
    if len(values) == 1 and (name := kept_evaluation(records[0], split)) is not None:
        interval = records[0]["evaluations"][name].get("after_interval", {}).get(column.key)
    return float(np.mean(values)), interval


def metric_table(report: Report) -> list[list[str]]:
    """Metrics and costs of each arm; columns that no arm has are left out."""
    found = {column: [measured(report, arm, column) for arm in report.arms] for column in COLUMNS}
    found = {column: values for column, values in found.items() if not all(math.isnan(value) for value, _ in values)}
    rows = [["arm", *(column.heading for column in found)]]
    for i, arm in enumerate(report.arms):
        row = [arm.label]
        for column, values in found.items():
            value, interval = values[i]
            shown = _count(value / column.scale, column.digits)
            row.append(shown + (" [{:.3f}, {:.3f}]".format(*interval) if interval else ""))
        rows.append(row)
    return rows


def as_document(report: Report) -> dict[str, Any]:
    """The arms, their metrics, costs and differences from the baseline as plain values."""
    arms = []
    for arm in report.arms:
        values = {column.key: measured(report, arm, column) for column in COLUMNS}
        against = None if arm.against is None else {**asdict(arm.against), "verdict": arm.against.verdict}
        arms.append(
            {
                "name": arm.label,
                "settings": dict(report.plan.arm_settings(arm.arm)),
                "seeds": [cell.cell.seed for cell in arm.cells if cell.status == "finished"],
                "reason": "" if arm.own is not None else _why_not(arm),
                "values": {key: value for key, (value, _) in values.items() if not math.isnan(value)},
                "intervals": {key: interval for key, (_, interval) in values.items() if interval},
                "difference": against,
            }
        )
    about = {"question": report.plan.question, "command": report.command, "split": report.split}
    return {"format": 1, "name": report.name, **about, "baseline": report.baseline.label, "arms": arms}


def cell_table(report: Report) -> list[list[str]]:
    """Every cell, with its reason where it is not as it should be."""
    rows = [["arm", "variant", "seed", "status", f"validation {report.plan.metric}", f"test {report.plan.metric}",
             "train s", "startup s", "reason"]]  # fmt: skip
    for cell in report.cells:
        values = [
            _number(float(answers.values(report.plan.metric).mean())) if answers is not None else "-"
            for answers in (cell.val, cell.test)
        ]
        times = [_count(cell.cost("train_s"), 1), _count(cell.cost("startup_s"), 1)]
        variant = arm_label(cell.cell.variant) if cell.cell.variant else "-"
        seed = str(cell.cell.seed)
        rows.append([arm_label(cell.cell.arm), variant, seed, cell.status, *values, *times, cell.reason or "-"])
    return rows


def trial_table(report: Report) -> list[list[str]]:
    """Every trial of the search, with its reason where it is not as it should be."""
    plan = report.plan
    if plan.search is None:
        return []
    rows = [["arm", "trial", *plan.search.space, f"validation {plan.metric}", "state"]]
    for arm, found in plan.found.items():
        for trial in found.trials:
            values = [trial.params[key] for key in plan.search.space]
            shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
            state = "best" if trial is found.best else trial.state.name.lower()
            state += f": {trial.user_attrs['reason']}" if "reason" in trial.user_attrs else ""
            rows.append([arm_label(arm), str(trial.number + 1), *shown, "-", state])
            if trial.value is not None:
                rows[-1][-2] = _number(trial.value)
    return rows if len(rows) > 1 else []


def seed_table(report: Report) -> list[list[str]]:
    """McNemar's test of each seed against the baseline's model of the same seed."""
    rows = [["arm", "seed", "p (McNemar, exact)"]]
    for arm in report.arms:
        if arm.against is not None:
            for seed, p in zip(arm.seeds, arm.against.per_seed, strict=False):
                rows.append([arm.label, str(seed), _p(p)])
    return rows if len(rows) > 1 else []


def fixed_and_broken(report: Report) -> list[list[str]]:
    """By class: rows that an arm has right and the baseline wrong, and the other way round, a mean over seeds."""
    names = next((c.label_names for c in report.cells if c.label_names), [])
    return _fixed_and_broken(report, {name: partial(_of_class, i) for i, name in enumerate(names)})


def fixed_and_broken_by_length(report: Report) -> list[list[str]]:
    """The same by thirds of the texts' lengths; nothing where the lengths were not kept, or all are the same."""
    split = "test" if report.split == "test" else "val"
    found = [getattr(cell, split) for cell in report.cells if getattr(cell, split) is not None]
    if not found or any(answers.lengths is None for answers in found):
        return []
    edges = [int(edge) for edge in np.unique(np.quantile(found[0].lengths, [1 / 3, 2 / 3], method="lower"))]
    edges = [edge for edge in edges if edge < found[0].lengths.max()]
    if not edges:
        return []
    bounds = [-1, *edges, int(found[0].lengths.max())]
    words = [f"up to {edges[0]:,} characters"]
    words += [f"{low + 1:,} to {high:,}" for low, high in itertools.pairwise(bounds[1:])]
    groups = {word: partial(_within, *pair) for word, pair in zip(words, itertools.pairwise(bounds), strict=True)}
    return _fixed_and_broken(report, groups)


def _of_class(number: int, answers: Answers) -> Any:
    return answers.labels == number


def _within(low: int, high: int, answers: Answers) -> Any:
    assert answers.lengths is not None
    return (answers.lengths > low) & (answers.lengths <= high)


def _fixed_and_broken(report: Report, groups: Mapping[str, Callable[[Answers], Any]]) -> list[list[str]]:
    """A column for each group of rows, which a function finds in answers."""
    split = "test" if report.split == "test" else "val"
    base = {c.cell.seed: getattr(c, split) for c in report.baseline.cells if getattr(c, split) is not None}
    rows = [["arm", *(f"{name}: fixed / broken" for name in groups)]]
    for arm in report.arms:
        pairs = [
            (getattr(c, split), base[c.cell.seed])
            for c in arm.cells
            if getattr(c, split) is not None and c.cell.seed in base
        ]
        if arm.arm == report.plan.baseline or not pairs:
            continue
        row = [arm.label]
        for inside in groups.values():
            fixed = np.mean([((a.right > b.right) & inside(a)).sum() for a, b in pairs])
            broken = np.mean([((a.right < b.right) & inside(a)).sum() for a, b in pairs])
            row.append(f"{fixed:.1f} / {broken:.1f}")
        rows.append(row)
    return rows if len(rows) > 1 else []


def difference_table(report: Report) -> list[list[str]]:
    """Each setting that an arm has otherwise than the baseline."""
    rows = [["arm", "setting", "baseline", "arm's own"]]
    for label, found in report.differences.items():
        for change in found:
            values = ("-" if change[who] is None else f"{change[who]}" for who in ("baseline", "arm"))
            rows.append([label, change["key"], *values])
    return rows if len(rows) > 1 else []


def notes(report: Report) -> list[str]:
    """What a reader should know beside the numbers."""
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
        "All seeds learn from the same choice of rows (data.split_seed) and are tested on the same: what another "
        "choice would have come to is not in the intervals.",
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
    """What would be compared with the numbers."""
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
    said += _made_otherwise(report)
    one_sided = [cell for cell in report.cells if cell.status == "finished" and cell.reason]
    if one_sided:
        said.append(f"warning: {len(one_sided)} of {len(report.cells)} cells predict one class only")
    odd = [cell for cell in report.cells if cell.status != "finished"]
    if odd:
        said.append(f"{len(odd)} of {len(report.cells)} cells have not finished; the table of cells says why")
    return said


def _made_otherwise(report: Report) -> list[str]:
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
    arms = [arm for arm in report.arms if arm.own is not None]
    if axis.chosen or not axis.numbers or len(names) < 3 or len(arms) < len(report.arms):
        return None
    sign = 1 if report.plan.higher_is_better else -1
    best = dict(max(arms, key=lambda arm: sign * arm.own.mean if arm.own is not None else 0.0).arm)[axis.name]
    return best if best in (names[0], names[-1]) else None


def _why_not(arm: ArmResult) -> str:
    cells = sorted(arm.cells, key=lambda cell: cell.status == "finished")  # what is missing first
    reasons = [cell.reason or cell.status for cell in cells]
    return reasons[0][:160] if reasons else "no cell"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _count(value: float, digits: int = 0) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _interval(found: Any, metric: str, signed: bool = False) -> str:
    low, high = found.low, found.high
    if metric == "accuracy":  # of which no value lies outside
        low, high = max(low, -1.0 if signed else 0.0), min(high, 1.0)
    form = "+.4f" if signed else ".4f"
    return f"[{low:{form}}, {high:{form}}]"


def _signed_interval(arm: ArmResult, metric: str) -> str:
    """By how much an arm is better, or by how much it is worse, with the interval of just that."""
    assert arm.against is not None
    found = arm.against.estimate
    if found.mean < 0:
        found = replace(found, mean=-found.mean, low=-found.high, high=-found.low)
    return f"{found.mean:.4f} {_interval(found, metric, signed=True)}"
