"""A run that is a trial of a search: reports its validation metrics, and stops early where the pruner says so.

Optuna's own callback for Lightning reports once an epoch and ends a pruned trial by an exception; here a trial reports
after each validation pass, and a pruned one ends as a whole run, with its checkpoints and its record.
"""

import json
import os
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from lightning_lora import processes
from lightning_lora.studies import PRUNERS, TRIAL_VARIABLE, import_optuna, open_journal, open_trial


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
        optuna = import_optuna()
        self.metric = metric
        chosen = getattr(optuna.pruners, PRUNERS[pruner])()
        loaded = optuna.load_study(study_name=study, storage=open_journal(Path(journal)), pruner=chosen)
        self.trial = open_trial(loaded, number)

    def report(self, value: float, step: int) -> bool:
        """Report a value and return whether the trial is pruned."""
        self.trial.report(value, step)
        if self.trial.should_prune():
            self.trial.set_user_attr("pruned", True)
            return True
        return False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric; stop training where the trial is pruned."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics[f"val/{self.metric}"])
        pruned = trainer.is_global_zero and self.report(value, trainer.global_step)
        if any(processes.agreed(pruned)):  # several processes: one asks, all stop
            trainer.should_stop = True


def trial_callbacks() -> list[Callback]:
    """Return the callback of the trial that this process is; none where it is no trial."""
    if not os.environ.get(TRIAL_VARIABLE):
        return []
    return [ReportTrial(**json.loads(os.environ[TRIAL_VARIABLE]))]
