"""What lies in the folders of experiments and runs: the sole reader of cells. Imports no torch."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.errors import UserError
from lightning_lora.experiments.given_runs import GivenRun
from lightning_lora.experiments.plan import Cell, Plan, with_found
from lightning_lora.experiments.plan_config import make_plan
from lightning_lora.experiments.results import CellResult, one_class, read_answers
from lightning_lora.experiments.searcher import read_found
from lightning_lora.runs.folder import RunFolder, kept_evaluation, kept_predictions

#: Many configs are read; libyaml takes a tenth of the time.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_run(place: Path) -> GivenRun:
    """A run with its answers: to test rows where the best weights were tested, and to validation rows.

    Raises:
        UserError: A file is damaged.
    """
    record = RunFolder(place).read()
    splits = (record.get("data") or {}).get("splits", {})
    fingerprints = {split: splits[split]["fingerprint"] for split in splits if split != "test"}
    test = None
    if (tested := kept_evaluation(record, "test")) is not None:
        test = read_answers(kept_predictions(place, tested))
        fingerprints["test"] = record["evaluations"][tested]["fingerprint"]
    validated = kept_evaluation(record, "val")
    best = read_answers(kept_predictions(place, validated)) if validated else None
    val = best or read_answers(place / "predictions" / "val.parquet")
    names = (test or val or ((), ()))[1]
    return GivenRun(
        place.name, record, val[0] if val else None, test[0] if test else None, names, "best" if best else "last",
        fingerprints,
    )  # fmt: skip


def read_plan(folder: Path) -> tuple[dict[str, Any], Plan]:
    """What was asked of an ablation, and its plan.

    Raises:
        UserError: The folder is none of an ablation, or what it says is damaged.
    """
    path = folder / "ablation.json"
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
        config, command = asked["config"], asked["command"]
        if not isinstance(config, dict) or not isinstance(command, str):
            raise TypeError("its config is a tree and its command are words")
        plan = make_plan(config, Path(asked["path"]), asked["small"])
        return asked, with_found(plan, read_found(plan, folder))
    except FileNotFoundError:
        raise UserError(f"report: {folder} is no ablation's folder (no ablation.json in it)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def gather_cells(plan: Plan, folder: Path) -> list[CellResult]:
    """Every cell of the plan, with what lies in its folder."""
    return [_cell(cell, folder / "cells" / cell.name) for cell in plan.cells]


def _cell(cell: Cell, place: Path) -> CellResult:
    if not cell.searched:
        return CellResult(cell, "missing", "no trial of the search has finished", {}, None, None)
    if not (place / "run.json").is_file():
        return CellResult(cell, "missing", "not started", {}, None, None)
    record: Mapping[str, Any] = RunFolder(place).read()
    status = str(record.get("status"))
    if status != "finished":
        error = str(record.get("error", ""))
        reason = error or ("under way, or killed" if status == "running" else status)
        return CellResult(cell, status, reason, record, None, None)
    if different := _different(cell, place / "config.yaml"):
        return CellResult(cell, "stale", f"trained with other settings: {different}", record, None, None)
    val, test = (
        read_answers(kept_predictions(place, name)) if (name := kept_evaluation(record, split)) else None
        for split in ("val", "test")
    )
    if val is None:
        return CellResult(cell, "interrupted", "trained, but not validated", record, None, None)
    answers, names = val
    return CellResult(cell, status, one_class(answers), record, answers, test[0] if test else None, names)


def _different(cell: Cell, config: Path) -> str:
    """The first setting of the plan that a cell was not trained with; empty where there is none."""
    settings = yaml.load(config.read_text(encoding="utf-8"), Loader=_YAML)
    for key, wanted in {**cell.change, "seed_everything": cell.seed}.items():
        if not same_value(value := value_at(settings, key), wanted):
            return f"{key} {value} instead of {wanted}"
    return ""


def value_at(settings: Any, key: str) -> Any:
    """Return the setting of a flat key in a tree of settings, None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


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
    # A test that a person ran by hand is a look as well, also of a cell that was set aside since (NAME.1).
    tests: Counter[str] = Counter()
    for record in [*(folder / "cells").glob("*/run.json"), *(folder / "stale").glob("*/run.json")]:
        place = record.parent
        name = place.name if place.parent.name == "cells" else place.name.rpartition(".")[0]
        tests[name] += sum(n.startswith("test") for n in RunFolder(place).read().get("evaluations", {}))
    by_hand = sum(max(0, count - cells.count(name)) for name, count in tests.items())
    return len(cells) + by_hand, len({*cells, *(name for name, count in tests.items() if count)})


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
