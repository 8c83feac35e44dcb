"""The search of an ablation: Optuna proposes settings, a trial is a cell like any other, and what is best is compared.

The studies lie in ``optuna.log`` in the ablation's folder: Optuna's journal, which several processes may write, also
over a network's filesystem, and ``optuna-dashboard logs/NAME/optuna.log`` opens. What they have found lies in
``search.json``, for the report. Each arm has a study of its own and as many trials, with the first of the seeds.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_lora.errors import BusyError, UserError
from lightning_lora.experiments.plan import Arm, Cell, Plan, arm_label, trial_cell
from lightning_lora.experiments.search_space import FOUND, Found, Range, Trial, read_found, write_found
from lightning_lora.files import POLL_S, locked_folder, write_text
from lightning_lora.runs.folder import RunFolder, kept_metrics
from lightning_lora.training.pruning import VARIABLE

JOURNAL = "optuna.log"
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
        #: How often each trial's process has ended without an end of the trial.
        self.ended: Counter[str] = Counter()

    def run(self) -> dict[Arm, Found]:
        """Does what is left of the trials, and gives what was found; waits for those of other processes."""
        found = {}
        for arm in self.plan.arms:
            study = self._study(arm)
            while (state := self._one_trial(study, arm)) != "done":
                if state == "busy":
                    time.sleep(POLL_S)
            found[arm] = self._found(study, arm)
            self._write(found)
        return found

    def _study(self, arm: Arm) -> Any:
        how = [self.search.sampler, self.search.pruner, self.search.seed, self.plan.metric]
        depends = [self.determines(arm), self.search.for_arm(arm), how]
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
            self._write({arm: replace(self._found(study, arm), best=None)})
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
        cell = self._propose(study, arm, trials)
        held.enter_context(locked_folder(self.claim(cell), "another process does this trial"))
        return cell, len(trials), ""

    def _propose(self, study: Any, arm: Arm, trials: Sequence[Any]) -> Cell:
        """A new trial's cell.

        It is proposed in a copy and then written in one piece: a kill between two settings leaves no half of a trial.
        The sampler is made anew for each: what it proposes depends on the trials before alone, not on what was killed.
        """
        number = len(trials)
        digest = hashlib.sha256(f"{self.search.seed}/{arm_label(arm)}/{number}".encode()).digest()
        samplers = {"tpe": self.optuna.samplers.TPESampler, "random": self.optuna.samplers.RandomSampler}
        sampler = samplers[self.search.sampler](seed=int.from_bytes(digest[:4], "big"))
        copy = self.optuna.create_study(direction=_DIRECTIONS[self.plan.higher_is_better], sampler=sampler)
        copy.add_trials(trials)
        asked = copy.ask()
        settings = {key: suggest(asked, key, space) for key, space in self.search.for_arm(arm).items()}
        study.add_trial(
            self.optuna.trial.create_trial(
                state=self.optuna.trial.TrialState.RUNNING, params=asked.params, distributions=asked.distributions
            )
        )
        return trial_cell(self.plan, arm, number, settings)

    def _settings(self, study: Any, arm: Arm, number: int) -> dict[str, Any]:
        """What a trial tries, as settings."""
        space = self.search.for_arm(arm)
        trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
        return {key: chosen(space[key], value) for key, value in trial.params.items()}

    def _tell(self, study: Any, number: int, cell: Cell) -> None:
        states = self.optuna.trial.TrialState
        place = self.folder / "cells" / cell.name
        record = RunFolder(place).read() if (place / "run.json").is_file() else {}
        value = kept_metrics(record, "val").get(self.plan.metric)
        trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
        if record.get("status") == "finished" and value is not None:
            if trial.user_attrs.get("pruned"):
                study.tell(number, state=states.PRUNED, skip_if_finished=True)
            else:
                study.tell(number, value, skip_if_finished=True)
            return
        # One whose process was killed has not failed: it goes on, once.
        self.ended[cell.name] += 1
        if record.get("status") == "failed" or self.ended[cell.name] > 1:
            study.tell(number, state=states.FAIL, skip_if_finished=True)

    def _found(self, study: Any, arm: Arm) -> Found:
        trials = []
        for trial in study.get_trials(deepcopy=False):
            settings = self._settings(study, arm, trial.number)
            place = self.folder / "cells" / trial_cell(self.plan, arm, trial.number, settings).name
            state = {"FAIL": "failed", "COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "running")
            reason = ""
            if state == "failed" and (place / "run.json").is_file():
                record = RunFolder(place).read()
                reason = str(record.get("error") or f"its process was ended ({record.get('status')})")
            trials.append(Trial(trial.number, settings, state, trial.value, reason))
        complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
        sign = 1 if self.plan.higher_is_better else -1
        best = max(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)
        edges = []
        for key, space in self.search.for_arm(arm).items():
            if best is not None and at_edge(space, best.settings[key]):
                edges.append(f"{key} {best.settings[key]:g}")
        return Found(trials, None if best is None else best.number, edges)

    def _write(self, found: Mapping[Arm, Found]) -> None:
        """Writes what is known of the arms of this plan."""
        with locked_folder(self.turn, None):
            known = {**read_found(self.folder), **found}
            write_text(self.folder / FOUND, write_found({arm: known[arm] for arm in self.plan.arms if arm in known}))


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


def at_edge(space: Range | list[Any], value: Any) -> bool:
    """Whether a value lies at an end of what was searched: of a range, or of numbers that were listed."""
    if isinstance(space, Range):
        return space.at_edge(value)
    numbers = [each for each in space if isinstance(each, int | float) and not isinstance(each, bool)]
    return len(numbers) == len(space) > 2 and value in (min(numbers), max(numbers))


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
