"""Holds back what libraries tell about themselves while they do what was asked of them."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars and no report of newly initialised weights from transformers: what matters is checked by its caller."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def quiet_export() -> Iterator[None]:
    """No progress reports of torch's exporter, which go to standard output, and of what it calls."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "root", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
