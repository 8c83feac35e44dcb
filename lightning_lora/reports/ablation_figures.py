"""The pictures of an ablation's report, one panel each: costs, axes, validation while training. Imports no torch."""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lora.experiments.plan import ARM, Axis
from lightning_lora.experiments.results import ArmResult
from lightning_lora.reports.ablation import Report, bounded, estimate_text, number_text

MARKERS = "os^Dv<>Pp*X"
_COSTS = {"trainable_params": "trainable parameters", "train_s": "training, s", "peak_memory_mb": "peak memory, MiB"}
#: More arms than these have no picture each.
_MOST_PANELS = 24


def color(report: Report, arm: ArmResult) -> str:
    """Return the colour of an arm, the same in all pictures: of ten that are distinguishable without colour vision."""
    from matplotlib import color_sequences
    from matplotlib.colors import to_hex

    colors = color_sequences["petroff10"]
    return to_hex(colors[[each.label for each in report.arms].index(arm.label) % len(colors)])


def overview_figure(report: Report) -> Any:
    """Draw quality against costs side by side, with a legend; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    if not report.has_answers:
        return None
    figure = Figure(figsize=(11.7, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_COSTS), sharey=True)
    for panel, cost in zip(panels, _COSTS, strict=True):
        _draw_costs(panel, report, cost)
    panels[0].set_ylabel(_quality(report))
    handles, labels = panels[0].get_legend_handles_labels()
    if 1 < len(labels) <= _MOST_PANELS:
        inches = 0.6 + 0.07 * max(map(len, labels))  # of a line's mark, and of its words at 8 points
        columns = max(1, min(len(labels), 6, int(figure.get_figwidth() / inches)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def pictures(report: Report) -> list[tuple[str, str, list[str]]]:
    """Return the pictures of a page: sections with a title, what is shown, and a picture as SVG for each panel."""
    if not report.has_answers:
        return []
    sections: list[tuple[str, str, list[Any]]] = [
        ("What each axis does", "Means with 95% intervals; small dots are seeds.", _axes(report)),
        (
            "While training",
            f"Validation {report.plan.metric} by optimizer step: mean and range of the seeds; the baseline in grey.",
            _curves(report),
        ),
        (
            "Cost against quality",
            "Nothing that the grey line joins is both cheaper and better.",
            [_cost_picture(report, cost) for cost in _COSTS],
        ),
    ]
    return [(title, said, [_as_svg(*each) for each in drawn]) for title, said, drawn in sections if drawn]


def _cost_picture(report: Report, cost: str) -> tuple[Any, str]:
    figure, panel = _figure()
    _draw_costs(panel, report, cost)
    panel.set_ylabel(_quality(report))
    return figure, f"{_quality(report)} against {_COSTS[cost]}"


def _draw_costs(panel: Any, report: Report, cost: str) -> None:
    from matplotlib.ticker import EngFormatter

    points = []
    for i, arm in enumerate(report.arms):
        if arm.own is not None and not math.isnan(x := arm.mean_cost(cost)):
            digits = 1 if cost == "train_s" else 0
            hover = f"{arm.label}: {estimate_text(arm.own, report.plan.metric)}, {number_text(x, digits)}"
            style = {"fmt": MARKERS[i % len(MARKERS)], "color": color(report, arm), "label": arm.label}
            _interval(panel, x, arm.own, report.plan.metric, f"{hover} {_COSTS[cost].split(', ')[-1]}", **style)
            points.append((x, arm.own.mean))
    if points:
        front = _front(points, report.plan.higher_is_better)
        panel.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
    panel.locator_params(axis="x", nbins=5)
    panel.set_xlabel(_COSTS[cost])
    positive = [x for x, _ in points if x > 0]
    if cost == "trainable_params":
        if positive and max(positive) / min(positive) > 20:
            panel.set_xscale("symlog" if len(positive) < len(points) else "log")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _axes(report: Report) -> list[tuple[Any, str]]:
    """Each compared axis, the others at the baseline; two that cross as a heat map; not arms by name."""
    axes = [axis for axis in report.plan.axes if not axis.chosen and len(axis.values) > 1 and axis.name != ARM]
    base = report.baseline.cells[0].cell.values
    drawn = [_heat_map(report, *axes)] if len(axes) == 2 else []
    for axis in axes:
        figure, panel = _figure()
        names, others = list(axis.values), [other for other in axes if other is not axis]
        points = []
        for arm in report.arms:
            values = arm.cells[0].cell.values
            if arm.own is None or any(values[other.name] != base[other.name] for other in others):
                continue
            i = names.index(values[axis.name])
            points.append((i, arm.own.mean))
            _interval(panel, i, arm.own, report.plan.metric, _hover(report, arm), fmt="o", color=color(report, arm))
            means = [each.values(report.plan.metric).mean() for each in report.answers_of(arm)]
            panel.plot([i + 0.12] * len(means), means, ".", color="#999999", zorder=1, markersize=4)
        if axis.numbers and points:
            panel.plot(*zip(*sorted(points), strict=True), color="#999999", linewidth=1, zorder=0)
        long = max(map(len, names)) * len(names) > 40
        panel.set_xticks(range(len(names)), names, rotation=30 if long else 0, ha="right" if long else "center")
        elsewhere = ", ".join(f"{other.name} {base[other.name]}" for other in others)
        shown = f"{axis.name} ({elsewhere})" if elsewhere else axis.name
        panel.set(xlabel=shown, ylabel=_quality(report), xlim=(-0.5, len(names) - 0.5))
        drawn.append((figure, f"{_quality(report)} by {axis.name}"))
    return drawn


def _heat_map(report: Report, down: Axis, across: Axis) -> tuple[Any, str]:
    figure, panel = _figure(grid=False)
    shape = len(down.values), len(across.values)
    found, hovers = np.full(shape, np.nan), {}
    for arm in report.arms:
        values = arm.cells[0].cell.values
        if arm.own is not None:
            at = list(down.values).index(values[down.name]), list(across.values).index(values[across.name])
            found[at], hovers[at] = arm.own.mean, _hover(report, arm)
    image = panel.imshow(found, cmap="cividis" if report.plan.higher_is_better else "cividis_r", aspect="auto")
    for (i, j), hover in hovers.items():
        red, green, blue, _ = image.cmap(image.norm(found[i, j]))
        ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "#111111"
        panel.text(j, i, f"{found[i, j]:.3f}", ha="center", va="center", color=ink, fontsize=8, gid=f"tip:{hover}")
    panel.set_xticks(range(shape[1]), across.values)
    panel.set_yticks(range(shape[0]), down.values)
    panel.set(xlabel=across.name, ylabel=down.name)
    panel.set_title(_quality(report), fontsize=9)
    return figure, f"{_quality(report)} by {down.name} and {across.name}"


def _curves(report: Report) -> list[tuple[Any, str]]:
    """Validation of each arm by step: the steps that all of its seeds have."""
    curves: dict[str, tuple[list[int], NDArray]] = {}
    for arm in report.arms:
        found = [cell.curve(report.plan.metric) for cell in arm.cells if cell.status == "finished"]
        steps = sorted(set.intersection(*map(set, found))) if found else []
        curves[arm.label] = steps, np.array([[each[step] for step in steps] for each in found])
    shown = [arm for arm in report.arms if len(curves[arm.label][0]) > 1]
    if not shown or len(shown) > _MOST_PANELS:
        return []
    values = np.concatenate([curves[arm.label][1].ravel() for arm in shown])
    room = 0.05 * (values.max() - values.min() or 1.0)
    drawn = []
    for arm in shown:
        figure, panel = _figure()
        if arm is not report.baseline and report.baseline in shown:
            steps, seeds = curves[report.baseline.label]
            panel.plot(steps, seeds.mean(axis=0), color="#999999", linewidth=1)
        steps, seeds = curves[arm.label]
        means = seeds.mean(axis=0)
        panel.fill_between(
            steps, seeds.min(axis=0), seeds.max(axis=0), color=color(report, arm), alpha=0.25, linewidth=0
        )
        panel.plot(steps, means, color=color(report, arm))
        for step, mean in zip(steps, means, strict=True):
            (dot,) = panel.plot(step, mean, ".", color=color(report, arm))
            dot.set_gid(f"tip:{arm.label}: {mean:.4f} at step {step:,}")
        panel.set(xlabel="step", ylim=(values.min() - room, values.max() + room))
        panel.set_title(arm.label, fontsize=9)
        drawn.append((figure, f"validation {report.plan.metric} of {arm.label} by step"))
    return drawn


def _hover(report: Report, arm: ArmResult) -> str:
    assert arm.own is not None
    return f"{arm.label}: {estimate_text(arm.own, report.plan.metric)}"


def _quality(report: Report) -> str:
    return f"{report.split} {report.plan.metric}"


def _as_svg(figure: Any, alt: str) -> str:
    """Return a figure as SVG in the ink of the page, with words for hovering and for those who do not see."""
    import matplotlib as mpl

    # Laid out once; a figure that still has a layout is drawn twice when it is saved, and laid out each time.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)
    out = io.StringIO()
    # Paths instead of fonts: the page looks the same everywhere. No date: the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": alt, "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def _interval(panel: Any, x: float, found: Any, metric: str, hover: str, **style: Any) -> None:
    low, high = bounded(found, metric)
    drawn = panel.errorbar([x], [found.mean], [[found.mean - low], [high - found.mean]], capsize=3, **style)
    drawn.lines[0].set_gid(f"tip:{hover}")


def _front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Points that no other is both cheaper and better than, from the cheapest on."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def _figure(grid: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    if grid:
        panel.grid(color="#999999", alpha=0.25, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panel
