"""``main.py fit``: train, keep the best and the last checkpoint, write the record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer

from lightning_lora.artifacts.runs import RunFolder, new_record, now
from lightning_lora.commands.configured import MONITOR, ConfiguredRun
from lightning_lora.data.splits import text_keys
from lightning_lora.errors import UserError
from lightning_lora.evaluation.costs import parameter_counts, peak_memory_mb
from lightning_lora.files import write_text
from lightning_lora.models.methods import find_method
from lightning_lora.reports.tables import duration
from lightning_lora.training.module import TextClassifier


def run(words: list[str]) -> int:
    """Trains one run; whatever happens after the folder is made, a record is left in it."""
    cli = ConfiguredRun("fit", words)
    config = cli.config
    source = config.data.source
    stem = f"{Path(str(source)).stem if isinstance(source, str) else 'files'}-{config.model.method}"
    folder = RunFolder.create(Path(config.logs_dir), config.name, stem)
    record = new_record(["python", "main.py", "fit", *words], config.seed_everything)
    settings = cli.settings()
    write_text(folder.config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    record |= {"name": folder.path.name, "base_model": config.model.base_model, "method": config.model.method}
    record["config"] = settings
    print(f"run: {folder.path}")
    with recorded(folder, record):
        cli.build(folder)
        model: TextClassifier = cli.model
        cli.datamodule.setup("fit")
        record["data"] = cli.datamodule.describe()
        cli.datamodule.prepared.write_parquet(folder.splits)
        record["costs"] = parameter_counts(model.model)
        record["model"] = {
            "architecture": model.model.config.model_type,
            "base_fingerprint": model.identity.base_fingerprint,
            "target_modules": model.target_modules,
            "head_modules": model.head_modules,
            "learning_rate": model.learning_rate,
            "quantization": model.identity.quantization,
        }
        record["speed"] = speed_choices(model, cli.trainer)
        describe_run(record, cli.trainer)
        started = time.perf_counter()
        if find_method(config.model.method).trains:
            cli.trainer.fit(model, datamodule=cli.datamodule)
        else:  # what the fresh head says is kept as it is, so that it is tested like any other
            cli.trainer.validate(model, datamodule=cli.datamodule, verbose=False)
            cli.trainer.save_checkpoint(folder.checkpoints / "best.ckpt", weights_only=True)
        record["costs"] |= {"fit_s": time.perf_counter() - started, **cli.costs.costs(), **peak_memory_mb()}
        record["metrics"] = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        record["steps"] = cli.trainer.global_step
        for which in ("best", "last"):
            path = folder.checkpoints / f"{which}.ckpt"
            if path.is_file():
                key = "checkpoint_bytes" if which == "best" else f"checkpoint_{which}_bytes"
                record["costs"][key] = path.stat().st_size
        if scores := best_score(cli.trainer):
            record["best"] = scores
        if "val" in cli.collector.last:
            rows = cli.datamodule.rows("val")
            cli.collector.last["val"].write_parquet(
                folder.path / "predictions" / "val.parquet",
                row=rows.numbers,
                origin=rows.origins,
                key=text_keys(rows.texts),
            )
    finish(folder, record)
    return 0


def best_score(trainer: Trainer) -> dict[str, Any]:
    """The metric that chose the best checkpoint and its value."""
    for callback in trainer.checkpoint_callbacks:
        score = getattr(callback, "best_model_score", None)
        if getattr(callback, "monitor", None) == MONITOR and score is not None:
            return {"monitor": MONITOR, "value": float(score)}
    return {}


@contextmanager
def recorded(folder: RunFolder, record: dict[str, Any]) -> Iterator[None]:
    """Writes the record at the end, with status finished, interrupted or failed."""
    started = time.perf_counter()
    record["status"] = "failed"
    try:
        yield
        record["status"] = "finished"
    except (KeyboardInterrupt, SystemExit):
        record["status"] = "interrupted"
        raise
    except BaseException as error:
        record["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        record["ended"] = now()
        record["wall_s"] = time.perf_counter() - started
        folder.write(record)


def speed_choices(model: TextClassifier, trainer: Trainer) -> dict[str, Any]:
    """What was chosen for speed, in words, and the threads."""
    choices = [f"{model.attention_for(training=True)} attention", *model.speed_choices(str(trainer.precision))]
    return {"choices": choices, "precision": str(trainer.precision), "threads": torch.get_num_threads()}


def describe_run(record: dict[str, Any], trainer: Trainer) -> None:
    """Prints what is about to be done: data, model, device."""
    data, model, costs = record["data"], record["model"], record["costs"]
    for split, report in data["splits"].items():
        cut = f", {report['truncated_share']:.0%} cut at {data['max_length']} tokens" if "tokens" in report else ""
        cached = ", tokens from the cache" if report.get("from_cache") else ""
        print(f"{split}: {report['rows']:,} rows, {report['from']}{cut}{cached}")
    if any(data["repeats_removed"].values()):
        what = ", ".join(f"{n} ({k.replace('_', ' ')})" for k, n in data["repeats_removed"].items() if n)
        print(f"repeats taken out: {what}")
    if data["bad_rows_dropped"]:
        print(f"rows without text or label left out: {data['bad_rows_dropped']}")
    print(f"labels: {', '.join(data['label_names'])}")
    stored = "" if model["quantization"] == "none" else f", stored as {model['quantization']}"
    print(f"base model: {record['base_model']} ({model['architecture']}{stored}), method {record['method']}")
    if targets := model["target_modules"]:
        kinds = dict.fromkeys(name.split(".")[-1] for name in targets)
        print(f"adapted: {len(targets)} layers ({', '.join(kinds)}); trained whole: {', '.join(model['head_modules'])}")
    share = costs["trainable_params"] / costs["total_params"]
    print(f"trainable parameters: {costs['trainable_params']:,} of {costs['total_params']:,} ({share:.2%})")
    device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    if find_method(record["method"]).frozen_encoder and not record["config"]["model"]["frozen_dropout"]:
        print("dropout: off in the frozen encoder (model.frozen_dropout), on in head and adapter as configured")
    print(f"learning rate {model['learning_rate']:g}, {device}, precision {trainer.precision}")
    speed = record["speed"]
    print(f"speed: {', '.join(speed['choices'])}; {speed['threads']} threads", flush=True)


def finish(folder: RunFolder, record: dict[str, Any]) -> None:
    """Prints what came out and what to type next."""
    metrics = record["metrics"]
    took = record["costs"]["train_s"]
    print(f"\n{f'trained in {duration(took)}' if took else 'nothing to train'}: ", end="")
    print(", ".join(f"{name} {metrics[name]:.4f}" for name in ("val/accuracy", MONITOR, "val/loss") if name in metrics))
    print(f"run folder: {folder.path}")
    if (folder.checkpoints / "best.ckpt").is_file():
        print(f"next: python main.py test --run {folder.path}")
    elif (folder.checkpoints / "last.ckpt").is_file():
        print("no validation pass ended, so no checkpoint is the best one")
        print(f"next: python main.py test --run {folder.path} --checkpoint last")
    else:
        print("no checkpoint was kept (trainer.enable_checkpointing or fast_dev_run); the weights are gone")
