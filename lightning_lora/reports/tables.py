"""Tables of one run, for the terminal and as Markdown. A column or row is one entry."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.evaluation.metric_table import METRICS, metrics_for, row_metrics
from lightning_lora.tasks import Task
from lightning_lora.units import duration


@dataclass(frozen=True)
class Column:
    """A metric or cost as a column of tables.

    Args:
        key: Its name in an evaluation, or in the costs of a run record.
        heading: Its heading.
        is_metric: Whether it is a metric, and may have an interval.
        scale: What one unit of the heading is in the record's unit.
        digits: Digits after the point.
    """

    key: str
    heading: str
    is_metric: bool = False
    scale: float = 1
    digits: int = 0


COST_COLUMNS = (
    Column("trainable_params", "trainable parameters"),
    Column("train_s", "training s", digits=1),
    Column("train_tokens_per_s", "tokens/s"),
    Column("peak_memory_mb", "peak memory MiB"),
    Column("peak_gpu_memory_mb", "peak GPU memory MiB"),
    Column("checkpoint_bytes", "checkpoint MB", scale=1e6, digits=2),
)


def metric_columns(task: Task) -> list[Column]:
    """Return a column for each metric of a task that has a heading."""
    return [Column(name, spec.heading, True, digits=4) for name, spec in metrics_for(task).items() if spec.heading]


def metric_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Return the table's rows, header first: baselines and before, where measured, after with its interval, in int8."""
    columns = metric_columns(evaluation.get("task", "single_label"))
    rows = [["", *(column.heading for column in columns)]]
    for name, values in evaluation.get("baselines", {}).items():
        rows.append([name, *(_cell(values.get(column.key)) for column in columns)])
    for key, title in (("before", "before"), ("after", "after"), ("after_interval", "95% interval"), ("int8", "int8")):
        if values := evaluation.get(key):
            rows.append([title, *(_cell(values.get(column.key)) for column in columns)])
    for origin, values in evaluation.get("after_by_file", {}).items():
        rows.append([origin.rpartition("/")[2], *(_cell(values.get(column.key)) for column in columns)])
    return rows


def cost_rows(record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Return what the run cost, one line each."""
    costs: Mapping[str, Any] = record.get("costs") or {}
    rows = [["base model", str(record.get("base_model") or "-")], ["method", str(record.get("method", "-"))]]
    if trainable := costs.get("trainable_params"):
        share = trainable / costs["total_params"]
        rows.append(["trainable parameters", f"{trainable:,} of {costs['total_params']:,} ({share:.2%})"])
    if splits := (record.get("data") or {}).get("splits"):
        counts = {name: split["rows"] for name, split in splits.items()}
        if (split := evaluation.get("split")) is not None:
            counts[split] = evaluation["rows"]
        rows.append(["rows", ", ".join(f"{name} {count:,}" for name, count in counts.items())])
    if costs.get("train_s"):
        rate = f"{costs['train_rows_per_s']:.1f} texts/s"
        rate += f", {costs['train_tokens_per_s']:,.0f} tokens/s" if "train_tokens_per_s" in costs else ""
        rows.append(["training time", f"{duration(costs['train_s'])} ({rate})"])
    if seconds := evaluation.get("after_s"):
        rows.append(["test time", f"{duration(seconds)} ({evaluation['rows'] / seconds:.1f} texts/s)"])
    if seconds := evaluation.get("int8_s"):
        rate = f"{evaluation['rows'] / seconds:.1f} texts/s, {evaluation['int8_layers']}"
        rows.append(["in int8", f"{duration(seconds)} ({rate})"])
        bounds = {name: evaluation.get(f"int8_{name}_difference") for name in row_metrics()}
        flipped = [f"{evaluation['int8_flipped']:,} labels"] * (evaluation.get("task") != "regression")
        changed = [f"{METRICS[n].heading} {b[0]:+.4f} to {b[1]:+.4f} (95% interval)" for n, b in bounds.items() if b]
        rows.append(["int8 changes", ", ".join([*flipped, *changed])])
    for name, heading in (("peak_gpu_memory_mb", "peak GPU memory"), ("peak_memory_mb", "peak memory")):
        rows += [[heading, f"{costs[name]:,.0f} MiB"]] if name in costs else []
    if size := costs.get("checkpoint_bytes"):
        rows.append(["checkpoint", f"{size / 1e6:.2f} MB"])
    rows += _baseline_rows(evaluation.get("baselines", {}))
    if "majority_accuracy" in evaluation:
        rows.append(["majority vote", f"{evaluation['majority_accuracy']:.4f} accuracy on the same rows"])
    if without := evaluation.get("uncalibrated"):
        values = ", ".join(f"{METRICS[name].heading} {value:.4f}" for name, value in without.items())
        rows.append(["temperature", f"{evaluation['temperature']:.3f}; without it {values}"])
    if thresholds := evaluation.get("thresholds"):
        single = len(set(thresholds.values())) == 1
        words = [f"{value:.2f}" if single else f"{name} {value:.2f}" for name, value in thresholds.items()]
        rows.append(["predicted from a probability of", ", ".join(words[: 1 if single else None])])
    return rows


def _baseline_rows(baselines: Mapping[str, Any]) -> list[list[str]]:
    """Return how much better, or worse, the run is than each baseline."""
    rows = []
    for name, values in baselines.items():
        if "interval" in values:
            spec, by = METRICS[values.get("compared_by", "accuracy")], values["ours_better_by"]
            low, high = values["interval"]
            lower = "" if spec.higher_is_better else ", of which less is better"
            if low <= 0 <= high:
                said = f"{by:+.4f} {spec.heading} ({low:+.4f} to {high:+.4f}, 95% interval)"
                rows.append([f"better than {name} by", f"{said}{lower}: inconclusive"])
                continue
            ends = f"{low:+.4f} to {high:+.4f}" if by >= 0 else f"{-high:+.4f} to {-low:+.4f}"
            said = f"{abs(by):.4f} {spec.heading} ({ends}, 95% interval){lower}"
            rows.append([f"{'better' if by >= 0 else 'worse'} than {name} by", said])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table; the first is the heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def print_tables(title: str, metrics: list[list[str]], costs: list[list[str]]) -> None:
    """Print both tables to the terminal, the first with a line for each metric, which fits into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in (row[0] for row in metrics):
        table.add_column(heading, justify="right" if heading else "left", style="bold" if heading == "after" else None)
    for line in list(zip(*metrics, strict=True))[1:]:
        table.add_row(*line)
    console.print(table)
    grid = Table(show_header=False, box=None)
    for row in costs:
        grid.add_row(*row)
    console.print(grid)


def _cell(value: float | Sequence[float] | None) -> str:
    values = list(value) if isinstance(value, Sequence) else [value]
    # One number for all rows has no correlation.
    return " to ".join("-" if each is None or math.isnan(each) else f"{each:.4f}" for each in values)
