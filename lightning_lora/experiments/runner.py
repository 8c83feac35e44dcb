"""Runs an experiment: the cells of a plan, each trained once; then the test rows, once.

An ablation lies in ``logs/NAME``: ``ablation.json`` (what was asked), ``cells/`` (a run folder each, trained by ``fit``
and validated as a process of its own), ``stale/`` (cells of other settings, code, versions or data: kept, never mixed
in) and the report. Several processes may work on one: a cell is held by a lock that dies with its holder.
"""

import contextlib
import itertools
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from lightning_lora.children import last_error, run_child
from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.config.options import TRACK_HELP, TRACKERS
from lightning_lora.config.settings import flat
from lightning_lora.errors import BusyError, UserError
from lightning_lora.evaluation.metric_table import compared_metrics
from lightning_lora.experiments.confounders import Change
from lightning_lora.experiments.evaluating import evaluate_test_rows
from lightning_lora.experiments.plan import Cell, Plan, make_plan
from lightning_lora.experiments.resolving import (
    check_validated,
    data_module,
    data_settings,
    find_changes,
    resolve_cells,
    with_arms,
)
from lightning_lora.experiments.results import read_cells
from lightning_lora.experiments.searcher import Searcher, read_found
from lightning_lora.files import atomic_folder, locked_folder, write_text
from lightning_lora.interrupts import StopRequest
from lightning_lora.program import command_line
from lightning_lora.runs.folder import (
    RECORD_FORMAT,
    RunFolder,
    as_configured,
    best_metrics,
    commit,
    now,
    versions,
)
from lightning_lora.training.trackers import check_package
from lightning_lora.units import duration
from lightning_lora.workers import EXECUTORS, Workers, claimed, share_tasks


def run_experiment(
    config: Mapping[str, Any],
    path: Path,
    folder: Path,
    options: Namespace,
    overrides: Sequence[str],
    argv: Sequence[str],
    base: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Train what is missing of an experiment and test once; return 1 if a cell failed.

    Args:
        config: What ``make_plan`` makes the plan of.
        path: Its path.
        folder: The experiment's folder.
        options: Of ``add_options``.
        overrides: Options of ``fit`` for all cells.
        argv: The command.
        base: Configs of the base recipe, each with priority over those before; by default the one that the plan names.
    """
    if not base:
        config, recipe = with_arms(config, path, options.arms, overrides)
        base = [recipe]
    track: list[str] = []
    if options.track:
        check_package(options.track)
        track = ["--track", options.track, "--track_group", "-".join(folder.relative_to(options.logs_dir).parts)]
    resolve = partial(resolve_cells, base=base, overrides=overrides)
    plan, config = fit_to_data(make_plan(config, path, options.small), config, path, resolve)
    worker = Worker(plan, folder, resolve, track)
    settings = worker.settings
    if (folder / "config.yaml").exists():
        raise UserError(f"--name: {folder} is the folder of a run; choose another name")
    changes = find_changes(plan, settings)
    needs = (options.cell_cpus, options.cell_gpus)
    one_gpu_each = all(each["trainer"]["devices"] == 1 for each in settings.values())
    workers = Workers(options.workers, options.executor, options.address, *needs, one_gpu_each)
    check_validated(settings)
    show_plan(plan.with_found(read_found(plan, folder)), folder, changes, worker.stale_cells())
    if options.plan:
        return 0
    asked = {"config": config, "path": str(path), "small": options.small, "command": command_line(*argv)}
    asked["differences"] = {arm: [asdict(change) for change in found] for arm, found in changes.items()}
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with StopRequest().listening():
        worker.move_stale()  # before ablation.json changes what the cells are about
        write_text(folder / "ablation.json", json.dumps({"format": 1, **asked}, indent=2, ensure_ascii=False) + "\n")
        if workers.alone:
            worker.run()
        else:
            for failure in workers.run(worker.run, len(plan.cells), worker.watch()):
                print(f"warning: {failure}", file=sys.stderr)
        plan = plan.with_found(read_found(plan, folder))
        tested = options.no_test or evaluate_test_rows(plan, folder, workers)
    return int(not tested or any(cell.status != "finished" for cell in read_cells(plan, folder)))


def show_plan(plan: Plan, folder: Path, changes: Mapping[str, Sequence[Change]], stale: Collection[str]) -> None:
    """Print what will be done, and which confounders there are.

    Args:
        plan: The plan.
        folder: The ablation's.
        changes: In what each arm differs from the baseline.
        stale: Names of stale cells, which will be trained again.
    """
    cells = [cell for cell in read_cells(plan, folder) if cell.cell.name not in stale]
    took = [float(cell.record.get("wall_s", 0)) for cell in cells if cell.status == "finished"]
    left = len(plan.cells) - len(took)
    compares = len(plan.arms) > 1
    baseline = f" (baseline {plan.baseline})" if compares else ""
    print(f"{plan.question}\n\nablation: {folder}\narms: {', '.join(plan.arms)}{baseline}")
    variants = f" x {plan.tried} variants, the best on validation taken" if plan.tried > 1 else ""
    if (search := plan.search) is not None:
        variants = ""
        done = sum(trial.state.is_finished() for found in plan.found.values() for trial in found.trials)
        print(
            f"search: {plan.tried} trials of each arm ({search.sampler}, seed {search.seed}, chosen by validation "
            f"{plan.metric}), over {', '.join(search.space)}; {done} of {plan.tried * len(plan.arms)} are done"
        )
    about = f", about {duration(sum(took) / len(took) * left)} for the others" if took and left else ""
    again = f"; {len(stale)} are of other code, settings or data and will be trained again" if stale else ""
    folds = f" x {plan.folds} folds" if plan.folds else ""
    count = f"{len(plan.arms)} arms{variants} x {len(plan.seeds)} seeds{folds} = {len(plan.cells)}"
    print(f"cells: {count}; {len(took)} are finished{about}{again}")
    for arm, found in changes.items():
        print(f"{arm} against {plan.baseline}: {'; '.join(map(str, found)) or 'no difference'}")
        for change in (each for each in found if not each.named):
            print(f"  warning: confounder: {change} is named by no axis; its effect cannot be told from the axis's")
    if len(plan.seeds) < 2 and compares:
        print("warning: one seed; nothing can be called better")
    print(flush=True)


def add_options(parser: OptionParser) -> None:
    """Add the options of how an experiment is run."""
    parser.add_argument("--logs_dir", default="logs", help="The folder of all runs.")
    parser.add_argument("--track", choices=get_args(TRACKERS), help=TRACK_HELP)
    parser.add_argument("--plan", action="store_true", help="Show the plan and stop.")
    parser.add_argument("--no_test", action="store_true", help="Do not evaluate test rows.")
    workers = "Processes that share the cells; by default 1, with Ray as many as the cluster has room for."
    parser.add_argument("--workers", type=int, help=workers)
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="Where the workers run.")
    parser.add_argument("--address", help="Of a Ray cluster; by default one is started on this machine.")
    parser.add_argument("--cell_cpus", type=float, default=1, help="CPUs that a worker takes of its Ray node.")
    parser.add_argument("--cell_gpus", type=float, default=0, help="GPUs that a worker takes of its Ray node.")


def fit_to_data(
    plan: Plan, config: Mapping[str, Any], path: Path, resolve: Callable[[Plan], dict[str, dict[str, Any]]]
) -> tuple[Plan, Mapping[str, Any]]:
    """Return the plan and its config, with a metric of the data's task where none was chosen.

    Raises:
        UserError: The data has no such metric or cannot be divided into so many folds, or a setting is at fault.
    """
    first, metrics = plan.arms[plan.baseline], compared_metrics()
    settings = resolve(replace(plan, cells=[first]))[first.name]
    try:
        data = data_module(data_settings(settings))
        metrics = compared_metrics(data.task)
        if plan.folds is not None:
            data.prepared  # noqa: B018  # which divides the rows
    except UserError as error:  # others of the data are the cells' own
        if plan.folds is not None:
            raise UserError(f"{path}: folds: {error}") from error
    if plan.metric in metrics:
        return plan, config
    if "metric" in config:
        raise UserError(f"{path}: metric: '{plan.metric}' is none that the data has; it has {', '.join(metrics)}")
    return replace(plan, metric=metrics[0]), {**config, "metric": metrics[0]}


@dataclass
class Worker:
    """Trains the cells that nobody has trained or is training.

    Args:
        plan: The plan.
        folder: The ablation's folder.
        resolve: Gives all settings of each cell of a plan, by the cell's name.
        track: The options of ``fit`` that say where cells are tracked.
    """

    plan: Plan
    folder: Path
    resolve: Callable[[Plan], dict[str, dict[str, Any]]]
    track: Sequence[str] = ()
    #: A cell that failed before is trained again: once, whichever of several workers does it.
    started: float = field(default_factory=time.time, init=False)

    def __post_init__(self) -> None:
        self.cells = self.folder / "cells"
        #: All settings of each cell, by its name.
        self.settings = self.resolve(self.plan)
        self.code, self.versions = commit()["fingerprint"], versions()
        self._data: dict[str, dict[str, str]] = {}

    def run(self) -> None:
        """Search, where the plan asks for it, and train the cells, each unless another process does."""
        if self.plan.search is not None:
            self._search()
        cells = [cell for cell in self.plan.cells if cell.searched]
        missing = [cell for cell in cells if self._status(self.cells / cell.name) == "missing"]
        for data in {self._data_key(self.settings[cell.name]) for cell in missing}:
            # Read, split and tokenized once, so that no cell's time or memory contains it; errors are the cell's own.
            with contextlib.suppress(UserError):
                module = data_module(json.loads(data))
                module.setup("fit")
                module.setup("test")
        took: list[float] = []

        def train(cell: Cell) -> None:
            started = time.perf_counter()
            if self.train(cell):
                took.append(time.perf_counter() - started)
                left = sum(self._status(self.cells / c.name) not in ("done", "failed") for c in cells)
                about = duration(sum(took) / len(took) * left)
                print(f"  {duration(took[-1])}; {left} cells left, about {about}", flush=True)

        share_tasks(cells, self.folder, lambda cell: cell.name, train)

    def _search(self) -> None:
        """Search what the plan asks for; from here on the plan is that of what was found."""
        plan, settings = self.plan, self.settings

        def train(cell: Cell) -> None:
            self.settings = {**settings, **self.resolve(replace(plan, cells=[cell]))}
            if self.train(cell):
                print()

        def determines(arm: str) -> Any:
            own = settings[plan.arms[arm].name]
            return [own, self._fingerprints(own), self.code, self.versions]

        self.plan = plan.with_found(Searcher(plan, self.folder, train, determines).run())
        self.settings = self.resolve(self.plan)
        self.move_stale()

    def train(self, cell: Cell) -> bool:
        """Train a cell, which this process holds, or resume it; return whether there was anything to do."""
        place, output = self.cells / cell.name, self.cells / f"{cell.name}.txt"
        if (why := self._why_stale(cell)) is not None:
            self._move(place, why)
        status = self._status(place)
        if status == "failed" and (place / "run.json").stat().st_mtime < self.started:
            self._move(place, "failed, tried again")
        elif status in ("done", "failed"):
            return False
        print(cell.name, flush=True)
        with tempfile.TemporaryDirectory() as directory:
            if (place / "config.yaml").is_file():  # a finished one is left as it is
                argv = ["fit", "--resume", str(place)]
            else:
                config = Path(directory) / "cell.yaml"
                config.write_text(yaml.safe_dump(self.settings[cell.name], sort_keys=False, allow_unicode=True))
                argv = ["fit", "--config", str(config), "--logs_dir", str(self.cells), "--name", cell.name]
                argv += self.track
            # The answers of the best weights, not of the last, are what is chosen by.
            exit_status = run_child([argv, ["validate", "--run", str(place)]], output)
        if exit_status == BusyError.status:
            raise BusyError("another process trains this cell")
        if not (place / "run.json").is_file():  # it did not get as far as a folder: leave one that says why
            error = last_error(output.read_text(encoding="utf-8"), exit_status)
            record = {"format": RECORD_FORMAT, "status": "failed", "error": error, "name": place.name}
            with contextlib.suppress(FileExistsError), atomic_folder(place) as staging:
                RunFolder(staging).write({**record, "code": commit(), "versions": versions()})
        print(self._outcome(place), end="")
        return True

    def watch(self) -> Callable[[], None]:
        """Return a function that prints a line for each cell or trial that other processes have finished since."""

        def ended() -> list[Path]:
            places = sorted(path.parent for path in self.cells.glob("*/run.json"))
            return [place for place in places if self._status(place) in ("done", "failed")]

        shown = set(ended())

        def show() -> None:
            for place in ended():
                if place not in shown:
                    shown.add(place)
                    print(f"{place.name}{self._outcome(place)}", flush=True)

        return show

    def _outcome(self, place: Path) -> str:
        """The end of a cell, in a line."""
        record = RunFolder(place).read()
        value = best_metrics(record, "val").get(self.plan.metric)
        if record.get("status") == "finished" and value is not None:
            return f"  validation {self.plan.metric} {value:.4f}"
        return f"  {record.get('status')}: {record.get('error', 'its process was ended')}"

    @staticmethod
    def _status(place: Path) -> str:
        """The status of a cell's run, or "missing"; "done" where it has been validated too."""
        if not (place / "run.json").is_file():
            return "missing"
        status = str(RunFolder(place).read().get("status"))
        validated = (place / "predictions" / "val-best.parquet").is_file()
        return "done" if status == "finished" and validated else status

    def stale_cells(self) -> dict[str, str]:
        """Return the names of stale cells, and why each is stale."""
        found = {cell.name: self._why_stale(cell) for cell in self.plan.cells}
        return {name: why for name, why in found.items() if why is not None}

    def move_stale(self) -> None:
        """Move stale cells to ``stale/``, but for those that another process holds."""
        for name, why in self.stale_cells().items():
            with contextlib.suppress(BusyError), claimed(self.folder, name):
                self._move(self.cells / name, why)

    def _why_stale(self, cell: Cell) -> str | None:
        """What has changed since a cell was started; None where nothing has, or there is no such cell."""
        place = self.cells / cell.name
        if not (place / "run.json").is_file():
            return None
        record, settings = RunFolder(place).read(), self.settings[cell.name]
        if record.get("code", {}).get("fingerprint") != self.code:
            return "the code has changed"
        if changed := [n for n, v in self.versions.items() if record.get("versions", {}).get(n) != v]:
            return f"the version of {', '.join(changed)} has changed"
        if (place / "config.yaml").is_file():  # it did not fail before it had one
            config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
            done, wanted = flat(as_configured(config, record)), flat(settings)
            if different := sorted(key for key in {*done, *wanted} if done.get(key) != wanted.get(key)):
                return f"other settings: {', '.join(different)}"
        then = {name: split["fingerprint"] for name, split in (record.get("data") or {}).get("splits", {}).items()}
        if then and (today := self._fingerprints(settings)) and then != today:
            return "the data has changed"
        return None

    def _fingerprints(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Fingerprints of the splits as the data is now; empty where it cannot be read, which fit will say."""
        data = self._data_key(settings)
        if data not in self._data:
            self._data[data] = {}
            with contextlib.suppress(UserError):
                splits = data_module(json.loads(data)).prepared.describe()["splits"]
                self._data[data] = {name: split["fingerprint"] for name, split in splits.items()}
        return self._data[data]

    @staticmethod
    def _data_key(settings: Mapping[str, Any]) -> str:
        """What the data of a cell depends on, as JSON."""
        return json.dumps(data_settings(settings), sort_keys=True)

    def _move(self, place: Path, why: str) -> None:
        """Move a cell's folder to ``stale/``."""
        stale = self.folder / "stale"
        stale.mkdir(exist_ok=True)
        targets = (stale / f"{place.name}.{number}" for number in itertools.count(1))
        target = next(each for each in targets if not each.exists())
        with locked_folder(place, f"{place} is being trained by another process"):
            place.rename(target)
        write_text(target / "why.txt", f"{now()}: {why}\n")
        print(f"{place.name}: {why}; moved to {target}")
