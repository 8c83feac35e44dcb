"""The tables of an ablation's report, a header and then rows of words, and the same as plain values."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from lightning_lora.evaluation.intervals import LEVEL
from lightning_lora.experiments.plan import arm_label
from lightning_lora.experiments.results import Answers, ArmResult
from lightning_lora.reports.ablation import Report, interval_text, number_text
from lightning_lora.reports.tables import COST_COLUMNS, Column, metric_columns
from lightning_lora.runs.folder import kept_evaluation, kept_metrics

TextTable = list[list[str]]


def arm_table(report: Report) -> TextTable:
    """Return the main table: a row for each arm."""
    metric, level = report.plan.metric, f"{LEVEL:.0%} interval"
    header = ["arm", "seeds", f"{report.split} {metric}", level, "SD of seeds", "better than baseline by", level]
    header += ["p (Holm)", "verdict", "minimum detectable effect", "seeds to settle", "settings tried"]
    rows = [header]
    for arm in report.arms:
        own, found = arm.own, arm.against
        row = [f"**{arm.label}** (baseline)" if arm.arm == report.plan.baseline else arm.label]
        if own is None:
            rows.append([*row, "0", *["-"] * 6, _why_not(arm), *["-"] * (len(header) - 9)])
            continue
        row += [str(own.seeds), f"{own.mean:.4f}", interval_text(own, metric), number_text(own.sd, 4)]
        if found is None:
            row += ["-"] * 6
        else:
            needed = "more rows" if found.seeds_needed is None else str(found.seeds_needed)
            if found.verdict not in ("inconclusive", "one seed"):
                needed = "settled"
            row += [f"{found.estimate.mean:+.4f}", interval_text(found.estimate, metric, True), _p(found.p_corrected)]
            row += [found.verdict, f"{found.detectable:.4f}", "-" if found.estimate.seeds < 2 else needed]
        rows.append([*row, str(arm.tried)])
    return rows


def measured(report: Report, arm: ArmResult, column: Column) -> tuple[float, list[float] | None]:
    """Return a metric's or cost's mean over an arm's finished seeds (NaN without), and a single seed's interval."""
    if not column.is_metric:
        return arm.mean_cost(column.key), None
    records = [cell.record for cell in arm.cells if cell.status == "finished"]
    found = [kept_metrics(record, report.split_key) for record in records]
    values = [metrics[column.key] for metrics in found if column.key in metrics]
    if not values:
        return math.nan, None
    interval = None
    if len(values) == 1 and (name := kept_evaluation(records[0], report.split_key)) is not None:
        interval = records[0]["evaluations"][name].get("after_interval", {}).get(column.key)
    return float(np.mean(values)), interval


def metric_table(report: Report) -> TextTable:
    """Return metrics and costs of each arm, without the columns that no arm has."""
    columns = [*metric_columns(), *COST_COLUMNS]
    found = {column: [measured(report, arm, column) for arm in report.arms] for column in columns}
    found = {column: values for column, values in found.items() if not all(math.isnan(value) for value, _ in values)}
    rows = [["arm", *(column.heading for column in found)]]
    for i, arm in enumerate(report.arms):
        row = [arm.label]
        for column, values in found.items():
            value, interval = values[i]
            shown = number_text(value / column.scale, column.digits)
            row.append(shown + (" [{:.3f}, {:.3f}]".format(*interval) if interval else ""))
        rows.append(row)
    return rows


def as_document(report: Report) -> dict[str, Any]:
    """Return the arms, their metrics, costs and differences from the baseline as plain values."""
    arms = []
    for arm in report.arms:
        values = {column.key: measured(report, arm, column) for column in (*metric_columns(), *COST_COLUMNS)}
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


def cell_table(report: Report) -> TextTable:
    """Return every cell, with its reason where it is not as it should be."""
    metric = report.plan.metric
    rows = [
        ["arm", "variant", "seed", "status", f"validation {metric}", f"test {metric}", "train s", "startup s", "reason"]
    ]
    for result in report.cells:
        cell = result.cell
        row = [arm_label(cell.arm), arm_label(cell.variant) if cell.variant else "-", str(cell.seed), result.status]
        row += [f"{each.values(metric).mean():.4f}" if each is not None else "-" for each in (result.val, result.test)]
        row += [number_text(result.cost(name), 1) for name in ("train_s", "startup_s")]
        rows.append([*row, result.reason or "-"])
    return rows


def trial_table(report: Report) -> TextTable:
    """Return every trial of the search, with its reason where it has failed."""
    plan = report.plan
    if plan.search is None:
        return []
    rows = [["arm", "trial", *plan.search.space, f"validation {plan.metric}", "state"]]
    for arm, found in plan.found.items():
        for trial in found.trials:
            values = [trial.params[key] for key in plan.search.space]
            row = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
            state = "best" if trial is found.best else trial.state.name.lower()
            state += f": {trial.user_attrs['reason']}" if "reason" in trial.user_attrs else ""
            value = "-" if trial.value is None else f"{trial.value:.4f}"
            rows.append([arm_label(arm), str(trial.number + 1), *row, value, state])
    return _unless_empty(rows)


def seed_table(report: Report) -> TextTable:
    """Return McNemar's test of each seed against the baseline's model of the same seed."""
    rows = [["arm", "seed", "p (McNemar, exact)"]]
    for arm in report.arms:
        if arm.against is not None:
            rows += [[arm.label, str(seed), _p(p)] for seed, p in zip(arm.seeds, arm.against.per_seed, strict=False)]
    return _unless_empty(rows)


def difference_table(report: Report) -> TextTable:
    """Return each setting of an arm that differs from the baseline's."""
    rows = [["arm", "setting", "baseline", "arm's own"]]
    for label, found in report.differences.items():
        for change in found:
            values = ("-" if change[who] is None else f"{change[who]}" for who in ("baseline", "arm"))
            rows.append([label, change["key"], *values])
    return _unless_empty(rows)


def fixed_and_broken(report: Report) -> TextTable:
    """Return by class: rows that an arm has right and the baseline wrong, and the reverse, a mean over seeds."""
    names = next((c.label_names for c in report.cells if c.label_names), [])
    return _fixed_and_broken(report, {name: partial(_of_class, i) for i, name in enumerate(names)})


def fixed_and_broken_by_length(report: Report) -> TextTable:
    """Return the same by thirds of the texts' lengths; nothing where lengths were not kept, or all are the same."""
    found = [answers.lengths for cell in report.cells if (answers := report.answers(cell)) is not None]
    if not found or (lengths := found[0]) is None or any(each is None for each in found):
        return []
    longest = int(lengths.max())
    edges = sorted({int(edge) for edge in np.quantile(lengths, [1 / 3, 2 / 3], method="lower")} - {longest})
    if not edges:
        return []
    bounds = [-1, *edges, longest]
    words = [f"up to {edges[0]:,} characters"]
    words += [f"{low + 1:,} to {high:,}" for low, high in itertools.pairwise(bounds[1:])]
    groups = {word: partial(_within, *pair) for word, pair in zip(words, itertools.pairwise(bounds), strict=True)}
    return _fixed_and_broken(report, groups)


def _of_class(number: int, answers: Answers) -> Any:
    return answers.labels == number


def _within(low: int, high: int, answers: Answers) -> Any:
    assert answers.lengths is not None
    return (answers.lengths > low) & (answers.lengths <= high)


def _fixed_and_broken(report: Report, groups: Mapping[str, Callable[[Answers], Any]]) -> TextTable:
    """A column for each group of rows, which a function finds in answers."""
    base = {cell.cell.seed: report.answers(cell) for cell in report.baseline.cells}
    rows = [["arm", *(f"{name}: fixed / broken" for name in groups)]]
    for arm in report.arms:
        both = [(report.answers(cell), base.get(cell.cell.seed)) for cell in arm.cells]
        pairs = [(own, other) for own, other in both if own is not None and other is not None]
        if arm.arm == report.plan.baseline or not pairs:
            continue
        row = [arm.label]
        for inside in groups.values():
            fixed = np.mean([((own.right > other.right) & inside(own)).sum() for own, other in pairs])
            broken = np.mean([((own.right < other.right) & inside(own)).sum() for own, other in pairs])
            row.append(f"{fixed:.1f} / {broken:.1f}")
        rows.append(row)
    return _unless_empty(rows)


def _unless_empty(rows: TextTable) -> TextTable:
    return rows if len(rows) > 1 else []


def _why_not(arm: ArmResult) -> str:
    cells = sorted(arm.cells, key=lambda cell: cell.status == "finished")  # what is missing first
    return (cells[0].reason or cells[0].status)[:160] if cells else "no cell"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
