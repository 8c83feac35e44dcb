"""Run the commands behind the README's tables again and report which figures differ from the stored ones.

    python benchmarks/reproduce.py --smoke                                                # minutes
    python benchmarks/reproduce.py --data ag_news=FOLDER imdb=FOLDER --only ag_news_arms

``reproduce.yaml`` holds, for each table, its commands, the data that has to be given, and the figures by their path
in each run's record: ``{is: 0.836, within: [0.812, 0.858]}``, ``within: 0.01`` for a distance, or ``within: null`` for
what depends on the machine and is shown only. Finished commands are not run again; the exit status is 1 if a figure
differs or is missing.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
TABLES = Path(__file__).with_suffix(".yaml")
HEADER = ("table", "run", "figure", "stored", "now", "same if", "verdict")


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing of each table, print the comparison, and write it as Markdown."""
    options = _parser().parse_args(words)
    given = {name: Path(place).resolve() for name, _, place in (pair.partition("=") for pair in options.data)}
    if wrong := [name for name, place in given.items() if not place.exists()]:
        sys.exit(f"error: --data: {wrong[0]}={given[wrong[0]]} does not exist; give NAME=FOLDER")
    tables = yaml.safe_load(Path(options.list).read_text())["smoke" if options.smoke else "tables"]
    if unknown := sorted(set(options.only or ()) - set(tables)):
        sys.exit(f"error: --only: no table '{unknown[0]}'; there are {', '.join(tables)}")
    rows, failed = [], False
    for name, table in tables.items():
        lacking = set(table.get("data") or {}) - set(given)
        if (options.only and name not in options.only) or lacking:
            for need in lacking if not options.only or name in options.only else ():
                print(f"{name}: skipped; give --data {need}=FOLDER ({table['data'][need]})")
            continue
        logs = Path(options.logs_dir) / name
        print(f"{name}: {table['says']}", flush=True)
        failed |= not all(run_command(command, logs, given) for command in table["commands"])
        rows += compare(name, table["figures"], logs)
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    differing = sum(row[-1] in ("differs", "missing") for row in rows)
    print(f"\n{text}\n\n{differing} of {len(rows)} figures differ or are missing")
    Path(options.logs_dir).mkdir(parents=True, exist_ok=True)
    (Path(options.logs_dir) / "reproduce.md").write_text(f"{text}\n", encoding="utf-8")
    return int(failed or differing > 0)


def run_command(template: str, logs: Path, given: Mapping[str, Path]) -> bool:
    """Run a command of ``main.py`` unless its result exists; False if it failed.

    Args:
        template: Its words, with {logs}, {project} and the names of data as placeholders.
        logs: The folder of the table's runs.
        given: The folder of each data set.
    """
    values = {"logs": logs, "project": PROJECT, **given}
    words = shlex.split(re.sub(r"\{(\w+)\}", lambda found: shlex.quote(str(values[found[1]])), template))
    if words[0] in ("fit", "test"):  # compare and ablate do only what is missing by themselves
        place = logs / words[words.index("--name") + 1] if words[0] == "fit" else Path(words[words.index("--run") + 1])
        record = json.loads((place / "run.json").read_text()) if (place / "run.json").is_file() else {}
        if record.get("status") == "finished" if words[0] == "fit" else "test" in record.get("evaluations", {}):
            return True
        if words[0] == "fit" and (place / "config.yaml").is_file():
            words = ["fit", "--resume", str(place)]
    print(f"$ python main.py {shlex.join(words)}", flush=True)
    return subprocess.run([sys.executable, str(PROJECT / "main.py"), *words], check=False).returncode == 0


def compare(table: str, figures: Mapping[str, Mapping[str, Any]], logs: Path) -> list[list[str]]:
    """A row of ``HEADER`` for each stored figure of a table."""
    rows = []
    for run, stored in figures.items():
        path = logs / run / "run.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for key, figure in stored.items():
            now, within = look_up(record, key), figure["within"]
            shown = "-" if now is None else f"{now:.6g}"
            verdict = judge(figure["is"], within, now)
            rows.append([table, run, key, f"{figure['is']:.6g}", shown, _allowed(within), verdict])
    return rows


def judge(stored: float, within: float | Sequence[float] | None, now: float | None) -> str:
    """Return "same", "differs", "missing", or "shown" where a figure is not judged."""
    if now is None:
        return "missing"
    if within is None:
        return "shown"
    low, high = within if isinstance(within, Sequence) else (stored - within, stored + within)
    room = 1e-9 * max(1.0, abs(stored))  # what decimal numbers lose as binary ones
    return "same" if low - room <= now <= high + room else "differs"


def look_up(record: Mapping[str, Any], path: str) -> float | None:
    """Return a number of a run record by its keys joined by dots, which keys may themselves hold."""
    value = record.get(path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    for key, inner in record.items():
        inside = path.startswith(f"{key}.") and isinstance(inner, Mapping)
        if inside and (found := look_up(inner, path[len(key) + 1 :])) is not None:
            return found
    return None


def _allowed(within: float | Sequence[float] | None) -> str:
    if within is None:
        return "not judged"
    return f"{within[0]:g} to {within[1]:g}" if isinstance(within, Sequence) else f"± {within:g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="A reduced table that takes minutes.")
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="Run these tables only.")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="Data that tables need.")
    parser.add_argument("--list", default=str(TABLES), help="Another list of tables.")
    parser.add_argument("--logs_dir", default="logs/reproduce", help="The folder of the runs.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
