"""The tables of an ablation's report, a header and then rows of words, and the same as plain values."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lora.evaluation.intervals import LEVEL, MOST_FILES
from lightning_lora.experiments.results import ArmResult
from lightning_lora.reports.ablation import Report, bounded, interval_text, number_text
from lightning_lora.reports.tables import COST_COLUMNS, Column, metric_columns
from lightning_lora.runs.folder import best_evaluation, best_metrics

TextTable = list[list[str]]
#: What stands behind a mean: how the arm compares with the baseline.
SIGNS = {"better": "+", "worse": "-", "equivalent": "=", "same predictions": "=", "inconclusive": "?"}
LEGEND = (
    "Behind each mean: + better than the baseline, - worse, = equivalent within the margin, ? inconclusive. Paired by "
    "seed and row; p-values are corrected for the arms of a set (Holm), not of all sets. Bold: the best mean."
)
INTERVALS = "In brackets 95% intervals over seeds and rows."
PUBLISHED = "Published rows are what others report, measured by none of these runs: {}."


def arm_table(report: Report) -> TextTable:
    """Return the main table: a row for each arm; of one arm without what compares it."""
    metric, level = report.plan.metric, f"{LEVEL:.0%} interval"
    compared = ["better than baseline by", level, "p (Holm)", "verdict", "minimum detectable effect", "seeds needed"]
    header = ["arm", "seeds", f"{report.split} {metric}", level, "SD of seeds"]
    rows = [[*header, *(compared if report.compares else []), "settings tried"]]
    for arm in report.arms:
        own, found = arm.own, arm.against
        name = f"**{arm.label}** (baseline)" if arm is report.baseline and report.compares else arm.label
        if own is None:
            against = ["-", "-", "-", _why_not(arm), "-", "-"] if report.compares else []
            rows.append([name, "0", *["-"] * 3, *against, "-"])
            continue
        row = [name, str(own.seeds), f"{own.mean:.4f}", interval_text(own, metric), number_text(own.sd, 4)]
        if found is not None:
            needed = "more rows" if found.seeds_needed is None else str(found.seeds_needed)
            if found.verdict not in ("inconclusive", "one seed"):
                needed = "enough"
            row += [f"{found.estimate.mean:+.4f}", interval_text(found.estimate, metric, True), _p(found.p_corrected)]
            row += [found.verdict, f"{found.detectable:.4f}", "-" if found.estimate.seeds < 2 else needed]
        elif report.compares:
            row += ["-"] * 6
        rows.append([*row, str(arm.tried)])
    if (published := report.plan.published).figures:
        shown = ["published", *(published.shown(arm.label) for arm in report.arms)]
        rows = [[*row, figure] for row, figure in zip(rows, shown, strict=True)]
    return rows


def measured(report: Report, arm: ArmResult, column: Column) -> tuple[float, list[float] | None]:
    """Return a metric's or cost's mean over an arm's finished seeds (NaN without), and a single seed's interval.

    Of folds a metric is that of the rows of all folds together, a cost the mean of a fold.
    """
    if not column.is_metric:
        return arm.mean_cost(column.key), None
    if report.plan.folds:
        pooled = report.answers_of(arm)
        values = [each.metrics.get(column.key, math.nan) for each in pooled]
        interval = pooled[0].intervals.get(column.key) if len(pooled) == 1 else None
        return float(np.mean(values)) if values else math.nan, interval
    records = [cell.record for cell in arm.cells if cell.status == "finished"]
    found = [best_metrics(record, report.split_key) for record in records]
    values = [value for metrics in found if (value := metrics.get(column.key)) is not None]  # None: not defined
    interval = None
    if len(values) == 1 and (name := best_evaluation(records[0], report.split_key)) is not None:
        interval = records[0]["evaluations"][name].get("after_interval", {}).get(column.key)
        interval = None if interval is None or None in interval else interval
    return float(np.mean(values)) if values else math.nan, interval


def metric_table(report: Report, columns: Sequence[Column] | None = None) -> TextTable:
    """Return metrics and costs of each arm, by default all, without the columns that no arm has."""
    header, *rows = ["arm"], *([arm.label] for arm in report.arms)
    for column in [*metric_columns(report.task), *COST_COLUMNS] if columns is None else columns:
        found = [measured(report, arm, column) for arm in report.arms]
        if all(math.isnan(value) for value, _ in found):
            continue
        header.append(column.heading)
        for row, (value, interval) in zip(rows, found, strict=True):
            shown = number_text(value / column.scale, column.digits)
            row.append(shown + (" [{:.3f}, {:.3f}]".format(*interval) if interval else ""))
    return [header, *rows]


def as_document(report: Report) -> dict[str, Any]:
    """Return the arms, their metrics, costs and differences from the baseline as plain values."""
    arms = []
    for arm in report.arms:
        values = {column.key: measured(report, arm, column) for column in [*metric_columns(report.task), *COST_COLUMNS]}
        arms.append(
            {
                "name": arm.label,
                "settings": arm.by_seed[0].cell.change,
                "seeds": [cell.cell.seed for cell in arm.by_seed if cell.status == "finished"],
                "reason": "" if arm.own is not None else _why_not(arm),
                "values": {key: value for key, (value, _) in values.items() if not math.isnan(value)},
                "intervals": {key: interval for key, (_, interval) in values.items() if interval},
                "published": report.plan.published.figures.get(arm.label),
                "difference": arm.against and {**asdict(arm.against), "verdict": arm.against.verdict},
            }
        )
    about = {"question": report.plan.question, "command": report.command, "split": report.split}
    return {"format": 1, "name": report.name, **about, "baseline": report.baseline.label, "arms": arms}


def more_tables(report: Report) -> list[tuple[str, TextTable]]:
    """Return the other tables with their titles, without those that have no rows."""
    what = "Labels of texts" if report.task == "multi_label" else "Texts"
    tables = {
        f"{report.plan.metric} by file or split": file_table(report),
        f"{what} fixed and broken against the baseline, by class": fixed_and_broken(report, by_class(report)),
        "What the search has tried": trial_table(report),
        f"{what} fixed and broken against the baseline, by length": fixed_and_broken(report, by_length(report)),
        "Each seed by itself": seed_table(report),
        "Cells": cell_table(report),
        "In what each arm differs from the baseline": change_table(report),
    }
    return [(title, rows) for title, rows in tables.items() if len(rows) > 1]


def file_table(report: Report) -> TextTable:
    """Return the metric of each arm on the compared rows of each file or split, where they are from a few."""
    rows, metric = report.rows, report.plan.metric
    names: list[str] = [] if rows is None else np.unique(rows.origins).tolist()
    if not 1 < len(names) <= MOST_FILES:
        return []
    table = [["arm", *(name.rpartition("/")[2] for name in names)]]
    for arm in report.arms:
        found = report.answers_of(arm)
        parts = [[each.of_rows(each.origins == name).values(metric).mean() for each in found] for name in names]
        table.append([arm.label, *(f"{np.mean(part):.4f}" if part else "-" for part in parts)])
    return table


def cell_table(report: Report) -> TextTable:
    """Return every cell, with its reason where it is not as it should be."""
    metric = report.plan.metric
    rows = [["arm", "variant", "seed", *(["fold"] if report.plan.folds else []), "status"]]
    rows[0] += [f"validation {metric}", f"test {metric}", "train s", "startup s", "reason"]
    for result in report.cells:
        cell = result.cell
        fold = [] if cell.fold is None else [str(cell.fold)]
        row = [cell.arm, cell.variant or "-", str(cell.seed), *fold, result.status]
        found = [result.answers.get(split) for split in ("val", "test")]
        row += ["-" if each is None else f"{each.values(metric).mean():.4f}" for each in found]
        row += [number_text(result.cost(name), 1) for name in ("train_s", "startup_s")]
        rows.append([*row, result.reason or "-"])
    return rows


def trial_table(report: Report) -> TextTable:
    """Return every trial of the search, with its reason where it has failed."""
    plan, space = report.plan, report.plan.search.space if report.plan.search is not None else {}
    rows = [["arm", "trial", *space, f"validation {plan.metric}", "state"]]
    for arm, found in plan.found.items():
        for trial in found.trials:
            values = [trial.params[key] for key in space]
            row = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
            state = "best" if trial is found.best else trial.state.name.lower()
            state += f": {trial.user_attrs['reason']}" if "reason" in trial.user_attrs else ""
            rows.append([arm, str(trial.number + 1), *row, "-" if trial.value is None else f"{trial.value:.4f}", state])
    return rows


def seed_table(report: Report) -> TextTable:
    """Return McNemar's test of each seed against the baseline's model of the same seed."""
    rows = [["arm", "seed", "p (McNemar, exact)"]]
    for arm in report.arms:
        if arm.against is not None:
            rows += [[arm.label, str(seed), _p(p)] for seed, p in zip(arm.seeds, arm.against.per_seed, strict=False)]
    return rows


def change_table(report: Report) -> TextTable:
    """Return each setting of an arm that differs from the baseline's."""
    rows = [["arm", "setting", "baseline", "arm's own"]]
    for label, changes in report.changes.items():
        for each in changes:
            values = ("-" if value is None else str(value) for value in (each.baseline, each.arm))
            rows.append([label, each.key, *values])
    return rows


def by_class(report: Report) -> dict[str, NDArray]:
    """Return which of the compared rows, (N,), are of each class; of several labels a text, which answers, (1, C)."""
    rows = report.rows
    if rows is None or rows.task == "regression":
        return {}
    several = np.eye(len(rows.label_names), dtype=bool)
    groups = several[:, None] if rows.task == "multi_label" else (rows.truth == np.arange(len(several))[:, None])
    return dict(zip(rows.label_names, groups, strict=True))


def by_length(report: Report) -> dict[str, NDArray]:
    """Return which of the compared rows are of each third of the texts' lengths, where these were kept and differ."""
    rows = report.rows
    if rows is None or rows.lengths is None or rows.task == "regression":
        return {}
    longest = int(rows.lengths.max())
    edges = {int(edge) for edge in np.quantile(rows.lengths, [1 / 3, 2 / 3], method="lower")} - {longest}
    groups = {}
    for low, high in itertools.pairwise([-1, *sorted(edges), longest] if edges else []):
        name = f"{low + 1:,} to {high:,}" if low >= 0 else f"up to {high:,} characters"
        inside = (rows.lengths > low) & (rows.lengths <= high)
        groups[name] = inside[:, None] if rows.task == "multi_label" else inside
    return groups


def fixed_and_broken(report: Report, groups: Mapping[str, NDArray]) -> TextTable:
    """Return by group of rows those that an arm has right and the baseline wrong, and the reverse: means over seeds.

    Of several labels what is counted is whether a text is given each, by text and label.
    """
    split = report.split_key
    base = {cell.cell.seed: cell.answers.get(split) for cell in report.baseline.by_seed}
    rows = [["arm", *(f"{name}: fixed / broken" for name in groups)]]
    for arm in report.arms if groups else ():
        both = [(cell.answers.get(split), base.get(cell.cell.seed)) for cell in arm.by_seed]
        pairs = [own.right - other.right for own, other in both if own is not None and other is not None]
        if arm is not report.baseline and pairs:
            gains = np.array(pairs)
            counts = [((gains > 0) * group, (gains < 0) * group) for group in groups.values()]
            shown = [f"{fixed.sum() / len(gains):.1f} / {broken.sum() / len(gains):.1f}" for fixed, broken in counts]
            rows.append([arm.label, *shown])
    return rows


def sets_table(reports: Mapping[str, Report]) -> TextTable:
    """Return the metric of each arm on each set, header first, and in how many sets it is better or worse.

    Args:
        reports: The report of each set's ablation, by the set's name.
    """
    labels = list(dict.fromkeys(arm.label for report in reports.values() for arm in report.arms))
    compares = any(report.compares for report in reports.values())
    rows = [["arm", *reports, *(["better", "worse"] if compares else [])]]
    for label in labels:
        arms = {name: next((a for a in report.arms if a.label == label), None) for name, report in reports.items()}
        verdicts = [arm.against.verdict for arm in arms.values() if arm is not None and arm.against is not None]
        cells = [_set_cell(arms[name], report) for name, report in reports.items()]
        is_baseline = all(label == report.plan.baseline for report in reports.values())
        counts = ["", ""] if is_baseline else [str(verdicts.count(verdict)) for verdict in ("better", "worse")]
        if not compares:
            is_baseline, counts = False, []
        rows.append([f"{label} (baseline)" if is_baseline else label, *cells, *counts])
        if any(label in report.plan.published.figures for report in reports.values()):
            figures = [report.plan.published.shown(label) for report in reports.values()]
            rows.append([f"{label}, published", *figures, *(["", ""] if compares else [])])
    return rows


def sets_note(reports: Mapping[str, Report]) -> str:
    """Return what stands under the table: the metric, which rows it is of, and how to read it."""
    metrics = list(dict.fromkeys(report.plan.metric for report in reports.values()))
    by_set = [f"{metric} ({', '.join(n for n, r in reports.items() if r.plan.metric == metric)})" for metric in metrics]
    untested = ", ".join(name for name, report in reports.items() if report.split != "test")
    rows = f"on validation rows for {untested}, where not all has finished" if untested else "on test rows"
    what = metrics[0].capitalize() if len(metrics) == 1 else f"By set: {', '.join(by_set)};"
    sources = dict.fromkeys(r.plan.published.source for r in reports.values() if r.plan.published.figures)
    legend = LEGEND if any(report.compares for report in reports.values()) else INTERVALS
    return " ".join([f"{what} {rows}. {legend}", *(PUBLISHED.format(source) for source in sources)])


def _set_cell(arm: ArmResult | None, report: Report) -> str:
    if arm is None or arm.own is None:
        return "-"
    if not report.compares:
        return "{:.3f} [{:.3f}, {:.3f}]".format(arm.own.mean, *bounded(arm.own, report.plan.metric))
    signed = [a.own.mean for a in report.arms if a.own is not None]
    best = max(signed) if report.plan.higher_is_better else min(signed)
    mean = f"**{arm.own.mean:.3f}**" if arm.own.mean == best else f"{arm.own.mean:.3f}"
    return f"{mean} {SIGNS.get(arm.against.verdict, '')}".strip() if arm.against is not None else mean


def _why_not(arm: ArmResult) -> str:
    cells = sorted(arm.cells, key=lambda cell: cell.status == "finished")  # what is missing first
    return (cells[0].reason or cells[0].status)[:160]


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
