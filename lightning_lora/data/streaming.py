"""A train split larger than memory: Parquet files, local or on any fsspec filesystem, tokenized piece by piece.

Each piece of a file becomes a shard in the cache folder (``sharding``). Texts are then never needed again, for a shard
keeps what the project asks of them: tokens, labels, row numbers, keys that find repeats, and digests for the
fingerprint. Validation and test rows are held in memory as usual. What comes out is what ``prepare`` gives of the same
files: the same rows in the same order, the same fingerprints.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.data import prepare
from lightning_lora.data.labels import encode_labels
from lightning_lora.data.prepare import Prepared, SourceOptions
from lightning_lora.data.reading import Table, read_file
from lightning_lora.data.remote import matching
from lightning_lora.data.rows import SplitRows
from lightning_lora.data.sharding import Job, make_shards, plan
from lightning_lora.data.shards import KEYS, ShardRows, ShardTokens
from lightning_lora.data.sources import source_files, split_files, split_named
from lightning_lora.data.specs import find_spec
from lightning_lora.data.splits import position_type, text_keys
from lightning_lora.data.stored import stored_splits
from lightning_lora.data.tokens import TokenRows, base_tokenizer, tokenizer_rules
from lightning_lora.errors import UserError


def read_splits(options: SourceOptions, base_model: str, cache_dir: Path) -> Prepared:
    """The splits that the options describe: held in memory, or with a train split that is streamed.

    Args:
        options: Of the source.
        base_model: Whose tokenizer streamed rows are tokenized with.
        cache_dir: Where splits and shards are kept.

    Raises:
        UserError: As ``prepare``; or what is to be streamed cannot be.
    """
    if not options.stream:
        return stored_splits(options, cache_dir)
    return streamed_splits(options, base_tokenizer(base_model), cache_dir)


@dataclass(frozen=True)
class StreamedRows:
    """Rows of a split whose texts are not held: four bytes a row for the label, four for the place.

    Args:
        rows: Where they are.
        labels: Class numbers, int32, shape (rows,).
        known: Whether all of it was in the cache.
    """

    rows: ShardRows
    labels: np.ndarray
    known: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """None are held, so what needs them is refused before."""
        raise TypeError("streamed rows hold no texts")

    @property
    def origins(self) -> list[str]:
        """The file of each row; made when it is asked for, as ``numbers`` is."""
        return [shard.origin for shard, _, local in self.rows.pieces() for _ in range(len(local))]

    @cached_property
    def numbers(self) -> np.ndarray:
        """The 1-based row of each row in its file, int64, shape (rows,)."""
        return np.concatenate([shard.map("numbers")[local] for shard, _, local in self.rows.pieces()])

    def select(self, keep: np.ndarray) -> "StreamedRows":
        """The rows at the given ascending positions."""
        return StreamedRows(ShardRows(self.rows.shards, self.rows.positions[keep]), self.labels[keep], self.known)

    def not_in(self, other: SplitRows) -> np.ndarray:
        """Ascending positions of the rows whose text is no repeat of one of the other rows, whose texts are held."""
        others = np.unique(np.array(text_keys(other.texts), KEYS))
        keep = np.ones(len(self), dtype=bool)
        for shard, mine, local in self.rows.pieces():
            keys = shard.map("keys")[local]
            nearest = np.minimum(np.searchsorted(others, keys), len(others) - 1)
            keep[mine] = others[nearest] != keys
        return np.flatnonzero(keep).astype(position_type(len(keep)))

    def fingerprint(self) -> str:
        """A hash of texts and labels in their order: that of the same rows held in memory."""
        digest = hashlib.sha256()
        for _, mine, _ in self.rows.pieces():
            digest.update(self.labels[mine].astype("<i8").tobytes())
        for shard, _, local in self.rows.pieces():
            digest.update(shard.map("digests")[local].tobytes())
        return digest.hexdigest()

    def places(self) -> Iterator[dict[str, Any]]:
        """Columns ``origin``, ``row`` and ``key``, a shard at a time."""
        import pyarrow as pa

        for shard, _, local in self.rows.pieces():
            keys = pa.py_buffer(shard.map("keys")[local].tobytes())
            key = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(local), [None, keys]).cast(pa.binary())
            yield {"origin": [shard.origin] * len(local), "row": shard.map("numbers")[local], "key": key}

    def tokens(self, tokenizer: Any, cache_dir: Path, advance: Callable[[int], None]) -> tuple[TokenRows, bool]:
        """The tokens, which were made by the same tokenizer when the rows were read."""
        del tokenizer, cache_dir, advance
        return ShardTokens(self.rows), self.known


def streamed_splits(options: SourceOptions, tokenizer: Any, cache_dir: Path) -> Prepared:
    """The splits, of which train is tokenized already and the others are held.

    Raises:
        UserError: There are no such files, a row is bad, labels do not agree, or a size does not fit.
    """
    names, held, warnings = _files(options)
    text_columns, label_column = prepare.columns_of(options)
    columns = list(dict.fromkeys([*text_columns, label_column]))
    tables = {
        split: [read_file(path, columns, label_column, encoding=options.encoding) for path in paths]
        for split, paths in held.items()
    }
    next(iter(tables.values()))[0].warnings[:0] = warnings
    tables, dropped = prepare.checked(tables, options)
    pieces = plan(names, columns, label_column)
    rules = tokenizer_rules(tokenizer).decode()
    stated = options.label_names is not None
    words = tokenizer.backend_tokenizer.to_str()
    job = Job(text_columns, label_column, options.bad_rows, rules, words, cache_dir, stated)
    found, known = make_shards(pieces, job)
    dropped += sum(shard.dropped for shard in found)
    firsts = [
        Table(
            shard.origin,
            {label_column: [cell for cell, _ in shard.cells]},
            [row for _, row in shard.cells],
            label_names=shard.label_names,
        )
        for shard in found
    ]
    if not any(len(table) for table in firsts):
        raise UserError(f"{names[0]}: the train split has no usable row")
    # Of train each label cell once: to its number there it is what each row's code is to its class number.
    rows = sum(shard.rows for shard in found)
    labels = encode_labels({"train": firsts, **tables}, label_column, options.label_names, train_rows=rows)
    everything = ShardRows(found, np.arange(rows, dtype=position_type(rows)))
    classes = np.empty(rows, np.int32)
    numbers = {id(shard): each for shard, each in zip(found, labels.encoded["train"], strict=True)}
    for shard, mine, _ in everything.pieces():
        classes[mine] = numbers[id(shard)][shard.map("codes")]
    read: dict[str, SplitRows] = {"train": StreamedRows(everything, classes, known)}
    for split, parts in tables.items():
        read[split] = prepare.joined(parts, text_columns, labels.encoded[split])
    return prepare.assemble(read, tables, labels, options, dropped)


def _files(options: SourceOptions) -> tuple[list[str], dict[str, list[Path]], list[str]]:
    """Names of the train files, the files of the splits that are held, and warnings."""
    source = options.source
    held: dict[str, list[Path]] = {}
    warnings: list[str] = []
    if isinstance(source, str):
        found = None if find_spec(source) else source_files(source)
        if found is None:
            raise UserError(
                f"data.stream: '{source}' is no folder of Parquet files; download it, or give the splits as "
                "data.source={train: 's3://bucket/train-*.parquet', validation: FILE, test: FILE}"
            )
        held, warnings = found
        names = [str(path) for path in held.pop("train")]
    else:
        names = []
        for name, place in source.items():
            split = split_named(name)
            if split == "train":
                names = matching(place)
            else:
                held[split] = split_files(name, place)
        if not names:
            raise UserError(f"data.source: {dict(source)} has no train split; give train: FILES")
    for split, word in (("test", "test"), ("val", "validation")):
        if split not in held:
            raise UserError(
                f"data.stream: the source has no {word} split, and none is carved from rows that are streamed; "
                f"give data.source.{word}: FILE"
            )
    if odd := next((name for name in names if not name.lower().endswith(".parquet")), None):
        raise UserError(f"data.stream: {odd} is no .parquet file, and only those are streamed; leave data.stream out")
    return names, {split: held[split] for split in ("val", "test")}, warnings
