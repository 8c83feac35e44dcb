"""The search of an ablation: Optuna proposes settings, a trial is a cell like any other, and what is best is compared.

The studies lie in ``optuna.log`` in the ablation's folder: Optuna's journal, which several processes may write, also
over a network's filesystem, and ``optuna-dashboard logs/NAME/optuna.log`` opens. What they have found lies in
``search.json``, for the report. Each arm has a study of its own and as many trials, with the first of the seeds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_lora.ablation.plan import Arm, Cell, Plan, arm_label, trial_cell
from lightning_lora.ablation.search import FOUND, Found, Range, Trial, read_found, write_found
from lightning_lora.artifacts.runs import RunFolder
from lightning_lora.errors import BusyError, UserError
from lightning_lora.files import locked_folder, write_text
from lightning_lora.training.pruning import VARIABLE

JOURNAL = "optuna.log"
_POLL_S = 2.0
_DIRECTIONS = {True: "maximize", False: "minimize"}


class Searcher:
    """Searches for each arm.

    Args:
        plan: The plan, which has a search.
        folder: The ablation's folder.
        train: Trains a cell of these settings, or goes on with it, while this process holds it; with the environment
            that the trial's process is to have.
        claim: The folder whose lock holds a cell.
        determines: What the result of a trial depends on beside its settings (code, versions, settings of all).
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        train: Callable[[Cell, Mapping[str, str]], None],
        claim: Callable[[Cell], Path],
        determines: Callable[[Arm], Any],
    ) -> None:
        assert plan.search is not None
        self.plan = plan
        self.search = plan.search
        self.folder = folder
        self.train = train
        self.claim = claim
        self.determines = determines
        self.optuna = import_optuna()
        self.storage = journal(folder / JOURNAL)
        self.turn = folder / ".claims"
        self.turn.mkdir(exist_ok=True)

    def run(self) -> dict[Arm, Found]:
        """Does what is left of the trials, and gives what was found; waits for those of other processes."""
        found = {}
        for arm in self.plan.arms:
            study = self._study(arm)
            while (state := self._one_trial(study, arm)) != "done":
                if state == "busy":
                    time.sleep(_POLL_S)
            found[arm] = self._found(study, arm)
            self._write(found)
        return found

    def _study(self, arm: Arm) -> Any:
        depends = [self.determines(arm), self.search.for_arm(arm), self.search.sampler, self.search.seed]
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
        return self.optuna.create_study(
            study_name=f"{arm_label(arm)} ({digest[:12]})",
            storage=self.storage,
            direction=_DIRECTIONS[self.plan.higher_is_better],
            load_if_exists=True,
        )

    def _one_trial(self, study: Any, arm: Arm) -> str:
        """Does a trial that is new, or that a process has left: "did"; "busy" where others do the rest, or "done"."""
        with ExitStack() as held:
            with locked_folder(self.turn, None):
                cell, number, state = self._take(study, arm, held)
            if cell is None:
                return state
            shown = {k.rsplit(".", 1)[-1]: v for k, v in self._settings(study, arm, number).items()}
            tried = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            print(f"{arm_label(arm)}, trial {number + 1} of {self.search.trials}: {tried}", flush=True)
            environment = {}
            if self.search.pruner != "none":
                trial = {"journal": str(self.folder / JOURNAL), "study": study.study_name, "number": number}
                trial |= {"metric": self.plan.metric, "pruner": self.search.pruner}
                environment = {VARIABLE: json.dumps(trial)}
            try:
                self.train(cell, environment)
            except BusyError:  # what a killed process has begun still runs
                return "busy"
            self._tell(study, number, cell)
            self._write({**read_found(self.folder), arm: replace(self._found(study, arm), best=None)})
        return "did"

    def _take(self, study: Any, arm: Arm, held: ExitStack) -> tuple[Cell | None, int, str]:
        """A trial's cell, held, and its number; else why there is none."""
        trials = study.get_trials(deepcopy=False)
        running = [trial.number for trial in trials if not trial.state.is_finished()]
        for number in running:
            cell = trial_cell(self.plan, arm, number, self._settings(study, arm, number))
            try:
                held.enter_context(locked_folder(self.claim(cell), "another process does this trial"))
            except BusyError:
                continue
            return cell, number, ""
        if len(trials) >= self.search.trials:
            return None, 0, "busy" if running else "done"
        # A sampler anew for each trial: what it proposes depends on the trials before alone, not on what was killed.
        study.sampler = self._sampler(arm, len(trials))
        trial = study.ask()
        settings = {key: suggest(trial, key, space) for key, space in self.search.for_arm(arm).items()}
        cell = trial_cell(self.plan, arm, trial.number, settings)
        held.enter_context(locked_folder(self.claim(cell), "another process does this trial"))
        return cell, trial.number, ""

    def _sampler(self, arm: Arm, number: int) -> Any:
        digest = hashlib.sha256(f"{self.search.seed}/{arm_label(arm)}/{number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        if self.search.sampler == "qmc":
            return self.optuna.samplers.QMCSampler(seed=self.search.seed)  # which counts its points in the study
        samplers = {"tpe": self.optuna.samplers.TPESampler, "random": self.optuna.samplers.RandomSampler}
        return samplers[self.search.sampler](seed=seed)

    def _settings(self, study: Any, arm: Arm, number: int) -> dict[str, Any]:
        """What a trial tries, as settings."""
        space = self.search.for_arm(arm)
        trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
        return {key: chosen(space[key], value) for key, value in trial.params.items()}

    def _tell(self, study: Any, number: int, cell: Cell) -> None:
        states = self.optuna.trial.TrialState
        place = self.folder / "cells" / cell.name
        record = RunFolder(place).read() if (place / "run.json").is_file() else {}
        value = record.get("evaluations", {}).get("val", {}).get("after", {}).get(self.plan.metric)
        trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
        if record.get("status") != "finished" or value is None:
            study.tell(number, state=states.FAIL)
        elif trial.user_attrs.get("pruned"):
            study.tell(number, state=states.PRUNED)
        else:
            study.tell(number, value)

    def _found(self, study: Any, arm: Arm) -> Found:
        trials = []
        for trial in study.get_trials(deepcopy=False):
            settings = self._settings(study, arm, trial.number)
            place = self.folder / "cells" / trial_cell(self.plan, arm, trial.number, settings).name
            state = {"FAIL": "failed", "COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "running")
            reason = ""
            if state == "failed" and (place / "run.json").is_file():
                reason = str(RunFolder(place).read().get("error", ""))
            trials.append(Trial(trial.number, settings, state, trial.value, reason))
        complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
        sign = 1 if self.plan.higher_is_better else -1
        best = max(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)
        edges = []
        for key, space in self.search.for_arm(arm).items():
            if best is not None and isinstance(space, Range) and space.at_edge(best.settings[key]):
                edges.append(f"{key} {best.settings[key]:g}")
        return Found(trials, None if best is None else best.number, edges)

    def _write(self, found: Mapping[Arm, Found]) -> None:
        with locked_folder(self.turn, None):
            write_text(self.folder / FOUND, write_found({**read_found(self.folder), **found}))


def import_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("search: needs Optuna; pip install -c constraints.txt -e '.[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def journal(path: Path) -> Any:
    """Optuna's storage in a file."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))


def suggest(trial: Any, key: str, space: Range | list[Any]) -> Any:
    """What a trial is to try of a setting."""
    if isinstance(space, list):
        return chosen(space, trial.suggest_categorical(key, [str(value) for value in space]))
    if space.whole:
        return trial.suggest_int(key, int(space.low), int(space.high), step=int(space.step or 1), log=space.log)
    return trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log)


def chosen(space: Range | list[Any], value: Any) -> Any:
    """The setting that Optuna's value stands for: choices are known to it by their words."""
    return next(choice for choice in space if str(choice) == value) if isinstance(space, list) else value
