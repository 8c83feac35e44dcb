"""``fit --budget``: the best run that validation finds within a time. Test rows are never evaluated.

While it lasts ``logs/NAME`` holds ``tuning.json`` (what was tried, and the time used) and ``trials/`` (a run folder
each, trained by ``fit`` as a process of its own); at the end the best trial is moved up and becomes the run.
"""

import contextlib
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_lora.children import last_error, run_child
from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import METRICS, SHOWN, primary_metric
from lightning_lora.experiments.search_space import import_optuna, make_search
from lightning_lora.experiments.searcher import propose
from lightning_lora.experiments.tuning_space import TuningSpace
from lightning_lora.files import atomic_folder, locked_folder, write_text
from lightning_lora.interrupts import Interrupted, StopRequest
from lightning_lora.runs.folder import TUNING, RunFolder, as_yaml, commit, plain, versions
from lightning_lora.tasks import Task
from lightning_lora.units import duration

_UNITS = {"s": 1, "m": 60, "h": 3600}
#: So many failed trials in a row end a search: the next ones would most likely fail too.
_MOST_FAILED = 5
#: Proposals that were tried before, or do not fit into the time, after which there is nothing left to try.
_PROPOSALS = 20


def budget_seconds(text: str) -> float:
    """Return the seconds that a text such as "90s", "5m" or "1.5h" says.

    Raises:
        UserError: It says none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or not float(found[1]):
        raise UserError(f"--budget: a time such as 90s, 5m or 1.5h is needed, got '{text}'")
    return float(found[1]) * _UNITS[found[2]]


@dataclass
class Tuner:
    """Trains the default, and then what the search proposes, until the time is used up.

    Args:
        space: What is searched.
        folder: Of the run that the best trial becomes.
        budget_s: Seconds, from ``started`` on.
        seed: ``seed_everything``: of the trials, and of what is proposed.
        command: The command, as in a record.
        page: Makes ``tuning.md`` of what ``run.json`` has under ``tuning``.
        started: When the command began, by ``time.monotonic``.
    """

    space: TuningSpace
    folder: Path
    budget_s: float
    seed: int
    command: str
    page: Callable[[Mapping[str, Any]], str]
    started: float
    #: Seconds that were used before an interruption.
    before_s: float = field(default=0.0, init=False)
    trials: list[dict[str, Any]] = field(default_factory=list, init=False)
    #: Number of the trial that is being moved up; None while there is a search.
    kept: int | None = field(default=None, init=False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the trials depend on: those of something else cannot be compared with them."""
        identity = {"settings": self.space.settings(self.space.default), "code": commit()["fingerprint"]}
        identity |= {"versions": versions(), "data": self.space.fingerprints, "search space": self.space.dimensions}
        return plain(identity)

    def run(self) -> RunFolder:
        """Search, or resume a search that was interrupted; return the folder of the best run.

        Raises:
            UserError: The default cannot be trained, no trial came to an end, another process is at it, or the folder
                holds a search over something else.
        """
        if not (self.folder / TUNING).is_file():
            with contextlib.suppress(FileExistsError), atomic_folder(self.folder) as staging:
                (staging / "trials").mkdir()
                self._save(staging)
        with locked_folder(self.folder, f"{self.folder} is being searched by another process"):
            self._load()
            try:
                with StopRequest().listening():
                    try:
                        if self.kept is None:
                            self._search()
                    finally:
                        if self.folder.exists():
                            self._save(self.folder)
                    return self._keep()
            except (Interrupted, KeyboardInterrupt):
                print(f"\ninterrupted after {duration(self.used_s)}; resume with the same command: {self.command}")
                raise

    @property
    def used_s(self) -> float:
        """Seconds that were used so far, those before an interruption included."""
        return self.before_s + time.monotonic() - self.started

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.budget_s - self.used_s

    @property
    def best(self) -> dict[str, Any] | None:
        """The trial that is best on validation rows, of equal ones that with the lower loss; None where all failed."""
        done = [trial for trial in self.trials if trial["status"] == "finished"]
        return max(done, key=lambda trial: (self._score(trial), -trial.get("loss", 0), -trial["number"]), default=None)

    def _score(self, trial: Mapping[str, Any]) -> float:
        """What a finished trial is judged by: more is better."""
        name = primary_metric(self.space.task)[0]
        return trial[name] if METRICS[name].higher_is_better else -trial[name]

    def _load(self) -> None:
        """Read what an earlier process of the same command has left."""
        state = json.loads((self.folder / TUNING).read_text(encoding="utf-8"))
        for key, now in self.identity.items():
            if state["identity"][key] != now:
                raise UserError(
                    f"--name: {self.folder} is a search with other {key}, which cannot be compared; choose another "
                    f"name, or bring back what it began with: {state['command']}"
                )
        self.trials, self.before_s, self.kept = state["trials"], state["used_s"], state["kept"]
        running = [trial for trial in self.trials if trial["status"] == "running"]
        for trial in running:  # of a process that was killed, its trial knows better how long it ran
            self.before_s = max(self.before_s, trial["started_s"] + (self._record(trial).get("wall_s") or 0.0))
        if self.trials:
            done = len(self.trials) - len(running)
            print(f"resumed: {done} trials are done; {duration(max(0.0, self.left_s))} left", flush=True)

    def _save(self, folder: Path) -> None:
        state = {"format": 1, "command": self.command, "identity": self.identity, "trials": self.trials}
        state |= {"used_s": self.used_s, "kept": self.kept}
        write_text(folder / TUNING, json.dumps(plain(state), indent=2) + "\n")

    def _search(self) -> None:
        """Train trials until nothing more fits into the time."""
        for trial in self.trials:
            if trial["status"] == "running":  # of a process that was ended
                self._train(trial)
        while (point := self._next_point()) is not None:
            entry = {"number": len(self.trials), "settings": self.space.changes(point), "point": point}
            self.trials.append({**entry, "status": "running", "started_s": self.used_s})
            self._save(self.folder)
            self._train(self.trials[-1])
        if len(self.trials) == 1 and self.left_s < 0:
            used = duration(self.used_s)  # with what comes before its trial, such as reading the data
            print(f"the default alone took {used}, more than the budget of {duration(self.budget_s)}")

    def _next_point(self) -> dict[str, Any] | None:
        """Return what to try next: something new that can come to an end in the time that is left; else None."""
        if not self.trials:
            return dict(self.space.default)
        failed = [trial["status"] == "failed" for trial in self.trials[-_MOST_FAILED:]]
        if self.left_s <= 0 or (len(failed) == _MOST_FAILED and all(failed)):
            return None
        # Of trials that ran to their end; what differs beside the number of epochs may make others faster or slower.
        whole = [trial for trial in self.trials if trial["status"] == "finished" and not trial["stopped_by_time"]]
        fits = [(each["seconds"] - each["startup_s"]) / each["point"].get("epochs_factor", 1) for each in whole]
        fit_s, startup_s = min(fits, default=0.0), self._startup_s
        tried = [trial["settings"] for trial in self.trials]
        for point in self._proposals():
            takes_s = startup_s + fit_s * point.get("epochs_factor", 1)
            if self.space.changes(point) not in tried and takes_s <= self.left_s:
                return point
        return None

    def _proposals(self) -> Iterator[dict[str, Any]]:
        """Yield one change each of the best so far, in the order of what matters; then what Optuna makes of it all."""
        start = self.space.default if self.best is None else self.best["point"]
        for change in self.space.initial_trials()[len(self.trials) - 1 :]:
            yield {**start, **change}
        optuna, space = import_optuna(), make_search({"space": self.space.dimensions}, []).space
        states = {"finished": optuna.trial.TrialState.COMPLETE, "failed": optuna.trial.TrialState.FAIL}
        trials = [
            optuna.trial.create_trial(
                state=states[trial["status"]],
                params=trial["point"],
                distributions=space,
                value=self._score(trial) if trial["status"] == "finished" else None,
            )
            for trial in self.trials
        ]
        for attempt in range(_PROPOSALS):
            yield dict(propose("tpe", f"{self.seed}/{len(trials)}/{attempt}", space, trials).params)

    def _train(self, trial: dict[str, Any]) -> None:
        """Train a trial, or resume it, and add to its entry what it came to."""
        place = self._place(trial)
        output = place.with_suffix(".txt")
        for _ in range(2):  # one whose process was killed has not failed: it is resumed, once
            status = 0
            if self._record(trial).get("status") not in ("finished", "failed"):
                status = self._run(trial, place, output)
            record = self._record(trial)
            if record.get("status") in ("finished", "failed") or not place.exists():
                break
        metrics = (record.get("best") or {}).get("metrics", {})
        scores = {name: metrics.get(f"val/{name}") for name in scores_of(self.space.task)}
        said = output.read_text(encoding="utf-8") if output.is_file() else ""
        seconds = self.used_s - trial["started_s"]
        if record.get("status") == "finished" and None not in scores.values():
            found = {"status": "finished", **scores, "startup_s": max(0.0, seconds - record["costs"]["fit_s"])}
            found["stopped_by_time"] = "time limit" in str(record.get("stopped_by"))
        elif not (trial["number"] or record):  # a fault of the settings or the data, as plain fit would have it
            shutil.rmtree(self.folder)
            raise UserError(last_error(said, status))
        else:
            none = "no validation pass gave finite scores"
            reason = record.get("error") or (none if record.get("status") == "finished" else last_error(said, status))
            found = {"status": "failed", "reason": str(reason)}
        trial |= {"seconds": seconds, **found}  # at once: a signal may come at any time
        self._save(self.folder)
        for other in self.trials:  # the weights of others than the best are no longer needed
            if other["status"] == "finished" and other is not self.best:
                shutil.rmtree(self._place(other) / "checkpoints", ignore_errors=True)
        print(self._line(trial), flush=True)

    def _run(self, trial: Mapping[str, Any], place: Path, output: Path) -> int:
        """Train a trial in a process of its own, from its last state where it has one; return the exit status."""
        if place.exists():
            with locked_folder(place, None):  # its process may still be saving, where only this one was killed
                pass
        if [*place.glob("checkpoints/last*.ckpt")]:
            return run_child([["fit", "--resume", str(place)]], output)
        shutil.rmtree(place, ignore_errors=True)  # nothing to resume from, and less time than it was given
        settings = self.space.settings(trial["point"])
        if trial["number"]:
            left = max(1, math.floor(self.left_s - self._startup_s))
            days, hours, minutes = left // 86400, left // 3600 % 24, left // 60 % 60
            settings["trainer"]["max_time"] = f"{days:02}:{hours:02}:{minutes:02}:{left % 60:02}"
        with tempfile.TemporaryDirectory() as directory:
            config = Path(directory) / "trial.yaml"
            config.write_text(as_yaml(settings), encoding="utf-8")
            argv = ["fit", "--config", str(config), "--logs_dir", str(place.parent), "--name", place.name]
            return run_child([argv], output)

    @property
    def _startup_s(self) -> float:
        """Seconds that a trial takes beside fitting; about half as many as the first, whose process imports all."""
        known = [each["startup_s"] / (1 if each["number"] else 2) for each in self.trials if "startup_s" in each]
        return min(known, default=0.0)

    def _place(self, trial: Mapping[str, Any]) -> Path:
        return self.folder / "trials" / f"{trial['number']:03}"

    def _record(self, trial: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a trial's run; empty where it has left none."""
        run = RunFolder(self._place(trial))
        return run.read() if run.record.is_file() else {}

    def _line(self, trial: Mapping[str, Any]) -> str:
        """The end of a trial, in a line."""
        if trial["status"] == "finished":
            name, words = primary_metric(self.space.task)
            came_to = f"validation {words} {trial[name]:.4f}{', the best so far' if trial is self.best else ''}"
            came_to += ", stopped by the time left" if trial["stopped_by_time"] else ""
        else:
            came_to = f"failed: {trial['reason']}"
        left = f"{duration(trial['seconds'])}; {duration(max(0.0, self.left_s))} left"
        return f"trial {trial['number']} ({changes_words(trial['settings'])}): {came_to}; {left}"

    def _keep(self) -> RunFolder:
        """Make the best trial the run, or resume doing so."""
        best = self.best
        if best is None:
            raise UserError(f"{self.folder}: none of {len(self.trials)} trials finished: {self.trials[0]['reason']}")
        self.kept = best["number"]
        self._save(self.folder)
        place, run = self._place(best), RunFolder(self.folder)
        record, settings = self._record(best), RunFolder(place).settings()
        if not best["stopped_by_time"]:  # the limit of its trial has changed nothing, and is none of the run's
            settings["trainer"]["max_time"] = None
            record["config"] = settings
            record.get("length", {}).get("typed", {}).pop("max_time", None)
        for part in sorted(place.iterdir()):
            if part.name not in ("run.json", "config.yaml"):
                part.rename(self.folder / part.name)
        shown = ("number", "settings", *scores_of(self.space.task), "seconds", "status", "stopped_by_time", "reason")
        tuning = {
            "task": self.space.task,
            "budget_s": self.budget_s,
            "default": next(iter(self.space.by_method.values())),
            "used_s": self.used_s,
            "space": self.space.dimensions,
            "trials": [{key: trial[key] for key in shown if key in trial} for trial in self.trials],
            "kept": self.kept,
        }
        run.write({**record, "name": self.folder.name, "command": self.command, "tuning": tuning})
        write_text(self.folder / "tuning.md", self.page(tuning))
        write_text(run.config, as_yaml(settings))  # last: from here on it is a run
        (self.folder / TUNING).unlink()
        return run


def scores_of(task: Task) -> list[str]:
    """Return the metrics that a trial's entry has of its weights on validation rows, that which judges it first."""
    return list(dict.fromkeys([primary_metric(task)[0], *SHOWN[task]]))


def changes_words(settings: Mapping[str, Any]) -> str:
    """Return in words in what a trial differs from the default: "learning_rate 0.001, method full"."""
    values = {key.rpartition(".")[2]: f"{v:g}" if isinstance(v, float) else v for key, v in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "the default"
