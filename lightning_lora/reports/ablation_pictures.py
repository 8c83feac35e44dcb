"""The pictures of an ablation's report: costs against quality, and what each axis does. Imports no torch."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_lora.reports.ablation import Report

#: Okabe and Ito's colours, distinguishable without colour vision; shapes are in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "os^Dv<>Pp*X"
_COSTS = {"trainable_params": "trainable parameters", "train_s": "training, s", "peak_memory_mb": "peak memory, MiB"}


def pareto_figure(report: Report) -> Any:
    """Draw quality with its interval against costs, the Pareto front joined; None where there is nothing to draw."""
    arms = [(arm, arm.own) for arm in report.arms if arm.own is not None]
    if not arms:
        return None
    from matplotlib.ticker import EngFormatter

    figure, panels = _figure(len(_COSTS))
    for panel, (cost, label) in zip(panels, _COSTS.items(), strict=True):
        points = []
        for i, (arm, found) in enumerate(arms):
            if not math.isnan(x := arm.mean_cost(cost)):
                style = {"fmt": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)], "label": arm.label}
                _interval(panel, x, found, **style)
                points.append((x, found.mean))
        if points:
            front = _front(points, report.plan.higher_is_better)
            panel.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
        panel.locator_params(axis="x", nbins=5)
        panel.set_xlabel(label)
        positive = [x for x, _ in points if x > 0]
        if cost == "trainable_params":
            if positive and max(positive) / min(positive) > 20:
                panel.set_xscale("symlog" if len(positive) < len(points) else "log")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel(f"{report.split} {report.plan.metric}")
    handles, labels = panels[0].get_legend_handles_labels()
    if 1 < len(labels) <= 24:
        inches = 0.6 + 0.07 * max(map(len, labels))  # of a line's mark, and of its words at 8 points
        columns = max(1, min(len(labels), 6, int(figure.get_figwidth() / inches)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def axes_figure(report: Report) -> Any:
    """Draw the metric against each compared axis, other axes at the baseline; None where there is nothing to draw.

    Means have their intervals as bars; grey dots are seeds.
    """
    axes = [axis for axis in report.plan.axes if not axis.chosen and len(axis.values) > 1]
    base = report.baseline.cells[0].cell.values
    if not axes or not any(arm.own for arm in report.arms):
        return None
    figure, panels = _figure(len(axes))
    for panel, axis in zip(panels, axes, strict=True):
        names = list(axis.values)
        for arm in report.arms:
            values = arm.cells[0].cell.values
            elsewhere = any(values[other.name] != base[other.name] for other in axes if other is not axis)
            if arm.own is None or elsewhere:
                continue
            i = names.index(values[axis.name])
            _interval(panel, i, arm.own, fmt="o", color=COLORS[0])
            seeds = [answers for cell in arm.by_seed if (answers := report.answers(cell)) is not None]
            means = [answers.values(report.plan.metric).mean() for answers in seeds]
            panel.plot([i + 0.12] * len(means), means, ".", color="#999999", zorder=1)
        panel.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 8 else 0)
        panel.set_xlabel(axis.name)
        panel.set_xlim(-0.5, len(names) - 0.5)
    panels[0].set_ylabel(f"{report.split} {report.plan.metric}")
    return figure


def as_svg(figure: Any, alt: str) -> str:
    """Return a figure as SVG for a page, with words for those who do not see it."""
    import matplotlib as mpl

    # Laid out once; a figure that still has a layout is drawn twice when it is saved, and laid out each time.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)
    out = io.StringIO()
    # Paths instead of fonts: the page looks the same everywhere. No date: the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": alt, "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)


def _interval(panel: Any, x: float, found: Any, **style: Any) -> None:
    panel.errorbar([x], [found.mean], [[found.mean - found.low], [found.high - found.mean]], capsize=3, **style)


def _front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Points that no other is both cheaper and better than, from the cheapest on."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(11.0, 3.7 * columns + 0.6), 3.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, columns)).tolist()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels
