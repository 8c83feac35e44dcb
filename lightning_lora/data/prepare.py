"""From a source to the three splits: read, check, carve, remove duplicates, subsample.

The order matters and is fixed: a missing test split is carved before anything else; duplicates of test texts are
removed from the training side; validation is carved from what is left; subsampling comes last.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lightning_lora.data.labels import (
    FEW_VALUES,
    LabelCells,
    encode_label_sets,
    encode_labels,
    encode_numbers,
    few,
    number_of,
    ordered,
)
from lightning_lora.data.pairs import Truncation, choose_truncation, is_pair
from lightning_lora.data.reading import Table
from lightning_lora.data.rows import Rows
from lightning_lora.data.sources import SPLITS, row_sources
from lightning_lora.data.specs import find_spec
from lightning_lora.data.splits import (
    carve,
    classes_of,
    contradictions,
    count_of,
    position_type,
    strata,
    stratified_sample,
    take_fold,
)
from lightning_lora.data.stored import RowRules, label_name, stored_rows
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path
from lightning_lora.tasks import Task

DEFAULT_TEST_SIZE = 0.2
DEFAULT_VAL_SIZE = 0.1
#: The warning about rows that contradict others.
CONTRADICTED = "rows have a text that stood before with another label"


@dataclass(frozen=True)
class SourceOptions:
    """Which rows to read and how to split them; see ``TextDataModule`` for each field."""

    source: str | Mapping[str, str]
    text_column: str | Sequence[str] | None = None
    label_column: str | Sequence[str] | None = None
    label_separator: str | None = None
    task: str = "auto"
    label_names: Sequence[Any] | Mapping[Any, Any] | None = None
    truncation: Truncation | None = None
    encoding: str | None = None
    bad_rows: str = "error"
    test_size: int | float | None = None
    val_size: int | float | None = None
    train_rows: int | float | None = None
    test_rows: int | float | None = None
    fold: Sequence[int] | None = None
    split_seed: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SourceOptions":
        """Those of the settings of a data module."""
        return cls(**{each.name: settings[each.name] for each in fields(cls) if each.name in settings})


@dataclass(frozen=True)
class Prepared:
    """The splits and what was done to get them."""

    task: Task
    label_names: list[str]
    label_values: dict[str, list[str]]
    splits: dict[str, Rows]
    origin: dict[str, str]
    duplicates_removed: dict[str, int]
    bad_rows_dropped: int
    citation: str
    warnings: list[str]

    def write_parquet(self, path: Path) -> None:
        """Writes which row of the source went to which split; ``key`` is equal for texts that are duplicates."""
        import pyarrow.parquet as pq

        types = {"split": pa.string(), "origin": pa.string(), "row": pa.int64(), "key": pa.binary()}
        schema = pa.schema(types)
        with atomic_path(path) as staging, pq.ParquetWriter(staging, schema) as writer:
            for split, rows in self.splits.items():
                for origin, batches in groupby(rows.batches("row", "key"), key=lambda each: each[0]):
                    table = pa.Table.from_batches([batch for _, batch in batches])
                    columns = {"row": table["row"], "key": table["key"].cast(pa.binary())}
                    columns |= {"split": [split] * len(table), "origin": [origin] * len(table)}
                    writer.write_table(pa.table(columns).select(schema.names))

    def describe(self) -> dict[str, Any]:
        """Plain values for the run record: sizes, class counts, fingerprints, what was taken out."""
        splits = {
            split: {
                "rows": len(rows),
                **self._describe_labels(split),
                "from": self.origin[split],
                "fingerprint": rows.fingerprint,
            }
            for split, rows in self.splits.items()
        }
        return {name: value for name, value in vars(self).items() if name != "origin"} | {"splits": splits}

    def _describe_labels(self, split: str) -> dict[str, Any]:
        if self.task != "regression":
            return {"rows_by_class": dict(zip(self.label_names, self.class_counts(split), strict=True))}
        labels = self.splits[split].labels
        kinds = {"mean": labels.mean(), "sd": labels.std(), "min": labels.min(), "max": labels.max()}
        return {"numbers": {name: float(value) for name, value in kinds.items()}}

    def class_counts(self, split: str) -> list[int]:
        """Rows of each class or label in a split; not of regression."""
        labels = self.splits[split].labels
        if labels.ndim == 2:
            return labels.sum(axis=0, dtype=np.int64).tolist()
        return np.bincount(labels, minlength=len(self.label_names)).tolist()


def prepare(options: SourceOptions, cache_dir: Path | None = None) -> Prepared:
    """The train, val and test rows that the options describe, the same ones every time.

    Args:
        options: Of the source.
        cache_dir: Where the rows that were read are kept for reuse; without one they are held in memory.
    """
    spec = find_spec(options.source)
    place, named = (spec.source, spec.splits) if spec else (options.source, None)
    sources, warnings = row_sources(place, options.encoding, named)
    text_columns, label_column = columns_of(options)
    truncation = choose_truncation(options.truncation, text_columns)
    pair = is_pair(truncation)
    if len(text_columns) == 2 and not pair:
        warnings.append(
            f"data.truncation: {truncation} is of one text, so {' and '.join(text_columns)} are joined by a space; "
            "longest_first reads them as a pair"
        )
    keep_rows = spec.keep_rows if spec else {}
    rules = RowRules(text_columns, label_column, options.bad_rows, keep_rows, pair, options.label_separator)
    files = {}
    for split, parts in sources.items():
        with tqdm(desc=f"Reading {split}", disable=None, leave=False, delay=0.5) as bar:
            files[split] = [stored_rows(part, rules, cache_dir, bar.update) for part in parts]
    column = label_name(label_column)
    # Of each file the different label cells, one file after another, and which of all these each row has: -1 where it
    # is left out.
    tables, codes, count = dict[str, list[Table]](), dict[str, np.ndarray](), 0
    for split, each in files.items():
        tables[split], numbers = [], []
        for file in each:
            table, of_rows = file.labels(column)
            numbers.append(np.where(of_rows < 0, -1, of_rows + count))
            tables[split].append(table)
            count += len(table)
        codes[split] = np.concatenate(numbers)
        if not (codes[split] >= 0).any():
            raise UserError(f"{each[0].origin}: the {split} split has no usable row")
    label_cells = LabelCells.of(tables, column, int((codes["train"] >= 0).sum()))
    task = _task_of(label_cells, options, spec.task if spec else None)
    if task == "multi_label":
        # Columns are labels also where no row has them.
        names = ordered(rules.label_columns) if len(rules.label_columns) > 1 else None
        labels = encode_label_sets(label_cells, options.label_names or names)
    elif task == "regression":
        labels = encode_numbers(label_cells, options.label_names)
    else:
        known = spec.label_names if spec else None
        labels = encode_labels(label_cells, options.label_names, known, options.task == "single_label")
    splits = {}
    for split, each in files.items():
        there = codes[split] >= 0
        positions = np.flatnonzero(there).astype(position_type(len(there)))
        of_rows = labels.codes[codes[split][there]]
        splits[split] = Rows(each, positions, of_rows.astype(np.int32) if task == "single_label" else of_rows)
    dropped = sum(int((each < 0).sum()) for each in codes.values())
    del tables, label_cells, codes  # of numbers as long as the rows
    if options.fold is not None:
        if options.test_size is not None:
            size = options.test_size
            raise UserError(f"data.test_size: {size}, but data.fold says which rows are tested; leave it out")
        if splits.pop("test", None) is not None:
            warnings.append("data.fold: the folds are of the rows of train; the source's own test split is not used")
    splits, origin, removed, more = divide(splits, options, labels.names, task)
    warnings = [*warnings, *labels.warnings, *more]
    citation = spec.citation if spec else ""
    return Prepared(task, labels.names, labels.values, splits, origin, removed, dropped, citation, warnings)


def _task_of(cells: LabelCells, options: SourceOptions, known: Task | None = None) -> Task:
    """What is predicted: typed, or known of the data set, or any number of labels where cells are lists.

    Raises:
        UserError: The cells are of another kind than was typed.
    """
    several = next((number for number, cell in enumerate(cells.values) if isinstance(cell, list)), None)
    if options.task == "auto":
        return known or ("single_label" if several is None else "multi_label")
    if options.label_separator is not None and options.task != "multi_label":
        raise UserError(
            f"data.label_separator: it makes lists of labels, but data.task is {options.task}; leave one out"
        )
    if several is not None and options.task != "multi_label":
        raise UserError(
            f"{cells.where(several)}: a list of labels, but data.task is {options.task}; correct the row, or set "
            "data.task=multi_label"
        )
    if several is None and options.task == "multi_label":
        found, remedy = "no lists of labels", "single_label, or name data.label_separator or several label columns"
        if len(set(cells.values)) > FEW_VALUES and all(number_of(cell) is not None for cell in cells.values):
            found, remedy = "numbers", "regression to predict them, or name another data.label_column"
        raise UserError(f"data.task: multi_label, but column '{cells.column}' holds {found}; set data.task={remedy}")
    return cast(Task, options.task)


def columns_of(options: SourceOptions) -> tuple[list[str], str | Sequence[str]]:
    """The names of the columns with the text, and of that or those with the label.

    Raises:
        UserError: A column is named twice.
    """
    spec = find_spec(options.source)
    text_column = options.text_column or (spec.text_column if spec else "text")
    label_column = options.label_column or (spec.label_column if spec else "label")
    texts = [text_column] if isinstance(text_column, str) else list(text_column)
    named = Counter([*texts, *([label_column] if isinstance(label_column, str) else label_column)])
    if twice := next((name for name, count in named.items() if count > 1), None):
        raise UserError(f"data.text_column, data.label_column: '{twice}' is named twice; a column is a text or a label")
    return texts, label_column


def divide(
    read: Mapping[str, Rows], options: SourceOptions, label_names: Sequence[str], task: Task = "single_label"
) -> tuple[dict[str, Rows], dict[str, str], dict[str, int], list[str]]:
    """The three splits of the rows read; where each is from, how many duplicates were removed, and warnings."""
    splits, warnings, removed = dict(read), list[str](), Counter[str]()
    origin = dict.fromkeys(read, "the source's own split")

    def remove_duplicates(split: str, other: str) -> None:
        left = splits[split].without(splits[other])
        if not len(left):
            raise UserError(f"data.source: every row of {split} is also in {other}; give other rows for one of them")
        removed[f"{split}_in_{other}"] = len(splits[split]) - len(left)
        splits[split] = left

    for split, size, default in (
        ("test", options.test_size, DEFAULT_TEST_SIZE),
        ("val", options.val_size, DEFAULT_VAL_SIZE),
    ):
        if split == "val" and "val" in splits:
            remove_duplicates("val", "test")
        if split in splits:
            if size is not None:
                raise UserError(
                    f"data.{split}_size: {size}, but the source has a {split} split of its own; leave it out"
                )
            remove_duplicates("train", split)
            continue
        train = splits["train"]
        odd = contradictions(train.labels, train.keys)
        where = train.place(odd[0]) if len(odd) else train.origins[0]
        if len(odd) and not warnings:
            warnings.append(f"{len(odd)} {CONTRADICTED} (the first: {where})")
        spare = int(split == "test" and "val" not in splits)
        seed, fold = options.split_seed, options.fold if split == "test" else None
        groups = strata(train.labels)
        stay, taken = (
            carve(groups, train.keys, size, seed, split, default, spare, where)
            if fold is None
            else take_fold(groups, train.keys, fold, seed)
        )
        removed[f"train_in_{split}"] = len(train) - len(stay) - len(taken)
        splits["train"], splits[split] = train.select(stay), train.select(taken)
        origin[split] = f"{len(taken):,} of {len(train):,} rows of train, stratified, seed {seed}"
        origin[split] += f", fold {fold[0]} of {fold[1]}" if fold is not None else ""
    classes = classes_of(strata(splits["train"].labels))
    needed: dict[Task, int] = {"regression": 0, "multi_label": 1}  # of several labels each is there or not
    if len(classes) < needed.get(task, 2):
        only = f"are of the class '{label_names[classes[0]]}'" if len(classes) else "are without a label"
        raise UserError(
            f"data.source: without the rows that are also in val or test, all rows of train {only}; give other rows "
            "for one of them"
        )

    origin["train"] += " without the rows taken from it" if len(read["train"]) > len(splits["train"]) else ""
    for split, size, least in (("train", options.train_rows, len(classes)), ("test", options.test_rows, 0)):
        if size is not None:
            rows = splits[split]
            number = count_of(size, len(rows), f"data.{split}_rows")
            if number < least and task == "single_label":
                raise UserError(f"data.train_rows: {number} rows for {least} classes; take {least} or more")
            chosen = stratified_sample(
                strata(rows.labels), number, options.split_seed, f"subsample/{split}", min(least, 1)
            )
            splits[split] = rows.select(chosen)
            origin[split] += f"; a stratified sample of {number:,} of {len(rows):,}"
    for split, meaning in {"val": "measured there", "test": "measured there", "train": "learned"}.items():
        present = set(classes_of(splits[split].labels).tolist()) if task != "regression" else {0}
        if absent := [name for number, name in enumerate(label_names) if number not in present]:
            warnings.append(f"{split} has no row of {few(absent)}: cannot be {meaning}")
    return {split: splits[split] for split in SPLITS}, origin, removed, warnings
