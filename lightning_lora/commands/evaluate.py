"""``main.py validate`` and ``main.py test``: metrics of a run's checkpoint, before and after fine-tuning."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.artifacts.checkpoints import load_checkpoint
from lightning_lora.artifacts.runs import RunFolder, now
from lightning_lora.commands.configured import ConfiguredRun
from lightning_lora.errors import UserError
from lightning_lora.evaluation.costs import peak_memory_mb
from lightning_lora.files import write_text
from lightning_lora.reports.tables import cost_rows, markdown, metric_rows, print_tables


def validate(words: list[str]) -> int:
    """Metrics on the validation rows."""
    return _evaluate("validate", "val", words)


def test(words: list[str]) -> int:
    """Metrics on the test rows, before and after fine-tuning."""
    return _evaluate("test", "test", words)


def _evaluate(command: str, split: str, words: list[str]) -> int:
    cli = ConfiguredRun(command, words)
    folder = RunFolder.open(Path(cli.config.run))
    path = folder.checkpoint(cli.config.checkpoint)
    cli.build(folder)
    cli.datamodule.setup(command)
    rows = cli.datamodule.rows(split)
    evaluation: dict[str, Any] = {
        "measured": now(),
        "checkpoint": path.name,
        "rows": len(rows),
        "fingerprint": rows.fingerprint(),
        "majority_accuracy": majority_accuracy(cli.datamodule.rows("train").labels, rows.labels),
    }
    if cli.config.get("before"):
        print(f"{split} rows before fine-tuning (base model with a fresh head): {len(rows):,}")
        evaluation["before"], evaluation["before_s"] = _run_pass(cli, command, split, cli.make_trainer(None))
    load_checkpoint(cli.model, path)
    print(f"{split} rows after fine-tuning ({path}): {len(rows):,}")
    evaluation["after"], evaluation["after_s"] = _run_pass(cli, command, split, cli.trainer)
    evaluation |= peak_memory_mb()
    predictions = folder.path / "predictions" / f"{split}.parquet"
    cli.collector.last[split].write_parquet(predictions, row=rows.numbers, origin=rows.origins)
    record = folder.add_evaluation(split, evaluation)
    metrics, costs = metric_rows(evaluation), cost_rows(record, evaluation)
    summary = f"# {folder.path.name}: {split}\n\n{markdown(metrics)}\n\n{markdown([['', ''], *costs])}\n"
    write_text(folder.path / f"{split}.md", summary)
    print()
    print_tables(f"{split}: {len(rows):,} rows", metrics, costs)
    print(f"\nrun folder:    {folder.path} (this table: {split}.md, every row: predictions/{split}.parquet)")
    print(f"curves:        tensorboard --logdir {folder.path.parent}")
    print(f"your own text: python main.py predict --run {folder.path} 'What a film!'")
    return 0


def _run_pass(cli: ConfiguredRun, command: str, split: str, trainer: Any) -> tuple[dict[str, float], float]:
    started = time.perf_counter()
    results = getattr(trainer, command)(cli.model, datamodule=cli.datamodule, verbose=False)
    seconds = time.perf_counter() - started
    if not results:
        raise UserError(f"the {command} pass was interrupted")
    return {name.removeprefix(f"{split}/"): value for name, value in results[0].items()}, seconds


def majority_accuracy(train_labels: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class of the training rows."""
    return float((labels == np.bincount(train_labels).argmax()).mean())
