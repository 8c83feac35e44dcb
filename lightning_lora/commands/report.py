"""``main.py report``: the report of ablations or of any runs, from what lies in their folders. Imports no torch."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.errors import UserError
from lightning_lora.experiments.given_runs import GivenRun, as_ablation, differences, remarks
from lightning_lora.experiments.records import count_looks, gather_cells, read_curves, read_plan, read_run
from lightning_lora.experiments.results import compare_arms
from lightning_lora.files import atomic_path, write_text
from lightning_lora.reports import ablation as reports
from lightning_lora.reports import ablation_pages, ablation_pictures, ablation_tables
from lightning_lora.reports.tables import markdown
from lightning_lora.runs.folder import RunFolder, plain


def run(words: list[str]) -> int:
    """Writes the report of each ablation again, and one of all plain runs together."""
    parser = OptionParser(
        "report",
        description="Writes the report of each ablation again, or compares runs: those that differ by their seed only "
        "are one arm. Runs of a folder are grouped by their data, with a report for each group. Without torch.",
    )
    folders = "Ablations (such as logs/ablation-rank), runs, or folders of runs (such as logs: its finished runs)."
    parser.add_argument("folders", nargs="+", help=folders)
    parser.add_argument("--baseline", help="The run that the others are compared with; by default the first.")
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
    print(f"{markdown(ablation_tables.metric_table(report))}\n\n{markdown(ablation_tables.arm_table(report))}\n")
    written = {
        "html": ablation_pages.as_html(report),
        "md": ablation_pages.as_markdown(report),
        "csv": ablation_pages.as_csv(report),
        "tex": ablation_pages.as_latex(report),
        "json": json.dumps(plain(ablation_tables.as_document(report)), indent=2, ensure_ascii=False) + "\n",
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
                raise UserError(f"report: {path} has not finished ({status}); resume it, or leave it out")
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
