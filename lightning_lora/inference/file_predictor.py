"""A trained model, loaded once, and how a Parquet file goes through it in flat memory."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning import Callback

from lightning_lora.config.configured_run import ConfiguredRun, check_base
from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path
from lightning_lora.inference.input_rows import InputRows
from lightning_lora.inference.loaded_run import LoadedRun, assemble
from lightning_lora.inference.many_files import (
    FileTask,
    holds_texts,
    input_stamp,
    open_flat,
    output_schema,
    read_pieces,
    reading,
)
from lightning_lora.inference.output import new_columns
from lightning_lora.runs.folder import RunFolder

#: Rows that are held at a time: enough to find batches of like length in, and twice as many are all that memory holds.
CHUNK_ROWS = 8192
#: The same in bytes, for long texts and wide tables.
CHUNK_BYTES = 1 << 26
#: Takes a number of rows that are done.
Advance = Callable[[int], None]


class RefusedError(UserError):
    """A file cannot be predicted as it is; others can."""


@dataclass(frozen=True)
class PredictJob:
    """What is to be done, for any process that does a part of it.

    Args:
        words: Those of the command.
        tasks: All files.
        settings: What all outputs are made with.
        text_columns: Columns of the text.
    """

    words: list[str]
    tasks: list[FileTask]
    settings: dict[str, Any]
    text_columns: list[str]


def fingerprint(checkpoint: Path) -> str:
    """SHA-256 of the weights: of the file, or of all files of an exported adapter's folder."""
    digest = hashlib.sha256()
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file()) if checkpoint.is_dir() else [checkpoint]
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_for(cli: ConfiguredRun, checkpoint: Path, labels: Sequence[str]) -> LoadedRun:
    """The run of a command line, loaded with its settings.

    Args:
        cli: The command line.
        checkpoint: The weights.
        labels: Names of the classes.

    Raises:
        UserError: The weights cannot be loaded, or the model cannot compute as is asked.
    """
    config = cli.config
    found = assemble(config.model.as_dict(), config.data, checkpoint, labels, cli.make_trainer(None))
    if config.int8:
        found.model.check_int8(str(config.trainer.precision))
        found.model.int8 = True
    if any(word.partition("=")[0] == "--data.max_length" for word in cli.words):
        check_base(found.model, found, None)
    return found


class FilePredictor:
    """The model, loaded once, and how a file goes through it.

    Args:
        cli: The command line.
        job: What is to be done.

    Raises:
        UserError: The weights cannot be loaded, or are no more those that the job was planned with.
    """

    def __init__(self, cli: ConfiguredRun, job: PredictJob) -> None:
        self.config = cli.config
        self.job = job
        checkpoint = RunFolder.open(Path(self.config.run)).checkpoint(self.config.checkpoint)
        self.config.trainer.enable_progress_bar = False  # there is one for all files
        self.run = load_for(cli, checkpoint, job.settings["labels"])
        if fingerprint(checkpoint) != job.settings["weights"]:
            raise UserError(f"{checkpoint} has changed since the command started (is it still trained?)")
        self.counter = _RowCounter()
        self.run.trainer.callbacks.append(self.counter)  # type: ignore[attr-defined]  # a list, which Lightning hides

    def write(self, task: FileTask, advance: Advance) -> None:
        """Predicts one file; its output is there whole or not at all.

        Raises:
            RefusedError: The file cannot be read, or its text column holds something else.
            UserError: The output cannot be written.
        """
        self.counter.advance = advance
        with refused_reading(task.source):
            opened = open_flat(task.source)
        with atomic_path(task.output) as staging, opened as file:
            if input_stamp(task.source, file.metadata.num_rows) != task.stamp:
                raise RefusedError(f"{task.source} has changed since the command started; start it again")
            new = new_columns(self.job.settings["labels"])
            stamp = {"input": task.stamp, "settings": self.job.settings}
            schema = output_schema(task, file.schema_arrow, new, stamp)
            with pq.ParquetWriter(staging, schema) as writer:
                for piece, dataset, rows in _one_ahead(self._prepared(file, task)):
                    writer.write_table(self._predicted(piece, dataset, rows, schema, task.columns))
                    advance(len(rows.faults))

    def _prepared(self, file: pq.ParquetFile, task: FileTask) -> Iterator[tuple[pa.Table, TokenDataset, InputRows]]:
        first = 1
        pieces = read_pieces(file, CHUNK_ROWS, CHUNK_BYTES)
        while True:
            with refused_reading(task.source):
                piece = next(pieces, None)
            if piece is None:
                return
            rows = rows_of_piece(task.source, piece, self.job.text_columns, first)
            for name in self.job.text_columns:
                if rows.faults and not holds_texts(kind := piece.schema.field(name).type):
                    raise RefusedError(f"{rows.faults[min(rows.faults)]}; the column holds {kind}. Set --text_column")
            first += piece.num_rows
            yield piece, self.run.dataset(rows.usable), rows

    def _predicted(
        self,
        piece: pa.Table,
        dataset: TokenDataset,
        rows: InputRows,
        schema: pa.Schema,
        columns: Mapping[str, str | None],
    ) -> pa.Table:
        new = rows.predicted(self.run.predict_dataset(dataset))
        arrays = [piece.column(source) if source else new[name] for name, source in columns.items()]
        return pa.table(arrays, schema=schema)


def rows_of_piece(path: Path, piece: pa.Table, text_columns: Sequence[str], first: int) -> InputRows:
    """Some rows of a file, the first of which has this number in it."""
    columns: dict[str, Any] = {name: piece.column(name) for name in text_columns}
    return InputRows.of(Table(str(path), columns, range(first, first + piece.num_rows), "row"), text_columns)


def refuse_faults(job: PredictJob) -> None:
    """Refuses input files with a row that has no text, before any is predicted.

    Raises:
        UserError: There is such a row; the first is named.
    """
    for task in job.tasks:
        first = 1
        with reading(task.source), open_flat(task.source) as file:
            for batch in file.iter_batches(CHUNK_ROWS, columns=job.text_columns):
                rows_of_piece(task.source, pa.Table.from_batches([batch]), job.text_columns, first).refuse_faults()
                first += batch.num_rows


@contextmanager
def refused_reading(path: Path) -> Iterator[None]:
    """Refuses the file for what is said while it is read: a disk that is full when it is written is another matter."""
    try:
        with reading(path):
            yield
    except UserError as error:
        raise RefusedError(str(error)) from None


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each of which is made while the one before is used: tokens of the next rows, while the model runs."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


class _RowCounter(Callback):
    """Says how many rows each batch had."""

    advance: Advance

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Counts the batch."""
        self.advance(len(outputs["rows"]))
