"""Runs an experiment: the cells of a plan, each trained once; then the test rows, once.

An ablation lies in ``logs/NAME``: ``ablation.json`` (what was asked), ``cells/`` (a run folder each), ``stale/`` (cells
of other settings, code, versions or data: kept, never mixed in), ``test_looks.jsonl`` (every look at test rows) and the
report. Several processes may work on one: a cell is held by a lock that dies with its holder.
"""

import itertools
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.children import run_child
from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.config.settings import flat
from lightning_lora.errors import UserError
from lightning_lora.experiments.confounders import Change, changes, second_differences
from lightning_lora.experiments.plan import Plan, arm_label, with_found
from lightning_lora.experiments.records import gather_cells, same_value, value_at
from lightning_lora.experiments.results import compare_arms
from lightning_lora.experiments.searcher import read_found
from lightning_lora.experiments.worker import Worker
from lightning_lora.files import locked_folder, write_text
from lightning_lora.interrupts import StopRequest
from lightning_lora.locations import check_model
from lightning_lora.models.methods import AdapterOptions, check_options, find_method
from lightning_lora.models.quantization import Quantization, check_quantization
from lightning_lora.runs.folder import now
from lightning_lora.units import duration
from lightning_lora.workers import EXECUTORS, Workers

LEDGER = "test_looks.jsonl"


def run_experiment(
    plan: Plan,
    base: Sequence[Mapping[str, Any]],
    overrides: Sequence[str],
    folder: Path,
    asked: dict[str, Any],
    options: Namespace,
) -> int:
    """Train what is missing of an experiment and test once; return 1 if a cell failed.

    Args:
        plan: The plan.
        base: Configs of the base recipe, each with priority over those before.
        overrides: Options of ``fit`` for all cells.
        folder: The experiment's folder.
        asked: What ``report`` reads the plan from: "config", "path", "small", "command".
        options: Of ``add_options``.
    """
    settings = resolve_cells(plan, base, overrides)
    if (folder / "config.yaml").exists():
        raise UserError(f"--name: {folder} is the folder of a run; choose another name")
    warned = lint(plan, settings)
    needs = (options.cell_cpus, options.cell_gpus)
    one_gpu_each = all(each["trainer"]["devices"] == 1 for each in settings.values())
    workers = Workers(options.workers, options.executor, options.address, *needs, one_gpu_each)
    worker = Worker(plan, folder, partial(resolve_cells, base=base, overrides=overrides), options.retry_failed)
    show_plan(with_found(plan, read_found(plan, folder)), folder, warned, worker.stale_cells())
    if options.plan:
        return 0
    done = {cell.cell.name for cell in gather_cells(plan, folder) if cell.status == "finished"}
    check_bases({name: each for name, each in settings.items() if name not in done})
    differences = {arm: [asdict(change) for change in found] for arm, found in warned.items()}
    document = json.dumps({"format": 1, **asked, "differences": differences}, indent=2, ensure_ascii=False) + "\n"
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with StopRequest().listening():
        worker.set_stale_aside()  # before anything says what the cells are about
        write_text(folder / "ablation.json", document)
        if workers.alone:
            worker.run()
        else:
            for failure in workers.run(worker.run, len(plan.cells), worker.progress()):
                print(f"warning: {failure}", file=sys.stderr)
        plan = with_found(plan, read_found(plan, folder))
        tested = options.no_test or look_at_test(plan, folder)
    return int(not tested or any(cell.status != "finished" for cell in gather_cells(plan, folder)))


def resolve_cells(plan: Plan, base: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All settings of each cell, by its name; cells that differ in their seed are parsed once.

    Raises:
        UserError: They cannot be parsed, a method cannot do what is asked, or two arms have the same settings.
    """
    known: dict[str, dict[str, Any]] = {}
    found = {}
    for cell in plan.cells:
        key = json.dumps(cell.change, sort_keys=True, default=str)
        if key not in known:
            try:
                known[key] = resolve(base, overrides, nested(cell.change))
            except UserError as error:
                raise UserError(f"{arm_label((*cell.arm, *cell.variant))}: {error}") from error
        for name, value in cell.change.items():
            if not same_value(here := value_at(known[key], name), value):
                raise UserError(f"{name}: an option gives {here} to every cell, but {cell.name} is about {value}")
        found[cell.name] = {**known[key], "seed_everything": cell.seed}
    firsts = {arm: found[next(cell for cell in plan.cells if cell.arm == arm).name] for arm in plan.arms}
    for one, other in itertools.combinations(firsts, 2):
        if plan.search is None and plan.tried == 1 and firsts[one] == firsts[other]:
            raise UserError(f"arms {arm_label(one)} and {arm_label(other)} have the same settings")
    return found


def check_bases(settings: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a base model that does not exist before any cell is trained.

    Args:
        settings: All settings of each cell that is still to be trained, by its name.

    Raises:
        UserError: One does not exist; the cell is named.
    """
    checked: set[str] = set()
    for name, each in settings.items():
        if (base := each["model"]["base_model"]) not in checked:
            try:
                check_model(base, "model.base_model")
            except UserError as error:
                raise UserError(f"cell {name}: {error}") from error
            checked.add(base)


def resolve(base: Sequence[Mapping[str, Any]], overrides: Sequence[str], change: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a cell: the base's, its own, the command line's, each with priority over those before.

    Raises:
        UserError: They cannot be parsed, or its method cannot do what is asked.
    """
    with tempfile.TemporaryDirectory() as directory:
        words: list[str] = []
        for number, content in enumerate([*base, change]):
            file = Path(directory) / f"{number}.yaml"
            file.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
            words += ["--config", str(file)]
        settings = ConfiguredRun("fit", [*words, *overrides]).settings()
    model = settings["model"]
    entry = find_method(model["method"])
    check_options(model["method"], AdapterOptions(**model["adapter"]))
    check_quantization(Quantization(**model["quantization"]), model["method"], entry.bits, entry.cpu_bits)
    return settings


def nested(change: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys as the tree that a config is."""
    tree: dict[str, Any] = {}
    for key, value in change.items():
        *path, last = key.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def lint(plan: Plan, settings: Mapping[str, dict[str, Any]]) -> dict[str, list[Change]]:
    """In what each arm differs from the baseline."""
    named = sorted({key for axis in plan.axes for change in axis.values.values() for key in change})
    named += list(plan.search.space) if plan.search is not None else []
    first = {arm: next(cell for cell in plan.cells if cell.arm == arm) for arm in plan.arms}
    base = settings[first[plan.baseline].name]
    found = {}
    for arm, cell in first.items():
        if arm != plan.baseline:
            other = settings[cell.name]
            follows = what_follows(base, named), what_follows(other, named)
            both = follows[0].keys() & follows[1].keys()
            one, two = (_shared(*sides, named) for sides in ((base, other), (other, base)))
            one |= {name: follows[0][name] for name in both}
            two |= {name: follows[1][name] for name in both}
            found[arm_label(arm)] = changes(one, two, named)
    return found


def _shared(settings: Mapping[str, Any], other: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """Flat settings without the adapter's options that only one of two methods takes: the method implies them."""
    one, two = (set(find_method(each["model"]["method"]).options) for each in (settings, other))
    left_out = {f"model.adapter.{name}" for name in one ^ two} - set(named)
    return {key: value for key, value in flat(dict(settings)).items() if key not in left_out}


def what_follows(settings: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """What settings come to without saying so, such as ratios.

    Args:
        settings: Of an arm's first cell.
        named: Keys that the axes and the search name.
    """
    model = settings["model"]
    method, adapter = find_method(model["method"]), model["adapter"]
    follows: dict[str, Any] = {}
    if adapter["rank"] and "alpha" in method.options:
        follows["alpha / rank"] = adapter["alpha"] / adapter["rank"]
    lowered = model["speedups"]["frozen_weights"] == "auto" and settings["trainer"]["precision"] == "bf16-mixed"
    number = "bfloat16" if method.frozen_encoder and lowered else "float32"
    if "model.quantization.bits" not in named:  # else the axis is about it
        follows["weights of the encoder"] = number if not model["quantization"]["bits"] else "quantized"
    follows["the encoder multiplies in"] = multiplies_in(settings)
    return follows


def multiplies_in(settings: Mapping[str, Any]) -> str:
    """The number format of the encoder's matrix products, by all settings of a cell."""
    quantization, precision = settings["model"]["quantization"], str(settings["trainer"]["precision"])
    if quantization["bits"] == 8:
        return "int8"
    if quantization["bits"] == 4 and quantization["compute_dtype"] != "auto":
        return str(quantization["compute_dtype"])
    return {"bf16": "bfloat16", "16": "float16"}.get(precision.partition("-")[0], "float32")


def show_plan(plan: Plan, folder: Path, warned: Mapping[str, Sequence[Change]], stale: Collection[str]) -> None:
    """Prints what will be done, and what a reader would hold against it.

    Args:
        plan: The plan.
        folder: The ablation's.
        warned: In what each arm differs from the baseline.
        stale: Names of cells that are of something else, and will be trained again.
    """
    cells = gather_cells(plan, folder) if folder.exists() else []
    cells = [cell for cell in cells if cell.cell.name not in stale]
    states = [cell.status for cell in cells]
    took = [float(cell.record.get("wall_s", 0)) for cell in cells if cell.status == "finished"]
    left = len(plan.cells) - len(took)
    about = f", about {duration(sum(took) / len(took) * left)} for the others" if took and left else ""
    print(f"{plan.question}\n")
    print(f"ablation: {folder}")
    print(f"arms: {', '.join(arm_label(arm) for arm in plan.arms)} (baseline {arm_label(plan.baseline)})")
    variants = f" x {plan.tried} variants, the best on validation taken" if plan.tried > 1 else ""
    if plan.search is not None:
        variants = ""
        how = f"{plan.search.sampler}, seed {plan.search.seed}, chosen by validation {plan.metric}"
        tried = sum(trial.state.is_finished() for found in plan.found.values() for trial in found.trials)
        print(
            f"search: {plan.tried} trials of each arm ({how}), over {', '.join(plan.search.space)}; "
            f"{tried} of {plan.tried * len(plan.arms)} are done"
        )
    print(
        f"cells: {len(plan.arms)} arms{variants} x {len(plan.seeds)} seeds = {len(plan.cells)}; "
        f"{states.count('finished')} are finished{about}"
        + (f"; {len(stale)} are of other code, settings or data and will be set aside" if stale else "")
    )
    for arm, found in warned.items():
        print(f"{arm} against {arm_label(plan.baseline)}: {'; '.join(map(str, found)) or 'no difference'}")
        for change in second_differences(found):
            print(f"  warning: confounder: {change} is named by no axis; its effect cannot be told from the axis's")
    if len(plan.seeds) < 2:
        print("warning: one seed; nothing can be called better")
    print(flush=True)


def look_at_test(plan: Plan, folder: Path) -> bool:
    """Tests each arm's best variant that was not tested yet, once all its seeds are there; every look is written down.

    What is tested was chosen before, by validation rows only. Gives whether all of it went well.
    """
    with locked_folder(folder, None):
        return _look_at_test(plan, folder)


def _look_at_test(plan: Plan, folder: Path) -> bool:
    well = True
    for arm in compare_arms(plan, gather_cells(plan, folder)):
        if not arm.complete:
            print(f"{arm.label}: not tested, as not all its seeds have finished")
            continue
        for result in arm.cells:
            if result.test is not None:
                continue
            entry = {"time": now(), "cell": result.cell.name, "process": os.getpid()}
            with (folder / LEDGER).open("a", encoding="utf-8") as ledger:  # before the look, not after
                ledger.write(json.dumps(entry) + "\n")
                ledger.flush()
                os.fsync(ledger.fileno())
            print(f"{result.cell.name}: test rows", flush=True)
            words = ["test", "--run", str(folder / "cells" / result.cell.name), "--before", "false"]
            if status := run_child([words], folder / "cells" / f"{result.cell.name}.txt"):
                print(f"{result.cell.name}: the test ended with status {status}", file=sys.stderr)
                well = False
    return well


def add_options(parser: OptionParser) -> None:
    """Add what all experiments can be told about how they are run."""
    parser.add_argument("--logs_dir", default="logs", help="The folder of all runs.")
    parser.add_argument("--plan", action="store_true", help="Show the plan and stop.")
    parser.add_argument("--no_test", action="store_true", help="Leave the test rows closed.")
    parser.add_argument("--retry_failed", action="store_true", help="Try cells again that failed.")
    workers = "Processes that share the cells; by default 1, with Ray as many as the cluster has room for."
    parser.add_argument("--workers", type=int, help=workers)
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="Where the workers run.")
    parser.add_argument("--address", help="Of a Ray cluster; by default one is started on this machine.")
    parser.add_argument("--cell_cpus", type=float, default=1, help="CPUs that a worker takes of its Ray node.")
    parser.add_argument("--cell_gpus", type=float, default=0, help="GPUs that a worker takes of its Ray node.")
