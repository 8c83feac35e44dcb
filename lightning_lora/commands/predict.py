"""``main.py predict``: labels and probabilities for a person's own texts, from nothing but a run folder."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_lora.artifacts.runs import RunFolder
from lightning_lora.artifacts.weights import weights_labels
from lightning_lora.commands.configured import ConfiguredRun
from lightning_lora.commands.many_files import is_many
from lightning_lora.commands.predictor import load_classifier
from lightning_lora.data.batching import LengthBatchSampler, TokenDataset, evaluated_together
from lightning_lora.data.datamodule import make_loader
from lightning_lora.data.prepare import is_unicode
from lightning_lora.data.reading import READERS, Table, format_of, read_file, read_text
from lightning_lora.data.tokens import InputFormat, load_tokenizer, tokenize
from lightning_lora.errors import UserError, print_warnings
from lightning_lora.evaluation.predictions import Predictions, in_row_order
from lightning_lora.files import atomic_path
from lightning_lora.locations import resolve
from lightning_lora.training.module import TextClassifier

OUTPUTS = (".csv", ".jsonl", ".parquet")
FORMATS = ("table", "csv", "jsonl")
SHOWN_CLASSES = 4


def run(words: list[str]) -> int:
    """Classifies texts in the order given and prints or writes a row for each."""
    cli = ConfiguredRun("predict", words)
    config = cli.config
    output = Path(config.output) if config.output else None
    if not config.texts and is_many(config.input):
        if output is None or output.suffix.lower() in OUTPUTS:
            raise UserError("--output: for many input files a folder is needed, to hold an output for each")
        if config.format != "table":
            raise UserError("--format: the outputs of many input files are Parquet files; leave it out")
        from lightning_lora.commands.predict_files import run_files

        return run_files(cli)
    for option in ("workers", "executor", "address"):
        if config[option] is not None:
            raise UserError(f"--{option}: only for many input files: --input FOLDER, or --input 'FOLDER/*.parquet'")
    if output and output.suffix.lower() not in OUTPUTS:
        raise UserError(f"--output: '{output.name}' must end in one of {', '.join(OUTPUTS)}")
    if config.format not in FORMATS:
        raise UserError(f"--format: '{config.format}' is not one of {', '.join(FORMATS)}")
    if output and config.format != "table":
        raise UserError("--format: the format of --output is that of its ending; leave --format out")
    if config.text_column and (config.texts or config.input in (None, "-")):
        raise UserError("--text_column: only an --input file has columns; leave it out")
    texts = gather_texts(config.texts, config.input, config.text_column or config.data.text_column)
    path = RunFolder.open(Path(config.run)).checkpoint(config.checkpoint)
    model = load_classifier(config, path, weights_labels(path))
    columns = {"text": texts, **predict_texts(cli, model, texts).columns()}
    if output:
        write_output(output, columns)
        print(f"{len(texts):,} rows written to {output}", file=sys.stderr)
    elif config.format == "table":
        print_table(columns)
    else:
        sys.stdout.write(as_csv(columns) if config.format == "csv" else as_jsonl(columns))
    return 0


def predict_texts(cli: ConfiguredRun, model: TextClassifier, texts: list[str]) -> Predictions:
    """Predictions of the texts, in their order."""
    data = cli.config.data
    tokenizer = load_tokenizer(resolve(data.base_model, "model.base_model").target, "model.base_model")
    frame = InputFormat.of(tokenizer, data.max_length, data.truncation, data.window_overlap)
    dataset = TokenDataset(tokenize(texts, tokenizer), frame, None, data.padding == "max_length")
    loader = make_loader(dataset, LengthBatchSampler(dataset.widths, evaluated_together(data.eval_batch_size), None))
    with torch.inference_mode():
        batches: Any = cli.make_trainer(None).predict(model, loader)
    return in_row_order(batches, model.label_names)


def gather_texts(given: Sequence[str], source: str | None, text_column: str | list[str] | None) -> list[str]:
    """The texts of the command line, of standard input ("-") or of a file.

    Raises:
        UserError: There are none, or both kinds, or a text is empty or missing.
    """
    if given and source:
        raise UserError("predict takes texts or --input, not both")
    if given:
        table = Table("command line", {"text": list(given)}, range(1, len(given) + 1), "text")
    elif source in (None, "-"):
        if sys.stdin.isatty():
            raise UserError("no texts: give them as words in quotes, with --input FILE, or on standard input")
        try:
            table = _lines("standard input", sys.stdin.read())
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 text ({error.reason} at byte {error.start})") from None
    else:
        path = Path(str(source)).expanduser()
        if not path.is_file():
            raise UserError(f"--input: no file '{source}'")
        if path.suffix.lower() in (".txt", ""):
            table = _lines(str(path), read_text(path))
        else:
            if format_of(path) not in READERS:
                raise UserError(f"--input: '{path.name}' must end in one of .txt, {', '.join(READERS)}")
            columns = [text_column] if isinstance(text_column, str) else (text_column or ["text"])
            read = read_file(path, columns)
            print_warnings(read.warnings)
            table = Table(read.origin, {}, read.rows, read.unit)
            for column in columns:
                check_texts(read, column)
            table.columns["text"] = [" ".join(cells) for cells in zip(*read.columns.values(), strict=True)]
    check_texts(table, "text")
    if not len(table):
        raise UserError(f"{table.origin}: no texts")
    return table.columns["text"]


def _lines(origin: str, content: str) -> Table:
    # Only \n ends a line: splitlines() would also cut at a form feed or U+2028 inside a text.
    lines = content.removesuffix("\n").split("\n") if content else []
    return Table(origin, {"text": [line.removesuffix("\r") for line in lines]}, range(1, len(lines) + 1), "line")


def check_texts(table: Table, column: str) -> None:
    """Refuses a cell of the column that is no text or an empty one.

    Raises:
        UserError: As said; the place is named.
    """
    for i, cell in enumerate(table.columns[column]):
        if not isinstance(cell, str) or not cell.strip() or not is_unicode(cell):
            got = "null" if cell is None else repr(cell)[:40]
            raise UserError(f"{table.where(i, column)}: a text is needed, got {got}")


def write_output(path: Path, columns: dict[str, Any]) -> None:
    """Writes the columns in the format of the file's ending, whole or not at all."""
    try:
        with atomic_path(path) as staging:
            if path.suffix.lower() == ".parquet":
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.table(columns), staging)
            else:
                content = as_csv(columns) if path.suffix.lower() == ".csv" else as_jsonl(columns)
                staging.write_text(content, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror or error})") from error


def as_csv(columns: dict[str, Any]) -> str:
    """The columns as CSV, heading first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()


def as_jsonl(columns: dict[str, Any]) -> str:
    """The columns as JSON Lines."""
    rows = zip(*columns.values(), strict=True)
    plain = ({name: _plain(value) for name, value in zip(columns, row, strict=True)} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


def print_table(columns: dict[str, Any]) -> None:
    """Prints the rows to the terminal: long texts shortened, probabilities of each class where few."""
    from rich.console import Console
    from rich.table import Table as RichTable

    names = [name for name in columns if name != "text"]
    if len(names) > 2 + SHOWN_CLASSES:
        names = names[:2]
    table = RichTable()
    table.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in names:
        table.add_column(name, justify="left" if name == "prediction" else "right", no_wrap=True, min_width=len(name))
    for i, text in enumerate(columns["text"]):
        cells = [v if isinstance(v := columns[name][i], str) else f"{v:.4f}" for name in names]
        table.add_row(" ".join(text.split()), *cells)
    Console(markup=False).print(table)
