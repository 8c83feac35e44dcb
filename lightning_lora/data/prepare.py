"""From a source to the three splits: read, check, carve, take repeats out, subsample.

The order matters and is fixed: a missing test split is carved before anything else; what stands in test is
taken out of the training side; validation is carved from what is left; subsampling comes last.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lightning_lora.data.labels import encode_labels, few
from lightning_lora.data.rows import RowFile, Rows
from lightning_lora.data.sources import SPLITS, row_sources
from lightning_lora.data.specs import find_spec
from lightning_lora.data.splits import carve, contradictions, count_of, position_type, stratified_sample
from lightning_lora.data.stored import RowRules, stored_rows
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
    splits: dict[str, Rows]
    origin: dict[str, str]
    repeats_removed: dict[str, int] = field(default_factory=dict)
    bad_rows_dropped: int = 0
    citation: str = ""
    label_values: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def write_parquet(self, path: Path) -> None:
        """Writes which row of the source went to which split; ``key`` is equal for texts that are repeats."""
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
                    "fingerprint": rows.fingerprint,
                }
                for name, rows in self.splits.items()
            },
            "repeats_removed": self.repeats_removed,
            "bad_rows_dropped": self.bad_rows_dropped,
            "citation": self.citation,
            "warnings": self.warnings,
        }


def prepare(options: SourceOptions, cache_dir: Path | None = None) -> Prepared:
    """The train, val and test rows that the options describe, the same ones every time.

    Args:
        options: Of the source.
        cache_dir: Where the rows that were read are kept for reuse; without one they are held in memory.

    Raises:
        UserError: The source cannot be read, a row is bad, or a size does not fit.
    """
    spec = find_spec(options.source) if isinstance(options.source, str) else None
    text_columns, label_column = columns_of(options)
    sources, warnings = row_sources(spec.source if spec else options.source, options.encoding, options.stream)
    rules = RowRules(text_columns, label_column, options.bad_rows, spec.keep_rows if spec else {})
    files: dict[str, list[RowFile]] = {}
    for split, parts in sources.items():
        with tqdm(desc=f"Reading {split}", disable=None, leave=False, delay=0.5) as bar:
            files[split] = [stored_rows(part, rules, cache_dir, bar.update) for part in parts]
    found = {split: [file.labels(label_column) for file in each] for split, each in files.items()}
    usable = {split: sum(int((codes >= 0).sum()) for _, codes in each) for split, each in found.items()}
    if nothing := next((split for split, rows in usable.items() if not rows), None):
        raise UserError(f"{files[nothing][0].origin}: the {nothing} split has no usable row")
    cells = {split: [table for table, _ in each] for split, each in found.items()}
    known = spec.label_names if spec else None
    labels = encode_labels(cells, label_column, options.label_names, known, usable["train"])
    read = {
        split: _usable(each, labels.encoded[split], [codes for _, codes in found[split]])
        for split, each in files.items()
    }
    divided = divide(read, options, labels.names)
    divided["warnings"] = [*warnings, *labels.warnings, *divided["warnings"]]
    dropped = sum(file.rows for each in files.values() for file in each) - sum(usable.values())
    citation = spec.citation if spec else ""
    return Prepared(labels.names, label_values=labels.values, bad_rows_dropped=dropped, citation=citation, **divided)


def _usable(files: Sequence[RowFile], classes: Sequence[np.ndarray], codes: Sequence[np.ndarray]) -> Rows:
    """The rows of the files that are not left out.

    Args:
        files: The files.
        classes: Of each file, the class number of each different label cell.
        codes: Of each file, which of these cells each row has, -1 for one that is left out.
    """
    each = [np.append(of_cells, -1).astype(np.int32) for of_cells in classes]
    labels = np.concatenate([of_cells[rows] for of_cells, rows in zip(each, codes, strict=True)])
    positions = np.flatnonzero(labels >= 0).astype(position_type(len(labels)))
    return Rows(files, positions, labels[positions])


def columns_of(options: SourceOptions) -> tuple[list[str], str]:
    """The names of the columns with the text, and of that with the label."""
    spec = find_spec(options.source) if isinstance(options.source, str) else None
    text_column = options.text_column or (spec.text_column if spec else "text")
    label_column = options.label_column or (spec.label_column if spec else "label")
    return [text_column] if isinstance(text_column, str) else list(text_column), label_column


def divide(read: dict[str, Rows], options: SourceOptions, label_names: Sequence[str]) -> dict[str, Any]:
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
        keys = train.keys
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


def absent_classes(read: Mapping[str, Rows], splits: Mapping[str, Rows], label_names: Sequence[str]) -> list[str]:
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
