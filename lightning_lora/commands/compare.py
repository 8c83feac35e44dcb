"""``main.py compare``: arms trained and tested on the same rows, in the same order, from the same head; one table.

Each arm is a run of its own, made by ``fit`` and ``test`` in a process of its own (so that its peak memory
is its own), under ``logs/NAME/ARM``. What is finished is not done again.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from lightning_lora.artifacts.runs import RunFolder, folder_name, now
from lightning_lora.commands.configured import DEFAULT_CONFIG, ConfiguredRun
from lightning_lora.errors import UserError
from lightning_lora.evaluation.intervals import METRICS, RowSums, difference_interval
from lightning_lora.files import atomic_path, write_text
from lightning_lora.models.methods import METHODS
from lightning_lora.reports import comparison as report
from lightning_lora.reports.tables import duration

DEFAULT_ARMS = ("none", "head", "lora", "full")
#: What may follow a method's name after a hyphen, and the setting that it means.
STORED: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "nf4": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4"},
}
ARMS_KEY = "arms"


def run(words: list[str]) -> int:
    """Runs what is missing of the arms and writes the tables; 1 if an arm failed."""
    options, overrides = _parser().parse_known_args(words)
    config_path = Path(options.config) if options.config else DEFAULT_CONFIG
    base = _read_config(config_path)
    arms = choose_arms(options.arms, base.pop(ARMS_KEY, None))
    settings = {name: resolve(base, overrides, change) for name, change in arms.items()}  # before anything is run
    logs_dir = Path(options.logs_dir)
    name = folder_name(options.name) if options.name else f"compare-{config_path.stem}-{_key(settings)}"
    folder = logs_dir / name
    if (folder / "config.yaml").exists():
        raise UserError(f"--name: {folder} is the folder of a run; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"comparison: {folder}\narms: {', '.join(arms)}")
    started = time.perf_counter()
    ran = 0
    failed: dict[str, str] = {}
    for number, (arm, resolved) in enumerate(settings.items(), 1):
        print(f"\n== arm {number} of {len(settings)}: {arm}{_time_left(started, ran, len(settings) - number + 1)}")
        try:
            ran += run_arm(folder, arm, resolved)
        except ArmError as error:
            failed[arm] = str(error)
            print(f"arm {arm} failed: {error}", file=sys.stderr)
    results = gather(folder, list(settings), failed)
    write_reports(folder, name, results, ["python", "main.py", "compare", *words])
    return 1 if failed else 0


class ArmError(Exception):
    """An arm could not be run; the others go on."""


def choose_arms(names: Sequence[str] | None, described: Any) -> dict[str, dict[str, Any]]:
    """The settings in which each arm differs from the config, by name.

    Args:
        names: Of the command line: keys of ``described``, or METHOD, METHOD-int8, METHOD-nf4, METHOD-fp4;
            None means all that are described, or else ``DEFAULT_ARMS``.
        described: The config's ``arms``: a mapping of names to settings.

    Raises:
        UserError: A name is none of these, or stands there twice.
    """
    described = {} if described is None else described
    if not isinstance(described, dict) or not all(isinstance(v or {}, dict) for v in described.values()):
        raise UserError(f"{ARMS_KEY}: a mapping of each arm's name to its settings is needed")
    wanted = list(names or described or DEFAULT_ARMS)
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--arms: '{next(n for n in wanted if wanted.count(n) > 1)}' stands there twice")
    arms = {}
    for name in wanted:
        method, _, stored = name.partition("-")
        if name in described:
            arms[folder_name(name)] = described[name] or {}
        elif method in METHODS and (not stored or stored in STORED):
            change: dict[str, Any] = {"method": method}
            arms[name] = {"model": change | ({"quantization": STORED[stored]} if stored else {})}
        else:
            raise UserError(
                f"--arms: no arm '{name}'; there are {', '.join([*described, *METHODS])}, and a method followed by "
                f"-{', -'.join(STORED)}"
            )
    return arms


def resolve(base: dict[str, Any], overrides: Sequence[str], change: dict[str, Any]) -> dict[str, Any]:
    """All settings of an arm: the config, the command line's, the arm's own, each winning over those before.

    Raises:
        UserError: They cannot be parsed.
    """
    with tempfile.TemporaryDirectory() as directory:
        first, last = Path(directory) / "config.yaml", Path(directory) / "arm.yaml"
        first.write_text(yaml.safe_dump(base))
        last.write_text(yaml.safe_dump(change))
        return ConfiguredRun("fit", ["--config", str(first), *overrides, "--config", str(last)]).settings()


def run_arm(folder: Path, arm: str, settings: dict[str, Any]) -> int:
    """Fits and tests an arm unless that is done; gives how much there was to do, from 0 to 1.

    Raises:
        ArmError: A command failed; its own message has been printed.
        UserError: The arm's folder holds a run with other settings.
    """
    path = folder / arm
    ran = 0
    if path.exists() and not _finished(path):
        _move_aside(path)
    test = ["test", "--run", str(path), "--before", "false"]
    if not path.exists():
        config = folder / f"{arm}.yaml"
        write_text(config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        fit = ["fit", "--config", str(config), "--logs_dir", str(folder), "--name", arm]
        if status := run_commands(fit, test):
            raise ArmError(_reason(path, status))
        ran += 1
    else:
        done = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        if different := [key for key in {*done, *settings} if done.get(key) != settings.get(key)]:
            raise UserError(
                f"{path} was made with other settings ({', '.join(sorted(different))}); choose another --name"
            )
        print(f"{path}: trained already")
    if "test" not in RunFolder(path).read().get("evaluations", {}):
        if status := run_commands(test):
            raise ArmError(_reason(path, status))
        ran += 1
    return ran


#: Runs commands one after another, each given as JSON, until one fails.
_STARTER = """
import json, sys
from lightning_lora.cli import main
for command in map(json.loads, sys.argv[1:]):
    status = main(command)
    if status:
        sys.exit(status)
"""


def run_commands(*commands: list[str]) -> int:
    """Runs commands of this program in one process of their own; gives the exit status of the first that failed.

    Raises:
        KeyboardInterrupt: It was interrupted.
    """
    here = str(Path(__file__).parents[2])  # also where the package is not installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    words = [sys.executable, "-c", _STARTER, *map(json.dumps, commands)]
    status = subprocess.run(words, check=False, env=environment).returncode
    if status in (130, -2):
        raise KeyboardInterrupt
    return status


def gather(folder: Path, names: Sequence[str], failed: dict[str, str]) -> list[dict[str, Any]]:
    """What each arm came to, with which arms cannot be told from the best.

    Raises:
        UserError: Arms were tested on different rows.
    """
    arms: list[dict[str, Any]] = []
    sums: dict[str, RowSums] = {}
    fingerprints = set()
    for name in names:
        if name in failed:
            arms.append({"name": name, "status": failed[name], "metrics": {}, "costs": {}})
            continue
        record = RunFolder(folder / name).read()
        test = record["evaluations"]["test"]
        fingerprints.add(test["fingerprint"])
        rows = pq.read_table(folder / name / "predictions" / "test.parquet")
        labels = record["data"]["label_names"]
        logits = np.stack([rows.column(f"logit({label})").to_numpy() for label in labels], axis=1)
        truth = np.array([labels.index(label) for label in rows.column("label").to_pylist()])
        sums[name] = RowSums(logits, truth)
        arms.append(
            {
                "name": name,
                "status": "finished",
                "metrics": test["after"],
                "intervals": test["after_interval"],
                "costs": record["costs"],
                "rows": test["rows"],
                "train_rows": record["data"]["splits"]["train"]["rows"],
                "seed": record["seed"],
                "learning_rate": record["model"]["learning_rate"],
                "code": record["code"],
                "machine": record["machine"],
                "fingerprint": test["fingerprint"],
                "train_fingerprint": record["data"]["splits"]["train"]["fingerprint"],
                "ties": {},
            }
        )
    if len(fingerprints) > 1:
        raise UserError(
            f"{folder}: the arms were tested on different rows (the source has changed); use another --name"
        )
    finished = [arm for arm in arms if arm["status"] == "finished"]
    for column in report.COLUMNS:
        if column.key in METRICS and (best := report.best_arm(finished, column)):
            for arm in finished:
                if arm is not best:
                    low, high = difference_interval(sums[arm["name"]], sums[best["name"]], column.key)
                    arm["ties"][column.key] = low <= 0 <= high
    return arms


def write_reports(folder: Path, name: str, arms: list[dict[str, Any]], command: list[str]) -> None:
    """Writes the comparison as Markdown, CSV, JSON and a picture, and prints it."""
    facts = [f"command: `{' '.join(command)}`"]
    finished = [arm for arm in arms if arm["status"] == "finished"]
    title = name
    if finished:
        first = finished[0]
        title = f"{name}: {first['train_rows']:,} rows to train, {first['rows']:,} to test, seed {first['seed']}"
        machine = first["machine"]
        facts.append(f"machine: {machine['cores']} cores, {machine['processor']}")
        rates = ", ".join(f"{a['name']} {a['learning_rate']:g}" for a in finished if a["learning_rate"])
        facts.append(f"learning rates: {rates}")
        if len({arm["train_fingerprint"] for arm in finished}) > 1:
            facts.append("careful: the arms were trained on different rows")
        if len({json.dumps(arm["code"]) for arm in finished}) > 1:
            facts.append("careful: the code changed between arms (see `code` in comparison.json)")
        with atomic_path(folder / "comparison.png") as staging:
            report.write_picture(staging, title, finished)
    write_text(folder / "comparison.md", report.markdown_page(title, arms, facts))
    write_text(folder / "comparison.csv", report.as_csv(arms))
    document = {"name": name, "written": now(), "command": command, "arms": arms}
    write_text(folder / "comparison.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print()
    report.print_comparison(title, arms)
    print(f"\nwritten: {folder / 'comparison'}.md, .csv, .json, .png (each arm's run is in a folder beside them)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py compare",
        allow_abbrev=False,
        description="Trains and tests several arms on the same rows and puts them into one table. A second call "
        "finishes what is missing. Every other option is one of fit's, for all arms.",
    )
    parser.add_argument("-c", "--config", help="As for fit; may hold 'arms': each name with its settings.")
    parser.add_argument(
        "--arms",
        nargs="+",
        help="Arms of the config, or METHOD, METHOD-int8, METHOD-nf4, METHOD-fp4 with a method of "
        f"{', '.join(METHODS)}; by default those of the config, or {' '.join(DEFAULT_ARMS)}.",
    )
    parser.add_argument("--name", help="The folder under --logs_dir; by default made from the settings.")
    parser.add_argument("--logs_dir", default="logs", help="The folder of all runs.")
    parser.error = _refuse  # type: ignore[method-assign,assignment]
    return parser


def _refuse(message: str) -> None:
    raise UserError(message)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path} ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise UserError(f"--config: {path} holds no settings")
    return config


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _finished(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.record.is_file() and folder.read().get("status") == "finished"


def _move_aside(path: Path) -> None:
    """Nothing of an unfinished run is thrown away: it may say why it did not finish."""
    number = 1
    while (target := path.with_name(f"{path.name}.unfinished-{number}")).exists():
        number += 1
    path.rename(target)
    print(f"{path} was not finished: moved to {target.name}")


def _reason(path: Path, status: int) -> str:
    folder = RunFolder(path)
    error = folder.read().get("error") if folder.record.is_file() else None
    return error or f"ended with status {status}, without a reason in its record"


def _time_left(started: float, ran: int, left: int) -> str:
    if not ran:
        return ""
    # Arms differ, so this is no more than a first idea.
    return f" (about {duration((time.perf_counter() - started) / ran * left)} left)"
