"""``main.py compare``: arms trained and tested on the same rows, in the same order, from the same head; one table.

Each arm is a run of its own, made by ``fit`` and ``test`` in a process of its own (so that its peak memory
is its own), under ``logs/NAME/ARM``. What is finished is not done again.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from lightning_lora.artifacts.runs import RunFolder, folder_name, now
from lightning_lora.commands.arms import ARMS_KEY, DEFAULT_ARMS, choose_arms, resolve_arms
from lightning_lora.commands.config_files import read_config
from lightning_lora.commands.configured import DEFAULT_CONFIG, flat
from lightning_lora.commands.options import OptionParser
from lightning_lora.data.augment import Augmentation
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError
from lightning_lora.evaluation.intervals import RowSums, difference_interval
from lightning_lora.files import atomic_path, write_text
from lightning_lora.models.methods import METHODS
from lightning_lora.reports import comparison as report
from lightning_lora.reports.tables import duration


def run(words: list[str]) -> int:
    """Runs what is missing of the arms and writes the tables; 1 if an arm failed."""
    options, overrides = _parser().parse_known_args(words)
    paths = [Path(each) for each in options.config or [DEFAULT_CONFIG]]
    configs = [read_config(path) for path in paths]
    described = [config.pop(ARMS_KEY) for config in configs if ARMS_KEY in config]
    arms = choose_arms(options.arms, described[-1] if described else None)
    settings = resolve_arms(configs, overrides, arms)  # all of them before any is run
    name = folder_name(options.name) if options.name else f"compare-{paths[-1].stem}-{_key(configs, overrides)}"
    folder = Path(options.logs_dir) / name
    if (folder / "config.yaml").exists():
        raise UserError(f"--name: {folder} is the folder of a run; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    with _only_here(folder) as lock:
        print(f"comparison: {folder}\narms: {', '.join(arms)}")
        failed = run_arms(folder, settings, lock)
        names = [*_earlier(folder, list(settings)), *settings]
        write_reports(folder, gather(folder, names, failed), ["python", "main.py", "compare", *words])
    return 1 if failed else 0


class ArmError(Exception):
    """An arm could not be run; the others go on."""


def run_arms(folder: Path, settings: Mapping[str, dict[str, Any]], lock: int | None) -> dict[str, str]:
    """Runs what is missing; gives the reason of each arm that failed."""
    started = time.perf_counter()
    ran = 0
    failed: dict[str, str] = {}
    if any(not (folder / arm).exists() for arm in settings):
        prepare_data(list(settings.values()))
    for number, (arm, resolved) in enumerate(settings.items(), 1):
        print(f"\n== arm {number} of {len(settings)}: {arm}{_time_left(started, ran, len(settings) - number + 1)}")
        try:
            ran += run_arm(folder, arm, resolved, lock)
        except ArmError as error:
            failed[arm] = str(error)
            print(f"arm {arm} failed: {error}", file=sys.stderr)
    return failed


def prepare_data(settings: Sequence[dict[str, Any]]) -> None:
    """Reads, splits and tokenizes once, so that no arm's memory or time holds it.

    What is wrong with an arm's data is said by the arm.
    """
    done: list[Any] = []
    for each in settings:
        data = {**each["data"], "base_model": each["model"]["base_model"]}
        if data in done:
            continue
        done.append(data)
        try:
            module = TextDataModule(**{**data, "augmentation": Augmentation(**data["augmentation"])})
            module.setup("fit")
            module.setup("test")
        except UserError:
            continue


def run_arm(folder: Path, arm: str, settings: dict[str, Any], lock: int | None = None) -> int:
    """Fits and tests an arm unless that is done; gives whether there was anything to do, 0 or 1.

    Raises:
        ArmError: A command failed; its own message has been printed.
        UserError: The arm's folder holds a run with other settings.
    """
    path = folder / arm
    different = _different(path, settings) if (path / "config.yaml").is_file() else []
    interrupted = path.exists() and not _finished(path)
    # What failed is tried afresh, as what made it fail may have been mended.
    goes_on = interrupted and not different and _status(path) in ("running", "interrupted")
    if interrupted and not goes_on:
        _move_aside(path)
    test = ["test", "--run", str(path), "--before", "false"]
    commands = [test]
    config = folder / f".{arm}.yaml"
    if goes_on:
        commands.insert(0, ["fit", "--resume", str(path)])
    elif not path.exists():
        write_text(config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        commands.insert(0, ["fit", "--config", str(config), "--logs_dir", str(folder), "--name", arm])
    else:
        if different:
            raise UserError(f"{path} was made with other settings ({', '.join(different)}); choose another --name")
        print(f"{path}: trained already")
        if "test" in RunFolder(path).read().get("evaluations", {}):
            return 0
    try:
        if status := run_commands(*commands, lock=lock):
            raise ArmError(_reason(path, status))
    finally:
        config.unlink(missing_ok=True)
    return 1


#: Seconds that an interrupted arm has to write its record before it is interrupted again.
_PATIENCE_S = 30
#: Runs commands one after another, each given as JSON, until one fails.
_STARTER = """
import json, sys
from lightning_lora.cli import main
for command in map(json.loads, sys.argv[1:]):
    status = main(command)
    if status:
        sys.exit(status)
"""


def run_commands(*commands: list[str], lock: int | None = None) -> int:
    """Runs commands of this program in one process of their own; gives the exit status of the first that failed.

    Args:
        commands: The words of each.
        lock: A file that the process holds open too: should this one be killed, the lock stays until the
            other ends.

    Raises:
        KeyboardInterrupt: It was interrupted; the process has ended by itself and left its record.
    """
    here = str(Path(__file__).parents[2])  # also where the package is not installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    words = [sys.executable, "-c", _STARTER, *map(json.dumps, commands)]
    process = subprocess.Popen(words, env=environment, pass_fds=() if lock is None else (lock,))
    try:
        status = process.wait()
    except BaseException as error:
        # Ctrl-C reaches the process by itself; anything else that ends this one has to be passed on.
        if not isinstance(error, KeyboardInterrupt):
            process.send_signal(signal.SIGTERM)
        while True:
            try:
                process.wait(timeout=_PATIENCE_S)
                raise
            except subprocess.TimeoutExpired:
                # Python drops an interrupt that arrives inside a callback which cannot raise (a finalizer, say).
                process.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return status


def gather(folder: Path, names: Sequence[str], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """What each arm came to, with which arms cannot be told from the best.

    Raises:
        UserError: Arms were tested on different rows, or learnt from different ones by the same settings.
    """
    arms: list[dict[str, Any]] = []
    sums: dict[str, RowSums] = {}
    for name in names:
        if name in failed:
            arms.append({"name": name, "status": failed[name], "metrics": {}, "costs": {}})
            continue
        record = RunFolder(folder / name).read()
        test = record["evaluations"]["test"]
        rows = pq.read_table(folder / name / "predictions" / "test.parquet")
        labels = record["data"]["label_names"]
        logits = np.stack([rows.column(f"logit({label})").to_numpy() for label in labels], axis=1)
        truth = np.array([labels.index(label) for label in rows.column("label").to_pylist()])
        sums[name] = RowSums(logits, truth)
        splits = record["data"]["splits"]
        arms.append(
            {
                "name": name,
                "status": "finished",
                "metrics": test["after"],
                "intervals": test.get("after_interval", {}),
                "costs": record["costs"],
                "rows": test["rows"],
                "train_rows": splits["train"]["rows"],
                "seed": record["seed"],
                "learning_rate": record["model"]["learning_rate"],
                "code": record["code"],
                "machine": record["machine"],
                "fingerprints": {"test": test["fingerprint"]}
                | {split: splits[split]["fingerprint"] for split in ("train", "val")},
                "data": record["config"]["data"],
                "ties": {},
            }
        )
    finished = [arm for arm in arms if arm["status"] == "finished"]
    for arm in finished[1:]:
        first = finished[0]
        same_settings = arm["data"] == first["data"]
        for split, fingerprint in arm["fingerprints"].items():
            if fingerprint != first["fingerprints"][split] and (split == "test" or same_settings):
                raise UserError(
                    f"{folder}: arms {first['name']} and {arm['name']} have different {split} rows (the source has "
                    "changed, or an arm's settings change it); use another --name"
                )
    for column in report.COLUMNS:
        if column.is_metric and (best := report.best_arm(finished, column)):
            for arm in finished:
                if arm is not best:
                    low, high = difference_interval(sums[arm["name"]], sums[best["name"]], column.key)
                    arm["ties"][column.key] = low <= 0 <= high
    return arms


def write_reports(folder: Path, arms: list[dict[str, Any]], command: list[str]) -> None:
    """Writes the comparison as Markdown, CSV, JSON and a picture, and prints it."""
    facts = [f"command: `{shlex.join(command)}`"]
    finished = [arm for arm in arms if arm["status"] == "finished"]
    title = folder.name
    if finished:
        first = finished[0]
        title += f": {first['train_rows']:,} rows to train, {first['rows']:,} to test, seed {first['seed']}"
        facts.append(f"machine: {first['machine']['cores']} cores, {first['machine']['processor']}")
        rates = ", ".join(f"{a['name']} {a['learning_rate']:g}" for a in finished if a["learning_rate"])
        facts.append(f"learning rates: {rates}")
        facts += [
            f"careful: {what} (see comparison.json)"
            for what, values in (
                ("the code changed between arms", [arm["code"] for arm in finished]),
                ("arms ran on different machines", [arm["machine"] for arm in finished]),
                ("arms were trained on different rows", [arm["fingerprints"]["train"] for arm in finished]),
                ("arms have different seeds", [arm["seed"] for arm in finished]),
            )
            if any(value != values[0] for value in values)
        ]
        with atomic_path(folder / "comparison.png") as staging:
            report.write_picture(staging, title, finished)
    write_text(folder / "comparison.md", report.markdown_page(title, arms, facts))
    write_text(folder / "comparison.csv", report.as_csv(arms))
    document = {"name": folder.name, "written": now(), "command": command, "arms": arms}
    write_text(folder / "comparison.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print()
    report.print_comparison(title, arms, facts[1:])
    print(f"\nwritten: {folder / 'comparison'}.md, .csv, .json, .png (each arm's run is in a folder beside them)")


def _parser() -> OptionParser:
    parser = OptionParser(
        "compare",
        description="Trains and tests several arms on the same rows and puts them into one table. A second call "
        "finishes what is missing. Every other option is one of fit's, for all arms; it wins over an arm's own.",
    )
    described = "As for fit, and as often; may hold 'arms': each name with its settings."
    parser.add_argument("-c", "--config", action="append", help=described)
    parser.add_argument(
        "--arms",
        nargs="+",
        help="Arms of the config, or METHOD, METHOD-int8, METHOD-nf4, METHOD-fp4 with a method of "
        f"{', '.join(METHODS)}; by default those of the config, or {' '.join(DEFAULT_ARMS)}.",
    )
    parser.add_argument("--name", help="The folder under --logs_dir; by default made from the settings.")
    parser.add_argument("--logs_dir", default="logs", help="The folder of all runs.")
    return parser


def _key(configs: Sequence[dict[str, Any]], overrides: Sequence[str]) -> str:
    """Of what all arms share, so that a call with one arm more finds those that are done."""
    shared = json.dumps([*configs, list(overrides)], sort_keys=True, default=str)
    return hashlib.sha256(shared.encode()).hexdigest()[:8]


@contextmanager
def _only_here(folder: Path) -> Iterator[int | None]:
    """Holds the folder's lock, and gives its file; where another process has it, that is said.

    Raises:
        UserError: Another process works in the folder.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield None
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--name: another process works in {folder}; wait for it, or choose another name"
            ) from error
        yield file.fileno()


def _earlier(folder: Path, names: Sequence[str]) -> list[str]:
    """Arms of the comparison that is there already, which this call does not name: they stay in the table."""
    try:
        arms = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["arms"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    known = [arm["name"] for arm in arms if arm["name"] not in names]
    return [
        arm
        for arm in known
        if _finished(folder / arm) and "test" in RunFolder(folder / arm).read().get("evaluations", {})
    ]


def _status(path: Path) -> str:
    folder = RunFolder(path)
    return str(folder.read().get("status")) if folder.record.is_file() else "running"


def _finished(path: Path) -> bool:
    return _status(path) == "finished"


def _different(path: Path, settings: dict[str, Any]) -> list[str]:
    """The settings in which a run differs from what is asked for."""
    done, asked = flat(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))), flat(settings)
    return sorted(key for key in {*done, *asked} if done.get(key) != asked.get(key))


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
