"""Tables and the picture of a comparison of arms. Imports no torch.

An arm is a plain dict: ``name``, ``status`` ("finished", or what went wrong), ``metrics``, ``intervals``,
``costs`` as in the run record, and ``ties``: by metric, whether it can be told apart from the best arm.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.reports.tables import duration, markdown

Arm = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Args:
        key: Name of the metric or cost.
        heading: What stands above it.
        better: "max", "min", or nothing where no value is better.
        is_metric: Whether it comes from the test rows, and so has an interval.
        scale: What one unit of the heading is worth in the record's unit.
        digits: Digits after the point.
    """

    key: str
    heading: str
    better: str | None
    is_metric: bool = False
    scale: float = 1
    digits: int = 0


COLUMNS: tuple[Column, ...] = (
    Column("accuracy", "accuracy", "max", True, digits=4),
    Column("f1_macro", "F1 (macro)", "max", True, digits=4),
    Column("precision_macro", "precision (macro)", "max", True, digits=4),
    Column("recall_macro", "recall (macro)", "max", True, digits=4),
    Column("loss", "loss", "min", True, digits=4),
    # Not ranked: how much too large it comes out depends on how sure a model is (evaluation/intervals.py).
    Column("calibration_error", "calibration error", None, True, digits=4),
    Column("trainable_params", "trainable parameters", "min"),
    Column("total_params", "all parameters", None),
    Column("train_s", "training s", "min", digits=1),
    Column("train_tokens_per_s", "tokens/s", "max"),
    Column("peak_memory_mb", "peak memory MiB", "min"),
    Column("peak_gpu_memory_mb", "peak GPU memory MiB", "min"),
    Column("checkpoint_bytes", "checkpoint MB", "min", scale=1e6, digits=2),
)
LEGEND = (
    "**Bold**: best of the column (calibration errors are not ranked). ≈: cannot be told from the best on these "
    "rows (the 95% interval of the paired difference holds 0). In brackets: 95% interval, from resampling the test "
    "rows. Training's own noise, which only more seeds show, is in none of them; times and memory were measured once."
)


def value_of(arm: Arm, column: Column) -> float | None:
    """The arm's value of a column in the record's unit, or None where it has none."""
    return (arm.get("metrics" if column.is_metric else "costs") or {}).get(column.key)


def best_arm(arms: Sequence[Arm], column: Column) -> Arm | None:
    """The arm with the best value; None where there is nothing to choose from.

    Costs of an arm that trains nothing are not compared.
    """
    candidates = [arm for arm in arms if value_of(arm, column) is not None]
    if not column.is_metric:
        candidates = [arm for arm in candidates if (arm["costs"] or {}).get("train_s")]
    if column.better is None or len(candidates) < 2:
        return None
    sign = 1 if column.better == "max" else -1
    return max(candidates, key=lambda arm: sign * (value_of(arm, column) or 0))


def table(arms: Sequence[Arm]) -> list[list[str]]:
    """The rows of the table, heading first; columns that no arm has are left out."""
    columns = [column for column in COLUMNS if any(value_of(arm, column) is not None for arm in arms)]
    rows = [["arm", *(column.heading for column in columns)]]
    best = {column.key: best_arm(arms, column) for column in columns}
    for arm in arms:
        if not columns or arm["status"] != "finished":
            rows.append([f"{arm['name']}: {arm['status']}", *("-" for _ in columns)])
            continue
        cells = [arm["name"]]
        for column in columns:
            text = _cell(arm, column)
            if arm is best[column.key]:
                text = f"**{text}**"
            elif column.is_metric and arm.get("ties", {}).get(column.key):
                text += " ≈"
            cells.append(text)
        rows.append(cells)
    return rows


def _cell(arm: Arm, column: Column) -> str:
    value = value_of(arm, column)
    if value is None or (column.key == "train_s" and not value):
        return "-"
    text = f"{value / column.scale:,.{column.digits}f}"
    if bounds := (arm.get("intervals") or {}).get(column.key) if column.is_metric else None:
        low, high = bounds
        text += f" [{low:.3f}, {high:.3f}]"
    return text


def markdown_page(title: str, arms: Sequence[Arm], facts: Sequence[str]) -> str:
    """The whole comparison as Markdown."""
    listed = "\n".join(f"- {fact}" for fact in facts)
    picture = "![accuracy, time, memory and size of each arm](comparison.png)"
    return f"# {title}\n\n{markdown(table(arms))}\n\n{LEGEND}\n\n{listed}\n\n{picture}\n"


def as_csv(arms: Sequence[Arm]) -> str:
    """The comparison as CSV: plain numbers, the bounds of intervals in columns of their own."""
    out = io.StringIO()
    names = []
    for column in COLUMNS:
        names += [column.key] + ([f"{column.key}_low", f"{column.key}_high"] if column.is_metric else [])
    writer = csv.DictWriter(out, ["arm", "status", *names], lineterminator="\n")
    writer.writeheader()
    for arm in arms:
        row: dict[str, Any] = {"arm": arm["name"], "status": arm["status"]}
        for column in COLUMNS:
            row[column.key] = value_of(arm, column)
            if bounds := (arm.get("intervals") or {}).get(column.key) if column.is_metric else None:
                row[f"{column.key}_low"], row[f"{column.key}_high"] = bounds
        writer.writerow(row)
    return out.getvalue()


def print_comparison(title: str, arms: Sequence[Arm], facts: Sequence[str]) -> None:
    """Prints the table to the terminal, an arm a column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows = table(arms)
    turned = [list(cells) for cells in zip(*rows, strict=True)]
    shown = Table(title=title, title_justify="left")
    for i, heading in enumerate(turned[0]):
        shown.add_column(Text(heading), justify="right" if i else "left")
    for cells in turned[1:]:
        shown.add_row(*(Text(c.strip("*"), style="bold green" if c.startswith("**") else "") for c in cells))
    console.print(shown)
    for line in (LEGEND.replace("**Bold**", "Green"), *facts):
        console.print(line, markup=False, highlight=False, style="bold red" if line.startswith("careful") else "dim")


def write_picture(path: Path, title: str, arms: Sequence[Arm]) -> None:
    """Draws accuracy with its interval, and what each arm costs."""
    from matplotlib.figure import Figure

    arms = [arm for arm in arms if arm["status"] == "finished"]
    names = [arm["name"] for arm in arms]
    places = list(range(len(arms)))[::-1]
    panels = [column for column in COLUMNS if column.key in ("train_s", "peak_memory_mb", "checkpoint_bytes")]
    figure = Figure(figsize=(13, 1.6 + 0.45 * len(arms)), layout="constrained")
    axes = figure.subplots(1, 1 + len(panels), sharey=True, width_ratios=[2] + [1] * len(panels))
    accuracy = COLUMNS[0]
    best = best_arm(arms, accuracy)
    for place, arm in zip(places, arms, strict=True):
        value, (low, high) = (
            arm["metrics"][accuracy.key],
            arm["intervals"].get(accuracy.key, (arm["metrics"][accuracy.key],) * 2),
        )
        color = "tab:green" if arm is best or arm["ties"].get(accuracy.key) else "tab:blue"
        axes[0].errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=4, color=color)
        axes[0].annotate(f"{value:.3f}", (value, place), (0, 7), textcoords="offset points", ha="center", size=8)
    axes[0].set(title="accuracy, 95% interval (green: best, or not told from it)", yticks=places, yticklabels=names)
    axes[0].set_ylim(-0.6, len(arms) - 0.2)
    axes[0].grid(axis="x", alpha=0.3)
    for axis, column in zip(axes[1:], panels, strict=True):
        values = [(value_of(arm, column) or 0) / column.scale for arm in arms]
        axis.barh(places, values, height=0.55, color="tab:gray")
        axis.set_title(column.heading)
        axis.set_xlim(0, max([*values, 1e-9]) * 1.35)
        for place, value in zip(places, values, strict=True):
            said = duration(value) if column.key == "train_s" else f"{value:,.{column.digits}f}"
            said = said if value else "none"
            axis.text(value, place, f" {said}", va="center", size=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, ha="left", x=0.01)
    figure.savefig(path, dpi=130)
