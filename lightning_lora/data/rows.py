"""The rows of one split: columns of Arrow files, of which what is asked for is read, some thousand rows at a time."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_lora.data.pairs import Text
from lightning_lora.data.reading import Table

#: What an Arrow file holds of each row of a source. The label is null where the row is left out.
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "text_pair": pa.string(),  # of a pair the second text, else null
        "label": pa.string(),  # the cell, as JSON: 1, 1.0, true and "1" are four labels; a list of them where it is one
        "row": pa.int64(),  # 1-based, in the source
        "key": pa.binary(16),  # text_keys
        "digest": pa.binary(32),  # SHA-256 of the text, or of both with a NUL byte between
    }
)
#: Labels that are converted together.
_LABELS_TOGETHER = 2**16


@dataclass(frozen=True)
class RowFile:
    """The rows of one file of a source, checked.

    Args:
        origin: The file or Hub split.
        content: An Arrow file of ``SCHEMA``: its path in the cache, or its bytes.
        unit: What the numbers of rows count: "line" or "row".
        class_names: Names of the classes that the source declares, by column.
        pair: Whether rows hold a pair of texts.
    """

    origin: str
    content: Path | pa.Buffer
    unit: str
    class_names: dict[str, list[str]]
    pair: bool

    @classmethod
    def open(cls, origin: str, content: Path | pa.Buffer) -> "RowFile":
        """The rows of an Arrow file.

        Raises:
            OSError, ValueError, KeyError: It is damaged.
        """
        with _opened(content) as file:
            return cls(origin, content, **json.loads((pa.ipc.open_file(file).schema.metadata or {})[b"facts"]))

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Some columns, a batch of rows at a time. They are read, not mapped: mapped pages count as memory."""
        options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in columns])
        with _opened(self.content) as file:
            reader = pa.ipc.open_file(file, options=options)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)

    def labels(self, column: str) -> tuple[Table, np.ndarray]:
        """A table with each different label cell, at the first row that has it; and which of them each row has.

        That of a row that is left out is -1.
        """
        words = pa.chunked_array([batch["label"] for batch in self.batches("label")], pa.string()).combine_chunks()
        encoded = words.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy()
        numbers = np.concatenate([np.zeros(0, np.int64), *(batch["row"].to_numpy() for batch in self.batches("row"))])
        found, firsts = np.unique(codes, return_index=True)
        starts = range(0, len(encoded.dictionary), _LABELS_TOGETHER)  # of numbers there are as many as rows
        parts = (encoded.dictionary.slice(start, _LABELS_TOGETHER).to_pylist() for start in starts)
        cells = [json.loads(word) for part in parts for word in part]
        rows = numbers[firsts[found >= 0]].tolist()
        return Table(self.origin, {column: cells}, rows, self.unit, self.class_names), codes


def _opened(content: Path | pa.Buffer) -> pa.NativeFile:
    return pa.OSFile(str(content)) if isinstance(content, Path) else pa.BufferReader(content)


@dataclass(frozen=True)
class Rows:
    """The rows of one split; in memory are only their positions and labels.

    Args:
        files: The files that they stand in, one after another.
        positions: Which of all rows of the files, ascending, shape (rows,).
        labels: Class numbers, int32 (rows,); 0 or 1 by label, uint8 (rows, C); or numbers, float64 (rows,).
    """

    files: Sequence[RowFile]
    positions: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self, *columns: str) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Some columns of the rows, a batch at a time, each with its origin."""
        start = 0
        for file in self.files:
            for batch in file.batches(*columns):
                # Needles of another type would have the whole haystack copied.
                bounds = np.array([start, start + len(batch)], self.positions.dtype)
                first, last = np.searchsorted(self.positions, bounds)
                if first < last:
                    yield file.origin, batch.take(pa.array(self.positions[first:last] - start))
                start += len(batch)

    def _column(self, name: str) -> Iterator[Any]:
        for _, batch in self.batches(name):
            yield from batch[name].to_pylist()

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The fields of ``SCHEMA`` that hold the texts: one, or the two of pairs."""
        return ("text", "text_pair") if self.files[0].pair else ("text",)

    def text_batches(self) -> Iterator[list[Text]]:
        """The texts or pairs of texts, a batch at a time."""
        for _, batch in self.batches(*self.text_fields):
            sides = [batch[name].to_pylist() for name in self.text_fields]
            yield sides[0] if len(sides) == 1 else list(zip(*sides, strict=True))

    @cached_property
    def texts(self) -> list[Text]:
        """The texts or pairs of texts, all in memory."""
        return [text for texts in self.text_batches() for text in texts]

    @cached_property
    def keys(self) -> list[bytes]:
        """The ``text_keys`` of the texts."""
        return list(self._column("key"))

    @cached_property
    def numbers(self) -> np.ndarray:
        """The 1-based line or row of each row in its origin, int64, shape (rows,)."""
        return np.fromiter(self._column("row"), np.int64, len(self))

    @cached_property
    def origins(self) -> list[str]:
        """The file or Hub split of each row."""
        return [origin for origin, batch in self.batches("row") for _ in range(len(batch))]

    def place(self, position: int) -> str:
        """Where the row at a position stands, in words: file, line or row."""
        row = self.select(np.array([position]))
        units = {file.origin: file.unit for file in self.files}
        return f"{row.origins[0]}, {units[row.origins[0]]} {row.numbers[0]}"

    def select(self, keep: np.ndarray) -> "Rows":
        """The rows at the given ascending positions."""
        return Rows(self.files, self.positions[keep], self.labels[keep])

    def without(self, other: "Rows") -> "Rows":
        """The rows whose text is no duplicate of one of the other rows."""
        others = pa.array(other.keys, SCHEMA.field("key").type)
        keys = pa.chunked_array([batch["key"] for _, batch in self.batches("key")], others.type)
        return self.select(~pc.is_in(keys, value_set=others).to_numpy())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of texts and labels in their order."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _LABELS_TOGETHER):
            kind = "<f8" if self.labels.dtype.kind == "f" else "<i8"
            digest.update(self.labels[start : start + _LABELS_TOGETHER].astype(kind).tobytes())
        for _, batch in self.batches("digest"):
            digest.update(b"".join(batch["digest"].to_pylist()))
        return digest.hexdigest()
