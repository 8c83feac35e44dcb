"""A trained model, loaded once, and how a Parquet file goes through it in flat memory."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning import Callback

from lightning_lora.config.lightning_cli import ConfiguredRun
from lightning_lora.data.batching import LengthBatchSampler, TokenDataset, evaluated_together
from lightning_lora.data.datamodule import make_loader
from lightning_lora.data.reading import Table, cells
from lightning_lora.data.tokens import InputFormat, load_tokenizer, tokenize
from lightning_lora.devices import keep_freed_memory
from lightning_lora.errors import UserError
from lightning_lora.evaluation.predictions import Predictions, in_row_order
from lightning_lora.export.weights import load_weights
from lightning_lora.files import atomic_path
from lightning_lora.inference.input_rows import Rows
from lightning_lora.inference.many_files import (
    Shard,
    holds_texts,
    input_stamp,
    open_flat,
    output_schema,
    read_pieces,
    reading,
)
from lightning_lora.inference.output import new_columns
from lightning_lora.locations import resolve
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.module import TextClassifier

#: Rows that are held at a time: enough to find batches of like length in, and twice as many are all that memory holds.
CHUNK_ROWS = 8192
#: The same in bytes, for long texts and wide tables.
CHUNK_BYTES = 1 << 26
#: Takes a number of rows that are done, and whether this process did them.
Advance = Callable[[int, bool], None]


class RefusedError(UserError):
    """A file cannot be predicted as it is; others can."""


@dataclass(frozen=True)
class Job:
    """What is to be done, for any process that does a part of it.

    Args:
        words: Those of the command.
        shards: All files.
        settings: What all outputs are made with.
        text_columns: Columns of the text.
    """

    words: list[str]
    shards: list[Shard]
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


def load_classifier(config: Any, checkpoint: Path, labels: Sequence[str]) -> TextClassifier:
    """The model of a run, trained, as it is to predict.

    Args:
        config: Settings of the command.
        checkpoint: Its weights.
        labels: Names of its classes.

    Raises:
        UserError: The weights cannot be loaded, or the model cannot compute as is asked.
    """
    model = TextClassifier(**config.model.as_dict(), label_names=list(labels))
    load_weights(model, checkpoint)
    keep_freed_memory()
    if config.int8:
        model.check_int8(str(config.trainer.precision))
        model.int8 = True
    return model


def predict_dataset(trainer: Any, model: TextClassifier, dataset: TokenDataset, batch_size: int | None) -> Predictions:
    """Predictions of all texts of a dataset, in their order; none of none."""
    if not len(dataset):
        return Predictions(np.zeros((0, len(model.label_names))), None, model.label_names, np.zeros(0, dtype=np.int64))
    loader = make_loader(dataset, LengthBatchSampler(dataset.widths, evaluated_together(batch_size), None))
    with torch.inference_mode():
        batches: Any = trainer.predict(model, loader)
    return in_row_order(batches, model.label_names)


class Predictor:
    """The model, loaded once, and how a file goes through it.

    Args:
        cli: The command line.
        job: What is to be done.

    Raises:
        UserError: The weights cannot be loaded, or are no more those that the job was planned with.
    """

    def __init__(self, cli: ConfiguredRun, job: Job) -> None:
        self.config = cli.config
        self.job = job
        checkpoint = RunFolder.open(Path(self.config.run)).checkpoint(self.config.checkpoint)
        self.model = load_classifier(self.config, checkpoint, job.settings["labels"])
        if fingerprint(checkpoint) != job.settings["weights"]:
            raise UserError(f"{checkpoint} has changed since the command began (is it still trained?); start it again")
        data = self.config.data
        self.tokenizer = load_tokenizer(resolve(data.base_model, "model.base_model").target, "model.base_model")
        self.frame = InputFormat.of(self.tokenizer, data.max_length, data.truncation, data.window_overlap)
        self.config.trainer.enable_progress_bar = False  # there is one for all files
        self.trainer = cli.make_trainer(None)
        self.counter = _RowCounter()
        self.trainer.callbacks.append(self.counter)  # type: ignore[attr-defined]  # a list, which Lightning hides

    def write(self, shard: Shard, advance: Advance) -> None:
        """Predicts one file; its output is there whole or not at all.

        Raises:
            RefusedError: The file cannot be read, or its text column holds something else.
            UserError: The output cannot be written.
        """
        self.counter.advance = advance
        with refused_reading(shard.source):
            opened = open_flat(shard.source)
        with atomic_path(shard.output) as staging, opened as file:
            if input_stamp(shard.source, file.metadata.num_rows) != shard.stamp:
                raise RefusedError(f"{shard.source} has changed since the command began; start it again")
            new = new_columns(self.job.settings["labels"])
            stamp = {"input": shard.stamp, "settings": self.job.settings}
            schema = output_schema(file.schema_arrow, self.job.text_columns, new, stamp)
            with pq.ParquetWriter(staging, schema) as writer:
                for piece, dataset, rows in _one_ahead(self._prepared(file, shard)):
                    writer.write_table(self._predicted(piece, dataset, rows, schema))
                    advance(len(rows.faults), True)

    def _prepared(self, file: pq.ParquetFile, shard: Shard) -> Iterator[tuple[pa.Table, TokenDataset, Rows]]:
        first = 1
        pieces = read_pieces(file, CHUNK_ROWS, CHUNK_BYTES)
        while True:
            with refused_reading(shard.source):
                piece = next(pieces, None)
            if piece is None:
                return
            rows = rows_of_piece(shard.source, piece, self.job.text_columns, first)
            for name in self.job.text_columns:
                if rows.faults and not holds_texts(kind := piece.schema.field(name).type):
                    raise RefusedError(f"{rows.faults[min(rows.faults)]}; the column holds {kind}. Set --text_column")
            first += piece.num_rows
            padding = self.config.data.padding == "max_length"
            yield piece, TokenDataset(tokenize(rows.usable, self.tokenizer), self.frame, None, padding), rows

    def _predicted(self, piece: pa.Table, dataset: TokenDataset, rows: Rows, schema: pa.Schema) -> pa.Table:
        columns = rows.columns(predict_dataset(self.trainer, self.model, dataset, self.config.data.eval_batch_size))
        arrays = [columns[name] if name in columns else piece.column(name) for name in schema.names]
        return pa.table(arrays, schema=schema)


def rows_of_piece(path: Path, piece: pa.Table, text_columns: Sequence[str], first: int) -> Rows:
    """Some rows of a file, the first of which has this number in it."""
    columns = {name: cells(piece.column(name)) for name in text_columns}
    return Rows.of(Table(str(path), columns, range(first, first + piece.num_rows), "row"), text_columns)


def refuse_faults(job: Job) -> None:
    """Refuses input files with a row that has no text, before any is predicted.

    Raises:
        UserError: There is such a row; the first is named.
    """
    for shard in job.shards:
        first = 1
        with reading(shard.source), open_flat(shard.source) as file:
            for batch in file.iter_batches(CHUNK_ROWS, columns=job.text_columns):
                rows_of_piece(shard.source, pa.Table.from_batches([batch]), job.text_columns, first).refuse_faults()
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
        self.advance(len(outputs["rows"]), True)
