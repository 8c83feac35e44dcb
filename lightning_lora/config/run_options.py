"""What each command that is configured like a run can be told beside the run's settings."""

from collections.abc import Iterable
from typing import Literal

from lightning.pytorch.cli import LightningArgumentParser

from lightning_lora.errors import UserError

#: Options that belong to one command and not to what is trained; they are left out of ``config.yaml``.
COMMAND_KEYS = frozenset(
    "config name logs_dir resume run checkpoint before int8 texts input text_column output format "  # noqa: SIM905
    "formats rows license base_model_id push_to_hub private workers executor address bad_rows".split()
)
#: A text that the model of the default config is sure of.
EXAMPLE_TEXT = "A beautiful film, wonderfully acted."
#: Settings of a run that ``predict`` uses; it refuses all others, which would be accepted and ignored.
PREDICT_SETTINGS = (
    *("data.max_length", "data.truncation", "data.window_overlap", "data.padding", "data.eval_batch_size"),
    *("data.text_column", "data.encoding", "model.base_model", "model.method", "model.adapter", "model.quantization"),
    *("model.attention", "model.speedups", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.precision", "trainer.enable_progress_bar", "trainer.deterministic"),
    *("trainer.benchmark", "trainer.inference_mode"),
)


#: What the short help of fit shows of the settings.
COMMON_SETTINGS = (
    *("model.base_model", "data.source", "data.text_column", "data.label_column", "data.label_names"),
    *("data.max_length", "data.truncation", "data.batch_size", "data.bad_rows", "model.method", "model.learning_rate"),
    *("model.adapter.rank", "model.adapter.alpha", "model.adapter.dropout", "model.adapter.target_modules"),
    *("model.quantization.bits", "trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.precision"),
    *("seed_everything", "keep_every_epoch"),
)
#: What the help of each command shows first.
EXAMPLES = {
    "fit": (
        "python main.py fit --name reviews",
        "python main.py fit --data.source rows.csv --data.text_column review --data.label_column verdict",
        "python main.py fit --config configs/experiment/own_csv.yaml --model.adapter.rank 16",
        "python main.py fit --resume logs/reviews",
    ),
    "validate": ("python main.py validate --run logs/reviews",),
    "test": ("python main.py test --run logs/reviews", "python main.py test --run logs/reviews --before false"),
    "predict": (
        f"python main.py predict --run logs/reviews '{EXAMPLE_TEXT}'",
        "python main.py predict --run logs/reviews --input rows.csv --text_column review --output labels.csv",
        "cat reviews.txt | python main.py predict --run logs/reviews --format csv",
        "python main.py predict --run logs/reviews --input folder/ --output labels/ --workers 4",
    ),
    "export": (
        "python main.py export --run logs/reviews",
        "python main.py export logs/reviews --formats [adapter,onnx]",
    ),
}
#: Settings of a run that are in no group.
RUN_SETTINGS = ("seed_everything", "keep_every_epoch")


def refuse_unused(keys: Iterable[str]) -> None:
    """Refuses settings that ``predict`` would not use.

    Args:
        keys: The settings that were given, such as "data.bad_rows".

    Raises:
        UserError: There is one.
    """
    for key in keys:
        if ("." not in key and key not in RUN_SETTINGS) or any(
            f"{key}.".startswith(f"{setting}.") for setting in PREDICT_SETTINGS
        ):
            continue
        if key == "data.bad_rows":
            raise UserError(
                "--data.bad_rows: is about rows to train on; for texts to predict give --bad_rows empty or "
                "--bad_rows error"
            )
        raise UserError(f"--{key}: predict does not use it; leave it out")


def _fit_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--name", type=str | None, default=None, help="Name of the run folder; it must be new.")
    parser.add_argument("--logs_dir", type=str, default="logs", help="The folder of all runs.")
    parser.add_argument("--resume", type=str | None, default=None, help="Go on with an interrupted run: its folder.")


def _run_options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--run", type=str, help="The run folder, such as logs/NAME.")
    parser.add_argument(
        "--checkpoint", type=str, default="best", help="'best', 'last', a file, or an exported adapter folder."
    )


def _validate_options(parser: LightningArgumentParser) -> None:
    _run_options(parser)
    asked = "Also evaluate in int8 (CPUs with AMX), and say how it compares."
    parser.add_argument("--int8", type=bool, default=False, help=asked)


def _test_options(parser: LightningArgumentParser) -> None:
    _validate_options(parser)
    parser.add_argument("--before", type=bool, default=True, help="Also test the model as it was before training.")


def _export_options(parser: LightningArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--output", type=str | None, default=None, help="A new folder; by default RUN/export, RUN/export-2, ..."
    )
    formats = "Of adapter, merged, onnx, onnx-int8; by default all that the method has."
    parser.add_argument("--formats", type=list[str] | str | None, default=None, help=formats)
    parser.add_argument("--rows", type=int, default=1000, help="Test rows that the forms are compared on.")
    license_ = "License for the card; by default that of the base model's card."
    parser.add_argument("--license", type=str | None, default=None, help=license_)
    base = "The base model's name on the Hub, where it was loaded from a folder or package."
    parser.add_argument("--base_model_id", type=str | None, default=None, help=base)
    parser.add_argument("--push_to_hub", type=str | None, default=None, help="Upload as NAME or OWNER/NAME.")
    parser.add_argument("--private", type=bool, default=True, help="Whether a new repository on the Hub is private.")


def _predict_options(parser: LightningArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument("texts", nargs="*", type=str, help="Texts to classify.")
    source = (
        "A .txt, .csv, .tsv, .jsonl or .parquet file, or - for standard input (a text a line); or many files: a folder "
        "of .parquet files, or a quoted pattern such as 'in/*.parquet'."
    )
    parser.add_argument("--input", type=str | None, default=None, help=source)
    column = "The text column of --input; of several, as [title,body], those not blank are joined by a space."
    parser.add_argument("--text_column", type=str | list[str] | None, default=None, help=column)
    blank = (
        "Rows without a text: keep them with 'empty' cells (default; typed texts are refused), or stop with an "
        "'error' before anything is predicted."
    )
    parser.add_argument("--bad_rows", type=Literal["empty", "error"] | None, default=None, help=blank)
    written = "A .csv, .jsonl or .parquet file to write; of many input files a folder, with a file for each."
    parser.add_argument("--output", type=str | None, default=None, help=written)
    shown = "What to print without --output: table, csv or jsonl."
    parser.add_argument("--format", type=str, default="table", help=shown)
    workers = "Of many input files: processes that share them; by default 1, with Ray one for each GPU or CPU."
    parser.add_argument("--workers", type=int | None, default=None, help=workers)
    executor = "Of many input files: local (default), or ray for a cluster (needs the extra 'scale')."
    parser.add_argument("--executor", type=str | None, default=None, help=executor)
    faster = "Compute in int8 (CPUs with AMX): faster, less exact; `test --int8 true` says by how much."
    parser.add_argument("--int8", type=bool, default=False, help=faster)
    address = "Of the Ray cluster; without one a cluster of this machine is made."
    parser.add_argument("--address", type=str | None, default=None, help=address)


COMMAND_OPTIONS = {
    "fit": _fit_options,
    "validate": _validate_options,
    "test": _test_options,
    "predict": _predict_options,
    "export": _export_options,
}
