"""An ablation's report as a page that needs no network, and as Markdown, CSV and LaTeX. Imports no torch."""

import csv
import io
from typing import Any

from jinja2 import Environment, PackageLoader, Template

from lightning_lora.reports import ablation_pictures as pictures
from lightning_lora.reports.ablation import Report, answer, notes
from lightning_lora.reports.ablation_tables import (
    arm_table,
    cell_table,
    difference_table,
    fixed_and_broken,
    fixed_and_broken_by_length,
    metric_table,
    seed_table,
    trial_table,
)
from lightning_lora.reports.tables import markdown


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {report.name}", report.plan.question, answer(report), markdown(metric_table(report))]
    parts.append(markdown(arm_table(report)))
    parts.append("\n".join(f"- {note}" for note in notes(report)))
    for title, rows in _more_tables(report):
        parts.append(f"## {title}\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def as_csv(report: Report) -> str:
    """The main table with metrics and costs as CSV."""
    out, metrics = io.StringIO(), metric_table(report)
    joined = [[*row, *more[1:]] for row, more in zip(arm_table(report), metrics, strict=True)]
    csv.writer(out, lineterminator="\n").writerows([[cell.replace("**", "") for cell in row] for row in joined])
    return out.getvalue()


def as_latex(report: Report) -> str:
    """The main table's first columns for a paper, with booktabs."""
    # Braces of LaTeX are not those of the template.
    marks = {"variable_start_string": "<<", "variable_end_string": ">>"}
    marks |= {"block_start_string": "<%", "block_end_string": "%>"}
    return _template("report.tex.j2", **marks).render(rows=[row[:9] for row in arm_table(report)])


def as_html(report: Report) -> str:
    """The report as one page that needs no network."""
    return _template("report.html.j2").render(
        report=report,
        answer=answer(report),
        metrics=metric_table(report),
        arms=arm_table(report),
        notes=notes(report),
        pictures=pictures.all_pictures(report),
        more_tables=_more_tables(report),
    )


def _template(name: str, **marks: Any) -> Template:
    environment = Environment(
        loader=PackageLoader("lightning_lora", "reports"),
        autoescape=name.endswith(".html.j2"),
        trim_blocks=True,
        **marks,
    )
    environment.filters["latex"] = _latex
    return environment.get_template(name)


def _more_tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    tables = [
        ("Texts fixed and broken against the baseline, by class", fixed_and_broken(report)),
        ("What the search has tried", trial_table(report)),
        ("Texts fixed and broken against the baseline, by length", fixed_and_broken_by_length(report)),
        ("Each seed by itself", seed_table(report)),
        ("Cells", cell_table(report)),
        ("In what each arm differs from the baseline", difference_table(report)),
    ]
    return [(title, rows) for title, rows in tables if rows]


def _latex(text: str) -> str:
    bold = text.startswith("**")
    text = text.replace("**", "")
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    text = "".join(named.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)
    return f"\\textbf{{{text}}}" if bold else text
