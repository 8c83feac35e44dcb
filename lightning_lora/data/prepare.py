"""From a source to the three splits: read, check, carve, take repeats out, subsample.

The order matters and is fixed: a missing test split is carved before anything else; what stands in test is
taken out of the training side; validation is carved from what is left; subsampling comes last.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.data.labels import Labels, encode_labels
from lightning_lora.data.reading import Table
from lightning_lora.data.rows import Rows, SplitRows
from lightning_lora.data.sources import SPLITS, read_source
from lightning_lora.data.specs import DatasetSpec, find_spec
from lightning_lora.data.splits import carve, contradictions, count_of, stratified_sample, text_keys
from lightning_lora.data.words import canonical, few
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path

DEFAULT_TEST_SIZE = 0.2
DEFAULT_VAL_SIZE = 0.1
#: Unicode categories of characters that show nothing: controls, format characters and separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


@dataclass(frozen=True)
class SourceOptions:
    """Which rows to read and how to split them; see ``TextDataModule`` for each field."""

    source: str | Mapping[str, str]
    text_column: str | Sequence[str] | None = None
    label_column: str | None = None
    label_names: Sequence[Any] | Mapping[Any, Any] | None = None
    encoding: str | None = None
    bad_rows: str = "error"
    test_size: int | float | None = None
    val_size: int | float | None = None
    train_rows: int | float | None = None
    test_rows: int | float | None = None
    split_seed: int = 0
    stream: bool = False


@dataclass(frozen=True)
class Prepared:
    """The splits and what was done to get them."""

    label_names: list[str]
    splits: dict[str, SplitRows]
    origin: dict[str, str]
    repeats_removed: dict[str, int] = field(default_factory=dict)
    bad_rows_dropped: int = 0
    citation: str = ""
    label_values: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def write_parquet(self, path: Path) -> None:
        """Writes which row of the source went to which split; ``key`` is equal for texts that are repeats."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {"split": pa.string(), "origin": pa.string(), "row": pa.int64(), "key": pa.binary()}
        schema = pa.schema(types)
        with atomic_path(path) as staging, pq.ParquetWriter(staging, schema) as writer:
            for name, rows in self.splits.items():
                for piece in rows.places():
                    columns = {"split": [name] * len(piece["row"]), **piece}
                    writer.write_table(pa.table(columns, schema=schema))

    def describe(self) -> dict[str, Any]:
        """Plain values for the run record: sizes, class counts, fingerprints, what was taken out."""
        return {
            "label_names": self.label_names,
            "label_values": self.label_values,
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
            "warnings": self.warnings,
        }


def prepare(options: SourceOptions) -> Prepared:
    """The train, val and test rows that the options describe, the same ones every time.

    Raises:
        UserError: The source cannot be read, a row is bad, or a size does not fit.
    """
    spec = _spec_of(options)
    text_columns, label_column = columns_of(options)
    keep_rows = spec.keep_rows if spec else {}
    tables = read_source(
        source_of(options),
        list(dict.fromkeys([*text_columns, label_column, *keep_rows])),
        label_column,
        options.encoding,
    )
    if keep_rows:
        tables = {split: [_matching(part, keep_rows) for part in parts] for split, parts in tables.items()}
    tables, dropped = checked(tables, options)
    labels = encode_labels(tables, label_column, options.label_names, spec.label_names if spec else None)
    read: dict[str, SplitRows] = {s: joined(parts, text_columns, labels.encoded[s]) for s, parts in tables.items()}
    return assemble(read, tables, labels, options, dropped, spec.citation if spec else "")


def assemble(
    read: dict[str, SplitRows],
    tables: dict[str, list[Table]],
    labels: Labels,
    options: SourceOptions,
    dropped: int,
    citation: str = "",
) -> Prepared:
    """The rows read, divided, with the warnings about them."""
    divided = divide(read, options, labels.names)
    told = [warning for parts in tables.values() for table in parts for warning in table.warnings]
    divided["warnings"] = [*told, *labels.warnings, *divided["warnings"]]
    return Prepared(labels.names, label_values=labels.values, bad_rows_dropped=dropped, citation=citation, **divided)


def source_of(options: SourceOptions) -> str | Mapping[str, str]:
    """Where the rows are: the location behind the name of a known data set, else what the options say."""
    spec = _spec_of(options)
    return spec.source if spec else options.source


def columns_of(options: SourceOptions) -> tuple[list[str], str]:
    """The names of the columns with the text, and of that with the label."""
    spec = _spec_of(options)
    text_column = options.text_column or (spec.text_column if spec else "text")
    label_column = options.label_column or (spec.label_column if spec else "label")
    return [text_column] if isinstance(text_column, str) else list(text_column), label_column


def _spec_of(options: SourceOptions) -> DatasetSpec | None:
    return find_spec(options.source) if isinstance(options.source, str) else None


def _matching(table: Table, keep_rows: Mapping[str, str]) -> Table:
    columns = [(table.columns[name], value) for name, value in keep_rows.items()]
    return table.select([i for i in range(len(table)) if all(cells[i] == value for cells, value in columns)])


def checked(tables: dict[str, list[Table]], options: SourceOptions) -> tuple[dict[str, list[Table]], int]:
    """The tables without rows whose text or label is missing, and how many these were.

    Raises:
        UserError: There are such rows and ``bad_rows`` is "error"; or no row is left.
    """
    found: dict[str, list[Table]] = {}
    for split, parts in tables.items():
        found[split] = [_without_bad_rows(part, *columns_of(options), options.bad_rows) for part in parts]
        if not any(len(part) for part in found[split]):
            raise UserError(f"{parts[0].origin}: the {split} split has no usable row")
    before, after = (sum(len(part) for parts in each.values() for part in parts) for each in (tables, found))
    return found, before - after


def bad_rows(table: Table, text_columns: Sequence[str], label_column: str) -> dict[int, str]:
    """Positions of the rows whose text or label is missing, each with what is wrong.

    Raises:
        UserError: A cell is there but is no text, or no label.
    """
    bad: dict[int, str] = {}
    for i, row in enumerate(zip(*(table.columns[name] for name in text_columns), strict=True)):
        for column, cell in zip(text_columns, row, strict=True):
            if cell is None:
                continue
            if not isinstance(cell, str):
                raise UserError(
                    f"{table.where(i, column)}: a text is needed, got {type(cell).__name__} {cell!r:.40}; "
                    "is it the text? Set data.text_column"
                )
            if "\0" in cell:
                raise UserError(f"{table.where(i, column)}: a NUL byte is no character; correct the row")
            if not is_unicode(cell):
                raise UserError(f"{table.where(i, column)}: half of a surrogate pair is no character; correct the row")
        if all(map(is_blank, row)):
            what = "null" if row[0] is None else "empty"
            bad[i] = f"{table.where(i, ' + '.join(text_columns))}: the text is {what}"
    for i, cell in enumerate(table.columns[label_column]):
        if cell is None or canonical(cell) == "" or (isinstance(cell, float) and math.isnan(cell)):
            bad.setdefault(i, f"{table.where(i, label_column)}: the label is missing")
        elif not isinstance(cell, str | int | float):
            raise UserError(
                f"{table.where(i, label_column)}: a label is a word or a number, got {type(cell).__name__} {cell!r:.40}"
            )
    return bad


def _without_bad_rows(table: Table, text_columns: list[str], label_column: str, policy: str) -> Table:
    bad = bad_rows(table, text_columns, label_column)
    if not bad:
        return table
    if policy == "error":
        more = f" (and {len(bad) - 1} more such rows in this file)" if len(bad) > 1 else ""
        raise bad_row_error(f"{bad[min(bad)]}{more}")
    return table.select([i for i in range(len(table)) if i not in bad])


def bad_row_error(what: str) -> UserError:
    """The error that ends the run at a row that could also be left out."""
    return UserError(f"{what}; correct it, or leave such rows out with data.bad_rows=drop")


def is_unicode(text: str) -> bool:
    """Whether the text can be written down: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_blank(cell: Any) -> bool:
    """Whether a cell of a text column is null or shows nothing: spaces, controls, format characters."""
    return cell is None or (isinstance(cell, str) and all(unicodedata.category(c) in _INVISIBLE for c in cell))


def joined_text(cells: Sequence[Any]) -> str:
    """The text of a row: those of its text columns that are not blank, joined by a space.

    This is the rule in training, streaming, ``predict`` and exports. A row lacks a text only if all of them are blank.
    """
    return " ".join(str(cell) for cell in cells if not is_blank(cell))


def texts_of(table: Table, text_columns: Sequence[str]) -> list[str]:
    """The text of each row, by ``joined_text``; none may lack one."""
    return [joined_text(row) for row in zip(*(table.columns[name] for name in text_columns), strict=True)]


def joined(tables: list[Table], text_columns: Sequence[str], labels: list[np.ndarray]) -> Rows:
    """The rows of all tables, with their class numbers."""
    texts = [text for table in tables for text in texts_of(table, text_columns)]
    origins = [table.origin for table in tables for _ in range(len(table))]
    numbers = np.concatenate([np.asarray(table.rows, dtype=np.int64) for table in tables])
    return Rows(texts, np.concatenate(labels), origins, numbers)


def divide(read: dict[str, SplitRows], options: SourceOptions, label_names: Sequence[str]) -> dict[str, Any]:
    """The three splits of the rows read, as the fields of ``Prepared`` that follow from dividing them."""
    splits, warnings, removed = dict(read), list[str](), Counter[str]()
    origin = dict.fromkeys(read, "the source's own split")

    def take_out_repeats(split: str, other: str) -> None:
        keep = splits[split].not_in(splits[other])
        removed[f"{split}_in_{other}"] = len(splits[split]) - len(keep)
        if len(keep) == 0:
            raise UserError(
                f"data.source: every row of {split} also stands in {other}; give other rows for one of them"
            )
        if len(keep) < len(splits[split]):
            splits[split] = splits[split].select(keep)

    def hold_out(split: str, size: int | float | None, default: float) -> None:
        """Gives ``splits`` the split, taken from train, unless the source has it; train then repeats none of it."""
        if split in splits:
            if size is not None:
                raise UserError(
                    f"data.{split}_size: {size}, but the source has a {split} split of its own; leave it out"
                    + (" (data.test_rows takes a part of it)" if split == "test" else "")
                )
            take_out_repeats("train", split)
            return
        train = splits["train"]
        keys = text_keys(train.texts)
        if len(odd := contradictions(train.labels, keys)) and not warnings:
            where = f"{train.origins[odd[0]]}, {train.numbers[odd[0]]}"
            warnings.append(f"{len(odd)} rows have a text that stood before with another label (the first: {where})")
        spare = int(split == "test" and "val" not in splits)
        stay, taken = carve(train.labels, keys, size, options.split_seed, split, default, spare, train.origins[0])
        removed[f"train_in_{split}"] = len(train) - len(stay) - len(taken)
        splits["train"], splits[split] = train.select(stay), train.select(taken)
        origin[split] = f"carved from train, {len(taken)} of {len(train)} rows (stratified, seed {options.split_seed})"

    hold_out("test", options.test_size, DEFAULT_TEST_SIZE)
    if "val" in splits:
        take_out_repeats("val", "test")
    hold_out("val", options.val_size, DEFAULT_VAL_SIZE)
    if len(left := np.unique(splits["train"].labels)) < 2:
        raise UserError(
            f"data.source: without the rows that also stand in val or test, all rows of train are of the class "
            f"'{label_names[left[0]]}'; give other rows for one of them"
        )

    origin["train"] += ", less what was carved from it" if len(read["train"]) > len(splits["train"]) else ""
    for split, size in (("train", options.train_rows), ("test", options.test_rows)):
        if size is not None:
            rows = splits[split]
            number = count_of(size, len(rows), f"data.{split}_rows")
            least = 1 if split == "train" else 0
            if split == "train" and number < len(left):
                raise UserError(f"data.train_rows: {number} rows for {len(left)} classes; take {len(left)} or more")
            splits[split] = rows.select(
                stratified_sample(rows.labels, number, options.split_seed, f"subsample/{split}", least)
            )
            origin[split] += f", {number} of {len(rows)} rows (stratified)"
    warnings += absent_classes(read, splits, label_names)
    ordered = {split: splits[split] for split in SPLITS}
    return {"splits": ordered, "origin": origin, "repeats_removed": removed, "warnings": warnings}


def absent_classes(
    read: Mapping[str, SplitRows], splits: Mapping[str, SplitRows], label_names: Sequence[str]
) -> list[str]:
    """A warning for each split that has no row of some class."""
    counts = {split: np.bincount(rows.labels, minlength=len(label_names)) for split, rows in splits.items()}
    total = np.sum([np.bincount(rows.labels, minlength=len(label_names)) for rows in read.values()], axis=0)
    warnings = []
    for split, meaning in (dict.fromkeys(SPLITS, "measured there") | {"train": "learned"}).items():
        absent = [i for i, name in enumerate(label_names) if total[i] and not counts[split][i]]
        if absent:
            named = few([f"{label_names[i]} ({total[i]} row{'s' * bool(total[i] > 1)})" for i in absent])
            warnings.append(f"{split} has no row of {named}: cannot be {meaning}")
    if nowhere := [name for name, count in zip(label_names, total, strict=True) if not count]:
        warnings.append(f"no row has the label {few(nowhere)}: cannot be learned")
    return warnings
