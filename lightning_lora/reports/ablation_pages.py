"""An ablation's report as a page that needs no network, and as Markdown, CSV and LaTeX. Imports no torch."""

import csv
import io
from typing import Any

from lightning_lora.reports.ablation import Report, answer, bounded, facts, interval_text, notes
from lightning_lora.reports.ablation_figures import color, pictures
from lightning_lora.reports.ablation_tables import arm_table, metric_table, more_tables
from lightning_lora.reports.tables import COST_COLUMNS, markdown, metric_columns
from lightning_lora.reports.templates import template


def as_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    parts = [f"# {report.name}", report.plan.question, answer(report), markdown(metric_table(report))]
    parts += [markdown(arm_table(report)), "\n".join(f"- {note}" for note in notes(report))]
    parts += [f"## {title}\n\n{markdown(rows)}" for title, rows in more_tables(report)]
    return "\n\n".join(parts) + "\n"


def as_csv(report: Report) -> str:
    """Return the main table with metrics and costs as CSV."""
    out = io.StringIO()
    for row, more in zip(arm_table(report), metric_table(report), strict=True):
        csv.writer(out, lineterminator="\n").writerow([cell.replace("**", "") for cell in [*row, *more[1:]]])
    return out.getvalue()


def as_latex(report: Report) -> str:
    """Return the main table's first columns for a paper, with booktabs."""
    # Braces of LaTeX are not those of the template.
    marks = {"variable_start_string": "<<", "variable_end_string": ">>"}
    rows = [row[: 9 if report.compares else None] for row in arm_table(report)]
    columns = "l" + "r" * 7 + "l" if report.compares else "l" + "r" * (len(rows[0]) - 1)
    marks |= {"block_start_string": "<%", "block_end_string": "%>"}
    return template("report.tex.j2", **marks).render(rows=rows, columns=columns)


def as_html(report: Report) -> str:
    """Return the report as one page that needs no network."""
    return template("report.html.j2").render(
        report=report,
        answer=answer(report),
        facts=facts(report),
        forest=forest(report),
        metrics=metric_table(report, metric_columns(report.task)),
        costs=metric_table(report, COST_COLUMNS),
        arms=arm_table(report),
        notes=(said := notes(report)),
        warnings=sum(note.startswith("warning:") for note in said),
        pictures=pictures(report),
        more_tables=more_tables(report),
    )


def forest(report: Report) -> dict[str, Any]:
    """Return what a forest plot shows: places on its axis in percent, and for each arm its numbers in words.

    The axis holds all intervals of the paired differences, zero, and the margin on both sides.
    """
    metric, margin = report.plan.metric, report.margin
    ends = [end for arm in report.arms if arm.against for end in bounded(arm.against.estimate, metric, True)]
    low, high = min([-margin, *ends]), max([margin, *ends])
    room = 0.03 * (high - low)

    def place(value: float) -> float:
        return round(100 * (value - low + room) / (high - low + 2 * room), 2)

    rows = []
    for arm in report.arms:
        own, found = arm.own, arm.against
        row: dict[str, Any] = {"label": arm.label, "color": color(report, arm), "baseline": arm is report.baseline}
        row["value"] = "-" if own is None else f"{own.mean:.4f}"
        row["interval"] = "" if own is None else interval_text(own, metric)
        row["verdict"] = found.verdict if found else "baseline" if row["baseline"] else "not finished"
        if found is not None:
            left, right = (place(end) for end in bounded(found.estimate, metric, True))
            row |= {"left": left, "width": round(right - left, 2), "point": place(found.estimate.mean)}
            row["difference"] = f"{found.estimate.mean:+.4f}"
            row["difference_interval"] = interval_text(found.estimate, metric, True)
        rows.append(row)
    band = {"left": place(-margin), "width": round(place(margin) - place(-margin), 2)}
    return {"rows": rows, "zero": place(0), "band": band, "low": f"{low:+.3f}", "high": f"{high:+.3f}"}
