"""From a source to the three splits: read, check, carve, take repeats out, subsample.

The order matters and is fixed: a missing test split is carved before anything else; what stands in test is
taken out of the training side; validation is carved from what is left; subsampling comes last.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.data.labels import canonical, encode_labels
from lightning_lora.data.reading import SPLITS, Table, read_source
from lightning_lora.data.specs import DatasetSpec, find_spec
from lightning_lora.data.splits import carve, count_of, not_in, stratified_sample, text_keys
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path

DEFAULT_TEST_SIZE = 0.2
DEFAULT_VAL_SIZE = 0.1


@dataclass(frozen=True)
class SourceOptions:
    """Which rows to read and how to split them; see ``TextDataModule`` for each field."""

    source: str | Mapping[str, str]
    text_column: str | Sequence[str] | None = None
    label_column: str | None = None
    label_names: Sequence[str] | None = None
    bad_rows: str = "error"
    test_size: int | float | None = None
    val_size: int | float | None = None
    train_rows: int | float | None = None
    test_rows: int | float | None = None
    split_seed: int = 0


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Args:
        texts: The texts.
        labels: Class numbers, int64, shape (rows,).
        origins: The file or Hub split of each row.
        numbers: The 1-based line or row of each row in its origin, int64, shape (rows,).
    """

    texts: list[str]
    labels: np.ndarray
    origins: list[str]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, keep: np.ndarray) -> "Rows":
        """The rows at the given positions."""
        texts = [self.texts[i] for i in keep]
        return Rows(texts, self.labels[keep], [self.origins[i] for i in keep], self.numbers[keep])

    def fingerprint(self) -> str:
        """A hash of texts and labels in their order."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """The splits and what was done to get them."""

    label_names: list[str]
    splits: dict[str, Rows]
    origin: dict[str, str]
    repeats_removed: dict[str, int] = field(default_factory=dict)
    bad_rows_dropped: int = 0
    citation: str = ""

    def table(self, texts: bool) -> Any:
        """An Arrow table of which row of the source is in which split, with or without text and label.

        ``key`` is equal for texts that are repeats of each other (``text_keys``).
        """
        import pyarrow as pa

        parts = self.splits.values()
        columns: dict[str, Any] = {
            "split": np.concatenate([np.full(len(rows), name) for name, rows in self.splits.items()]),
            "origin": [origin for rows in parts for origin in rows.origins],
            "row": np.concatenate([rows.numbers for rows in parts]),
            "key": [key for rows in parts for key in text_keys(rows.texts)],
        }
        if texts:
            columns["text"] = [text for rows in parts for text in rows.texts]
            columns["label"] = np.concatenate([rows.labels for rows in parts])
        return pa.table(columns)

    def write_parquet(self, path: Path) -> None:
        """Writes which row of the source went to which split."""
        import pyarrow.parquet as pq

        with atomic_path(path) as staging:
            pq.write_table(self.table(texts=False), staging)

    def describe(self) -> dict[str, Any]:
        """Plain values for the run record: sizes, class counts, fingerprints, what was taken out."""
        return {
            "label_names": self.label_names,
            "splits": {
                name: {
                    "rows": len(rows),
                    "rows_by_class": {
                        label: int(count)
                        for label, count in zip(
                            self.label_names,
                            np.bincount(rows.labels, minlength=len(self.label_names)),
                            strict=True,
                        )
                    },
                    "from": self.origin[name],
                    "fingerprint": rows.fingerprint(),
                }
                for name, rows in self.splits.items()
            },
            "repeats_removed": self.repeats_removed,
            "bad_rows_dropped": self.bad_rows_dropped,
            "citation": self.citation,
        }


def prepare(options: SourceOptions) -> Prepared:
    """The train, val and test rows that the options describe, the same ones every time.

    Raises:
        UserError: The source cannot be read, a row is bad, or a size does not fit.
    """
    spec = _spec_of(options)
    text_column = options.text_column or (spec.text_column if spec else "text")
    text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
    label_column = options.label_column or (spec.label_column if spec else "label")
    keep_rows = spec.keep_rows if spec else {}
    tables = read_source(
        source_of(options),
        list(dict.fromkeys([*text_columns, label_column, *keep_rows])),
        label_column,
    )
    dropped = 0
    for split, parts in tables.items():
        for i, whole in enumerate(parts):
            part = _matching(whole, keep_rows) if keep_rows else whole
            checked = _without_bad_rows(part, text_columns, label_column, options.bad_rows)
            dropped += len(part) - len(checked)
            parts[i] = checked
        if not any(len(part) for part in parts):
            raise UserError(f"{parts[0].origin}: the {split} split has no usable row")
    names = options.label_names or (spec.label_names if spec else None)
    label_names, encoded = encode_labels(tables, label_column, names)
    read = {split: _joined(parts, text_columns, encoded[split]) for split, parts in tables.items()}
    splits, origin, removed = _split(read, options)
    return Prepared(label_names, splits, origin, removed, dropped, spec.citation if spec else "")


def source_of(options: SourceOptions) -> str | Mapping[str, str]:
    """Where the rows are: the location behind the name of a known data set, else what the options say."""
    spec = _spec_of(options)
    return spec.source if spec else options.source


def _spec_of(options: SourceOptions) -> DatasetSpec | None:
    return find_spec(options.source) if isinstance(options.source, str) else None


def _matching(table: Table, keep_rows: Mapping[str, str]) -> Table:
    columns = [(table.columns[name], value) for name, value in keep_rows.items()]
    return table.select([i for i in range(len(table)) if all(cells[i] == value for cells, value in columns)])


def _without_bad_rows(table: Table, text_columns: list[str], label_column: str, policy: str) -> Table:
    """The table without rows whose text or label is missing; with policy "error" there must be none."""
    bad: dict[int, str] = {}
    for column in text_columns:
        for i, cell in enumerate(table.columns[column]):
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                bad.setdefault(i, f"{table.where(i, column)}: the text is {'null' if cell is None else 'empty'}")
            elif not isinstance(cell, str):
                raise UserError(
                    f"{table.where(i, column)}: a text is needed, got {type(cell).__name__} {cell!r:.40}; "
                    "is it the text? Set data.text_column"
                )
            elif "\0" in cell:
                raise UserError(f"{table.where(i, column)}: a NUL byte is no character; correct the row")
            elif not is_unicode(cell):
                raise UserError(f"{table.where(i, column)}: half of a surrogate pair is no character; correct the row")
    for i, cell in enumerate(table.columns[label_column]):
        if cell is None or canonical(cell) == "" or (isinstance(cell, float) and math.isnan(cell)):
            bad.setdefault(i, f"{table.where(i, label_column)}: the label is missing")
        elif not isinstance(cell, str | int | float):
            raise UserError(
                f"{table.where(i, label_column)}: a label is a word or a number, got {type(cell).__name__} {cell!r:.40}"
            )
    if not bad:
        return table
    if policy == "error":
        more = f" (and {len(bad) - 1} more such rows in this file)" if len(bad) > 1 else ""
        raise UserError(f"{bad[min(bad)]}{more}; correct it, or leave such rows out with data.bad_rows=drop")
    return table.select([i for i in range(len(table)) if i not in bad])


def is_unicode(text: str) -> bool:
    """Whether the text can be written down: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(tables: list[Table], text_columns: list[str], labels: list[np.ndarray]) -> Rows:
    texts: list[str] = []
    for table in tables:
        columns = [table.columns[name] for name in text_columns]
        texts += columns[0] if len(columns) == 1 else [" ".join(cells) for cells in zip(*columns, strict=True)]
    origins = [table.origin for table in tables for _ in range(len(table))]
    numbers = np.concatenate([np.asarray(table.rows, dtype=np.int64) for table in tables])
    return Rows(texts, np.concatenate(labels), origins, numbers)


def _split(read: dict[str, Rows], options: SourceOptions) -> tuple[dict[str, Rows], dict[str, str], Counter[str]]:
    origin = dict.fromkeys(read, "the source's own split")
    splits = dict(read)
    _carve_missing(splits, origin, "test", options.test_size, DEFAULT_TEST_SIZE, options.split_seed)

    removed: Counter[str] = Counter()
    keys = {split: text_keys(rows.texts) for split, rows in splits.items()}

    def take_out_repeats(split: str, other: str) -> None:
        keep = not_in(keys[split], keys[other])
        removed[f"{split}_in_{other}"] = len(splits[split]) - len(keep)
        if len(keep) == 0:
            raise UserError(f"data.source: every row of {split} also stands in {other}; nothing is left to train on")
        if len(keep) < len(splits[split]):
            splits[split] = splits[split].select(keep)
            keys[split] = [keys[split][i] for i in keep]

    for split in splits.keys() & {"train", "val"}:
        take_out_repeats(split, "test")
    _carve_missing(splits, origin, "val", options.val_size, DEFAULT_VAL_SIZE, options.split_seed)
    keys = {split: text_keys(splits[split].texts) for split in ("train", "val")}
    take_out_repeats("train", "val")

    origin["train"] += ", less what was carved from it" if len(read["train"]) > len(splits["train"]) else ""
    for split, size in (("train", options.train_rows), ("test", options.test_rows)):
        if size is not None:
            rows = splits[split]
            number = count_of(size, len(rows), f"data.{split}_rows")
            splits[split] = rows.select(
                stratified_sample(rows.labels, number, options.split_seed, f"subsample/{split}")
            )
            origin[split] += f", {number} of {len(rows)} rows (stratified)"
    if len(np.unique(splits["train"].labels)) < 2:
        raise UserError("data.train_rows: the rows to train on are all of one class; take more rows")
    return {split: splits[split] for split in SPLITS}, origin, removed


def _carve_missing(
    splits: dict[str, Rows],
    origin: dict[str, str],
    name: str,
    size: int | float | None,
    default: float,
    seed: int,
) -> None:
    """Gives ``splits`` the split ``name``, taken from train, unless the source has it."""
    if name in splits:
        if size is not None:
            raise UserError(
                f"data.{name}_size: {size}, but the source has a {name} split of its own; leave it out"
                + (" (data.test_rows takes a part of it)" if name == "test" else "")
            )
        return
    train = splits["train"]
    number = count_of(default if size is None else size, len(train), f"data.{name}_size")
    stay, taken = carve(train.labels, number, seed, name)
    if len(stay) == 0:
        raise UserError(f"data.{name}_size: {number} rows leave none of {len(train)} to train on")
    splits["train"], splits[name] = train.select(stay), train.select(taken)
    origin[name] = f"carved from train, {number} of {len(train)} rows (stratified, seed {seed})"
