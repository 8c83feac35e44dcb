"""An ablation's report as a page that needs no network, and as Markdown, CSV and LaTeX. Imports no torch."""

import csv
import html
import io
from collections.abc import Sequence

from lightning_lora.reports import ablation_pictures as pictures
from lightning_lora.reports.ablation import (
    Report,
    answer,
    cell_table,
    difference_table,
    fixed_and_broken,
    fixed_and_broken_by_length,
    notes,
    seed_table,
    table,
    trial_table,
)
from lightning_lora.reports.tables import markdown


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {report.name}", report.plan.question, answer(report), markdown(table(report))]
    parts.append("\n".join(f"- {note}" for note in notes(report)))
    for title, rows in _more_tables(report):
        parts.append(f"## {title}\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def as_csv(report: Report) -> str:
    """The main table as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[cell.replace("**", "") for cell in row] for row in table(report)])
    return out.getvalue()


def as_latex(report: Report) -> str:
    """The main table's first columns for a paper, with booktabs."""
    rows = [row[:9] for row in table(report)]
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'r' * 7}l}}", "\\toprule"]
    for i, row in enumerate(rows):
        line = " & ".join(_latex(cell) for cell in row) + r" \\"
        lines.append(f"{{}}{line}" if line.startswith("[") else line)  # else an option of the line break before
        lines += ["\\midrule"] if i == 0 else []
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_html(report: Report) -> str:
    """The report as one page."""
    sections = [f"<p class=answer>{html.escape(answer(report))}</p>", _html_table(table(report), "arms")]
    sections.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes(report)) + "</ul>")
    for title, picture in pictures.all_pictures(report):
        sections.append(f"<h2>{html.escape(title)}</h2><figure>{picture}</figure>")
    for number, (title, rows) in enumerate(_more_tables(report)):
        sections.append(f"<h2>{html.escape(title)}</h2>{_html_table(rows, f'more{number}')}")
    return _PAGE.format(
        title=html.escape(report.name), question=html.escape(report.plan.question), body="\n".join(sections)
    )


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


def _html_table(rows: Sequence[Sequence[str]], name: str) -> str:
    def cell(text: str, tag: str) -> str:
        shown = html.escape(text)
        if text.startswith("**"):
            shown = f"<b>{html.escape(text.replace('**', ''))}</b>"
        return f"<{tag}>{shown}</{tag}>"

    head = "".join(f"<th><button>{html.escape(text)}</button></th>" for text in rows[0])
    body = "".join(f"<tr>{''.join(cell(text, 'td') for text in row)}</tr>" for row in rows[1:])
    return f'<div class=wide><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _latex(text: str) -> str:
    bold = text.startswith("**")
    text = text.replace("**", "")
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    text = "".join(named.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)
    return f"\\textbf{{{text}}}" if bold else text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem }}
body {{ color: #111; background: #fff }}
h1 {{ font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
.answer {{ border-left: 4px solid #0072B2; padding: .25rem 1rem; font-size: 1.05rem }}
.wide {{ overflow-x: auto }} li {{ overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }}
td, th {{ padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }}
td:last-child {{ white-space: normal; min-width: 6rem }}
th button {{ font: inherit; font-weight: 600; border: 0; background: none; cursor: pointer; padding: 0 }}
figure {{ margin: 0 }} figure svg {{ max-width: 100%; height: auto }}
@media print {{ .wide {{ overflow: visible }} table {{ font-size: .6rem }} th button {{ cursor: auto }} }}
</style></head><body>
<h1>{title}</h1><p>{question}</p>
{body}
<script>
for (const table of document.querySelectorAll("table")) {{
  table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {{
    const up = button.dataset.up !== "1"; button.dataset.up = up ? "1" : "0";
    const body = table.tBodies[0], number = text => parseFloat(text.replace(/[\\[,<]/g, ""));
    [...body.rows].sort((a, b) => {{
      const x = a.cells[column].innerText, y = b.cells[column].innerText, i = number(x), j = number(y);
      const order = isNaN(i) || isNaN(j) ? (isNaN(i) ? 1 : 0) - (isNaN(j) ? 1 : 0) || x.localeCompare(y) : i - j;
      return up ? order : -order;
    }}).forEach(row => body.append(row));
  }}));
}}
</script></body></html>
"""
