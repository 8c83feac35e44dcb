"""The search of an ablation: Optuna proposes settings, a trial is a cell like any other, and the best is compared.

The studies lie in ``optuna.log`` in the ablation's folder: Optuna's journal, which several processes may write, also
over a network's filesystem, and ``optuna-dashboard logs/NAME/optuna.log`` opens. Each arm has a study of its own and
as many trials, with the first of the seeds. Imports no torch.

``Study.optimize`` would not do: it gives up a trial whose process was killed (only the storage in a database has a
heartbeat, which is no storage for a network's filesystem), and several processes run more trials than were asked for.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError, first_line
from lightning_lora.experiments.plan import Cell, Plan
from lightning_lora.experiments.search_space import SAMPLERS, SearchResult, at_edge, import_optuna
from lightning_lora.files import locked_folder
from lightning_lora.runs.folder import RunFolder, best_metrics
from lightning_lora.workers import share_tasks

JOURNAL = "optuna.log"


@dataclass
class Searcher:
    """Runs the trials of each arm.

    Args:
        plan: The plan, which has a search.
        folder: The ablation's folder.
        train: Trains a cell, or resumes it.
        determines: Gives what the trials of an arm, by its label, depend on beside their settings.
    """

    plan: Plan
    folder: Path
    train: Callable[[Cell], object]
    determines: Callable[[str], Any]

    def __post_init__(self) -> None:
        assert self.plan.search is not None
        self.search = self.plan.search
        self.storage = open_journal(self.folder / JOURNAL)
        self.studies = {arm: self._study(arm) for arm in self.plan.arms}

    def run(self) -> dict[str, SearchResult]:
        """Run the trials that are left, waiting for those of other processes; return what was found by arm."""
        trials = itertools.product(self.studies, range(self.search.trials))
        share_tasks(
            trials, self.folder, lambda trial: self.plan.trial_cell(trial[0], trial[1], {}).name, self._run_trial
        )
        return {arm: _found(self.plan, arm, study) for arm, study in self.studies.items()}

    def _study(self, arm: str) -> Any:
        how = [self.search.sampler, self.search.seed, self.plan.metric]
        depends = json.dumps([self.determines(arm), self.plan.space_of(arm), how], sort_keys=True, default=str)
        study = import_optuna().create_study(
            study_name=f"{arm} ({hashlib.sha256(depends.encode()).hexdigest()[:12]})",
            storage=self.storage,
            direction="maximize" if self.plan.higher_is_better else "minimize",
            load_if_exists=True,
        )
        study.set_user_attr("arm", arm)
        study.set_user_attr("opened", time.time())  # of several of one arm the last one is the report's
        return study

    def _run_trial(self, arm_and_number: tuple[str, int]) -> None:
        """Run a trial that this process holds, or resume what a killed process has left of it."""
        arm, number = arm_and_number
        study = self.studies[arm]
        with locked_folder(self.folder, None):
            while len(trials := study.get_trials(deepcopy=False)) <= number:
                how = self.search.sampler, f"{self.search.seed}/{arm}/{len(trials)}"
                study.add_trial(propose(*how, self.plan.space_of(arm), trials, self.plan.higher_is_better))
        trial = trials[number]
        if trial.state.is_finished():
            return
        shown = {key.rsplit(".", 1)[-1]: value for key, value in trial.params.items()}
        tried = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"{arm}, trial {number + 1} of {self.search.trials}: {tried}", flush=True)
        cell = self.plan.trial_cell(arm, number, trial.params)
        place = self.folder / "cells" / cell.name
        record: dict[str, Any] = {}
        for _ in range(2):  # one whose process was killed has not failed: it is resumed, once
            self.train(cell)
            record = RunFolder(place).read() if (place / "run.json").is_file() else {}
            value = best_metrics(record, "val").get(self.plan.metric)
            if record.get("status") == "finished" and value is not None:
                study.tell(number, value, skip_if_finished=True)
                return
            if record.get("status") == "failed":
                break
        reason = str(record.get("error") or f"its process was ended ({record.get('status')})")
        self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)  # Optuna has no public way
        study.tell(number, state=import_optuna().trial.TrialState.FAIL, skip_if_finished=True)


def propose(
    sampler: str, stream: str, space: Mapping[str, Any], trials: Sequence[Any], higher_is_better: bool = True
) -> Any:
    """Return a new trial, proposed in a copy of the study: a kill between two settings leaves no half of a trial.

    Each has a sampler with a seed of its own: what is proposed depends on the earlier trials alone, not on kills.

    Args:
        sampler: A key of ``SAMPLERS``.
        stream: What the sampler's seed is made from.
        space: Optuna's distribution of each parameter.
        trials: Optuna's earlier trials.
        higher_is_better: Whether more of their value is better.
    """
    optuna = import_optuna()
    digest = hashlib.sha256(stream.encode()).digest()
    made = getattr(optuna.samplers, SAMPLERS[sampler])(seed=int.from_bytes(digest[:4], "big"))
    copy = optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=made)
    copy.add_trials(trials)
    proposed = copy.ask(space)
    running = optuna.trial.TrialState.RUNNING
    return optuna.trial.create_trial(state=running, params=proposed.params, distributions=proposed.distributions)


def open_journal(path: Path) -> Any:
    """Open Optuna's storage in a file.

    Raises:
        UserError: Optuna is not installed, or the file is damaged.
    """
    storages = import_optuna().storages
    try:
        return storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable journal of Optuna ({first_line(error)})") from error


def read_found(plan: Plan, folder: Path) -> dict[str, SearchResult]:
    """Read what an ablation's search has found of each arm; nothing where there is none or it has not started.

    Raises:
        UserError: Optuna is not installed.
    """
    if plan.search is None or not (folder / JOURNAL).exists():
        return {}
    optuna, storage = import_optuna(), open_journal(folder / JOURNAL)
    found = {}
    for each in sorted(optuna.get_all_study_summaries(storage), key=lambda each: each.user_attrs.get("opened", 0)):
        arm = each.user_attrs.get("arm")
        if arm in plan.arms:
            study = optuna.load_study(study_name=each.study_name, storage=storage)
            trials = study.get_trials(deepcopy=False)
            # The config may search something else by now.
            same = all(trial.distributions == plan.space_of(arm) for trial in trials)
            found[arm] = _found(plan, arm, study) if same else SearchResult()
    return found


def _found(plan: Plan, arm: str, study: Any) -> SearchResult:
    trials = study.get_trials(deepcopy=False)
    ended = len(trials) >= plan.tried and all(trial.state.is_finished() for trial in trials)
    if not ended or not any(trial.state.name == "COMPLETE" for trial in trials):
        return SearchResult(trials)
    best = trials[study.best_trial.number]
    spaces = plan.space_of(arm).items()
    edges = [f"{key} {best.params[key]:g}" for key, space in spaces if at_edge(space, best.params[key])]
    return SearchResult(trials, best, edges)
