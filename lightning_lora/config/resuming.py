"""How ``fit --resume`` continues a run: from which state, what may be changed, and what that changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.config.settings import LIMITS
from lightning_lora.errors import UserError, print_warnings
from lightning_lora.runs.checkpoints import ResumePoints
from lightning_lora.runs.folder import RunFolder, as_configured
from lightning_lora.training.module import TextClassifier
from lightning_lora.training.optim import same_schedule


def was_started(folder: RunFolder, settings: Mapping[str, Any]) -> bool:
    """Whether a run was started in the folder with these settings."""
    return folder.config.is_file() and as_configured(folder.settings(), folder.read_if_written()) == settings


def find_state(folder: RunFolder, record: dict[str, Any]) -> Path | None:
    """Return the last state of a run that is whole; None where none was saved.

    Raises:
        UserError: All are damaged, or the run has finished and kept none.
    """
    finished = record.get("status") == "finished"
    try:
        point, damage = ResumePoints(folder.checkpoints).find()
    except UserError as error:
        if not finished:
            folder.write({**record, "status": "failed", "error": str(error)})
        raise
    print_warnings([damage] if damage else [])
    if finished and point is None:
        raise UserError(f"--resume: {folder.path} has no last.ckpt to continue from; start a new run")
    return point


def changed_limits(folder: RunFolder, trainer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the limits that are other than they were, by name: before, and now.

    Args:
        folder: The run's, whose config holds them as they were.
        trainer: The trainer's settings that are asked for.
    """
    before = folder.settings()["trainer"]
    return {f"trainer.{name}": [before[name], trainer[name]] for name in LIMITS if before[name] != trainer[name]}


def check_limits(method: str, trainer: Mapping[str, Any], state: Mapping[str, Any], folder: RunFolder) -> None:
    """Refuse to resume a run by other limits that leave nothing to do, or that its method cannot change.

    Args:
        method: The run's.
        trainer: The trainer's settings that are asked for.
        state: The checkpoint to continue from.
        folder: The run's folder.

    Raises:
        UserError: The new limits are reached already, or the method's schedule cannot be made longer.
    """
    if method == "adalora":
        raise UserError(f"--resume: {folder.path} has planned adalora's ranks for its number of steps; start a new run")
    for name, done in (("max_epochs", int(state["epoch"])), ("max_steps", int(state["global_step"]))):
        limit = trainer[name]
        if limit is not None and 0 <= limit <= done:
            raise UserError(f"--trainer.{name}: {limit}, but {folder.path} has done {done} already; give more")


def warn_of_schedule(model: TextClassifier) -> None:
    """Warn where a run that is resumed by other limits comes to another result than one started with them."""
    before, now = model.planned_before, model.planned_steps
    if before is None or now in (None, before) or same_schedule(model.schedule, model.warmup_ratio, before, now):
        return
    plan = f"the learning rate ({model.schedule}, warm-up {model.warmup_ratio:g}) was planned for {before} steps"
    then = f"and is planned for {now} from here on; the result differs from that of a run started with {now}"
    print_warnings([f"{plan} {then}"])


def warn_of_epoch(state: Mapping[str, Any]) -> None:
    """Warn where a run ended within an epoch (max_steps, max_time), as the next epoch begins then."""
    progress = state.get("loops", {}).get("fit_loop", {})
    epochs, batches = (progress.get(key, {}) for key in ("epoch_progress", "epoch_loop.batch_progress"))
    ended = epochs and epochs["current"]["ready"] == epochs["current"]["processed"]
    if ended and not batches["is_last_batch"]:
        where = f"the run ended {batches['current']['ready']} batches into an epoch, and the next one begins now"
        print_warnings([f"{where}; the result differs from that of a longer run"])
