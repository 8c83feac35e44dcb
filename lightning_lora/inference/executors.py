"""``main.py predict`` over many Parquet files: the model is loaded once, memory does not grow with the rows.

Each input file has one output file of its name, with its rows in its order. Processes share the files among them by a
claim on each; what is done is what is there, so the same command goes on after any end. Rows are predicted by the
same model in the same order wherever that happens: in this process, in several (``--workers``) or by Ray.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from lightning_lora.children import child_context, end_with_the_parent
from lightning_lora.cluster import import_ray, ray_cluster
from lightning_lora.config.lightning_cli import ConfiguredRun
from lightning_lora.errors import BusyError, UserError
from lightning_lora.export.weights import weights_labels
from lightning_lora.files import check_writable, remove_partial
from lightning_lora.inference.file_predictor import Advance, Job, Predictor, RefusedError, fingerprint, refuse_faults
from lightning_lora.inference.input_rows import text_columns_of, warn_of_faults
from lightning_lora.inference.many_files import (
    Shard,
    claimed,
    find_files,
    is_done,
    plan_shards,
    rows_without_prediction,
)
from lightning_lora.inference.output import new_columns, warn_of_renamed
from lightning_lora.interrupts import Interrupted, StopRequest
from lightning_lora.runs.folder import RunFolder

EXECUTORS = ("local", "ray")
#: Settings that predictions depend on, beside the weights.
MODEL_SETTINGS = ("base_model", "method", "adapter", "quantization")
DATA_SETTINGS = ("max_length", "truncation", "window_overlap", "padding")
_POLL_S = 0.2
#: How often a file is begun again whose process or machine was lost.
RAY_RETRIES = 3


def run_files(cli: ConfiguredRun) -> int:
    """Predicts all files that have no output yet."""
    config = cli.config
    if config.executor not in (None, *EXECUTORS):
        raise UserError(f"--executor: '{config.executor}' is not one of {', '.join(EXECUTORS)}")
    if config.address and config.executor != "ray":
        raise UserError("--address: only --executor ray has one; leave it out")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"--workers: 1 or more are needed, got {config.workers}")
    if config.executor == "ray":
        import_ray(config.address)  # or say that it is not there, before anything is made
    job = plan_job(cli)
    output = job.shards[0].output.parent
    if config.bad_rows == "error":
        refuse_faults(job)
    check_writable(output)
    remove_partial(output)
    done = sum(is_done(shard, job.settings) for shard in job.shards)
    warn_of_renamed(shard.columns for shard in job.shards)
    began = time.monotonic()
    open_shards = [shard for shard in job.shards if not shard.output.exists()]
    rows = sum(shard.rows for shard in open_shards)
    shown = config.trainer.enable_progress_bar is not False
    with cli.stop_request.listening(), rows_progress(rows, len(open_shards), shown) as advance:
        if not open_shards:
            refused = []
        elif config.executor == "ray":
            with ray_cluster(config.address) as ray:
                refused = predict_by_ray(ray, job, open_shards, advance, config.workers)
        elif (config.workers or 1) > 1:
            refused = predict_by_workers(job, min(config.workers, len(open_shards)), advance)
        else:
            refused = predict_shards(job, Predictor(cli, job), advance, bytearray(len(job.shards)))
    written = [rows_without_prediction(shard) for shard in job.shards if shard.output.exists()]
    places = [place for _, named in written for place in named]
    warn_of_faults(places, sum(count for count, _ in written), sum(shard.rows for shard in job.shards))
    if refused:
        also = f" ({len(refused) - 1} more files were refused; without them the others are done)" if refused[1:] else ""
        raise UserError(refused[0] + also)
    rate = f", {rows / max(time.monotonic() - began, 1e-9):,.0f} rows/s" if rows else ""
    there = f" ({done} of them were there)" if done else ""
    files = f"{len(job.shards)} file" + "s" * (len(job.shards) != 1)
    print(f"{sum(s.rows for s in job.shards):,} rows in {files} in {output}{there}{rate}", file=sys.stderr)
    return 0


def plan_job(cli: ConfiguredRun) -> Job:
    """Everything that can be known and refused before the model is loaded."""
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
    return Job(cli.words, plan_shards(files, Path(config.output), text_columns, new), kept, text_columns)


def predict_shards(job: Job, predictor: Predictor, advance: Advance, refused: MutableSequence[int]) -> list[str]:
    """Predicts the files that nobody else does, and waits for those; what was said of files that are refused.

    Args:
        job: All files.
        predictor: The model.
        advance: Called with numbers of rows that are done, and whether by this process.
        refused: A flag for each file; other processes may share them.

    Raises:
        UserError: Something is wrong with more than one file.
    """
    said: list[str] = []
    left = [i for i, shard in enumerate(job.shards) if not shard.output.exists()]
    while left:
        busy = []
        for i in left:
            shard = job.shards[i]
            if refused[i] or is_done(shard, job.settings):
                advance(shard.rows, False)
                continue
            try:
                with claimed(shard):
                    if not is_done(shard, job.settings):  # by now
                        predictor.write(shard, advance)
                    else:
                        advance(shard.rows, False)
            except BusyError:
                busy.append(i)
            except RefusedError as error:
                refused[i] = 1
                said.append(str(error))
        if len(busy) == len(left):
            time.sleep(_POLL_S)
            remove_partial(job.shards[0].output.parent)
        left = busy
    return said


@contextmanager
def rows_progress(rows: int, files: int, shown: bool) -> Iterator[Advance]:
    """Gives the function that counts n rows as done; a bar on standard error shows them, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # The longest texts of a chunk come first: what is left is told from minutes, not from the latest seconds.
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    progress = Progress(*columns, transient=True, console=console, speed_estimate_period=600, disable=hidden)
    task = progress.add_task(f"Predicting {files} files", total=rows)
    with progress:
        yield lambda count, own: progress.advance(task, count)


def predict_by_workers(job: Job, workers: int, advance: Advance) -> list[str]:
    """The same in several processes of this machine, which share its threads and GPUs.

    What a worker that was killed had begun is done by the others.

    Raises:
        UserError: What a worker found wrong, where that leaves files undone.
    """
    context = child_context()
    refused = context.RawArray("b", len(job.shards))
    # Each writes its own count: a lock would stay shut behind a process that is killed while it holds it.
    rows = context.RawArray("q", workers)
    said: list[str] = []
    failed: list[str] = []
    running: dict[Any, Any] = {}  # what each says -> the process
    threads = max(1, torch.get_num_threads() // workers)
    shown = 0
    try:
        for number in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, number, threads, rows, refused, sender))
            process.start()
            sender.close()
            running[receiver] = process
        while running:
            ready: list[Any] = connection.wait(list(running), timeout=_POLL_S)
            for receiver in ready:
                try:
                    kind, message = receiver.recv()
                except EOFError:
                    process = running.pop(receiver)
                    process.join()
                    if process.exitcode:
                        failed.append(f"a worker ended with status {process.exitcode}")
                else:
                    (said if kind == "refused" else failed).append(message)
            counted = min(sum(rows), sum(shard.rows for shard in job.shards))
            advance(counted - shown, True)
            shown = counted
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    undone = sum(not (refused[i] or is_done(shard, job.settings)) for i, shard in enumerate(job.shards))
    if undone:
        raise UserError(f"{failed[0]}; {undone} files are not done, the same command resumes with them")
    if failed:
        print(f"warning: {failed[0]}; the others have done its files", file=sys.stderr)
    return said


def _work(job: Job, number: int, threads: int, rows: Any, refused: Any, sender: Any) -> None:
    """One worker: what it says goes to its parent, which shows it as its own."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_the_parent, daemon=True).start()

    def advance(count: int, own: bool) -> None:
        rows[number] += count * own

    status = 1
    try:
        with StopRequest().listening():
            predictor = Predictor(_worker_cli(job, number), job)
            for message in predict_shards(job, predictor, advance, refused):
                sender.send(("refused", message))
        status = 0
    except UserError as error:
        sender.send(("failed", str(error)))
        status = error.status
    except Interrupted as error:
        status = error.status
    except Exception as error:
        sender.send(("failed", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"))
    sender.close()
    os._exit(status)


def _worker_cli(job: Job, number: int) -> ConfiguredRun:
    """The command line, for the n-th worker: where there are several GPUs, each takes its own."""
    cli = ConfiguredRun("predict", job.words)
    trainer = cli.config.trainer
    if trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() and trainer.devices == 1:
        trainer.devices = [number % torch.cuda.device_count()]
    return cli


def predict_by_ray(ray: Any, job: Job, shards: list[Shard], advance: Advance, workers: int | None) -> list[str]:
    """The same on a Ray cluster.

    The rows of Ray Data's table are the files, not their rows: ``read_parquet`` with ``map_batches`` cuts files up and
    puts them together as it likes, so that neither outputs of the inputs' names and order nor going on by file
    could be had from it. Ray Data still shares the files out, adds actors up to the number of CPUs or GPUs, and does a
    file again whose actor or machine is lost. All machines must see the same folders and have this package.

    Args:
        ray: The module, which has joined the cluster.
        job: All files.
        shards: The files without an output.
        advance: Called with numbers of rows that are done.
        workers: Actors at most; by default one for each GPU, or else each CPU of the cluster.

    Raises:
        UserError: The cluster has no place for an actor, or the same file ended ``RAY_RETRIES`` more of them.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what a person can act on is raised
    context.execution_no_progress_timeout_s = -1  # none: a file may take hours
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0)) if ConfiguredRun("predict", job.words).config.trainer.accelerator != "cpu" else 0
    places = gpus or int(cluster.get("CPU", 0))
    if not places:
        raise UserError("--executor ray: no node of the cluster has a CPU to give")
    most = min(workers or math.inf, len(shards), places)
    numbers = {shard.output: number for number, shard in enumerate(job.shards)}
    files = ray.data.from_items([{"index": numbers[s.output]} for s in shards], override_num_blocks=len(shards))
    results = files.map(
        RayPredictor,
        fn_constructor_args=(job, str(Path.cwd())),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=int(most), initial_size=int(most), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        max_task_retries=RAY_RETRIES,
    )
    said = []
    try:
        for result in results.iter_rows():
            advance(result["rows"], True)
            if result["failed"]:
                raise UserError(result["failed"])
            said += [result["refused"]] if result["refused"] else []
    except ray.exceptions.RayError as error:
        left = [shard.source.name for shard in shards if not shard.output.exists()]
        raise UserError(
            f"--executor ray: the same file ended {RAY_RETRIES + 1} processes (is memory short?); it is one of "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}; the same command resumes with what is left"
        ) from error
    return said


class RayPredictor:
    """An actor of Ray Data: the model, loaded when the first file comes.

    Args:
        job: All files.
        folder: The folder that the command was called in, which its paths are relative to.
    """

    def __init__(self, job: Job, folder: str) -> None:
        self.job = job
        self.folder = folder
        self.predictor: Predictor | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predicts the file of a row; what was wrong with it is said in the result, as errors are not for retrying."""
        shard = self.job.shards[row["index"]]
        result = {"rows": shard.rows, "refused": "", "failed": ""}
        try:
            if self.predictor is None:
                with suppress(OSError):
                    os.chdir(self.folder)
                torch.set_num_threads(1)  # as many as it has CPUs of the cluster
                self.predictor = Predictor(ConfiguredRun("predict", self.job.words), self.job)
            with claimed(shard, wait=True):
                remove_partial(shard.output.parent)
                if not is_done(shard, self.job.settings):
                    self.predictor.write(shard, lambda count, own: None)
        except RefusedError as error:
            result["refused"] = str(error)
        except UserError as error:
            result["failed"] = str(error)
        return result
