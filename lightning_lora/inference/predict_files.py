"""``main.py predict`` over many Parquet files: the model is loaded once, memory does not grow with the rows.

Each input file has one output file of its name, with its rows in its order. Processes share the files by a claim on
each; an output that is there is the only record of what is done, so the same command resumes after any end. Rows are
predicted by the same model in the same order wherever that happens: in this process, in others, or on Ray.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lightning_lora.config.configured_run import ConfiguredRun, check_base
from lightning_lora.data.pairs import is_pair
from lightning_lora.errors import UserError
from lightning_lora.export.weights import trained_for
from lightning_lora.files import atomic_path, check_writable, remove_partial
from lightning_lora.inference.input_rows import SHOWN_PLACES, text_columns_of, warn_of_faults
from lightning_lora.inference.loaded_run import LoadedRun, assemble
from lightning_lora.inference.many_files import (
    METADATA_KEY,
    FileTask,
    RefusedError,
    find_files,
    finished,
    plan_files,
    read_rows,
    reading,
)
from lightning_lora.inference.output import new_columns, warn_of_renamed
from lightning_lora.runs.folder import RunFolder
from lightning_lora.workers import Workers, share_tasks

#: Settings that predictions depend on, beside the weights.
MODEL_SETTINGS = ("base_model", "method", "adapter", "quantization", "pooling")
DATA_SETTINGS = ("max_length", "truncation", "window_overlap", "padding")
#: Takes a number of rows that are done.
Advance = Callable[[int], object]


@dataclass(frozen=True)
class PredictJob:
    """All files that are to be predicted by a command line, and what all outputs are made with, for any process."""

    argv: list[str]
    tasks: list[FileTask]
    settings: Mapping[str, Any]

    @property
    def left(self) -> list[FileTask]:
        """The files that have no output yet."""
        return [task for task in self.tasks if not task.output.exists()]


def run_files(cli: ConfiguredRun) -> int:
    """Predict all files that have no output yet."""
    config, started = cli.config, time.monotonic()
    gpus = 0 if config.trainer.accelerator == "cpu" else None
    one_gpu_each = config.trainer.devices == 1
    workers = Workers(config.workers, config.executor, config.address, gpus=gpus, one_gpu_each=one_gpu_each)
    job = plan_job(cli)
    if config.bad_rows == "error":
        columns = job.settings["text_column"]
        for task in job.tasks:
            for rows in read_rows(task, columns, columns, is_pair(config.data.truncation)):
                rows.refuse_faults()
    output = job.tasks[0].output.parent
    check_writable(output)
    remove_partial(output)
    done = sum(finished(task, job.settings) is not None for task in job.tasks)
    warn_of_renamed(task.columns for task in job.tasks)
    left, failures = job.left, list[str]()
    left_rows = sum(task.rows for task in left)
    hidden = True if config.trainer.enable_progress_bar is False else None  # None: shown on a terminal only
    with cli.stop_request.listening(), tqdm(total=left_rows, unit=" rows", leave=False, disable=hidden) as bar:
        if workers.alone:
            failures = predict_files(job, cli, bar.update)
        elif left:
            failures = workers.run(partial(work, job), len(left), _watching(left, bar.update))
    report(job, failures)
    rate = f", {left_rows / max(time.monotonic() - started, 1e-9):,.0f} rows/s" if left_rows else ""
    there = f" ({done} of them were there)" if done else ""
    files = f"{len(job.tasks)} file" + "s" * (len(job.tasks) != 1)
    print(f"{sum(task.rows for task in job.tasks):,} rows in {files} in {output}{there}{rate}", file=sys.stderr)
    return 0


def plan_job(cli: ConfiguredRun) -> PredictJob:
    """Find out and refuse what can be before the model is loaded."""
    config = cli.config
    text_columns = text_columns_of(config)
    checkpoint = RunFolder.open(Path(config.run)).checkpoint(config.checkpoint)
    labels = trained_for(checkpoint)
    files = find_files(config.input, Path(config.output))
    tasks = plan_files(
        files, Path(config.output), text_columns, new_columns(labels["label_names"], labels["task"]).names
    )
    settings = cli.settings()
    made_with = {f"data.{name}": settings["data"][name] for name in DATA_SETTINGS}
    made_with |= {f"model.{name}": settings["model"][name] for name in MODEL_SETTINGS}
    made_with |= {
        "trainer.precision": str(config.trainer.precision),
        "text_column": text_columns,
        "labels": labels["label_names"],
        "task": labels["task"],
        "weights": fingerprint(checkpoint),
        "int8": config.int8,
    }
    return PredictJob(cli.argv, tasks, made_with)


def work(job: PredictJob) -> None:
    """Do the work of a worker; a file that was refused is said after the others are done."""
    if refused := predict_files(job, ConfiguredRun("predict", job.argv), lambda count: None):
        raise UserError(refused[0])


def predict_files(job: PredictJob, cli: ConfiguredRun, advance: Advance) -> list[str]:
    """Predict the files that no other process predicts, and wait for the others; return why files were refused."""
    refused: list[str] = []
    loaded: LoadedRun | None = None

    def predict(task: FileTask) -> None:
        nonlocal loaded
        if finished(task, job.settings):  # by now, by another process
            advance(task.rows)
            return
        loaded = loaded or load_planned(cli, job)
        try:
            predict_file(loaded, job, task, advance)
        except RefusedError as error:
            refused.append(str(error))

    output = job.tasks[0].output.parent
    share_tasks(job.left, output, lambda task: task.output.name, predict)
    remove_partial(output)  # of a process that was killed in the meantime
    return refused


def predict_file(loaded: LoadedRun, job: PredictJob, task: FileTask, advance: Advance) -> None:
    """Predict one file; its output is there whole or not at all.

    Raises:
        RefusedError: The file cannot be read.
        UserError: The output cannot be written.
    """
    with reading(task.source):
        source = pq.read_schema(task.source)
    new = new_columns(job.settings["labels"], job.settings["task"])
    schema = pa.schema(source.field(n).with_name(name) if n else new.field(name) for name, n in task.columns.items())
    empty, places = 0, list[str]()
    tokenized = (
        (rows, loaded.dataset(rows.usable), rows.table.columns)
        for rows in read_rows(task, job.settings["text_column"], pair=is_pair(loaded.input_format.keep))
    )
    with atomic_path(task.output) as staging, pq.ParquetWriter(staging, schema) as writer:
        for rows, dataset, columns in _one_ahead(tokenized):
            predicted = rows.predicted(loaded.predict_dataset(dataset))
            arrays = [columns[n] if n else predicted[name] for name, n in task.columns.items()]
            writer.write_table(pa.table(arrays, schema=schema))
            empty += len(rows.faults)
            places = [*places, *rows.faulty_places][:SHOWN_PLACES]
            advance(len(rows.texts))
        stamp = {"input": task.stamp, "settings": job.settings, "rows_without_text": empty, "places": places}
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(stamp)})


def load_planned(cli: ConfiguredRun, job: PredictJob) -> LoadedRun:
    """Load the model that a job was planned with; weights that are others now are refused."""
    checkpoint = RunFolder.open(Path(cli.config.run)).checkpoint(cli.config.checkpoint)
    cli.config.trainer.enable_progress_bar = False  # there is one for all files
    loaded = load_for(cli, checkpoint, {"label_names": job.settings["labels"], "task": job.settings["task"]})
    if fingerprint(checkpoint) != job.settings["weights"]:
        raise UserError(f"{checkpoint} has changed since the command started (is it still trained?)")
    return loaded


def load_for(cli: ConfiguredRun, checkpoint: Path, labels: Mapping[str, Any]) -> LoadedRun:
    """Load the run of a command line with its settings; ``labels`` are those of ``trained_for``."""
    config = cli.config
    loaded = assemble(config.model.as_dict(), config.data, checkpoint, labels, cli.make_trainer(None))
    if config.int8:
        loaded.model.check_int8(str(config.trainer.precision))
        loaded.model.int8 = True
    if any(word.partition("=")[0] == "--data.max_length" for word in cli.argv):
        check_base(loaded.model, loaded, None)
    return loaded


def fingerprint(checkpoint: Path) -> str:
    """Return the SHA-256 of the weights: of the file, or of all files of an exported adapter's folder."""
    digest = hashlib.sha256()
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file()) if checkpoint.is_dir() else [checkpoint]
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def report(job: PredictJob, failures: list[str]) -> None:
    """Say how many rows have no prediction, and what went wrong; refuse to end well where files are not done."""
    stamps = [stamp for task in job.tasks if (stamp := finished(task, job.settings))]
    places = [place for stamp in stamps for place in stamp["places"]]
    warn_of_faults(places, sum(s["rows_without_text"] for s in stamps), sum(task.rows for task in job.tasks))
    if undone := len(job.tasks) - len(stamps):
        files = f"{undone} files are" if undone > 1 else "1 file is"
        reason = failures[0] if failures else "outputs were removed"
        raise UserError(f"{reason}; {files} not done, the same command resumes with what is left")
    if failures:
        print(f"warning: {failures[0]}; other workers have done its files", file=sys.stderr)


def _watching(tasks: list[FileTask], advance: Advance) -> Callable[[], None]:
    """Return what counts the rows of files that workers have finished."""
    waiting = list(tasks)

    def watch() -> None:
        for task in [task for task in waiting if task.output.exists()]:
            waiting.remove(task)
            advance(task.rows)

    return watch


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the items, each made while the one before is used: tokens of the next rows, while the model runs."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
