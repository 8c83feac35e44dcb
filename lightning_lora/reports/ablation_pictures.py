"""The pictures of an ablation's report, as SVG within the page. Imports no torch."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Okabe and Ito's colours, distinguishable without colour vision; shapes are in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "os^Dv<>Pp*X"
MOST_MATRICES = 12
MOST_CLASSES = 20


def all_pictures(report: Any) -> list[tuple[str, str]]:
    """Title and SVG of each picture that the report has the numbers for."""
    drawn = [
        ("Cost against quality", pareto(report)),
        ("What each axis does", sensitivity(report)),
        ("What the search has tried", trials(report)),
        ("Learning curves", learning_curves(report)),
        ("Confusion matrices", confusion(report)),
    ]
    return [(title, svg) for title, svg in drawn if svg]


def pareto(report: Any) -> str:
    """Quality with its interval against trainable parameters, time and memory; the Pareto front joined."""
    figure = pareto_figure(report)
    return "" if figure is None else _svg(figure, "Quality of each arm against its costs, with 95% intervals")


def pareto_figure(report: Any) -> Any:
    """The figure of ``pareto``; None where there is nothing to draw."""
    arms = [(arm, arm.own) for arm in report.arms if arm.own is not None]
    if not arms:
        return None
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(1, 3, 3.4)
    for panel, (cost, label) in zip(axes, (("trainable_params", "trainable parameters"), ("train_s", "training, s"),
                                           ("peak_memory_mb", "peak memory, MiB")), strict=True):  # fmt: skip
        points = []
        for i, (arm, found) in enumerate(arms):
            x = arm.mean_cost(cost)
            if math.isnan(x):
                continue
            bars = [[found.mean - found.low], [found.high - found.mean]]
            panel.errorbar([x], [found.mean], bars, fmt=MARKERS[i % len(MARKERS)], color=COLORS[i % len(COLORS)],
                           capsize=3, label=arm.label)  # fmt: skip
            points.append((x, found.mean))
        front = _front(points, report.plan.higher_is_better)
        panel.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0) if front else None
        positive = [x for x, _ in points if x > 0]
        if cost == "trainable_params" and positive and max(positive) / min(positive) > 20:
            panel.set_xscale("symlog" if len(positive) < len(points) else "log")
        else:
            panel.locator_params(axis="x", nbins=5)
        if cost == "trainable_params":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlabel(label)
    axes[0].set_ylabel(f"{report.split} {report.plan.metric}")
    _legend(figure, axes[0])
    return figure


def sensitivity(report: Any) -> str:
    """The metric against each compared axis: seeds as dots, means joined, intervals as bars; other axes at baseline."""
    axes_shown = [axis for axis in report.plan.axes if not axis.chosen and len(axis.values) > 1]
    if not axes_shown:
        return ""
    base = dict(report.plan.baseline)
    figure, panels = _figure(1, len(axes_shown), 3.2)
    drawn = False
    for panel, axis in zip(panels, axes_shown, strict=True):
        names = list(axis.values)
        for i, name in enumerate(names):
            arm = next((a for a in report.arms if dict(a.arm) == {**base, axis.name: name}), None)
            if arm is None or (found := arm.own) is None:
                continue
            drawn = True
            bars = [[found.mean - found.low], [found.high - found.mean]]
            panel.errorbar([i], [found.mean], bars, fmt="o", color=COLORS[0], capsize=3, zorder=2)
            seeds = [answers for cell in arm.cells if (answers := report.answers(cell)) is not None]
            values = [answers.values(report.plan.metric).mean() for answers in seeds]
            panel.plot([i + 0.12] * len(values), values, ".", color="#999999", zorder=1)
        panel.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 8 else 0)
        panel.set_xlabel(axis.name)
        panel.set_xlim(-0.5, len(names) - 0.5)
    if not drawn:
        return ""
    panels[0].set_ylabel(f"{report.split} {report.plan.metric}")
    return _svg(figure, "The metric for each value of each axis, with 95% intervals; grey dots are seeds")


def trials(report: Any) -> str:
    """The validation metric of each complete trial against each searched setting; crosses are each arm's best."""
    plan = report.plan
    found = {arm: one for arm, one in plan.found.items() if any(trial.value is not None for trial in one.trials)}
    if plan.search is None or not found:
        return ""
    figure, panels = _figure(1, len(plan.search.space), 3.2)
    for panel, key in zip(panels, plan.search.space, strict=True):
        spaces = [plan.search.for_arm(arm)[key] for arm in found]
        words = list(dict.fromkeys(str(value) for space in spaces for value in getattr(space, "choices", ())))
        for i, (arm, one) in enumerate(found.items()):
            color, label = COLORS[i % len(COLORS)], ", ".join(value for _, value in arm)
            shown = [trial for trial in one.trials if trial.state.name == "COMPLETE"]
            x = [words.index(str(t.params[key])) if words else t.params[key] for t in shown]
            panel.plot(x, [t.value for t in shown], MARKERS[i % len(MARKERS)], color=color, alpha=0.7, label=label)
            for at, trial in zip(x, shown, strict=True):
                if trial is one.best:
                    panel.plot([at], [trial.value], "x", color="black", markersize=9, zorder=3)
        if words:
            panel.set_xticks(range(len(words)), words)
        elif all(getattr(space, "log", False) for space in spaces):
            panel.set_xscale("log")
        panel.set_xlabel(key)
    panels[0].set_ylabel(f"validation {plan.metric}")
    _legend(figure, panels[0])
    return _svg(figure, "The validation metric of each trial against each searched setting; crosses are the best")


def learning_curves(report: Any) -> str:
    """Training loss over steps, the mean over seeds with the range between them."""
    from scipy.ndimage import uniform_filter1d

    figure, (panel,) = _figure(1, 1, 3.4)
    drawn = False
    for i, arm in enumerate(report.arms):
        curves = [report.curves.get(cell.cell.name, {}).get("train/loss_step", ()) for cell in arm.cells]
        curves = [dict(curve) for curve in curves if len(curve) > 1]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        if len(steps) < 2:
            continue
        values = np.array([[curve[step] for step in steps] for curve in curves])
        smooth = uniform_filter1d(values, 5, mode="nearest")
        color = COLORS[i % len(COLORS)]
        panel.plot(steps, smooth.mean(axis=0), color=color, label=arm.label)
        panel.fill_between(steps, smooth.min(axis=0), smooth.max(axis=0), color=color, alpha=0.15, linewidth=0)
        drawn = True
    if not drawn:
        return ""
    panel.set_xlabel("step")
    panel.set_ylabel("training loss (mean of 5 points)")
    _legend(figure, panel)
    return _svg(figure, "Training loss of each arm, mean over seeds; the band is their range")


def confusion(report: Any) -> str:
    """A confusion matrix for each arm, summed over its seeds: shares within the true class."""
    names: Sequence[str] = next((cell.label_names for cell in report.cells if cell.label_names), [])
    arms = [arm for arm in report.arms if any(report.answers(cell) is not None for cell in arm.cells)][:MOST_MATRICES]
    if not arms or not 2 <= len(names) <= MOST_CLASSES:
        return ""
    columns = min(4, len(arms))
    figure, panels = _figure(math.ceil(len(arms) / columns), columns, 2.6 if len(names) < 8 else 4)
    for panel, arm in zip(panels, arms, strict=False):
        counts = np.zeros((len(names), len(names)))
        for cell in arm.cells:
            if (answers := report.answers(cell)) is not None:
                np.add.at(counts, (answers.labels, answers.logits.argmax(axis=1)), 1)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 8:
            for i in range(len(names)):
                for j in range(len(names)):
                    color = "white" if shares[i, j] > 0.5 else "black"
                    panel.text(j, i, f"{shares[i, j]:.0%}", ha="center", va="center", color=color, fontsize=8)
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.set_title(arm.label, fontsize=9)
        panel.spines[["top", "right"]].set_visible(True)
    for panel in panels[len(arms) :]:
        panel.set_visible(False)
    return _svg(figure, "Shares of each true class (rows) by predicted class (columns)")


def _front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Points that no other is both cheaper and better than, from cheap to dear."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if higher_is_better else p[1])):
        if not front or (y > front[-1][1] if higher_is_better else y < front[-1][1]):
            front.append((x, y))
    return front


def _figure(rows: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    width = min(11.0, 3.7 * columns + 0.6 + (2.2 if columns == 1 else 0))
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel().tolist()
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, axes


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if 1 < len(labels) <= 24:
        inches = 0.6 + 0.07 * max(map(len, labels))  # of a line's mark, and of its words at 8 points
        columns = max(1, min(len(labels), 6, int(figure.get_figwidth() / inches)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _svg(figure: Any, alt: str) -> str:
    import matplotlib as mpl

    # Laid out once; a figure that still has a layout is drawn twice when it is saved, and laid out each time.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)
    out = io.StringIO()
    # Paths instead of fonts: the page looks the same everywhere. No date: the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": alt, "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
