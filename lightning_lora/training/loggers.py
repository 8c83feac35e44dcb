"""Where a run's numbers go: TensorBoard and ``metrics.csv``, each step once, also when training is resumed."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_lora.files import write_text

#: Loggers of services whose runs have an id, and the argument that resumes one.
RUN_ARGUMENTS = {"CometLogger": "experiment_key", "MLFlowLogger": "run_id", "WandbLogger": "id"}


def make_loggers(folder: Path, training: bool, steps: int) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        folder: The run's folder.
        training: Whether the run trains; a test pass writes to TensorBoard only.
        steps: Steps that were done before; what was logged of later ones is logged again, and so left out. Without
            training, those that the weights have been trained for.
    """
    place: dict[str, Any] = {"save_dir": folder, "name": "", "version": "tensorboard", "default_hp_metric": False}
    if not training:
        return [EvaluationBoard(max(steps - 1, 0), **place)]
    if not steps:
        return [TensorBoardLogger(**place), MetricsFile(folder, name="", version="")]
    return [TensorBoardLogger(**place, purge_step=steps), resumed_metrics(folder, steps)]


def run_ids(loggers: Iterable[Logger]) -> dict[str, str]:
    """Return the ids of the runs that loggers of ``RUN_ARGUMENTS`` have started, by class."""
    return {type(each).__name__: str(each.version) for each in loggers if type(each).__name__ in RUN_ARGUMENTS}


def rejoin_loggers(settings: Any, ids: Mapping[str, str]) -> None:
    """Have loggers resume the runs that they have started, instead of starting others.

    Args:
        settings: The parsed setting ``trainer.logger``; changed in place.
        ids: What the record knows: the run of each class of loggers.
    """
    for logger in settings if isinstance(settings, list) else [settings]:
        name = str(getattr(logger, "class_path", "")).rpartition(".")[2]
        if name in ids:
            logger.init_args[RUN_ARGUMENTS[name]] = ids[name]


class MetricsFile(CSVLogger):
    """``metrics.csv`` of a run, whose settings are in ``config.yaml``."""

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing."""


class EvaluationBoard(TensorBoardLogger):
    """TensorBoard of a pass over trained weights, which would otherwise stand at step 0 of their curves.

    Args:
        at: The step that the weights were trained to, counted as Lightning does.
        place: Of ``TensorBoardLogger``.
    """

    def __init__(self, at: int, **place: Any) -> None:
        super().__init__(**place)
        self.at = at

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log them at the weights' step."""
        super().log_metrics(metrics, self.at)


def resumed_metrics(folder: Path, steps: int) -> MetricsFile:
    """Return the logger of a ``metrics.csv`` that keeps its whole rows of earlier steps."""
    path = folder / "metrics.csv"
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
    numbers = MetricsFile(folder, name="", version="")
    if rows and "step" in (header := rows[0]):
        at = header.index("step")
        kept = [r for r in rows[1:] if len(r) == len(header) and r[at].isdigit() and int(r[at]) < steps]
        numbers.experiment.metrics_keys = list(header)  # Lightning's writer begins by removing the file
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerows([header, *kept])
        write_text(path, text.getvalue())
    return numbers
