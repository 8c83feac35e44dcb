"""A run that is a trial of a search: says its validation metrics, and ends early where the search has it end."""

import json
import os
from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_lora import processes

VARIABLE = "LIGHTNING_LORA_TRIAL"


def _pruner(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import optuna

        return getattr(optuna.pruners, name)()

    return make


#: What makes the pruner of each name.
PRUNERS = {
    "none": _pruner("NopPruner"),
    "median": _pruner("MedianPruner"),
    "halving": _pruner("SuccessiveHalvingPruner"),
}


class ReportTrial(Callback):
    """Reports to Optuna after each validation pass.

    Args:
        journal: The file of Optuna's studies.
        study: The study's name.
        number: The trial's.
        metric: What is reported, a metric of validation.
        pruner: A key of ``PRUNERS``: a study that is loaded does not know its own.
    """

    def __init__(self, journal: str, study: str, number: int, metric: str, pruner: str) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.metric = metric
        storage = JournalStorage(JournalFileBackend(journal))
        loaded = optuna.load_study(study_name=study, storage=storage, pruner=PRUNERS[pruner]())
        found = next(trial for trial in loaded.get_trials(deepcopy=False) if trial.number == number)
        self.trial = optuna.trial.Trial(loaded, found._trial_id)

    def _report(self, value: float, step: int) -> bool:
        """Reports, and gives whether to end."""
        self.trial.report(value, step)
        if self.trial.should_prune():
            self.trial.set_user_attr("pruned", True)
            return True
        return False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports, and asks whether to go on."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics[f"val/{self.metric}"])
        end = trainer.is_global_zero and self._report(value, trainer.global_step)
        if any(processes.agreed(end)):  # several processes: one asks, all do
            trainer.should_stop = True


def trial_callbacks() -> list[Callback]:
    """The callback of the trial that this process is; none where it is no trial."""
    if not os.environ.get(VARIABLE):
        return []
    return [ReportTrial(**json.loads(os.environ[VARIABLE]))]
