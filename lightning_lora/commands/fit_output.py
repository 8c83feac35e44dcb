"""What ``fit`` prints of a run: what is about to be done, and what it came to."""

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import Trainer

from lightning_lora.data.labels import few
from lightning_lora.errors import print_warnings
from lightning_lora.evaluation.metric_table import SHOWN
from lightning_lora.evaluation.temperature import ROWS_TO_FIT, temperature_words
from lightning_lora.models.methods import BASELINES, find_method
from lightning_lora.program import command_line
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.length import length_words
from lightning_lora.units import duration


def print_run(record: dict[str, Any], trainer: Trainer) -> None:
    """Print what is about to be done: data, model, device."""
    data, model = record["data"], record["model"]
    for split, report in data["splits"].items():
        cut = f", {report['truncated_share']:.0%} cut at {report['max_length']} tokens" if "tokens" in report else ""
        cached = ", tokens from the cache" if report.get("from_cache") else ""
        print(f"{split}: {report['rows']:,} rows ({report['from']}){cut}{cached}")
    for splits, count in data["duplicates_removed"].items():
        split, _, other = splits.partition("_in_")
        if count:
            print(f"duplicates: {count:,} rows of {split} removed, whose texts are in {other} too")
    if data["bad_rows_dropped"]:
        print(f"rows without text or label left out: {data['bad_rows_dropped']}")
    labels = []
    for name in data["label_names"]:
        values = data["label_values"][name]  # what the data says for the class
        labels.append(name if values in ([], [name]) else f"{name} ({', '.join(values)})")
    if data["task"] == "regression":
        numbers = data["splits"]["train"]["numbers"]
        print(f"numbers: {labels[0]}, in train {numbers['min']:g} to {numbers['max']:g}, mean {numbers['mean']:g}")
    else:
        print(f"{'labels, any number a text' if data['task'] == 'multi_label' else 'labels'}: {few(labels, 30)}")
    print_warnings(data["warnings"])
    if "architecture" in model:
        print_model(record, trainer)
    else:
        print(f"method {record['method']}: {find_method(record['method']).summary}, without a base model")
    print_warnings([*_without_effect(record)])
    if trainer.world_size > 1:
        where = f" on {trainer.num_nodes} machines" if trainer.num_nodes > 1 else ""
        size = record["config"]["data"]["batch_size"]
        print(f"{trainer.world_size} processes{where} share the {size} texts of a batch")
    sys.stdout.flush()


def _without_effect(record: Mapping[str, Any]) -> Iterator[str]:
    """What a method cannot do of what was asked for, or may undo."""
    method, model = find_method(record["method"]), record["config"]["model"]
    if not method.trains and model["label_smoothing"]:
        yield f"model.label_smoothing: method {record['method']} is fitted without it"
    if not method.weighs_classes and model["class_weights"] is not None:
        yield f"model.class_weights: method {record['method']} does not use them"
    if not method.stops_early and "EarlyStopping" in str(record["config"]["trainer"]["callbacks"]):
        yield (
            f"trainer.callbacks: EarlyStopping: the ranks of {record['method']} settle after 70% of the steps, and "
            "weights from before are not kept as the best; leave it out"
        )


def print_model(record: dict[str, Any], trainer: Trainer) -> None:
    """Print what is trained of the base model, and how."""
    model, costs, speed = record["model"], record["costs"], record["speed"]
    stored = "" if model["quantization"] == "none" else f", stored as {model['quantization']}"
    print(f"base model: {record['base_model']} ({model['architecture']}{stored}), method {record['method']}")
    device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    speed_line = f"speed: {', '.join(speed['choices'])}; {speed['threads']} threads"
    if record["method"] in BASELINES:
        print(f"{find_method(record['method']).summary}; {device}, precision {trainer.precision}\n{speed_line}")
        return
    print(f"starts from: base model with {model['head']}")
    if targets := model["target_modules"]:
        kinds = dict.fromkeys(name.split(".")[-1] for name in targets)
        print(f"adapted: {len(targets)} layers ({', '.join(kinds)}); trained whole: {', '.join(model['head_modules'])}")
    share = costs["trainable_params"] / costs["total_params"]
    print(f"trainable parameters: {costs['trainable_params']:,} of {costs['total_params']:,} ({share:.2%})")
    if find_method(record["method"]).frozen_encoder and not record["config"]["model"]["frozen_dropout"]:
        print("dropout: off in the frozen encoder (model.frozen_dropout), on in head and adapter as configured")
    print(f"learning rate {model['learning_rate']:g}, {device}, precision {trainer.precision}")
    if "length" in record:
        print(f"training length: {length_words(record['length'])}")
        if (why := record["length"].get("not_validated")) is not None:
            print_warnings([why])
    print(speed_line)


def print_result(folder: RunFolder, record: dict[str, Any]) -> None:
    """Print what training came to, and what to type next."""
    took, best, last = record["costs"]["train_s"], record.get("best"), record["metrics"]
    chosen = record["model"].get("chosen")
    if took and not record["steps"]:
        print(f"\nfitted in {duration(took)}")
        if chosen:
            key, tried = next((key, tried) for key, tried in chosen.items() if key.startswith("val_"))
            judged = {"val_f1_macro": "F1", "val_mse": "mean squared error"}[key]
            print(f"kept: {chosen['features']}, C {chosen['C']:g}, the best of {len(tried)} by validation {judged}")
    else:
        planned = (record.get("length") or {}).get("epochs") if record.get("stopped_by") else None
        of_planned = f" of {planned}" if planned else ""
        done = f"trained in {duration(took)}: {record['epochs']}{of_planned} epochs, {record['steps']} steps"
        print(f"\n{done if took else 'nothing to train'}")
    if record.get("stopped_by"):
        print(f"stopped by {record['stopped_by']}")
    if best and record["steps"]:
        print(f"kept: epoch {best['epoch']}, step {best['step']} (best {best['monitor']}): {shown(best['metrics'])}")
    calibrate = record["config"]["model"]["calibrate"]
    if best and "temperature" in best and (best["temperature"] != 1 or calibrate is True):
        rows = record["data"]["splits"]["val"]["rows"]
        print(f"temperature: {temperature_words(best['temperature'])}, fitted to {rows:,} validation rows")
        if rows < ROWS_TO_FIT:
            print_warnings([f"model.calibrate: {rows} validation rows may be too few ({ROWS_TO_FIT} are enough)"])
    if not (best and record["steps"] and best["metrics"].items() <= last.items()) and (said := shown(last)):
        print(f"{'last validation' if record['steps'] else 'validation'}: {said}")
    print(f"run folder: {folder.path}")
    if (folder.checkpoints / "best.ckpt").is_file():
        print(f"next: {command_line('test', '--run', folder.path)}")
    elif (folder.checkpoints / "last.ckpt").is_file():
        settled = "" if find_method(record["method"]).stops_early else " after the ranks had settled"
        print(f"no validation pass ended{settled}, so no checkpoint is the best one")
        print(f"next: {command_line('test', '--run', folder.path, '--checkpoint', 'last')}")
    else:
        print("no checkpoint was kept (trainer.enable_checkpointing or fast_dev_run); the weights are gone")


def shown(metrics: Mapping[str, float]) -> str:
    """Return the validation metrics that people look at first."""
    names = next((each for each in SHOWN.values() if f"val/{each[0]}" in metrics), ())
    found = {name: value for name in names if (value := metrics.get(f"val/{name}")) is not None}
    return ", ".join(f"val/{name} {value:.4f}" for name, value in found.items() if not math.isnan(value))
