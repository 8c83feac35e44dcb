"""The options of each command, its help page, and the configs that ``--config`` finds by name. Imports no torch."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from lightning_lora.errors import UserError
from lightning_lora.program import ROOT, program

#: The configs that come with this project: beside the package in a checkout, inside it in a wheel.
_IN_WHEEL = Path(__file__).parents[1] / "configs"
CONFIGS = _IN_WHEEL if _IN_WHEEL.is_dir() else ROOT / "configs"
DEFAULT_CONFIG = CONFIGS / "default.yaml"
#: A text that the model of the default config is sure of.
EXAMPLE_TEXT = "A beautiful film, wonderfully acted."
_RUN: dict[str, tuple[Any, Any, str]] = {
    "run": (str, None, "The run folder, such as logs/NAME."),
    "checkpoint": (str, "best", "'best', 'last', a file, or an exported adapter folder."),
}
_INT8 = {"int8": (bool, False, "Also evaluate in int8 (CPUs with AMX), and say how it compares.")}
_INPUT = (
    "A .txt, .csv, .tsv, .jsonl or .parquet file, or - for standard input (a text a line); or many files: a folder of "
    ".parquet files, or a quoted pattern such as 'in/*.parquet'."
)
_BAD_ROWS = (
    "Rows without a text: keep them with 'empty' cells (default; typed texts are refused), or stop with an 'error' "
    "before anything is predicted."
)
#: What ``--track`` takes.
TRACKERS = Literal["mlflow", "wandb", "trackio"]
TRACK_HELP = "Also write to a tracker; test and export continue the same tracked run."
ARM_HELP = "Of a config that describes arms (for compare): the one whose settings are taken."
#: For each command its options, each with its type, default and help.
COMMAND_OPTIONS: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "fit": {
        "name": (str | None, None, "Name of the run folder; it must be new."),
        "logs_dir": (str, "logs", "The folder of all runs."),
        "arm": (str | None, None, ARM_HELP),
        "resume": (str | None, None, "Resume an interrupted run: its folder."),
        "budget": (
            str | None,
            None,
            "Search settings that are not typed for so long (90s, 5m, 1.5h); keep the run that is best on validation.",
        ),
        "track": (TRACKERS | None, None, TRACK_HELP),
        "track_group": (str | None, None, "With --track: MLflow's experiment, or the others' group of the run."),
    },
    "data": {
        "arm": (str | None, None, ARM_HELP),
        "output": (str | None, None, "Also write the card as a page that needs no network: an .html file."),
    },
    "validate": {**_RUN, **_INT8},
    "test": {
        **_RUN,
        **_INT8,
        "before": (bool, True, "Also test the model as it was before training."),
        "baselines": (
            bool,
            False,
            "Also fit majority, tfidf and probe to the training rows, and test them.",
        ),
    },
    "export": {
        **_RUN,
        "output": (str | None, None, "A new folder; by default RUN/export, RUN/export-2, ..."),
        "formats": (
            list[str] | str | None,
            None,
            "Of adapter, merged, onnx, onnx-int8; by default all of the method's.",
        ),
        "rows": (int, 1000, "Test rows that the formats are compared on."),
        "license": (str | None, None, "License for the card; by default that of the base model's card."),
        "base_model_id": (str | None, None, "Name on the Hub of a base model that was loaded from elsewhere."),
        "space": (bool, False, "Also write a folder that runs as a Hugging Face Space, from the merged model."),
        "push_to_hub": (str | None, None, "Upload as NAME or OWNER/NAME."),
        "private": (bool, True, "Whether a new repository on the Hub is private."),
    },
    "predict": {
        **_RUN,
        "input": (str | None, None, _INPUT),
        "text_column": (str | list[str] | None, None, "Of --input; several, as [title,body], as in training."),
        "bad_rows": (Literal["empty", "error"] | None, None, _BAD_ROWS),
        "output": (str | None, None, "A .csv, .jsonl or .parquet file; of many input files a folder."),
        "format": (Literal["table", "csv", "jsonl"], "table", "What to print without --output: table, csv or jsonl."),
        "workers": (int | None, None, "Of many input files: processes; by default 1, with Ray one a GPU or CPU."),
        "executor": (str | None, None, "Of many input files: local (default), or ray (needs the extra 'scale')."),
        "address": (str | None, None, "Of the Ray cluster; without one a cluster of this machine is made."),
        "int8": (bool, False, "Compute in int8 (CPUs with AMX); `test --int8 true` says how exact it is."),
    },
}
#: Options that belong to one command and not to what is trained; they are left out of ``config.yaml``.
COMMAND_KEYS = frozenset({"config", "texts", *(name for options in COMMAND_OPTIONS.values() for name in options)})
#: Settings of a run that ``data`` and ``predict`` use; they refuse all others, which would be accepted and ignored.
CARD_SETTINGS = ("data", "model.base_model")
PREDICT_SETTINGS = (
    *("data.max_length", "data.truncation", "data.window_overlap", "data.padding", "data.eval_batch_size"),
    *("data.text_column", "data.encoding", "model.base_model", "model.method", "model.adapter", "model.quantization"),
    *("model.pooling", "model.attention", "model.speedups", "trainer.accelerator", "trainer.devices"),
    *("trainer.num_nodes", "trainer.strategy", "trainer.precision", "trainer.enable_progress_bar"),
    *("trainer.deterministic", "trainer.benchmark", "trainer.inference_mode"),
)
#: Settings that make a difference in training alone: ``validate`` and ``test`` refuse them.
TRAINING_SETTINGS = (
    *("data.train_max_length", "data.batch_size", "data.batch_by", "data.augmentation", "model.learning_rate"),
    *("model.schedule", "model.warmup_ratio", "model.weight_decay", "model.label_smoothing"),
    "model.gradient_checkpointing",
    *("trainer.max_epochs", "trainer.min_epochs", "trainer.max_steps", "trainer.min_steps", "trainer.max_time"),
    *("trainer.limit_train_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
    *("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
)
#: Settings that the short help of ``fit`` shows.
COMMON_SETTINGS = (
    *("model.base_model", "data.source", "data.text_column", "data.label_column", "data.label_names"),
    *("data.max_length", "data.truncation", "data.batch_size", "data.bad_rows", "model.method", "model.learning_rate"),
    *("model.adapter.rank", "model.adapter.alpha", "model.adapter.dropout", "model.adapter.target_modules"),
    *("model.quantization.bits", "trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.precision"),
    "seed_everything",
)
#: What the help of each command shows first.
EXAMPLES = {
    "fit": (
        "fit --name reviews",
        "fit --data.source rows.csv --data.text_column review --data.label_column verdict",
        "fit --config own_csv --model.adapter.rank 16",
        "fit --budget 5m --name reviews",
        "fit --resume logs/reviews",
    ),
    "data": (
        "data --config own_csv",
        "data --config own_csv --data.source rows.csv --data.text_column review --output card.html",
    ),
    "validate": ("validate --run logs/reviews",),
    "test": ("test --run logs/reviews", "test --run logs/reviews --baselines true"),
    "predict": (
        f"predict --run logs/reviews '{EXAMPLE_TEXT}'",
        "predict --run logs/reviews --input rows.csv --text_column review --output labels.csv",
        "predict --run logs/reviews --format csv < reviews.txt",
        "predict --run logs/reviews --input folder/ --output labels/ --workers 4",
    ),
    "export": (
        "export --run logs/reviews",
        "export logs/reviews --formats [adapter,onnx]",
        "export --run logs/reviews --formats merged --space true",
    ),
}


def show_help(command: str, make_parser: Callable[[], Any], argv: Iterable[str]) -> None:
    """Print the help page that the arguments ask for, if any, and end the process.

    ``--help`` shows the options of the command, and for ``fit`` and ``data`` the settings that are changed most;
    ``--help_all`` shows every setting.

    Args:
        command: The word after ``main.py``.
        make_parser: Returns its parser, which is changed.
        argv: What stands after it.
    """
    if not {"-h", "--help", "--help_all"} & set(argv):
        return
    parser = make_parser()
    if "--help_all" not in argv:
        common = {"fit": "", "data": "data."}.get(command)
        settings = [name for name in COMMON_SETTINGS if common is not None and name.startswith(common)]
        shown = {*COMMAND_OPTIONS[command], "config", "texts", "help", *settings}
        for action in parser._actions:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
        examples = "\n  ".join(f"{program()} {example}" for example in EXAMPLES[command])
        positional = " ['TEXT' ...]" if command == "predict" else ""
        parser.usage = f"{parser.prog} [OPTIONS]{positional}\n\nexamples:\n  {examples}"
        parser.epilog = "Every setting of a run is an option too: --help_all lists them, --print_config their values."
    parser.print_help()
    sys.exit(0)


def refuse_unused(command: str, keys: Iterable[str]) -> None:
    """Refuse settings that a command does not use.

    Args:
        command: "data", "predict", "validate" or "test".
        keys: The settings that were given, such as "data.bad_rows".

    Raises:
        UserError: A setting is not used by the command.
    """
    evaluates = command in ("validate", "test")
    listed = TRAINING_SETTINGS if evaluates else {"data": CARD_SETTINGS, "predict": PREDICT_SETTINGS}[command]
    for key in keys:
        in_use = any(f"{key}.".startswith(f"{setting}.") for setting in listed) != evaluates
        if not in_use and ("." in key or (key == "seed_everything" and not evaluates)):
            hint = "give --bad_rows empty or --bad_rows error" if key == "data.bad_rows" else "leave it out"
            raise UserError(f"--{key}: {command} does not use it; {hint}")


def recipes() -> dict[str, Path]:
    """Return the path of each config by its name: "default", "imdb_bert", and of ablations "rank"."""
    found = {"default": DEFAULT_CONFIG}
    for folder in (CONFIGS / "experiment", CONFIGS / "ablation"):
        found |= {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return found


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: a path, or the name or the path of a config of this project."""
    path = Path(name)
    if path.exists():
        return path
    shipped = CONFIGS.parent / path
    return shipped if path.parts[:1] == ("configs",) and shipped.is_file() else recipes().get(name, path)


def describe(path: Path) -> dict[str, str]:
    """Return what the head of a config says: its ``Question``, and where it is one of ``fit``'s its ``Score``."""
    lines, said, key = path.read_text(encoding="utf-8").splitlines(), dict[str, str](), ""
    for line in lines:
        if found := re.match(r"#? ?([A-Za-z]+): +(.*)", line):
            key = found[1].capitalize()
            said.setdefault(key, found[2])
        elif line.startswith("#    ") and key:
            said[key] += f" {line[1:].strip()}"
        else:
            key = ""
    return {name: said[name] for name in ("Question", "Score") if name in said}
