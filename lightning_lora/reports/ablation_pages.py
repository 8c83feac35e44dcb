"""An ablation's report as a page that needs no network, and as Markdown, CSV and LaTeX. Imports no torch."""

import csv
import io
from typing import Any

from jinja2 import Environment, PackageLoader, Template

from lightning_lora.reports.ablation import Report, answer, notes
from lightning_lora.reports.ablation_pictures import as_svg, axes_figure, pareto_figure
from lightning_lora.reports.ablation_tables import arm_table, metric_table, more_tables
from lightning_lora.reports.tables import markdown


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
    marks |= {"block_start_string": "<%", "block_end_string": "%>"}
    return _template("report.tex.j2", **marks).render(rows=[row[:9] for row in arm_table(report)])


def as_html(report: Report) -> str:
    """Return the report as one page that needs no network."""
    drawn = {
        "Cost against quality": (pareto_figure(report), "Quality of each arm against its costs, with 95% intervals"),
        "What each axis does": (axes_figure(report), "The metric for each value of each axis; grey dots are seeds"),
    }
    return _template("report.html.j2").render(
        report=report,
        answer=answer(report),
        metrics=metric_table(report),
        arms=arm_table(report),
        notes=notes(report),
        pictures=[(title, as_svg(figure, alt)) for title, (figure, alt) in drawn.items() if figure is not None],
        more_tables=more_tables(report),
    )


def _template(name: str, **marks: Any) -> Template:
    loader = PackageLoader("lightning_lora", "reports")
    environment = Environment(loader=loader, autoescape=name.endswith(".html.j2"), trim_blocks=True, **marks)
    environment.filters["latex"] = _latex
    return environment.get_template(name)


def _latex(text: str) -> str:
    bold = text.startswith("**")
    text = text.replace("**", "")
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    text = "".join(named.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)
    return f"\\textbf{{{text}}}" if bold else text
