"""The search of an ablation: Optuna proposes settings, a trial is a cell like any other, and the best is compared.

The studies lie in ``optuna.log`` in the ablation's folder: Optuna's journal, which several processes may write, also
over a network's filesystem, and ``optuna-dashboard logs/NAME/optuna.log`` opens. Each arm has a study of its own and
as many trials, with the first of the seeds. Imports no torch.

``Study.optimize`` would not do: it gives up a trial whose process was killed (only the storage in a database has a
heartbeat, which is no storage for a network's filesystem), and several processes run more trials than were asked for.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_lora.claims import claimed
from lightning_lora.errors import BusyError
from lightning_lora.experiments.plan import Arm, Cell, Plan, arm_label, trial_cell
from lightning_lora.experiments.search_space import Found, at_edge
from lightning_lora.files import POLL_S, locked_folder
from lightning_lora.runs.folder import RunFolder, kept_metrics
from lightning_lora.studies import SAMPLERS, TRIAL_VARIABLE, import_optuna, open_journal, open_trial

JOURNAL = "optuna.log"
_DIRECTIONS = {True: "maximize", False: "minimize"}


class Searcher:
    """Runs the trials of each arm.

    Args:
        plan: The plan, which has a search.
        folder: The ablation's folder.
        train: Trains a cell of these settings, or resumes it, while this process holds it; with the environment that
            the trial's process is to have.
        determines: What the result of a trial depends on beside its settings (code, versions, settings of all).
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        train: Callable[[Cell, Mapping[str, str]], None],
        determines: Callable[[Arm], Any],
    ) -> None:
        assert plan.search is not None
        self.plan = plan
        self.search = plan.search
        self.folder = folder
        self.train = train
        self.determines = determines
        self.optuna = import_optuna()
        self.storage = open_journal(folder / JOURNAL)
        #: How often each trial's process has ended without a result.
        self.ended: Counter[str] = Counter()

    def run(self) -> dict[Arm, Found]:
        """Run the trials that are left, waiting for those of other processes; return what was found."""
        studies = {arm: self._study(arm) for arm in self.plan.arms}
        for arm, study in studies.items():
            while (state := self._one_trial(study, arm)) != "done":
                if state == "busy":
                    time.sleep(POLL_S)
        return {arm: _found(self.plan, arm, study) for arm, study in studies.items()}

    def _study(self, arm: Arm) -> Any:
        how = [self.search.sampler, self.search.pruner, self.search.seed, self.plan.metric]
        depends = [self.determines(arm), self.search.for_arm(arm), how]
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
        study = self.optuna.create_study(
            study_name=f"{arm_label(arm)} ({digest[:12]})",
            storage=self.storage,
            direction=_DIRECTIONS[self.plan.higher_is_better],
            load_if_exists=True,
        )
        study.set_user_attr("arm", arm)
        study.set_user_attr("opened", time.time())  # of several of one arm the last one is the report's
        return study

    def _one_trial(self, study: Any, arm: Arm) -> str:
        """Run a trial that is new or that a killed process has left.

        Returns:
            "ran", "busy" where other processes run the rest, or "done".
        """
        with ExitStack() as held:
            with locked_folder(self.folder, None):
                trial, state = self._take(study, arm, held)
            if trial is None:
                return state
            shown = {key.rsplit(".", 1)[-1]: value for key, value in trial.params.items()}
            tried = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            print(f"{arm_label(arm)}, trial {trial.number + 1} of {self.search.trials}: {tried}", flush=True)
            cell = trial_cell(self.plan, arm, trial.number, trial.params)
            try:
                self.train(cell, self._environment(study, trial.number))
            except BusyError:  # the run of a killed process is still alive
                return "busy"
            self._tell(study, trial.number, cell)
        return "ran"

    def _environment(self, study: Any, number: int) -> dict[str, str]:
        """Return the variables that have the trial's process report to the pruner."""
        if self.search.pruner == "none":
            return {}
        trial = {"journal": str(self.folder / JOURNAL), "study": study.study_name, "number": number}
        return {TRIAL_VARIABLE: json.dumps({**trial, "metric": self.plan.metric, "pruner": self.search.pruner})}

    def _take(self, study: Any, arm: Arm, held: ExitStack) -> tuple[Any, str]:
        """Return a trial whose cell this process now holds; else None and why there is none."""
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if not trial.state.is_finished()]
        for trial in running:
            try:
                held.enter_context(self._holding(arm, trial))
            except BusyError:
                continue
            return trial, ""
        if len(trials) >= self.search.trials:
            return None, "busy" if running else "done"
        self._propose(study, arm, trials)
        trial = study.get_trials(deepcopy=False)[-1]
        held.enter_context(self._holding(arm, trial))
        return trial, ""

    def _holding(self, arm: Arm, trial: Any) -> Any:
        return claimed(self.folder, trial_cell(self.plan, arm, trial.number, trial.params).name)

    def _propose(self, study: Any, arm: Arm, trials: list[Any]) -> None:
        """Add a new trial to the study.

        It is proposed in a copy and then written in one piece: a kill between two settings leaves no half of a trial.
        Each has a sampler with a seed of its own: what is proposed depends on the earlier trials alone, not on kills.
        """
        digest = hashlib.sha256(f"{self.search.seed}/{arm_label(arm)}/{len(trials)}".encode()).digest()
        sampler = getattr(self.optuna.samplers, SAMPLERS[self.search.sampler])(seed=int.from_bytes(digest[:4], "big"))
        copy = self.optuna.create_study(direction=_DIRECTIONS[self.plan.higher_is_better], sampler=sampler)
        copy.add_trials(trials)
        asked = copy.ask(self.search.for_arm(arm))
        study.add_trial(
            self.optuna.trial.create_trial(
                state=self.optuna.trial.TrialState.RUNNING, params=asked.params, distributions=asked.distributions
            )
        )

    def _tell(self, study: Any, number: int, cell: Cell) -> None:
        """Tell Optuna what a trial has come to."""
        states = self.optuna.trial.TrialState
        place = self.folder / "cells" / cell.name
        record = RunFolder(place).read() if (place / "run.json").is_file() else {}
        value = kept_metrics(record, "val").get(self.plan.metric)
        trial = open_trial(study, number)
        if record.get("status") == "finished" and value is not None:
            if trial.user_attrs.get("pruned"):
                study.tell(number, state=states.PRUNED, skip_if_finished=True)
            else:
                study.tell(number, value, skip_if_finished=True)
            return
        # One whose process was killed has not failed: it is resumed, once.
        self.ended[cell.name] += 1
        if record.get("status") == "failed" or self.ended[cell.name] > 1:
            reason = str(record.get("error") or f"its process was ended ({record.get('status')})")
            trial.set_user_attr("reason", reason)
            study.tell(number, state=states.FAIL, skip_if_finished=True)


def read_found(plan: Plan, folder: Path) -> dict[Arm, Found]:
    """Read what an ablation's search has found of each arm; nothing where there is none or it has not started.

    Raises:
        UserError: Optuna is not installed.
    """
    journal = folder / JOURNAL
    if plan.search is None or not journal.exists():
        return {}
    optuna, storage = import_optuna(), open_journal(journal)
    latest: dict[Arm, Any] = {}
    for each in sorted(optuna.get_all_study_summaries(storage), key=lambda each: each.user_attrs.get("opened", 0)):
        arm = tuple((str(axis), str(value)) for axis, value in each.user_attrs.get("arm", []))
        if arm in plan.arms:
            latest[arm] = optuna.load_study(study_name=each.study_name, storage=storage)
    return {
        arm: _found(plan, arm, study)
        for arm, study in latest.items()
        # The config may search something else by now.
        if all(trial.distributions == plan.search.for_arm(arm) for trial in study.get_trials(deepcopy=False))
    }


def _found(plan: Plan, arm: Arm, study: Any) -> Found:
    assert plan.search is not None
    trials = study.get_trials(deepcopy=False)
    ended = len(trials) >= plan.search.trials and all(trial.state.is_finished() for trial in trials)
    if not ended or not any(trial.state.name == "COMPLETE" for trial in trials):
        return Found(trials)
    best = trials[study.best_trial.number]
    at = {key: best.params[key] for key, space in plan.search.for_arm(arm).items() if at_edge(space, best.params[key])}
    return Found(trials, best, [f"{key} {value:g}" for key, value in at.items()])
