"""``main.py fit``: train or resume training, keep the best and the last checkpoint, write the record."""

import copy
import gc
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora.commands.fit_output import print_result, print_run
from lightning_lora.config.configured_run import ConfiguredRun, row_columns
from lightning_lora.errors import UserError, print_warnings
from lightning_lora.evaluation.costs import parameter_counts, peak_memory_mb
from lightning_lora.files import locked_folder, remove_partial, write_text
from lightning_lora.interrupts import Interrupted, requeue, requeued
from lightning_lora.models.head import scale_output
from lightning_lora.models.methods import BASELINES, find_method
from lightning_lora.processes import is_rank_zero
from lightning_lora.program import command_line
from lightning_lora.runs.checkpoints import ResumePoints, read_checkpoint
from lightning_lora.runs.folder import RunFolder, as_yaml, new_record, now
from lightning_lora.training.guard import NotFiniteError
from lightning_lora.training.length import describe_length, stopped_by
from lightning_lora.training.loggers import run_ids
from lightning_lora.training.module import TextClassifier
from lightning_lora.training.saving import StateSaver, describe_best


def run(argv: list[str]) -> int:
    """Train one run, or resume one; once its first step has started, a record is left whatever happens."""
    started = time.monotonic()
    cli = ConfiguredRun("fit", argv)
    if cli.config.resume is None and cli.config.name and requeued():
        from lightning_lora.config.resuming import was_started

        folder = RunFolder(Path(cli.config.logs_dir) / cli.config.name)
        if was_started(folder, cli.settings()):
            cli = ConfiguredRun("fit", ["--resume", str(folder.path)])  # the scheduler gives the same command again
    check_tracking(cli)
    if cli.config.budget is not None:
        from lightning_lora.commands.fit_budget import tune

        tune(cli, argv, source_stem(cli), started)
        return 0
    if (status := cli.start_processes()) is not None:
        return status
    if not is_rank_zero():
        fit_nonzero_rank(cli)
    elif cli.config.resume is not None:
        resume(cli, argv)
    else:
        start(cli, argv)
    return 0


def check_tracking(cli: ConfiguredRun) -> None:
    """Refuse options of tracking that would be ignored, and a tracker whose package is missing.

    Raises:
        UserError: An option would be ignored, or a package is missing.
    """
    if cli.config.track is None:
        if cli.config.track_group is not None:
            raise UserError("--track_group: nothing is tracked; give --track too")
        return
    if cli.config.budget is not None:
        raise UserError("--track: the trials of --budget are not tracked; leave it out")
    if cli.config.trainer.logger is False:
        raise UserError("--track: nothing is logged with trainer.logger false; leave one out")
    from lightning_lora.training.trackers import check_package

    check_package(cli.config.track)


def start(cli: ConfiguredRun, argv: list[str]) -> None:
    """Train a new run; where no step was started, its folder is removed, so that its name is free again."""
    stem = f"{source_stem(cli)}-{cli.config.model.method}"
    folder = RunFolder.create(Path(cli.config.logs_dir), cli.config.name, stem, as_yaml(cli.settings()))
    try:
        with locked(folder):
            print(f"run: {folder.path}")
            record = first_record(cli, folder, argv)
            if cli.config.track is not None:
                from lightning_lora.training.trackers import new_tracked

                record["tracker"] = new_tracked(cli.config.track, folder.path.name, cli.config.track_group)
            train(cli, folder, record, None)
    except Exception:
        if not (cli.has_begun or any(folder.checkpoints.glob("*.ckpt"))):
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def source_stem(cli: ConfiguredRun) -> str:
    """Return what a run without a name is called after."""
    source = cli.config.data.source
    return Path(source).stem if isinstance(source, str) else "files"


def first_record(cli: ConfiguredRun, folder: RunFolder, argv: list[str]) -> dict[str, Any]:
    """Return what a record begins with."""
    record = new_record(["fit", *argv], cli.config.seed_everything)
    model = cli.config.model
    return record | {
        "name": folder.path.name,
        "base_model": model.base_model,
        "method": model.method,
        "config": cli.settings(),
    }


def locked(folder: RunFolder) -> AbstractContextManager[None]:
    """Hold the run for this process."""
    return locked_folder(folder.path, f"{folder.path} is being trained by another process")


def resume(cli: ConfiguredRun, argv: list[str]) -> None:
    """Resume a run from its last state that is whole, perhaps for longer than planned; without one, restart it."""
    from lightning_lora.config.resuming import changed_limits, check_limits, find_state, warn_of_epoch

    folder = RunFolder(Path(cli.config.resume))
    with locked(folder):
        fresh = first_record(cli, folder, argv)
        record = folder.read_if_written() or fresh  # killed before it was written
        changed = changed_limits(folder, cli.settings()["trainer"])
        finished, cli.longer = record.get("status") == "finished", bool(changed)
        if finished and not changed:
            print(f"{folder.path} has finished already; to train longer, give --trainer.max_epochs N too")
            return
        for place in (folder.path, folder.checkpoints, folder.path / "predictions"):
            remove_partial(place, any_host=True)  # the run is held by this process alone
        for key in ("versions", "code"):
            if record[key] != fresh[key]:
                print_warnings([f"{key} were {record[key]}, now {fresh[key]}: the rest may differ"])
        point = find_state(folder, record)
        state = read_checkpoint(point) if point is not None else {"global_step": 0, "epoch": 0}
        if changed:
            check_limits(record["method"], cli.settings()["trainer"], state, folder)
            warn_of_epoch(state)
        cli.steps_done, cli.logger_ids = int(state["global_step"]), record.get("loggers", {})
        where = f"{cli.steps_done} steps" if point else "the start: no state was saved"
        print(f"run: {folder.path}, continued from {where}")
        before = copy.deepcopy(record)
        resumed = {"at": fresh["started"], "steps": cli.steps_done} | ({"changed": changed} if changed else {})
        record.setdefault("resumed", []).append(resumed)
        try:
            train(cli, folder, record, point)
        except Exception:
            if finished and not cli.has_begun:
                folder.write(before)  # what had finished stays so
            raise
        other = (record.get("best") or {}).get("step") != (before.get("best") or {}).get("step")
        if finished and other and (stale := ", ".join(record.get("evaluations", {}))):
            print_warnings([f"{stale} in run.json are of the weights before; evaluate again"])


def fit_nonzero_rank(cli: ConfiguredRun) -> None:
    """Train as one of several processes whose rank is not zero; rank zero keeps the record and writes all files."""
    folder, point = RunFolder(Path(cli.config.resume or cli.config.logs_dir)), None
    if cli.config.resume is not None:
        from lightning_lora.config.resuming import changed_limits

        finished = folder.read_if_written().get("status") == "finished"
        cli.longer = bool(changed_limits(folder, cli.settings()["trainer"]))
        if finished and not cli.longer:
            return  # as rank zero does
        point, _ = ResumePoints(folder.checkpoints).find()
        cli.steps_done = int(read_checkpoint(point)["global_step"]) if point is not None else 0
    with cli.stop_request.listening():
        cli.build(folder)
        cli.datamodule.setup("fit")
        fit(cli, folder, point)


def train(cli: ConfiguredRun, folder: RunFolder, record: dict[str, Any], point: Path | None) -> None:
    """Make data, model and trainer; train, from the start or from a saved state; and fill the record."""
    with cli.stop_request.listening(), tracked(cli, folder, record), recorded(folder, record):
        cli.build(folder)
        cli.datamodule.setup("fit")
        describe_data(cli, folder, record)
        describe_model(cli, record)
        describe_plan(cli, record)
        print_run(record, cli.trainer)
        folder.write(record)
        cli.at_start = lambda: record_start(cli, folder, record)
        named, file = row_columns(cli.datamodule.rows("val")), folder.path / "predictions" / "val.parquet"
        cli.collector.keep = {"val": lambda predictions: predictions.write_parquet(file, **named)}
        started = time.perf_counter()
        fit(cli, folder, point)
        record["costs"] |= {"fit_s": time.perf_counter() - started, **cli.costs.costs(), **peak_memory_mb()}
        describe_result(cli, folder, record)
        ResumePoints(folder.checkpoints).tidy()
    print_result(folder, record)


def describe_data(cli: ConfiguredRun, folder: RunFolder, record: dict[str, Any]) -> None:
    """Add the data to the record, and write which row went where.

    Raises:
        UserError: The run is resumed with other rows than it was started with.
    """
    before, record["data"] = record.get("data", {}).get("splits"), cli.datamodule.describe()
    for split, report in record["data"]["splits"].items():
        if before and before.get(split, {}).get("fingerprint") != report["fingerprint"]:
            raise UserError(
                f"--resume: the {split} rows are not those that {folder.path} was started with; bring the data back as "
                "it was, or start a new run"
            )
    if not folder.splits.is_file():
        cli.datamodule.prepared.write_parquet(folder.splits)


def describe_model(cli: ConfiguredRun, record: dict[str, Any]) -> None:
    """Add to the record what is trained, and how."""
    model = cli.model
    record["costs"] = parameter_counts(model.model)
    record["speed"] = {
        "precision": str(cli.trainer.precision),
        "threads": torch.get_num_threads(),
        "processes": cli.trainer.world_size,
        "nodes": cli.trainer.num_nodes,
    }
    record["model"] = {"base_fingerprint": model.identity.base_fingerprint, "learning_rate": model.learning_rate}
    if not isinstance(model, TextClassifier):  # a baseline that reads texts
        record["base_model"] = None
        return
    record["model"] |= {
        "architecture": model.model.config.model_type,
        "target_modules": model.target_modules,
        "head": model.head_origin,
        "head_modules": model.head_modules,
        "quantization": model.identity.quantization,
    }
    record["speed"] |= {"choices": model.speed_choices(cli.trainer)}


def describe_plan(cli: ConfiguredRun, record: dict[str, Any]) -> None:
    """Add to the record how long is to be trained, and why; where a run resumes as it was that stays."""
    settings = cli.settings()["trainer"]
    if not find_method(cli.config.model.method).trains or settings["fast_dev_run"]:
        return
    before, found = record.get("length"), describe_length(settings, cli.datamodule, cli.length)
    if before is None:
        record["length"] = {**found, "auto_filled": cli.auto_filled}
    elif all(before[key] == found[key] for key in ("epochs", "steps")):
        time = {name: value for name, value in found["typed"].items() if name == "max_time"}
        record["length"] = {**before, "typed": {**before["typed"], **time}}
    else:
        record["length"] = {**found, "auto_filled": before["auto_filled"]}


def describe_result(cli: ConfiguredRun, folder: RunFolder, record: dict[str, Any]) -> None:
    """Add to the record what training came to."""
    trainer = cli.trainer
    if cli.model.step_started:
        record["speed"] |= cli.model.how_steps_ran()
    record |= {"steps": trainer.global_step, "epochs": trainer.current_epoch, "stopped_by": stopped_by(trainer)}
    if best := describe_best(folder, cli.model.task):
        record["best"] = best
    if cli.config.model.method in BASELINES:  # whose size follows from the texts
        record["costs"] |= parameter_counts(cli.model.model)
        record["model"] |= {"chosen": cli.model.chosen}
    metrics: dict[str, Any] = {}
    for callback in trainer.checkpoint_callbacks:
        metrics |= callback.metrics if isinstance(callback, StateSaver) else {}
    record["metrics"] = {name: float(value) for name, value in {**metrics, **trainer.callback_metrics}.items()}
    for which, key in (("best", "checkpoint_bytes"), ("last", "checkpoint_last_bytes")):
        if (path := folder.checkpoints / f"{which}.ckpt").is_file():
            record["costs"][key] = path.stat().st_size


def fit(cli: ConfiguredRun, folder: RunFolder, point: Path | None) -> None:
    """Call Lightning's fit; an error that a user can correct says how."""
    if not find_method(cli.config.model.method).trains:
        fit_without_steps(cli, folder)
        return
    gc.freeze()  # looking for garbage among all that was imported takes 0.2 s each time, within a step
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=point)
    except NotFiniteError as error:
        path = folder.checkpoints / "stopped.ckpt"
        cli.trainer.save_checkpoint(path, weights_only=True)
        rows = cli.datamodule.rows("train")
        all_origins = rows.origins
        origins = ", ".join(dict.fromkeys(all_origins[row] for row in error.rows))
        numbers = ", ".join(str(rows.numbers[row]) for row in sorted(error.rows))
        raise UserError(
            f"{error}: look at its rows ({origins}: {numbers}), lower model.learning_rate or raise "
            f"model.warmup_ratio; the weights before it are in {path}"
        ) from error
    except (MisconfigurationException, ValueError) as error:  # of the trainer's settings, before the first step
        if cli.model.step_started:
            raise
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        # On a GPU, or on the CPU, whose allocator says so in words only.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        accumulate, size = cli.trainer.accumulate_grad_batches, cli.datamodule.batch_size
        remedy = (
            f"the same steps with less: --data.batch_size {size // 2} --trainer.accumulate_grad_batches "
            f"{accumulate * 2}; or --model.gradient_checkpointing true"
            if size % 2 == 0
            else "give --model.gradient_checkpointing true, or a smaller data.max_length"
        )
        raise UserError(f"out of memory with {size} texts a batch; {remedy}") from error
    finally:
        gc.unfreeze()


def fit_without_steps(cli: ConfiguredRun, folder: RunFolder) -> None:
    """Fit a baseline; of the method "none" what the fresh head says is kept, to be tested like any other."""
    started = time.perf_counter()
    if cli.config.model.method in BASELINES:
        baseline: Any = cli.model
        baseline.chosen = baseline.fit_rows(cli.datamodule, cli.trainer)
        cli.costs.train_s, cli.costs.train_rows = time.perf_counter() - started, len(cli.datamodule.rows("train"))
    elif cli.model.task == "regression":  # a fresh head in the units of the data, as before fine-tuning
        scale_output(cli.model.model, *cli.datamodule.target_moments)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    cli.trainer.save_checkpoint(folder.checkpoints / "best.ckpt", weights_only=True)


def record_start(cli: ConfiguredRun, folder: RunFolder, record: dict[str, Any]) -> None:
    """Record what is known only right before training: a learning rate that was searched for, the loggers' runs."""
    found = cli.model.learning_rate
    if found != record["model"]["learning_rate"]:
        print(f"learning rate found by LearningRateFinder: {found:g}", flush=True)
        record["model"]["learning_rate"] = cli.config.model.learning_rate = found
    if cli.steps_done:
        from lightning_lora.config.resuming import warn_of_schedule

        warn_of_schedule(cli.model)
    if cli.tracker is not None and cli.tracker.attempt(lambda _: None):  # begins the tracked run
        folder.write(record)
    known = {"config": folder.with_own_paths(cli.settings()), "loggers": run_ids(cli.trainer.loggers)}
    if known != {"config": record["config"], "loggers": record.get("loggers", {})}:
        write_text(folder.config, as_yaml(known["config"]))
        record |= known
        folder.write(record)


@contextmanager
def tracked(cli: ConfiguredRun, folder: RunFolder, record: dict[str, Any]) -> Iterator[None]:
    """Give the run its tracker, if it has one, and end what is tracked as the run ends."""
    if "tracker" not in record:
        yield
        return
    from lightning_lora.training.trackers import Tracker

    tracker = cli.tracker = Tracker(record["tracker"])
    try:
        yield
    finally:
        if tracker.version is not None:
            best = record.get("best") or {}
            kept = {name.replace("val/", "val-best/"): value for name, value in best.get("metrics", {}).items()}
            tracker.log_metrics(kept, best.get("step"))
            tracker.log_files([folder.config])
            tracker.close(record["status"])
            folder.write(record)


@contextmanager
def recorded(folder: RunFolder, record: dict[str, Any]) -> Iterator[None]:
    """Write the record: at the start with status running, at the end with finished, interrupted or failed."""
    started, before = time.perf_counter(), record.get("wall_s", 0.0)
    record.pop("error", None)
    record["status"] = "running"
    folder.write(record)
    try:
        yield
        record["status"] = "finished"
    except (KeyboardInterrupt, SystemExit):
        record["status"] = "interrupted"
        raise
    except Interrupted as error:
        record |= {"status": "interrupted", "interrupted_by": str(error)}
        if str(error) == "SIGUSR1":  # the scheduler's warning
            record["requeue"] = requeue()
            print(record["requeue"], file=sys.stderr)
        print(f"{error}: resume with: {command_line('fit', '--resume', folder.path)}", file=sys.stderr)
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        record |= {"status": "failed", "error": said}
        raise
    finally:
        record |= {"ended": now(), "wall_s": before + time.perf_counter() - started}
        folder.write(record)
