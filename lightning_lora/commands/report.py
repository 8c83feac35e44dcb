"""``main.py report``: the report of ablations or of any runs, from what lies in their folders. Imports no torch."""

import csv
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.ablation.plan import Cell, Plan, make_plan, with_found
from lightning_lora.ablation.results import CellResult, compare_arms, one_class, read_answers
from lightning_lora.ablation.runs import GivenRun, as_ablation, differences, remarks
from lightning_lora.ablation.search import read_found
from lightning_lora.artifacts.runs import RunFolder, plain
from lightning_lora.commands.options import OptionParser
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path, write_text
from lightning_lora.reports import ablation as reports
from lightning_lora.reports import ablation_pages, ablation_pictures
from lightning_lora.reports.tables import markdown

#: Many configs are read; libyaml takes a tenth of the time.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def run(words: list[str]) -> int:
    """Writes the report of each ablation again, and one of all plain runs together."""
    parser = OptionParser(
        "report",
        description="Writes the report of each ablation again, or compares runs: those that differ by their seed only "
        "are one arm. Runs of a folder are grouped by their data, with a report for each group. Without torch.",
    )
    folders = "Ablations (such as logs/ablation-rank), runs, or folders of runs (such as logs: its finished runs)."
    parser.add_argument("folders", nargs="+", help=folders)
    parser.add_argument("--baseline", help="The run that the others are held against; by default the first.")
    parser.add_argument("--output", help="Folder of the runs' report; by default report-RUN beside the first run.")
    options = parser.parse_args(words)
    paths = [Path(folder) for folder in options.folders]
    ablations = [path for path in paths if (path / "ablation.json").is_file()]
    given = [path for path in paths if path not in ablations]
    places = run_folders(given)
    if not places and (options.baseline or options.output):
        raise UserError("--baseline and --output are for the report of runs; an ablation has its own")
    for path in ablations:
        write_ablation_report(path)
    if places:
        base = find_baseline(places, options.baseline) if options.baseline else None
        # What is named is compared or refused; of what merely lies in a folder, what can be compared is.
        named = [path.resolve() for path in given if (path / "run.json").is_file()]
        whole = len(named) == len(given)
        runs = {place: read_run(place) for place in places} if whole else readable_runs(places, named)
        groups = [runs] if whole else by_data(runs, base)
        command = shlex.join(["python", "main.py", "report", *words])
        for group in groups:
            first = base if base in group else next(iter(group))
            output = Path(options.output) if options.output else next(iter(group)).parent
            if not options.output or len(groups) > 1:
                output /= f"report-{next(iter(group)).name}"
            if len(groups) > 1:
                source = group[first].settings.get("data.source")
                print(f"\n== {source}: {len(group)} run{'s' * (len(group) > 1)} ({', '.join(p.name for p in group)})")
            write_runs_report(group, first, output, command)
    return 0


def readable_runs(places: Sequence[Path], named: Sequence[Path]) -> dict[Path, GivenRun]:
    """The runs; of those that were not named, one that cannot be read is said to be left out.

    Raises:
        UserError: A run that was named cannot be read, or none can.
    """
    runs: dict[Path, GivenRun] = {}
    for place in places:
        try:
            runs[place] = read_run(place)
        except UserError as error:
            if place.resolve() in named:
                raise
            print(f"warning: {place} is left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("report: no run can be read")
    return runs


def by_data(runs: Mapping[Path, GivenRun], baseline: Path | None) -> list[dict[Path, GivenRun]]:
    """The runs in groups of the same validation and test rows; of two with the same settings and seed, only one."""
    groups: dict[Any, dict[Path, GivenRun]] = {}
    for place in sorted(runs, key=lambda place: place != baseline):
        run = runs[place]
        splits = (run.record.get("data") or {}).get("splits", {})
        rows = tuple(
            run.fingerprints.get(split) or splits.get(split, {}).get("fingerprint") for split in ("val", "test")
        )
        group = groups.setdefault(rows, {})
        same = [other.name for other in group.values() if (other.settings, other.seed) == (run.settings, run.seed)]
        if same:
            print(f"warning: {place} is left out: same settings and seed as {same[0]}", file=sys.stderr)
        else:
            group[place] = run
    return [{place: group[place] for place in runs if place in group} for group in groups.values()]


def write_ablation_report(folder: Path) -> None:
    """Writes ``report.html``, ``.md``, ``.csv`` and ``.tex``, and prints the answer and the table."""
    asked, plan = read_plan(folder)
    cells = gather_cells(plan, folder)
    report = reports.Report(
        folder.name, plan, asked["command"], compare_arms(plan, cells), cells, count_looks(folder),
        asked.get("differences", {}), {c.cell.name: read_curves(folder / "cells" / c.cell.name) for c in cells},
    )  # fmt: skip
    write_report(report, folder)


def write_runs_report(given: Mapping[Path, GivenRun], baseline: Path, output: Path, command: str) -> None:
    """Writes the report of runs that were not planned together, in the same forms.

    Raises:
        UserError: They cannot be compared, or the place is that of something else.
    """
    if any((output / file).exists() for file in ("run.json", "config.yaml", "ablation.json")):
        raise UserError(f"--output: {output} is the folder of a run or ablation; choose another")
    places, runs = list(given), list(given.values())
    plan, cells = as_ablation(runs, given[baseline].name)
    looks = [sum(name.startswith("test") for name in run.record.get("evaluations", {})) for run in runs]
    report = reports.Report(
        output.name, plan, command, compare_arms(plan, cells), cells, (sum(looks), sum(map(bool, looks))),
        differences(runs, plan), {c.cell.name: read_curves(p) for c, p in zip(cells, places, strict=True)},
        ["Nothing was chosen by this report: all runs that were given are in it.", *remarks(runs)],
    )  # fmt: skip
    write_report(report, output)


def write_report(report: reports.Report, folder: Path) -> None:
    """Prints the answer and the table, then draws the pictures, then writes the report in every form."""
    print(f"\n{report.plan.question}\n{reports.answer(report)}\n")
    print(f"{markdown(reports.metric_table(report))}\n\n{markdown(reports.table(report))}\n")
    written = {
        "html": ablation_pages.as_html(report),
        "md": ablation_pages.as_markdown(report),
        "csv": ablation_pages.as_csv(report),
        "tex": ablation_pages.as_latex(report),
        "json": json.dumps(plain(reports.as_document(report)), indent=2, ensure_ascii=False) + "\n",
    }
    for ending, content in written.items():
        write_text(folder / f"report.{ending}", content)
    if (figure := ablation_pictures.pareto_figure(report)) is not None:
        with atomic_path(folder / "report.png") as staging:
            figure.savefig(staging, dpi=130)
    print(f"written: {folder / 'report'}.html, .md, .csv, .tex, .json, .png")


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of the runs, each once; a folder of runs stands for those of them that have finished.

    Raises:
        UserError: A folder is neither, or a run has not finished.
    """
    found: list[Path] = []
    for path in paths:
        if (path / "run.json").is_file():
            if (status := RunFolder(path).read().get("status")) != "finished":
                raise UserError(f"report: {path} has not finished ({status}); go on with it, or leave it out")
            found.append(path)
            continue
        left_out = {place: left_out_for(place) for place in sorted(path.glob("*/")) if place.name[0] != "."}
        finished = [place for place, reason in left_out.items() if reason is None]
        if not finished:
            raise UserError(f"report: {path} is no run, no ablation, and no folder with finished runs in it")
        for place, reason in left_out.items():
            if reason:
                print(f"warning: {place} is left out: {reason}", file=sys.stderr)
        found += finished
    unique = list({place.resolve(): place for place in found}.values())
    names = [place.name for place in unique]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"report: two runs are called {twice}; report them apart, or rename a folder")
    return unique


def left_out_for(place: Path) -> str | None:
    """Why a folder is no finished run; None where it is one, nothing where it is a report of this command."""
    if (place / "run.json").is_file():
        try:
            status = RunFolder(place).read().get("status")
        except UserError as error:
            return str(error)
        return None if status == "finished" else f"it has not finished ({status})"
    if (place / "ablation.json").is_file():
        return f"an ablation has a report of its own: report {place}"
    if (place / "comparison.json").is_file():
        return f"the arms of a comparison are reported by: report {place}"
    return "" if (place / "report.md").is_file() else "it is no run"


def find_baseline(places: list[Path], given: str) -> Path:
    """The baseline's folder, which is put beside the others where it is not among them."""
    path = Path(given)
    if found := [place for place in places if place.resolve() == path.resolve() or place.name == given]:
        return found[0]
    (place,) = run_folders([path]) if (path / "run.json").is_file() else [None]
    if place is None:
        raise UserError(f"--baseline: {given} is no run; there are {', '.join(p.name for p in places)}")
    places.append(place)
    run_folders(places)  # its name may be that of another
    return place


def read_run(place: Path) -> GivenRun:
    """A run with its answers: to test rows where the best weights were tested, and to validation rows.

    Raises:
        UserError: A file is damaged.
    """
    record = RunFolder(place).read()
    evaluations = record.get("evaluations") or {}
    tests = [name for name in evaluations if name.startswith("test") and _of_best(record, name)]
    splits = (record.get("data") or {}).get("splits", {})
    fingerprints = {split: splits[split]["fingerprint"] for split in splits if split != "test"}
    test = None
    if tests and (test := read_answers(place / "predictions" / f"{tests[0]}.parquet")) is not None:
        fingerprints["test"] = evaluations[tests[0]]["fingerprint"]
    best = read_answers(place / "predictions" / "val-best.parquet") if _of_best(record, "val") else None
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
        return asked, with_found(plan, read_found(folder))
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
        return CellResult(cell, "missing", "not begun", {}, None, None)
    record: Mapping[str, Any] = RunFolder(place).read()
    status = str(record.get("status"))
    if status != "finished":
        error = str(record.get("error", ""))
        reason = error or ("under way, or killed" if status == "running" else status)
        return CellResult(cell, status, reason, record, None, None)
    if different := _different(cell, place / "config.yaml"):
        return CellResult(cell, "stale", f"trained with other settings: {different}", record, None, None)
    tests = [name for name in record.get("evaluations") or {} if name.startswith("test") and _of_best(record, name)]
    val = read_answers(place / "predictions" / "val-best.parquet") if _of_best(record, "val") else None
    test = read_answers(place / "predictions" / f"{tests[0]}.parquet") if tests else None
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
    settings = yaml.load(config.read_text(encoding="utf-8"), Loader=_YAML)
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
