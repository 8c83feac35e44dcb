"""``main.py report``: the report of ablations or of any runs, from what lies in their folders. Imports no torch."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.errors import UserError
from lightning_lora.experiments.confounders import Change
from lightning_lora.experiments.given_runs import GivenRun, as_ablation, read_run, remarks
from lightning_lora.experiments.results import compare_arms, count_tests, read_cells, read_plan
from lightning_lora.files import atomic_path, write_text
from lightning_lora.program import command_line
from lightning_lora.reports import ablation_pages
from lightning_lora.reports.ablation import Report, answer
from lightning_lora.reports.ablation_figures import overview_figure
from lightning_lora.reports.ablation_tables import arm_table, as_document, metric_table, sets_note, sets_table
from lightning_lora.reports.tables import markdown
from lightning_lora.runs.folder import plain


def run(argv: list[str]) -> int:
    """Write the report of each ablation again, and one of all plain runs together."""
    parser = OptionParser(
        "report",
        description="Writes the report of each ablation again, or compares runs: those that differ by their seed only "
        "are one arm. Runs of a folder are grouped by their data, with a report for each group. Without torch.",
    )
    folders = "Ablations (such as logs/ablation-rank), runs, or folders of runs (such as logs: its finished runs)."
    parser.add_argument("folders", nargs="+", help=folders)
    parser.add_argument("--baseline", help="The run that the others are compared with; by default the first.")
    parser.add_argument("--output", help="Folder of the runs' report; by default report-RUN beside the first run.")
    options = parser.parse_args(argv)
    paths = [Path(folder) for folder in options.folders]
    ablations = [path for path in paths if (path / "ablation.json").is_file()]
    of_sets = [path for path in paths if not (path / "cells").exists() and [*path.glob("*/ablation.json")]]
    of_sets = [path for path in of_sets if (path / "report.md").is_file()]  # and not a folder of all runs
    given = [path for path in paths if path not in [*ablations, *of_sets]]
    if not given and (options.baseline or options.output):
        raise UserError("--baseline and --output are for the report of runs; an ablation has its own")
    parts = [place.parent for path in of_sets for place in sorted(path.glob("*/ablation.json"))]
    for path in [*ablations, *parts]:
        write_ablation_report(path)
    for path in of_sets:
        write_sets_report(path)
    if not given:
        return 0
    runs = read_runs(given)
    baseline = find_baseline(runs, options.baseline) if options.baseline else None
    # What is named is compared or refused; of what merely lies in a folder, what can be compared is.
    named = all((path / "run.json").is_file() for path in given)
    groups = [runs] if named else by_data(runs, baseline)
    for group in groups:
        output = Path(options.output) if options.output else group[0].place.parent
        if not options.output or len(groups) > 1:
            output /= f"report-{group[0].name}"
        if len(groups) > 1:
            count = f"{len(group)} run{'s' * (len(group) > 1)}"
            source = group[0].record["config"]["data"]["source"]
            print(f"\n== {source}: {count} ({', '.join(run.name for run in group)})")
        first = next((run for run in group if run is baseline), group[0])
        write_runs_report(group, first, output, command_line("report", *argv))
    return 0


def read_runs(paths: Sequence[Path]) -> list[GivenRun]:
    """Read runs, each once; a folder of runs stands for those of them that have finished.

    Raises:
        UserError: A run that is named has not finished or is damaged, or a folder holds none that can be read.
    """
    runs: dict[Path, GivenRun] = {}
    for path in paths:
        if (path / "run.json").is_file():
            runs.setdefault(path.resolve(), read_run(path))
            continue
        count = len(runs)
        for place in sorted(path.glob("*/")):
            try:
                if (place / "ablation.json").is_file():
                    raise UserError(f"an ablation has a report of its own: report {place}")
                if (place / "run.json").is_file():
                    runs.setdefault(place.resolve(), read_run(place))
                elif place.name[0] != "." and not (place / "report.md").is_file():
                    raise UserError("it is no run")
            except UserError as error:
                print(f"warning: {place} is left out: {error}", file=sys.stderr)
        if len(runs) == count:
            raise UserError(f"report: {path} is no run, no ablation, and no folder with finished runs in it")
    return list(runs.values())


def find_baseline(runs: list[GivenRun], given: str) -> GivenRun:
    """Return the baseline, which is added to the runs where it is not among them.

    Raises:
        UserError: It is no run.
    """
    path = Path(given)
    if found := [run for run in runs if run.place.resolve() == path.resolve() or run.name == given]:
        return found[0]
    if not (path / "run.json").is_file():
        raise UserError(f"--baseline: {given} is no run; there are {', '.join(run.name for run in runs)}")
    runs.append(read_run(path))
    return runs[-1]


def by_data(runs: Sequence[GivenRun], baseline: GivenRun | None) -> list[list[GivenRun]]:
    """Return the runs in groups of the same validation and test rows; of two with the same settings and seed, one."""
    groups: dict[tuple[str | None, ...], list[GivenRun]] = {}
    for run in sorted(runs, key=lambda run: run is not baseline):
        group = groups.setdefault((run.fingerprint("val"), run.fingerprint("test")), [])
        same = [other.name for other in group if (other.settings, other.seed) == (run.settings, run.seed)]
        if same:
            print(f"warning: {run.place} is left out: same settings and seed as {same[0]}", file=sys.stderr)
        else:
            group.append(run)
    return [[run for run in runs if run in group] for group in groups.values()]


def write_sets_report(folder: Path) -> None:
    """Write and print the table of an ablation over several data sets, from the ablations in its folder."""
    reports = {place.parent.name: read_ablation(place.parent) for place in sorted(folder.glob("*/ablation.json"))}
    first = next(iter(reports.values()))
    table = f"{markdown(sets_table(reports))}\n\n{sets_note(reports)}\n"
    print(f"\n{first.plan.question}\n\n{table}")
    each = "\n".join(f"- [{name}]({name}/report.md): {answer(report)}" for name, report in reports.items())
    write_text(folder / "report.md", f"# {first.plan.question}\n\n{table}\n{each}\n\ncommand: {first.command}\n")
    print(f"written: {folder / 'report.md'}, and a report for each set beside it")


def write_ablation_report(folder: Path) -> None:
    """Write the report of an ablation in every form, and print the answer and the table."""
    write_report(read_ablation(folder), folder)


def read_ablation(folder: Path) -> Report:
    """Read what lies in an ablation's folder."""
    asked, plan = read_plan(folder)
    cells = read_cells(plan, folder)
    changes = {arm: [Change(**each) for each in found] for arm, found in asked.get("differences", {}).items()}
    arms = compare_arms(plan, cells)
    return Report(folder.name, plan, asked["command"], arms, cells, count_tests(folder), changes)


def write_runs_report(runs: Sequence[GivenRun], baseline: GivenRun, output: Path, command: str) -> None:
    """Write the report of runs that were not planned together, in the same forms.

    Raises:
        UserError: They cannot be compared, or the place is that of something else.
    """
    if any((output / file).exists() for file in ("run.json", "config.yaml", "ablation.json")):
        raise UserError(f"--output: {output} is the folder of a run or ablation; choose another")
    plan, cells, changes = as_ablation(runs, baseline)
    tests = [sum(name.startswith("test") for name in run.record.get("evaluations", {})) for run in runs]
    notes = ["Nothing was chosen by this report: all runs that were given are in it.", *remarks(runs)]
    counts = sum(tests), sum(map(bool, tests))
    write_report(Report(output.name, plan, command, compare_arms(plan, cells), cells, counts, changes, notes), output)


def write_report(report: Report, folder: Path) -> None:
    """Print the answer and the tables, then write the report in every form."""
    tables = f"{markdown(metric_table(report))}\n\n{markdown(arm_table(report))}"
    print(f"\n{report.plan.question}\n{answer(report)}\n\n{tables}\n")
    written = {
        "html": ablation_pages.as_html(report),
        "md": ablation_pages.as_markdown(report),
        "csv": ablation_pages.as_csv(report),
        "tex": ablation_pages.as_latex(report),
        "json": json.dumps(plain(as_document(report)), indent=2, ensure_ascii=False) + "\n",
    }
    for ending, content in written.items():
        write_text(folder / f"report.{ending}", content)
    if (figure := overview_figure(report)) is not None:
        with atomic_path(folder / "report.png") as staging:
            figure.savefig(staging, dpi=130)
    print(f"written: {folder / 'report'}.html, .md, .csv, .tex, .json, .png")
