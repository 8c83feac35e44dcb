"""``main.py predict`` over many Parquet files: the model is loaded once, memory does not grow with the rows.

Each input file has one output file of its name, with its rows in its order. Processes share the files by a claim on
each; an output that is there is the only record of what is done, so the same command resumes after any end. Rows are
predicted by the same model in the same order wherever that happens: in this process, in others, or on Ray.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lightning_lora.claims import share_tasks
from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.errors import UserError
from lightning_lora.export.weights import weights_labels
from lightning_lora.files import check_writable, remove_partial
from lightning_lora.inference.file_predictor import (
    Advance,
    FilePredictor,
    PredictJob,
    RefusedError,
    fingerprint,
    refuse_faults,
)
from lightning_lora.inference.input_rows import text_columns_of, warn_of_faults
from lightning_lora.inference.many_files import FileTask, find_files, is_done, plan_files, rows_without_prediction
from lightning_lora.inference.output import new_columns, warn_of_renamed
from lightning_lora.runs.folder import RunFolder
from lightning_lora.workers import Workers

#: Settings that predictions depend on, beside the weights.
MODEL_SETTINGS = ("base_model", "method", "adapter", "quantization")
DATA_SETTINGS = ("max_length", "truncation", "window_overlap", "padding")


def run_files(cli: ConfiguredRun) -> int:
    """Predict all files that have no output yet."""
    config, started = cli.config, time.monotonic()
    gpus = 0 if config.trainer.accelerator == "cpu" else None
    one_gpu_each = config.trainer.devices == 1
    workers = Workers(config.workers, config.executor, config.address, gpus=gpus, one_gpu_each=one_gpu_each)
    job = plan_job(cli)
    output = job.tasks[0].output.parent
    if config.bad_rows == "error":
        refuse_faults(job)
    check_writable(output)
    remove_partial(output)
    done = sum(is_done(task, job.settings) for task in job.tasks)
    warn_of_renamed(task.columns for task in job.tasks)
    left = [task for task in job.tasks if not task.output.exists()]
    rows = sum(task.rows for task in left)
    shown = config.trainer.enable_progress_bar is not False
    with cli.stop_request.listening(), rows_progress(rows, len(left), shown) as advance:
        if not left:
            failures = []
        elif workers.alone:
            failures = predict_files(job, cli, advance)
        else:
            failures = workers.run(partial(work, job), len(left), _watching(left, advance))
    report_failures(job, failures)
    rate = f", {rows / max(time.monotonic() - started, 1e-9):,.0f} rows/s" if rows else ""
    there = f" ({done} of them were there)" if done else ""
    files = f"{len(job.tasks)} file" + "s" * (len(job.tasks) != 1)
    print(f"{sum(task.rows for task in job.tasks):,} rows in {files} in {output}{there}{rate}", file=sys.stderr)
    return 0


def plan_job(cli: ConfiguredRun) -> PredictJob:
    """Find out and refuse what can be before the model is loaded."""
    config = cli.config
    text_columns = text_columns_of(config)
    checkpoint = RunFolder.open(Path(config.run)).checkpoint(config.checkpoint)
    labels = list(weights_labels(checkpoint))
    files = find_files(config.input, Path(config.output))
    new = new_columns(labels).names
    settings = cli.settings()
    kept = {f"data.{name}": settings["data"][name] for name in DATA_SETTINGS}
    kept |= {f"model.{name}": value for name, value in settings["model"].items() if name in MODEL_SETTINGS}
    kept |= {"trainer.precision": str(config.trainer.precision), "text_column": text_columns, "labels": labels}
    kept |= {"weights": fingerprint(checkpoint), **({"int8": True} if config.int8 else {})}
    return PredictJob(cli.words, plan_files(files, Path(config.output), text_columns, new), kept, text_columns)


def work(job: PredictJob) -> None:
    """Do the work of a worker.

    Raises:
        UserError: A file was refused; the others are done.
    """
    if refused := predict_files(job, ConfiguredRun("predict", job.words), lambda count: None):
        raise UserError(refused[0])


def predict_files(job: PredictJob, cli: ConfiguredRun, advance: Advance) -> list[str]:
    """Predict the files that no other process predicts, and wait for the others; return why files were refused.

    Args:
        job: All files.
        cli: The command line.
        advance: Called with numbers of rows that are done.

    Raises:
        UserError: Something is wrong with more than one file.
    """
    refused: list[str] = []
    loaded: list[FilePredictor] = []

    def predict(task: FileTask) -> None:
        if is_done(task, job.settings):  # by now
            advance(task.rows)
            return
        loaded[:] = loaded or [FilePredictor(cli, job)]
        try:
            loaded[0].write(task, advance)
        except RefusedError as error:
            refused.append(str(error))

    left = [task for task in job.tasks if not task.output.exists()]
    output = job.tasks[0].output.parent
    share_tasks(left, output, lambda task: task.output.name, predict)
    remove_partial(output)  # of a process that was killed in the meantime
    return refused


def report_failures(job: PredictJob, failures: list[str]) -> None:
    """Say how many rows have no prediction, and what went wrong.

    Raises:
        UserError: Files are not done.
    """
    written = [rows_without_prediction(task) for task in job.tasks if task.output.exists()]
    places = [place for _, named in written for place in named]
    warn_of_faults(places, sum(count for count, _ in written), sum(task.rows for task in job.tasks))
    undone = sum(not is_done(task, job.settings) for task in job.tasks)
    if undone:
        files = f"{undone} files are" if undone > 1 else "1 file is"
        reason = failures[0] if failures else "outputs were removed"
        raise UserError(f"{reason}; {files} not done, the same command resumes with what is left")
    if failures:
        print(f"warning: {failures[0]}; other workers have done its files", file=sys.stderr)


@contextmanager
def rows_progress(rows: int, files: int, shown: bool) -> Iterator[Advance]:
    """Yield the function that counts rows as done; a bar on standard error shows them, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # The longest texts of a chunk come first: what is left is told from minutes, not from the latest seconds.
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    progress = Progress(*columns, transient=True, console=console, speed_estimate_period=600, disable=hidden)
    task = progress.add_task(f"Predicting {files} files", total=rows)
    with progress:
        yield lambda count: progress.advance(task, count)


def _watching(tasks: list[FileTask], advance: Advance) -> Callable[[], None]:
    """Return what counts the rows of files that workers have finished."""
    waiting = list(tasks)

    def watch() -> None:
        for task in [task for task in waiting if task.output.exists()]:
            waiting.remove(task)
            advance(task.rows)

    return watch
