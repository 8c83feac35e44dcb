"""Experiment trackers beside TensorBoard (``fit --track``): MLflow, Weights & Biases, Trackio.

A run has one tracked run, whose id is in ``run.json``, so that ``fit --resume``, ``test`` and ``export`` continue it.
Where a tracker keeps its runs is its own affair: each reads the variables that its manual names, and is local without.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from lightning_lora.errors import UserError, first_line, print_warnings

#: The experiment (MLflow) or project (the others) of runs that belong to no ablation.
PROJECT = "lightning_lora"
#: The status of a tracked run by that of the run.
_ENDED = {"finished": "FINISHED", "interrupted": "KILLED"}
_OWN_NAME = re.compile(r"(?:arm-)?(.+?)__seed-(.+)")  # of a cell: its arm and its seed


class Tracker(Logger):
    """Writes to a tracked run. Where that fails there is one warning, and the run continues without it.

    Args:
        known: What ``run.json`` has of it: ``kind``, ``run`` (its name), ``group``, ``id``, ``store``; filled in once
            the tracked run has started.
    """

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__()
        self.known = known
        self.kind: str = known["kind"]
        self._made: Any = None
        self._failed = False

    @property
    def name(self) -> str:
        """The kind of tracker."""
        return self.kind

    @property
    def version(self) -> str | None:
        """The id of the tracked run, once it has started."""
        return self.known["id"]

    def attempt(self, work: Callable[[Any], None]) -> bool:
        """Call a function with the tracker's own logger; return whether that went well."""
        if self._failed:
            return False
        try:
            if self._made is None:
                self._made = _MAKERS[self.kind](self.known)
                _ = self._made.experiment  # begins the tracked run
                self.known["id"] = str(self._made.version)
            work(self._made)
        except Exception as error:  # trackers raise kinds of several libraries
            self._failed = True
            why = missing_package(self.kind) or first_line(error)
            print_warnings([f"--track {self.kind}: nothing more is written to it: {why}"])
        return not self._failed

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Write the settings."""
        self.attempt(lambda logger: logger.log_hyperparams(dict(params or {})))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics at a step."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self.attempt(lambda logger: logger.log_metrics(numbers, step))

    def log_files(self, paths: Iterable[Path], kind: str = "run") -> None:
        """Keep files or folders with the tracked run."""

        def write(logger: Any) -> None:
            for path in paths:
                if self.kind == "mlflow":
                    logger.experiment.log_artifact(self.version, str(path))
                else:
                    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.known['run']}-{path.name}")
                    logger.experiment.log_artifact(str(path), name=stem, type=kind)

        self.attempt(write)

    def close(self, status: str | None = None) -> None:
        """Write what is left, and end the tracked run as the run ended; None leaves that as it was."""

        def end(logger: Any) -> None:
            if self.kind != "mlflow":
                logger.experiment.finish()
            elif status is not None:
                logger.experiment.set_terminated(self.version, _ENDED.get(status, "FAILED"))

        if self._made is not None:
            self.attempt(end)


def check_package(kind: str) -> None:
    """Refuse a tracker whose package is missing."""
    if (missing := missing_package(kind)) is not None:
        raise UserError(f"--track {kind}: {missing}")


def new_tracked(kind: str, name: str, group: str | None) -> dict[str, Any]:
    """Return what is known of a tracked run that has not started: the tracker, the run's name, its group or None."""
    return {"kind": kind, "run": name, "group": group, "id": None, "store": None}


def missing_package(kind: str) -> str | None:
    """Return what to install; None where it is."""
    return None if importlib.util.find_spec(kind) else f"its package is missing: pip install {kind}"


def tracked_before(record: Mapping[str, Any]) -> Tracker | None:
    """Return the tracker of a run that has a tracked run, or None."""
    known = record.get("tracker")
    return Tracker(dict(known)) if known and known["id"] else None


def add_results(
    record: Mapping[str, Any], metrics: Mapping[str, float], step: int | None, files: Iterable[Path]
) -> None:
    """Write what a later command has measured to the tracked run, where there is one."""
    if (tracker := tracked_before(record)) is not None:
        tracker.log_metrics(metrics, step)
        tracker.log_files(files)
        tracker.close()


def _tags(known: Mapping[str, Any]) -> dict[str, str]:
    """The arm and the seed of an ablation's cell."""
    cell = _OWN_NAME.fullmatch(known["run"]) if known["group"] else None
    return {"arm": cell[1], "seed": cell[2]} if cell else {}


class _MLFlow(MLFlowLogger):
    """Lightning's logger, which leaves out the letters of other alphabets, and so mixes up the classes' metrics."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(key=name, value=value, timestamp=now, step=step or 0) for name, value in metrics.items()]
        self.experiment.log_batch(run_id=self.run_id, metrics=found)


def _mlflow(known: dict[str, Any]) -> MLFlowLogger:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by itself it waits for a server for four minutes
    import mlflow

    given = "MLFLOW_TRACKING_URI" in os.environ
    uri = known["store"] if known["store"] and not given else mlflow.get_tracking_uri()
    known["store"] = uri if uri.startswith("sqlite:") else None  # an address may hold a password
    experiment = known["group"] or os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return _MLFlow(experiment, known["run"], uri, tags=_tags(known), run_id=known["id"])


def _wandb(known: dict[str, Any]) -> WandbLogger:
    import wandb

    offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
    mode: dict[str, Any] = {"mode": "offline"} if offline else {}
    return WandbLogger(
        name=known["run"],
        id=known["id"],
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        save_dir=os.environ.get("WANDB_DIR", "."),
        group=known["group"],
        job_type=_tags(known).get("arm"),
        **mode,
    )


class _Trackio(Logger):
    """Lightning has no logger for Trackio."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        import trackio

        super().__init__()
        resume = "allow" if known["id"] else "never"
        self.run = trackio.init(PROJECT, known["run"], known["group"], resume=resume, embed=False)
        if known["id"]:
            self.run.config.clear()  # else it takes the place of the settings that are there
        self.experiment = trackio  # whose functions are of the run that was started last

    @property
    def name(self) -> str:
        return PROJECT

    @property
    def version(self) -> str:
        return str(self.run.id)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        self.run.config.update(params)  # sent with the first metrics

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)


_MAKERS: dict[str, Callable[[dict[str, Any]], Logger]] = {"mlflow": _mlflow, "wandb": _wandb, "trackio": _Trackio}
