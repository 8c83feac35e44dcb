"""What the console shows: a progress bar with time left, and only messages that a person can act on."""

import logging
import time
import warnings
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_lora.evaluation.metric_table import SHOWN

#: Messages of libraries about themselves, each expected here; everything else is still shown.
_EXPECTED = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*`is_gradient_checkpointing` is deprecated.*",
    r".*Experiment logs directory .* exists and is not empty.*",  # the run folder, made a moment before
    r".*Checkpoint directory .* exists and is not empty.*",  # the same, where a run resumes
    r".*does not have many workers.*",  # batches are cut from arrays in memory: see data/datamodule.py
    r".*You are using a custom batch sampler.*",  # it gives every row once: see data/batching.py
    r".*It is recommended to use `self.log\(.*sync_dist=True\)` when logging.*",  # the metrics are of all processes
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*could not find the monitored key in the returned metrics.*",  # no validation pass yet: fit says so at its end
    r".*Please add the following callbacks: \['Timer'\]",  # the time limit of a trial, which is none of the run's
    r".*will save all (targets and predictions|data points) in.* buffer.*",  # as the project itself does
    r".*(No positive samples found|Average precision score for one or more).*",  # data says of which labels
    r".*variance of predictions or target is close to zero.*",  # nearly one number for all rows, as the metrics show
    r".*AMP with fp16 is not supported on CPU.*",  # refused in a line of its own
)


def quiet_libraries() -> None:
    """Silence what libraries say about themselves."""
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    # Device, precision and sizes are printed by the commands themselves, on lines of their own.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # What callbacks of a config are asked to say: a summary of the model, or to be verbose.
    shared = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    shared.addFilter(_is_asked_for)
    for logger in (shared, logging.getLogger("lightning.pytorch.callbacks")):
        logger.setLevel(logging.INFO)


def _is_asked_for(record: logging.LogRecord) -> bool:
    """Whether a message is no news of Lightning's own; of the time limit ``fit`` says it."""
    return record.levelno > logging.INFO or record.filename == "model_checkpoint.py"


class Progress(RichProgressBar):
    """Rich progress bars with time left, on standard error: standard output is for results."""

    def __init__(self) -> None:
        # By default a thread draws it 100 times a second, for which steps on a CPU wait (5% of their time).
        super().__init__(refresh_rate=4, console_kwargs={"stderr": True})
        self._updated_at = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar no more often than it is drawn: the metrics beside it take a tenth of what a step costs in Python."""
        if time.monotonic() - self._updated_at >= 1 / self.refresh_rate or trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._updated_at = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics beside the bar, by short names, which a narrow terminal has room for."""
        short = {
            "train/loss_step": "loss",
            **{f"{s}/{names[0]}": s for s in ("val", "test") for names in SHOWN.values()},
        }
        metrics = super().get_metrics(trainer, pl_module)
        return {short.get(name, name): value for name, value in metrics.items() if name != "v_num"}
