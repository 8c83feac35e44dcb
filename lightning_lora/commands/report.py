"""``main.py report``: the report of an ablation, made again from what lies in its folder. Imports no torch."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.ablation.plan import Cell, Plan, make_plan, with_found
from lightning_lora.ablation.results import CellResult, compare_arms, one_class, read_answers
from lightning_lora.ablation.search import read_found
from lightning_lora.artifacts.runs import RunFolder
from lightning_lora.commands.options import OptionParser
from lightning_lora.errors import UserError
from lightning_lora.files import write_text
from lightning_lora.reports import ablation as reports
from lightning_lora.reports.tables import markdown


def run(words: list[str]) -> int:
    """Writes the report of each folder again."""
    parser = OptionParser("report", description="Writes the report of ablations again, without torch.")
    parser.add_argument("folders", nargs="+", help="Folders that ablate made, such as logs/ablation-rank.")
    for folder in parser.parse_args(words).folders:
        write_ablation_report(Path(folder))
    return 0


def write_ablation_report(folder: Path) -> None:
    """Writes ``report.html``, ``.md``, ``.csv`` and ``.tex``, and prints the answer and the table."""
    asked, plan = read_plan(folder)
    cells = gather_cells(plan, folder)
    report = reports.Report(
        folder.name, plan, asked["command"], compare_arms(plan, cells), cells, count_looks(folder),
        asked.get("differences", {}), {c.cell.name: read_curves(folder / "cells" / c.cell.name) for c in cells},
    )  # fmt: skip
    written = {
        "html": reports.as_html(report),
        "md": reports.as_markdown(report),
        "csv": reports.as_csv(report),
        "tex": reports.as_latex(report),
    }
    for ending, content in written.items():
        write_text(folder / f"report.{ending}", content)
    print(f"\n{plan.question}\n{reports.answer(report)}\n\n{markdown(reports.table(report))}\n")
    print(f"written: {folder / 'report'}.html, .md, .csv, .tex")


def read_plan(folder: Path) -> tuple[dict[str, Any], Plan]:
    """What was asked of an ablation, and its plan.

    Raises:
        UserError: The folder is none of an ablation, or what it says is damaged.
    """
    path = folder / "ablation.json"
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
        plan = make_plan(asked["config"], Path(asked["path"]), asked["small"])
        return asked, with_found(plan, read_found(folder))
    except FileNotFoundError:
        raise UserError(f"report: {folder} is no ablation's folder (no ablation.json in it)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def gather_cells(plan: Plan, folder: Path) -> list[CellResult]:
    """Every cell of the plan, with what lies in its folder."""
    return [_cell(cell, folder / "cells" / cell.name) for cell in plan.cells]


def _cell(cell: Cell, place: Path) -> CellResult:
    if not (place / "run.json").is_file():
        return CellResult(cell, "missing", "not begun", {}, None, None)
    record: Mapping[str, Any] = RunFolder(place).read()
    status = str(record.get("status"))
    if status != "finished":
        error = str(record.get("error", ""))
        reason = error or ("under way, or killed" if status == "running" else status)
        return CellResult(cell, status, reason, record, None, None)
    if different := _different(cell, place / "config.yaml"):
        return CellResult(cell, "stale", f"trained with other settings: {different}", record, None, None)
    val, test = (
        read_answers(place / "predictions" / f"{file}.parquet") if _of_best(record, name) else None
        for name, file in (("val", "val-best"), ("test", "test"))
    )
    if val is None:
        return CellResult(cell, "interrupted", "trained, but not validated", record, None, None)
    answers, names = val
    return CellResult(cell, status, one_class(answers), record, answers, test[0] if test else None, names)


def _of_best(record: Mapping[str, Any], name: str) -> bool:
    """Whether an evaluation was of the checkpoint that validation chose, and not one that a person asked for."""
    evaluation = (record.get("evaluations") or {}).get(name)
    return evaluation is not None and Path(evaluation["checkpoint"]).name == "best.ckpt"


def _different(cell: Cell, config: Path) -> str:
    """The first setting of the plan that a cell was not trained with; empty where there is none."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    for key, wanted in {**cell.change, "seed_everything": cell.seed}.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not same_value(value, wanted):
            return f"{key} {value} instead of {wanted}"
    return ""


def same_value(one: Any, other: Any) -> bool:
    """Whether two settings are the same, however they are written (1 and 1.0, 1e-4 and "1e-4")."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same_value(a, b) for a, b in zip(one, other, strict=True))
    try:
        return one == other or float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def count_looks(folder: Path) -> tuple[int, int]:
    """Looks at test rows that were written down, and of how many cells."""
    try:
        lines = (folder / "test_looks.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    cells = []
    for line in lines:
        try:
            cells.append(json.loads(line)["cell"])
        except (ValueError, KeyError, TypeError):  # cut off when there was no room: still a look
            cells.append(line)
    # A test that a person ran by hand is a look as well.
    by_hand = 0
    for record in (folder / "cells").glob("*/run.json"):
        tests = [n for n in RunFolder(record.parent).read().get("evaluations", {}) if n.startswith("test")]
        by_hand += max(0, len(tests) - cells.count(record.parent.name))
    return len(cells) + by_hand, len(set(cells))


def read_curves(place: Path) -> dict[str, list[tuple[int, float]]]:
    """Each column of a run's metrics.csv as points (step, value)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if not (place / "metrics.csv").is_file():
        return curves
    with (place / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name in ("step", "epoch") or not value or not row.get("step"):
                    continue
                try:
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
                except ValueError:
                    continue
    return curves
