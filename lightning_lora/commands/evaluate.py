"""``main.py validate`` and ``main.py test``: metrics of a run's checkpoint, before and after fine-tuning."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Timer

from lightning_lora.config.lightning_cli import ConfiguredRun, row_columns
from lightning_lora.config.run_options import EXAMPLE_TEXT
from lightning_lora.data.splits import text_keys
from lightning_lora.errors import UserError
from lightning_lora.evaluation.costs import peak_memory_mb
from lightning_lora.evaluation.intervals import difference_interval, intervals
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.export.weights import check_weights, load_weights, trained_steps
from lightning_lora.files import check_writable, write_text
from lightning_lora.processes import started_to_follow
from lightning_lora.reports.tables import cost_rows, markdown, metric_rows, print_tables
from lightning_lora.runs.folder import RunFolder, now
from lightning_lora.training.parallel import device_count, end_followers, follow_the_leader


def validate(words: list[str]) -> int:
    """Metrics on the validation rows."""
    return _evaluate("validate", "val", words)


def test(words: list[str]) -> int:
    """Metrics on the test rows, before and after fine-tuning."""
    return _evaluate("test", "test", words)


def _evaluate(command: str, split: str, words: list[str]) -> int:
    cli = ConfiguredRun(command, words)
    follows = device_count(cli.config.trainer) > 1 and started_to_follow()
    try:
        if follows:
            _follow(cli, command, split)
        else:
            _lead(cli, command, split)
        end_followers(well=True)
    finally:
        end_followers(well=False)
    return 0


def _follow(cli: ConfiguredRun, command: str, split: str) -> None:
    """Evaluates as one of several processes that is not their leader, which checks, counts and writes."""
    follow_the_leader()
    folder = RunFolder.open(Path(cli.config.run))
    cli.build(folder)
    cli.datamodule.setup(command)
    if cli.config.get("before"):
        _run_pass(cli, command, split, cli.make_trainer(None))
    load_weights(cli.model, folder.checkpoint(cli.config.checkpoint))
    _run_pass(cli, command, split, cli.trainer)
    if cli.config.int8:
        if not cli.config.get("before"):
            _run_pass(cli, command, split, cli.make_trainer(None))
        _run_int8_pass(cli, command, split)


def _lead(cli: ConfiguredRun, command: str, split: str) -> None:
    folder = RunFolder.open(Path(cli.config.run))
    path = folder.checkpoint(cli.config.checkpoint)
    cli.steps_done = trained_steps(path)
    cli.build(folder)
    check_weights(cli.model, path)  # before minutes are spent on it
    int8_layers = cli.model.check_int8(str(cli.config.trainer.precision)) if cli.config.int8 else 0
    check_writable(folder.path)
    cli.datamodule.setup(command)
    rows = cli.datamodule.rows(split)
    folder.refuse_trained_rows(text_keys(rows.texts), ("train",) if split == "val" else ("train", "val"))
    name = folder.new_evaluation(split)
    evaluation: dict[str, Any] = {
        "measured": now(),
        "command": shlex.join(["python", "main.py", command, *cli.words]),
        "checkpoint": str(path),
        "step": cli.steps_done,
        "fingerprint": rows.fingerprint,
    }
    if cli.config.get("before"):
        print(f"{split} rows before fine-tuning (base model with {cli.model.head_origin}): {len(rows):,}")
        evaluation["before"], evaluation["before_s"] = _run_pass(cli, command, split, cli.make_trainer(None))
    load_weights(cli.model, path)
    print(f"{split} rows after fine-tuning ({path}): {len(rows):,}")
    evaluation["after"], evaluation["after_s"] = _run_pass(cli, command, split, cli.trainer)
    predictions = cli.collector.last[split]
    evaluation["rows"] = len(predictions)
    if predictions.labels is not None:
        evaluation["after_interval"] = intervals(predictions.logits, predictions.labels)
    train_labels = cli.datamodule.rows("train").labels
    evaluation["majority_accuracy"] = majority_accuracy(train_labels, rows.labels[predictions.rows])
    evaluation |= peak_memory_mb()
    file = folder.path / "predictions" / f"{name}.parquet"
    if name == "val":
        file = file.with_name("val-best.parquet")  # val.parquet is what fit's last pass said
    predictions.write_parquet(file, **row_columns(rows))
    tables = _written(folder, name, evaluation)  # whatever becomes of the pass in int8
    files = file.name
    if cli.config.int8:
        evaluation["int8_layers"] = f"{int8_layers} of {cli.model.model.config.num_hidden_layers} layers"
        again = _evaluate_int8(cli, command, split, evaluation, predictions)
        file = file.with_stem(f"{file.stem}-int8")
        again.write_parquet(file, **row_columns(rows))
        tables, files = _written(folder, name, evaluation), f"{files} and {file.name}"
    print()
    print_tables(f"{split}: {len(predictions):,} rows", *tables)
    print(f"\nrun folder:    {folder.path} (this table: {name}.md, every row: predictions/{files})")
    if (folder.path / "tensorboard").is_dir():
        print(f"curves:        tensorboard --logdir {folder.path.parent}")
    print(f"your own text: python main.py predict --run {folder.path} '{EXAMPLE_TEXT}'")


def _run_pass(cli: ConfiguredRun, command: str, split: str, trainer: Any) -> tuple[dict[str, float], float]:
    timer = Timer()
    trainer.callbacks.insert(0, timer)  # before what others do with the metrics
    results = getattr(trainer, command)(cli.model, datamodule=cli.datamodule, verbose=False)
    if not results:
        raise UserError(f"the {command} pass was interrupted")
    return {name.removeprefix(f"{split}/"): value for name, value in results[0].items()}, timer.time_elapsed(command)


def _evaluate_int8(
    cli: ConfiguredRun, command: str, split: str, evaluation: dict[str, Any], plain: Predictions
) -> Predictions:
    """What is said in int8 of rows that were evaluated before; how it compares is put into the evaluation."""
    print(f"{split} rows in int8 ({evaluation['int8_layers']}): {len(plain):,}")
    if not cli.config.get("before"):  # the pass before met each shape for the first time, and this one would not
        evaluation["after_s"] = _run_pass(cli, command, split, cli.make_trainer(None))[1]
    evaluation["int8"], evaluation["int8_s"] = _run_int8_pass(cli, command, split)
    again = cli.collector.last[split]
    evaluation["int8_flipped"] = int((again.classes != plain.classes).sum())
    if plain.labels is not None and len(plain) > 1:
        bounds = difference_interval(again.logits, plain.logits, plain.labels, "accuracy")
        evaluation["int8_accuracy_difference"] = bounds
    return again


def _written(folder: RunFolder, name: str, evaluation: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """The tables of an evaluation, which are written beside the record that it is added to."""
    record = folder.add_evaluation(name, evaluation)
    metrics, costs = metric_rows(evaluation), cost_rows(record, evaluation)
    summary = f"# {folder.path.name}: {name}\n\n{markdown(metrics)}\n\n{markdown([['', ''], *costs])}\n"
    write_text(folder.path / f"{name}.md", summary)
    return metrics, costs


def _run_int8_pass(cli: ConfiguredRun, command: str, split: str) -> tuple[dict[str, float], float]:
    cli.model.int8 = True
    return _run_pass(cli, command, split, cli.make_trainer(None))


def majority_accuracy(train_labels: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class of the training rows."""
    return float((labels == np.bincount(train_labels).argmax()).mean())
