"""Where a run's numbers go: TensorBoard and ``metrics.csv``, each step once, also when training is resumed."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_lora.files import write_text

#: Loggers of services whose runs have an id, and the argument that continues one.
RUN_ARGUMENTS = {"CometLogger": "experiment_key", "MLFlowLogger": "run_id", "WandbLogger": "id"}


def make_loggers(folder: Path, training: bool, steps: int) -> list[Logger]:
    """The loggers of a run.

    Args:
        folder: The run's folder.
        training: Whether the run trains; a test pass writes to TensorBoard only.
        steps: Steps that were done before; what was logged of later ones is logged again, and so left out. Without
            training, those that the weights have been trained for.
    """
    place: dict[str, Any] = {"save_dir": folder, "name": "", "version": "tensorboard", "default_hp_metric": False}
    if not training:
        return [EvaluationBoard(max(steps - 1, 0), **place)]
    if steps:
        place["purge_step"] = steps
    board = TensorBoardLogger(**place)
    kept = _rows_before(folder / "metrics.csv", steps) if steps else None
    numbers = MetricsFile(folder, name="", version="")
    if kept is not None:
        experiment = numbers.experiment  # Lightning's writer begins by removing the file
        experiment.metrics_keys = list(kept[0])
        text = io.StringIO()
        csv.writer(text, lineterminator="\r\n").writerows(kept)
        write_text(folder / "metrics.csv", text.getvalue())
    return [board, numbers]


def run_ids(loggers: Iterable[Logger]) -> dict[str, str]:
    """The ids of the runs that loggers of ``RUN_ARGUMENTS`` have started, by class."""
    return {type(each).__name__: str(each.version) for each in loggers if type(each).__name__ in RUN_ARGUMENTS}


class MetricsFile(CSVLogger):
    """``metrics.csv`` of a run, whose settings are in ``config.yaml``."""

    def log_hyperparams(self, params: Any = None) -> None:
        """Writes nothing."""


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
        """Logs them at the weights' step."""
        super().log_metrics(metrics, self.at)


def _rows_before(path: Path, steps: int) -> list[list[str]] | None:
    """The header and the rows of earlier steps; a row that a kill has cut off is none."""
    if not path.is_file():
        return None
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if not rows or "step" not in rows[0]:
        return None
    header, at = rows[0], rows[0].index("step")
    return [header, *(r for r in rows[1:] if len(r) == len(header) and r[at].isdigit() and int(r[at]) < steps)]
