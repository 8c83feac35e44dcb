"""The table of an ablation over several data sets: a row for each arm, a column for each set. Imports no torch."""

from collections.abc import Mapping

from lightning_lora.experiments.results import ArmResult
from lightning_lora.reports.ablation import Report, bounded
from lightning_lora.reports.ablation_tables import TextTable

#: What stands behind a mean: how the arm compares with the baseline.
SIGNS = {"better": "+", "worse": "-", "equivalent": "=", "same predictions": "=", "inconclusive": "?"}
LEGEND = (
    "Behind each mean: + better than the baseline, - worse, = equivalent within the margin, ? inconclusive. Paired by "
    "seed and row; p-values are corrected for the arms of a set (Holm), not of all sets. Bold: the best mean."
)
INTERVALS = "In brackets 95% intervals over seeds and rows."
PUBLISHED = "Published rows are what others report, measured by none of these runs: {}."


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
        cells = [_cell(arms[name], report) for name, report in reports.items()]
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


def _cell(arm: ArmResult | None, report: Report) -> str:
    if arm is None or arm.own is None:
        return "-"
    if not report.compares:
        return "{:.3f} [{:.3f}, {:.3f}]".format(arm.own.mean, *bounded(arm.own, report.plan.metric))
    signed = [a.own.mean for a in report.arms if a.own is not None]
    best = max(signed) if report.plan.higher_is_better else min(signed)
    mean = f"**{arm.own.mean:.3f}**" if arm.own.mean == best else f"{arm.own.mean:.3f}"
    return f"{mean} {SIGNS.get(arm.against.verdict, '')}".strip() if arm.against is not None else mean
