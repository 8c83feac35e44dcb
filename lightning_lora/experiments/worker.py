"""The cells of an ablation: which are to be trained, who trains them, and when one is of something else.

A cell is a run folder under ``cells/``, trained by ``fit`` and validated as a process of its own. Whoever trains it
holds its claim, a lock that dies with its holder.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.children import run_child
from lightning_lora.cluster import run_on_ray
from lightning_lora.config.lightning_cli import flat
from lightning_lora.data.augment import Augmentation
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import BusyError, UserError
from lightning_lora.experiments.plan import Cell, Plan, with_found
from lightning_lora.experiments.searcher import Searcher
from lightning_lora.files import POLL_S, locked_folder, write_text
from lightning_lora.runs.folder import RunFolder, commit, kept_metrics, now, versions
from lightning_lora.units import duration


class Worker:
    """Trains the cells that nobody has trained or is training.

    Args:
        plan: The plan.
        folder: The ablation's folder.
        settings: All settings of each cell.
        retry_failed: Whether cells that failed are tried again.
    """

    def __init__(self, plan: Plan, folder: Path, settings: Mapping[str, dict[str, Any]], retry_failed: bool) -> None:
        self.plan = plan
        self.cells = folder / "cells"
        self.stale = folder / "stale"
        self.claims = folder / ".claims"
        self.settings = settings
        self.retry_failed = retry_failed
        self.code = commit()["fingerprint"]
        self.versions = versions()
        self._data: dict[str, dict[str, str]] = {}

    def stale_cells(self) -> dict[str, str]:
        """Cells that are of something else, by name, and why."""
        found = {cell.name: self._why_stale(self.cells / cell.name, cell) for cell in self.plan.cells}
        return {name: why for name, why in found.items() if why is not None}

    def set_stale_aside(self) -> None:
        """Sets aside the cells of something else, but for those that another process holds."""
        stale = self.stale_cells()
        for cell in self.plan.cells:
            if cell.name in stale:
                with contextlib.suppress(BusyError), locked_folder(self.claim(cell), "held"):
                    self._set_aside(self.cells / cell.name, stale[cell.name])

    def run(self) -> None:
        """Goes through the cells until none is left, waiting for those that another process holds."""
        open_cells = [cell for cell in self.plan.cells if cell.searched]
        self._tokenize([cell for cell in open_cells if self._state(cell) == "missing"])
        took: list[float] = []
        while open_cells:
            busy = []
            for cell in open_cells:
                started = time.perf_counter()
                try:
                    with locked_folder(self.claim(cell), "another process trains this cell"):
                        did = self.train(cell)
                except BusyError:
                    busy.append(cell)
                    continue
                if did:
                    took.append(time.perf_counter() - started)
                    left = sum(self._state(c) not in ("done", "failed") for c in self.plan.cells if c.searched)
                    mean = sum(took) / len(took)
                    print(f"  {duration(took[-1])}; {left} cells left, about {duration(mean * left)}", flush=True)
            open_cells = busy
            if busy:
                time.sleep(POLL_S)

    def _tokenize(self, cells: Sequence[Cell]) -> None:
        """Read, split and tokenize once, so that no cell's time or memory contains it; errors are left to the cell."""
        found = [self._data_settings(self.settings[cell.name]) for cell in cells]
        for data in {json.dumps(each, sort_keys=True, default=str): each for each in found}.values():
            with contextlib.suppress(UserError):
                module = self._data_module(data)
                module.setup("fit")
                module.setup("test")

    def search(self, settings_of: Callable[[Cell], dict[str, Any]]) -> Plan:
        """Searches what the plan asks to be searched; gives the plan of what was found, which is this worker's now.

        Args:
            settings_of: All settings of a cell.
        """

        def train(cell: Cell, environment: Mapping[str, str]) -> None:
            self.settings = {**self.settings, cell.name: settings_of(cell)}
            if self.train(cell, environment):
                print()

        def determines(arm: tuple[tuple[str, str], ...]) -> Any:
            settings = self.settings[next(cell.name for cell in self.plan.cells if cell.arm == arm)]
            return [settings, self._fingerprints(settings), self.code, self.versions]

        found = Searcher(self.plan, self.cells.parent, train, self.claim, determines).run()
        self.plan = with_found(self.plan, found)
        self.settings = {cell.name: settings_of(cell) for cell in self.plan.cells}
        return self.plan

    def run_on(self, address: str | None, needs: Mapping[str, float]) -> None:
        """The same on a Ray cluster, whose nodes see the ablation's folder and the data where this process does."""
        cells = {cell.name: cell for cell in self.plan.cells}
        left = [name for name, cell in cells.items() if cell.searched and self._to_do(cell)]
        folder, settings, retry, plan = self.cells.parent.resolve(), self.settings, self.retry_failed, self.plan

        def train(name: str) -> str:
            worker = Worker(plan, folder, settings, retry)
            cell = next(cell for cell in plan.cells if cell.name == name)
            with locked_folder(worker.claim(cell), "another process trains this cell"):
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    worker.train(cell)
            return said.getvalue().strip()

        started, count = time.perf_counter(), 0

        def done(name: str, said: str) -> None:
            nonlocal count
            count += 1
            rest = len(left) - count
            about = duration((time.perf_counter() - started) / count * rest)
            print(f"{said or name}; {rest} cells left, about {about}", flush=True)

        if left:
            run_on_ray(left, train, address, needs, done)

    def _to_do(self, cell: Cell) -> bool:
        state = self._state(cell)
        stale = self._why_stale(self.cells / cell.name, cell) is not None
        return stale or not (state == "done" or (state == "failed" and not self.retry_failed))

    def train(self, cell: Cell, environment: Mapping[str, str] | None = None) -> bool:
        """Trains a cell, goes on with it, or leaves it where it is done; whether there was anything to do."""
        place = self.cells / cell.name
        if (why := self._why_stale(place, cell)) is not None:
            self._set_aside(place, why)
        state = self._state(cell)
        if state == "done" or (state == "failed" and not self.retry_failed):
            return False
        if state == "failed":
            self._set_aside(place, "failed, tried again")
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
        self._say(place, status, output)
        return True

    def _say(self, place: Path, status: int, output: Path) -> None:
        record = RunFolder(place).read() if (place / "run.json").is_file() else {}
        value = kept_metrics(record, "val").get(self.plan.metric)
        if status == 0 and value is not None:
            print(f"  validation {self.plan.metric} {value:.4f}", end="")
            return
        if not record:  # it did not get as far as a folder: leave one that says why
            said = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
            place.mkdir(exist_ok=True)
            failed = {"format": 1, "status": "failed", "error": said[-1][7:] if said else f"ended with status {status}"}
            RunFolder(place).write({**failed, "name": place.name, "code": commit(), "versions": versions()})
            record = failed
        print(f"  {record.get('status')}: {record.get('error', f'status {status}')}", end="")

    def claim(self, cell: Cell) -> Path:
        """The folder whose lock holds a cell."""
        claim = self.claims / cell.name
        claim.mkdir(parents=True, exist_ok=True)
        return claim

    def _state(self, cell: Cell) -> str:
        """The status of the cell's run, or "missing"; "done" where it has been validated too."""
        place = self.cells / cell.name
        if not (place / "run.json").is_file():
            return "missing"
        status = str(RunFolder(place).read().get("status"))
        validated = (place / "predictions" / "val-best.parquet").is_file()
        return "done" if status == "finished" and validated else status

    def _why_stale(self, place: Path, cell: Cell) -> str | None:
        """What has changed since a cell was begun; None where nothing has, or there is no such cell."""
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
        self.stale.mkdir(exist_ok=True)
        number = 1
        while (target := self.stale / f"{place.name}.{number}").exists():
            number += 1
        with locked_folder(place, f"{place} is being trained by another process"):
            place.rename(target)
        write_text(target / "why.txt", f"{now()}: {why}\n")
        print(f"{place.name}: {why}; set aside as {target}")
