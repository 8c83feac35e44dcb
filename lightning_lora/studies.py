"""Optuna's studies in a file: what a search and the run that is one of its trials share. Imports no torch."""

import warnings
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError, first_line

#: Optuna's class of each sampler and pruner.
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}
PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "halving": "SuccessiveHalvingPruner"}

#: Says to a run's process which trial it is, as JSON: the arguments of ``ReportTrial``.
TRIAL_VARIABLE = "LIGHTNING_LORA_TRIAL"


def import_optuna() -> Any:
    """Import Optuna, which then prints nothing.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("search: needs Optuna; pip install -c constraints.txt -e '.[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A list of target modules is a choice like any other: JSON, in which the journal is written, can hold it.
    warnings.filterwarnings("ignore", message="Choices for a categorical distribution")
    return optuna


def open_journal(path: Path) -> Any:
    """Open Optuna's storage in a file, which several processes may write, also over a network's filesystem.

    Raises:
        UserError: Optuna is not installed, or the file is damaged.
    """
    storages = import_optuna().storages
    try:
        return storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable journal of Optuna ({first_line(error)})") from error


def open_trial(study: Any, number: int) -> Any:
    """Open a trial of a study that is running, to report values and set attributes."""
    (found,) = [trial for trial in study.get_trials(deepcopy=False) if trial.number == number]
    return import_optuna().trial.Trial(study, found._trial_id)  # Optuna has no public way
