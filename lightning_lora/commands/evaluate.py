"""``main.py validate`` and ``main.py test``: metrics of a run's checkpoint, before and after fine-tuning."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Timer

from lightning_lora.config.configured_run import ConfiguredRun, row_columns
from lightning_lora.config.options import EXAMPLE_TEXT
from lightning_lora.data.pairs import is_pair
from lightning_lora.errors import UserError, print_warnings
from lightning_lora.evaluation.costs import peak_memory_mb
from lightning_lora.evaluation.intervals import MOST_FILES, difference_interval, intervals, metrics_of
from lightning_lora.evaluation.metric_table import METRICS, row_metrics
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.export.weights import check_weights, load_weights, trained_steps
from lightning_lora.files import check_writable, write_text
from lightning_lora.models.head import scale_output
from lightning_lora.models.methods import BASELINES, find_method
from lightning_lora.processes import is_rank_zero
from lightning_lora.program import command_line
from lightning_lora.reports.tables import cost_rows, markdown, metric_rows, print_tables
from lightning_lora.runs.folder import EVENT_FILES, RunFolder, now
from lightning_lora.training.baselines import make_classifier
from lightning_lora.training.trackers import add_results


def validate(argv: list[str]) -> int:
    """Measure a run on its validation rows."""
    return _evaluate("validate", "val", argv)


def test(argv: list[str]) -> int:
    """Measure a run on its test rows, before and after fine-tuning."""
    return _evaluate("test", "test", argv)


def _evaluate(command: str, split: str, argv: list[str]) -> int:
    cli = ConfiguredRun(command, argv)
    if cli.config.get("baselines") and cli.count_devices() > 1:
        raise UserError("--baselines: they are fitted by one process; leave trainer.devices out, or baselines")
    if (status := cli.start_processes()) is not None:
        return status
    folder = RunFolder.open(Path(cli.config.run))
    path = folder.checkpoint(cli.config.checkpoint)
    cli.steps_done = trained_steps(path)
    cli.build(folder)
    check_weights(cli.model, path)  # before minutes are spent on it
    int8_layers = cli.model.check_int8(str(cli.config.trainer.precision)) if cli.config.int8 else 0
    cli.datamodule.setup(command)
    rows = cli.datamodule.rows(split)
    if is_rank_zero():
        check_writable(folder.path)
        folder.refuse_trained_rows(rows.keys, ("train",) if split == "val" else ("train", "val"))
        _warn_of_other_rows(cli, folder, split)
    evaluation: dict[str, Any] = {
        "measured": now(),
        "command": command_line(command, *cli.argv),
        "checkpoint": str(path),
        "step": cli.steps_done,
        "task": cli.model.task,
        "split": split,
        "fingerprint": rows.fingerprint,
    }
    trained = cli.config.model.method not in BASELINES  # there is nothing before a baseline
    if cli.config.get("before") and trained:
        if cli.model.task == "regression":  # a fresh head in the units of the data
            scale_output(cli.model.model, *cli.datamodule.target_moments)
        print(f"{split} rows before fine-tuning (base model with {cli.model.head_origin}): {len(rows):,}")
        evaluation["before"], evaluation["before_s"] = _run_pass(cli, command, split, cli.make_trainer(None))
    load_weights(cli.model, path)
    print(f"{split} rows {'after fine-tuning ' if trained else ''}({path}): {len(rows):,}")
    evaluation["after"], evaluation["after_s"] = _run_pass(cli, command, split, cli.trainer)
    found = {"": cli.collector.last[split]}
    try:
        if cli.config.int8:
            evaluation["int8_layers"] = f"{int8_layers} of {cli.model.model.config.num_hidden_layers} layers"
            print(f"{split} rows in int8 ({evaluation['int8_layers']}): {len(found['']):,}")
            if not cli.config.get("before"):  # for times to compare, each shape must have been met before
                evaluation["after_s"] = _run_pass(cli, command, split, cli.make_trainer(None))[1]
            cli.model.int8 = True
            evaluation["int8"], evaluation["int8_s"] = _run_pass(cli, command, split, cli.make_trainer(None))
            found["-int8"] = cli.collector.last[split]
        if cli.config.get("baselines"):
            evaluation["baselines"] = {name: _baseline(cli, name, split, found[""]) for name in BASELINES}
    finally:  # an interruption keeps what was evaluated before it
        if is_rank_zero():
            _finish(cli, folder, split, evaluation, found)
    return 0


def _warn_of_other_rows(cli: ConfiguredRun, folder: RunFolder, split: str) -> None:
    """Say so where the rows are not those of the run's own split."""
    report = cli.datamodule.prepared.describe()["splits"][split]
    own = folder.read_if_written().get("data", {}).get("splits", {}).get(split, {})
    if own.get("fingerprint", report["fingerprint"]) == report["fingerprint"]:
        return
    where = f"{report['rows']:,} rows ({report['from']})"
    told = f"these are not the run's {own['rows']:,} {split} rows, but {where}"
    if not any(word.startswith(("--data", "--config", "-c")) for word in cli.argv):
        told += ": data.source of the run leads to another place from this folder, or the data has changed"
    elif split == "test" and isinstance(cli.config.data.source, str):
        told += "; to test on all rows of a file give --data.source '{train: FILE OF THE RUN, test: FILE}'"
    print_warnings([told])


def _baseline(cli: ConfiguredRun, name: str, split: str, ours: Predictions) -> dict[str, Any]:
    """Fit a baseline to the run's training rows; its metrics, and how much better ours is by row."""
    started = time.perf_counter()
    print(f"{split} rows by {name} ({find_method(name).summary}), fitted to the same training rows: {len(ours):,}")
    base, seed = cli.config.model.base_model, cli.config.seed_everything
    own = {name: cli.config.model[name] for name in ("threshold", "calibrate", "class_weights")} | {
        "task": ours.task,
        "seed": seed,
    }
    model, trainer = make_classifier(base, list(ours.label_names), name, **own), cli.make_trainer(None)
    cli.datamodule.setup("fit")
    chosen = model.fit_rows(cli.datamodule, trainer)
    metrics, _ = _run_pass(cli, split, split, trainer, model)
    theirs = cli.collector.last[split]
    found: dict[str, Any] = {**metrics, "chosen": chosen, "seconds": time.perf_counter() - started}
    if ours.labels is not None and len(ours) > 1:
        metric = row_metrics(ours.task)[0]
        first, second = (ours, theirs) if METRICS[metric].higher_is_better else (theirs, ours)
        found["ours_better_by"] = metrics_of(first)[metric] - metrics_of(second)[metric]
        found |= {"interval": difference_interval(first, second, metric), "compared_by": metric}
    return found


def _run_pass(
    cli: ConfiguredRun, command: str, split: str, trainer: Any, model: Any = None
) -> tuple[dict[str, float], float]:
    timer = Timer()
    trainer.callbacks.insert(0, timer)  # before what others do with the metrics
    results = getattr(trainer, command)(model or cli.model, datamodule=cli.datamodule, verbose=False)
    if not results:
        raise UserError(f"the {command} pass was interrupted")
    return {name.removeprefix(f"{split}/"): value for name, value in results[0].items()}, timer.time_elapsed(command)


def _finish(
    cli: ConfiguredRun, folder: RunFolder, split: str, evaluation: dict[str, Any], found: dict[str, Predictions]
) -> None:
    """Add what the predictions show to the evaluation, write all of it into the run folder and print it.

    Args:
        cli: The command line.
        folder: The run's.
        split: The split.
        evaluation: What the passes gave.
        found: The predictions, and those in int8 by "-int8".
    """
    predictions, rows = found[""], cli.datamodule.rows(split)
    evaluation |= {"rows": len(predictions), **peak_memory_mb()}
    if predictions.labels is not None:
        evaluation["after_interval"] = intervals(predictions)
        origins = np.array(rows.origins)[predictions.rows]
        if 1 < len(files := np.unique(origins).tolist()) <= MOST_FILES:
            by_file = {name: metrics_of(predictions.of_rows(origins == name)) for name in files}
            evaluation["after_by_file"] = by_file
    if predictions.thresholds is not None:
        names = predictions.label_names
        evaluation["thresholds"] = dict(zip(names, predictions.thresholds.round(4).tolist(), strict=True))
    if (temperature := cli.model.temperature) is not None and temperature != 1:
        evaluation["temperature"] = temperature.item()
        if predictions.labels is not None:
            without = metrics_of(replace(predictions, logits=predictions.logits * temperature.item()))
            evaluation["uncalibrated"] = {n: v for n, v in without.items() if n in ("loss", "calibration_error")}
    if predictions.task == "single_label":
        majority = np.bincount(cli.datamodule.rows("train").labels).argmax()  # the most frequent class in training
        evaluation["majority_accuracy"] = float((rows.labels[predictions.rows] == majority).mean())
    if (int8 := found.get("-int8")) is not None:
        evaluation["int8_flipped"] = int(int8.changed(predictions).sum())
        if predictions.labels is not None and len(predictions) > 1:
            metric = row_metrics(predictions.task)[0]
            evaluation[f"int8_{metric}_difference"] = difference_interval(int8, predictions, metric)
    name = folder.new_evaluation(split)
    stem = "val-best" if name == "val" else name  # val.parquet holds what fit's last pass gave
    for suffix, each in found.items():
        each.write_parquet(folder.path / "predictions" / f"{stem}{suffix}.parquet", **row_columns(rows))
    record = folder.add_evaluation(name, evaluation)
    metrics, costs = metric_rows(evaluation), cost_rows(record, evaluation)
    summary = f"# {folder.path.name}: {name}\n\n{markdown(metrics)}\n\n{markdown([['', ''], *costs])}\n"
    write_text(page := folder.path / f"{name}.md", summary)
    measured = {f"{stem}/{metric}": value for metric, value in evaluation["after"].items()}
    add_results(record, measured, evaluation["step"], [page])
    print()
    print_tables(f"{split}: {len(predictions):,} rows", metrics, costs)
    files = " and ".join(f"{stem}{suffix}.parquet" for suffix in found)
    print(f"\nrun folder:    {folder.path} (this table: {name}.md, every row: predictions/{files})")
    if any(folder.path.glob(EVENT_FILES)):
        print(f"curves:        tensorboard --logdir {folder.path.parent}")
    examples = " ".join([f"'{EXAMPLE_TEXT}'"] * (1 + is_pair(cli.config.data.truncation)))
    print(f"your own text: {command_line('predict', '--run', folder.path)} {examples}")
