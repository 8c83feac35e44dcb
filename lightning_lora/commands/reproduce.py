"""``main.py reproduce``: runs the frozen list of the README's tables; says which figures differ from the stored ones.

The list (``configs/reproduce.yaml``) has two parts, ``tables`` and ``smoke``. An entry:

    quickstart:
      says: what the table is about
      data: {ag_news: what has to be given as --data ag_news=FOLDER}      # may be left out
      commands: ["fit --name run --logs_dir {logs}", "test --run {logs}/run"]
      figures:
        run:                                                             # a run's folder under {logs}
          costs.trainable_params: {is: 332546, within: 0}
          evaluations.test.after.accuracy: {is: 0.836, within: [0.812, 0.858]}
          costs.train_s: {is: 70, within: null}                          # shown, never judged

Its runs lie in a folder of their own for each state of code, data and commands, where the same command goes on.
"""

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lora.artifacts.runs import RunFolder, commit, folder_name, now, processor, versions
from lightning_lora.commands.children import run_child
from lightning_lora.commands.config_files import read_config
from lightning_lora.commands.options import OptionParser
from lightning_lora.errors import UserError
from lightning_lora.files import locked_folder, write_text
from lightning_lora.reports.reproduction import DIFFERING, Compared, Figure, look_up, summary, table
from lightning_lora.reports.tables import duration, markdown

PROJECT = Path(__file__).parents[2]
FROZEN = PROJECT / "configs" / "reproduce.yaml"
#: Commands that an entry may use: those that leave records, and do nothing twice.
ALLOWED = ("fit", "validate", "test", "compare", "ablate")
_KEYS = ("says", "data", "commands", "figures")


@dataclass(frozen=True)
class Entry:
    """One table of the list.

    Args:
        name: Its name.
        says: What it is about.
        data: What has to be given, by the name of each placeholder.
        commands: The words of each command, with placeholders.
        figures: What was stored.
    """

    name: str
    says: str
    data: dict[str, str]
    commands: list[list[str]]
    figures: list[Figure]


def run(words: list[str]) -> int:
    """Runs what is missing of each table and compares; 1 if a figure differs or a command failed."""
    options = _parser().parse_args(words)
    given = _given(options.data or [])
    entries = read_list(Path(options.list), "smoke" if options.smoke else "tables", options.only)
    if unknown := sorted(set(given) - {name for entry in entries for name in entry.data}):
        raise UserError(f"--data: no table of these needs '{unknown[0]}'")
    name = folder_name(options.name) if options.name else f"reproduce-{'smoke' if options.smoke else 'tables'}"
    folder = Path(options.logs_dir) / name
    if any((folder / file).exists() for file in ("run.json", "config.yaml", "ablation.json", "comparison.json")):
        raise UserError(f"--name: {folder} is the folder of something else; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    compared: list[Compared] = []
    notes: list[str] = []
    failed = False
    with locked_folder(folder, f"another process works in {folder}; wait for it, or choose another --name"):
        for number, entry in enumerate(entries, 1):
            print(f"== table {number} of {len(entries)}: {entry.name} ({entry.says})", flush=True)
            if lacking := [need for need in entry.data if need not in given]:
                what = "; ".join(f"give --data {need}=FOLDER ({entry.data[need]})" for need in lacking)
                notes.append(f"{entry.name}: skipped; {what}")
                print(notes[-1], flush=True)
                continue
            logs = folder / f"{entry.name}-{_key(entry, given)}"
            if said := run_entry(entry, logs, given):
                failed = True
                notes.append(f"{entry.name}: {said}")
                print(notes[-1], file=sys.stderr, flush=True)
            compared += compare(entry, logs)
        write(folder, words, compared, notes)
    return int(failed or any(each.verdict in DIFFERING for each in compared))


def run_entry(entry: Entry, logs: Path, given: Mapping[str, Path]) -> str:
    """Runs those of its commands that are not done; gives what went wrong, or nothing."""
    logs.mkdir(parents=True, exist_ok=True)
    output = logs / "output.txt"
    for number, template in enumerate(entry.commands, 1):
        words = what_is_left(filled(template, logs, given))
        shown = f"{number} of {len(entry.commands)}: main.py {' '.join(template)}"
        if words is None:
            print(f"{shown}: done already", flush=True)
            continue
        print(f"{shown} (it writes to {output})", flush=True)
        started = time.perf_counter()
        if status := run_child([words], output):
            faults = [
                line[7:] for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")
            ]
            return f"command {number} ended with status {status}: {faults[-1] if faults else f'see {output}'}"
        print(f"  {duration(time.perf_counter() - started)}", flush=True)
    return ""


def what_is_left(words: list[str]) -> list[str] | None:
    """The words that do what is missing of a command; None where nothing is."""
    if words[0] == "fit":
        place = Path(_option(words, "--logs_dir")) / _option(words, "--name")
        status = RunFolder(place).read().get("status") if (place / "run.json").is_file() else None
        if status == "finished":
            return None
        return ["fit", "--resume", str(place)] if (place / "config.yaml").is_file() else words
    if words[0] in ("test", "validate"):
        record = Path(_option(words, "--run")) / "run.json"
        name = "test" if words[0] == "test" else "val"
        return None if record.is_file() and name in RunFolder(record.parent).read().get("evaluations", {}) else words
    return words  # does only what is missing itself


def filled(template: Sequence[str], logs: Path, given: Mapping[str, Path]) -> list[str]:
    """The words with folders for their placeholders."""
    values = {"logs": logs, "project": PROJECT, **given}
    return [re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), word) for word in template]


def compare(entry: Entry, logs: Path) -> list[Compared]:
    """Each figure of an entry with its value now."""
    found = []
    for figure in entry.figures:
        place = logs / figure.run
        record = RunFolder(place).read() if (place / "run.json").is_file() else {}
        found.append(Compared(entry.name, figure, look_up(record, figure.path)))
    return found


def write(folder: Path, words: Sequence[str], compared: Sequence[Compared], notes: Sequence[str]) -> None:
    """Writes ``reproduce.md`` and ``.json``, and prints the table and what differs."""
    command = shlex.join(["python", "main.py", "reproduce", *words])
    code, machine = commit(), processor()
    facts = [f"command: {command}", f"machine: {machine}", f"code: {str(code['commit'])[:12]}, dirty: {code['dirty']}"]
    facts.append(f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}")
    said = [*notes, *summary(compared)]
    shown = markdown(table(compared)) if compared else "No table was run."
    listed = "\n".join(f"- {line}" for line in [*said, *facts])
    write_text(folder / "reproduce.md", f"# {folder.name}\n\n{shown}\n\n{listed}\n")
    rows = [
        {"table": c.table, **asdict(c.figure), "now": c.now, "difference": c.difference, "verdict": c.verdict}
        for c in compared
    ]
    document = {"format": 1, "written": now(), "command": command, "machine": machine, "code": code}
    document |= {"versions": versions(), "notes": list(notes), "figures": rows}
    write_text(folder / "reproduce.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print("\n".join(["", shown, "", *said, f"written: {folder / 'reproduce'}.md, .json"]))


def read_list(path: Path, part: str, only: Sequence[str] | None) -> list[Entry]:
    """The entries of a part of the list, all or those that are named.

    Raises:
        UserError: It cannot be read, or an entry is not as it should be.
    """
    content = read_config(path).get(part)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: {part}: a mapping of each table's name to its entry is needed")
    entries = [_entry(folder_name(str(name), str(path)), described, path) for name, described in content.items()]
    if unknown := sorted(set(only or ()) - {entry.name for entry in entries}):
        raise UserError(f"--only: no table '{unknown[0]}'; there are {', '.join(entry.name for entry in entries)}")
    return [entry for entry in entries if only is None or entry.name in only]


def _entry(name: str, described: Any, path: Path) -> Entry:
    """One entry, checked."""

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(f"{path}: {name}: {message}")

    need(isinstance(described, dict) and not set(described) - set(_KEYS), f"an entry has {', '.join(_KEYS)}")
    data, commands, figures = described.get("data") or {}, described.get("commands"), described.get("figures")
    need(isinstance(data, dict), "data: what has to be given, by name")
    need(isinstance(commands, list) and bool(commands), "commands: a list is needed")
    need(isinstance(figures, dict) and bool(figures), "figures: figures of each run are needed")
    words = [shlex.split(str(command)) for command in commands]
    for command in words:
        need(bool(command) and command[0] in ALLOWED, f"commands: one of {', '.join(ALLOWED)} is needed")
        required = {"fit": ("--name", "--logs_dir"), "test": ("--run",), "validate": ("--run",)}.get(command[0], ())
        need(set(required) <= set(command), f"commands: {command[0]} needs {' and '.join(required)}")
        for placeholder in re.findall(r"\{(\w+)\}", " ".join(command)):
            need(placeholder in ("logs", "project", *data), f"commands: nothing is known of {{{placeholder}}}")
    found = []
    for run_name, each in figures.items():
        need(isinstance(each, dict), f"figures: {run_name}: a mapping of paths to figures is needed")
        for key, figure in each.items():
            where = f"figures: {run_name}: {key}"
            need(isinstance(figure, dict) and set(figure) == {"is", "within"}, f"{where}: 'is' and 'within' are needed")
            stored, within = figure["is"], figure["within"]
            bounds = within if isinstance(within, list) else [] if within is None else [within]
            numbers = all(isinstance(value, int | float) for value in [stored, *bounds])
            need(numbers and (not isinstance(within, list) or len(within) == 2), f"{where}: numbers are needed")
            found.append(Figure(str(run_name), str(key), stored, tuple(bounds) if isinstance(within, list) else within))
    return Entry(name, str(described.get("says", "")), {str(k): str(v) for k, v in data.items()}, words, found)


def _key(entry: Entry, given: Mapping[str, Path]) -> str:
    """Of all that the runs depend on; of the data the place, and sizes and times of its files."""
    data = {}
    for name in entry.data:
        files = [given[name]] if given[name].is_file() else sorted(p for p in given[name].rglob("*") if p.is_file())
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        data[name] = [str(given[name].resolve()), stamps]
    state = json.dumps([entry.commands, data, commit()["fingerprint"], versions()], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:8]


def _given(pairs: Sequence[str]) -> dict[str, Path]:
    given = {}
    for pair in pairs:
        name, sign, place = pair.partition("=")
        if not sign or not Path(place).exists():
            raise UserError(f"--data: NAME=FOLDER with a folder that is there is needed, got '{pair}'")
        given[name] = Path(place).resolve()
    return given


def _option(words: Sequence[str], option: str) -> str:
    return words[list(words).index(option) + 1]


def _parser() -> OptionParser:
    parser = OptionParser(
        "reproduce",
        description="Runs a frozen list of the README's tables and says which figures differ from the stored ones, and "
        "by how much. The same command again goes on. Status 1 if a figure differs.",
    )
    parser.add_argument("--smoke", action="store_true", help="A reduced table that takes minutes.")
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="These tables only.")
    parser.add_argument(
        "--data", nargs="+", metavar="NAME=FOLDER", help="Data that tables need; the others are skipped."
    )
    parser.add_argument("--list", default=str(FROZEN), help="The list; by default the project's own.")
    parser.add_argument("--name", help="The folder under --logs_dir; by default reproduce-tables or reproduce-smoke.")
    parser.add_argument("--logs_dir", default="logs", help="The folder of all runs.")
    return parser
