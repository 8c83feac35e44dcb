"""The cells of an ablation: which are to be trained, who trains them, and when one is stale.

A cell is a run folder under ``cells/``, trained by ``fit`` and validated as a process of its own. Whoever trains it
holds its claim, a lock that dies with its holder.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.children import last_error, run_child
from lightning_lora.claims import claimed, share_tasks
from lightning_lora.config.settings import flat
from lightning_lora.data.augment import Augmentation
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import BusyError, UserError
from lightning_lora.experiments.plan import Arm, Cell, Plan, with_found
from lightning_lora.experiments.searcher import Searcher
from lightning_lora.files import locked_folder, write_text
from lightning_lora.runs.folder import RunFolder, commit, kept_metrics, now, versions
from lightning_lora.units import duration


class Worker:
    """Trains the cells that nobody has trained or is training.

    Args:
        plan: The plan.
        folder: The ablation's folder.
        resolve: Gives all settings of each cell of a plan, by the cell's name.
        retry_failed: Whether cells that failed before now are trained again.
    """

    def __init__(
        self, plan: Plan, folder: Path, resolve: Callable[[Plan], dict[str, dict[str, Any]]], retry_failed: bool
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.cells = folder / "cells"
        self.resolve = resolve
        self.settings = resolve(plan)
        #: A cell that failed earlier is trained again: once, whichever of several workers does it.
        self.retry_before = time.time() if retry_failed else 0.0
        self.code = commit()["fingerprint"]
        self.versions = versions()
        self._data: dict[str, dict[str, str]] = {}

    def stale_cells(self) -> dict[str, str]:
        """Return the names of stale cells, and why each is stale."""
        found = {cell.name: self._why_stale(self.cells / cell.name, cell) for cell in self.plan.cells}
        return {name: why for name, why in found.items() if why is not None}

    def set_stale_aside(self) -> None:
        """Set stale cells aside, but for those that another process holds."""
        for name, why in self.stale_cells().items():
            with contextlib.suppress(BusyError), claimed(self.folder, name):
                self._set_aside(self.cells / name, why)

    def run(self) -> None:
        """Search, where the plan asks for it, and train the cells, each unless another process does."""
        if self.plan.search is not None:
            self._search()
        cells = [cell for cell in self.plan.cells if cell.searched]
        self._tokenize([cell for cell in cells if self._state(cell) == "missing"])
        took: list[float] = []

        def train(cell: Cell) -> None:
            started = time.perf_counter()
            if self.train(cell):
                took.append(time.perf_counter() - started)
                left = sum(self._state(c) not in ("done", "failed") for c in cells)
                mean = sum(took) / len(took)
                print(f"  {duration(took[-1])}; {left} cells left, about {duration(mean * left)}", flush=True)

        share_tasks(cells, self.folder, lambda cell: cell.name, train)

    def _tokenize(self, cells: Sequence[Cell]) -> None:
        """Read, split and tokenize once, so that no cell's time or memory contains it; errors are left to the cell."""
        found = [self._data_settings(self.settings[cell.name]) for cell in cells]
        for data in {json.dumps(each, sort_keys=True, default=str): each for each in found}.values():
            with contextlib.suppress(UserError):
                module = self._data_module(data)
                module.setup("fit")
                module.setup("test")

    def _search(self) -> None:
        """Search what the plan asks for; from here on the plan is that of what was found."""
        plan, settings = self.plan, self.settings

        def train(cell: Cell, environment: Mapping[str, str]) -> None:
            self.settings = {**settings, **self.resolve(replace(plan, cells=[cell]))}
            if self.train(cell, environment):
                print()

        def determines(arm: Arm) -> Any:
            own = settings[next(cell.name for cell in plan.cells if cell.arm == arm)]
            return [own, self._fingerprints(own), self.code, self.versions]

        self.plan = with_found(plan, Searcher(plan, self.folder, train, determines).run())
        self.settings = self.resolve(self.plan)
        self.set_stale_aside()

    def progress(self) -> Callable[[], None]:
        """Return a function that prints a line for each cell or trial that other processes have finished since."""
        shown = {name for name, _ in self._ended()}

        def show() -> None:
            for name, record in self._ended():
                if name not in shown:
                    shown.add(name)
                    print(f"{name}{self._said(record)}", flush=True)

        return show

    def train(self, cell: Cell, environment: Mapping[str, str] | None = None) -> bool:
        """Train a cell, which this process holds, or resume it; return whether there was anything to do."""
        place = self.cells / cell.name
        if (why := self._why_stale(place, cell)) is not None:
            self._set_aside(place, why)
        state = self._state(cell)
        if state == "failed" and (place / "run.json").stat().st_mtime < self.retry_before:
            self._set_aside(place, "failed, tried again")
        elif state in ("done", "failed"):
            return False
        print(f"{cell.name}", flush=True)
        output = self.cells / f"{cell.name}.txt"
        config = self.cells / f".{cell.name}.yaml"
        if (place / "config.yaml").is_file():  # a finished one is left as it is
            words = ["fit", "--resume", str(place)]
        else:
            write_text(config, yaml.safe_dump(self.settings[cell.name], sort_keys=False, allow_unicode=True))
            words = ["fit", "--config", str(config), "--logs_dir", str(self.cells), "--name", cell.name]
        try:
            # The answers of the best weights, not of the last, are what is chosen by.
            status = run_child([words, ["validate", "--run", str(place)]], output, environment)
        finally:
            config.unlink(missing_ok=True)
        if status == BusyError.status:
            raise BusyError("another process trains this cell")
        if not (place / "run.json").is_file():  # it did not get as far as a folder: leave one that says why
            place.mkdir(exist_ok=True)
            error = last_error(output.read_text(encoding="utf-8"), status)
            record = {"format": 1, "status": "failed", "error": error, "name": place.name}
            RunFolder(place).write({**record, "code": commit(), "versions": versions()})
        print(self._said(RunFolder(place).read()), end="")
        return True

    def _said(self, record: Mapping[str, Any]) -> str:
        """What a cell's record says of its end, in a line."""
        value = kept_metrics(record, "val").get(self.plan.metric)
        if record.get("status") == "finished" and value is not None:
            return f"  validation {self.plan.metric} {value:.4f}"
        return f"  {record.get('status')}: {record.get('error', 'its process was ended')}"

    def _ended(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Name and record of each cell, also of a search's trials, that is done or has failed."""
        for path in sorted(self.cells.glob("*/run.json")):
            if self._status(path.parent) in ("done", "failed"):
                yield path.parent.name, RunFolder(path.parent).read()

    def _state(self, cell: Cell) -> str:
        return self._status(self.cells / cell.name)

    @staticmethod
    def _status(place: Path) -> str:
        """The status of a cell's run, or "missing"; "done" where it has been validated too."""
        if not (place / "run.json").is_file():
            return "missing"
        status = str(RunFolder(place).read().get("status"))
        validated = (place / "predictions" / "val-best.parquet").is_file()
        return "done" if status == "finished" and validated else status

    def _why_stale(self, place: Path, cell: Cell) -> str | None:
        """What has changed since a cell was started; None where nothing has, or there is no such cell."""
        if not place.exists():
            return None
        if not (place / "run.json").is_file():
            return None if (place / "config.yaml").is_file() else "nothing in it"
        record = RunFolder(place).read()
        if record.get("code", {}).get("fingerprint") != self.code:
            return "the code has changed"
        if changed := [n for n, v in self.versions.items() if record.get("versions", {}).get(n) != v]:
            return f"the version of {', '.join(changed)} has changed"
        if not (place / "config.yaml").is_file():
            return None  # it failed before it had one
        done = flat(yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")))
        asked = flat(self.settings[cell.name])
        if different := sorted(key for key in {*done, *asked} if done.get(key) != asked.get(key)):
            return f"other settings: {', '.join(different)}"
        if "data" in record:
            now_there = self._fingerprints(self.settings[cell.name])
            then = {split: report["fingerprint"] for split, report in record["data"]["splits"].items()}
            if now_there and then != now_there:
                return "the data has changed"
        return None

    def _fingerprints(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Fingerprints of the splits as the data is now; empty where it cannot be read, which fit will say."""
        data = self._data_settings(settings)
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in self._data:
            try:
                splits = self._data_module(data).prepared.describe()["splits"]
                self._data[key] = {split: report["fingerprint"] for split, report in splits.items()}
            except UserError:
                self._data[key] = {}
        return self._data[key]

    @staticmethod
    def _data_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings["data"], "base_model": settings["model"]["base_model"]}

    @staticmethod
    def _data_module(data: Mapping[str, Any]) -> TextDataModule:
        return TextDataModule(**{**data, "augmentation": Augmentation(**data["augmentation"])})

    def _set_aside(self, place: Path, why: str) -> None:
        stale = self.folder / "stale"
        stale.mkdir(exist_ok=True)
        number = 1
        while (target := stale / f"{place.name}.{number}").exists():
            number += 1
        with locked_folder(place, f"{place} is being trained by another process"):
            place.rename(target)
        write_text(target / "why.txt", f"{now()}: {why}\n")
        print(f"{place.name}: {why}; set aside as {target}")
