"""How cost grows: rows, length, rank and batch, one at a time; tokens a second and peak memory.

    python benchmarks/scaling.py --out logs/scaling      (make scaling)

Each point is one process of ``throughput.py``. Rows grow with a tiny model, so that what the project itself adds
would show; the other axes are measured with the shape of MiniLM-L6. Points are visited in a shuffled order, several
rounds of it, and reported as medians.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from suite import machine, say

#: What each axis varies, over which values, and what stays fixed.
AXES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "rows": ([1_000, 3_000, 10_000, 30_000, 100_000], {"size": "tiny", "batch_size": 32}),
    "length": ([32, 64, 128, 256, 512], {"size": "minilm", "rows": 192, "batch_size": 16}),
    "rank": ([1, 4, 8, 16, 64], {"size": "minilm", "rows": 512, "batch_size": 32, "targets": "all_linear"}),
    "batch_size": ([4, 8, 16, 32, 64], {"size": "minilm", "rows": 512}),
}
SHOWN = {"tokens_per_s": "tokens/s", "peak_memory_mb": "peak memory, MiB"}


def measure(axis: str, value: int, fixed: dict[str, Any], work: Path) -> dict[str, Any]:
    """One point, in a process of its own."""
    out = work / "point.json"
    settings = {**fixed, axis: value}
    words = [word for name, setting in settings.items() for word in (f"--{name}", str(setting))]
    script = str(Path(__file__).with_name("throughput.py"))
    command = [sys.executable, "-W", "ignore", script, *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(out.read_text())


def picture(points: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """A column for each axis: tokens a second above, memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(points), 5), layout="constrained")
    grid = figure.subplots(len(SHOWN), len(points), squeeze=False)
    for column, (axis, values) in enumerate(points.items()):
        for row, (key, label) in enumerate(SHOWN.items()):
            axes = grid[row][column]
            axes.plot(list(values), [v[key] for v in values.values()], "o-", color="#0072B2")
            axes.set_xscale("log", base=10 if axis == "rows" else 2)
            axes.set_ylim(0, 1.1 * max(v[key] for v in values.values()))
            axes.set_xlabel(axis)
            axes.set_ylabel(label if column == 0 else "")
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures every axis and writes ``scaling.json`` and ``scaling.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/scaling"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, list[dict[str, Any]]]] = {axis: {v: [] for v in AXES[axis][0]} for axis in options.axes}
    for turn in range(options.rounds):
        plan = [(axis, value) for axis in options.axes for value in AXES[axis][0]]
        random.Random(turn).shuffle(plan)
        for axis, value in plan:
            found[axis][value].append(measure(axis, value, AXES[axis][1], options.out))
            result = found[axis][value][-1]
            say(f"{axis} {value}: {result['tokens_per_s']:,.0f} tokens/s, {result['peak_memory_mb']:,.0f} MiB")
    points = {
        axis: {
            value: {key: statistics.median(r[key] for r in results) for key in SHOWN} for value, results in v.items()
        }
        for axis, v in found.items()
    }
    (options.out / "point.json").unlink()
    report = {"machine": machine(), "fixed": {axis: AXES[axis][1] for axis in points}, "median": points}
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    picture(points, options.out / "scaling.png")
    for axis, values in points.items():
        for value, medians in values.items():
            print(
                f"{axis:<12}{value:>8}{medians['tokens_per_s']:>12,.0f} tokens/s{medians['peak_memory_mb']:>8,.0f} MiB"
            )


if __name__ == "__main__":
    main()
