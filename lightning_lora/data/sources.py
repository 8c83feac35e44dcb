"""The files of each split of a source: a file, a folder, a mapping or a Hub data set; and how their rows are read."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_lora.data.reading import (
    READERS,
    REMEDIES,
    Table,
    cells,
    format_of,
    read_file,
    require_columns,
    unknown_ending,
)
from lightning_lora.data.remote import matching, parquet_batches, version_of
from lightning_lora.errors import UserError, first_line
from lightning_lora.locations import resolve

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val"}
_SPLIT_NAMES |= {"dev": "val", "test": "test", "testing": "test"}
#: What ``save_to_disk`` of ``datasets`` writes into the folder of a Dataset and of a DatasetDict.
_SAVED, _SAVED_DICT = "state.json", "dataset_dict.json"
#: JSON files that libraries write beside the data.
_METADATA = {_SAVED, _SAVED_DICT, "dataset_info.json", "dataset_infos.json", "config.json", "croissant.json"}
_SPLIT_FILE = re.compile(rf"(?P<split>{'|'.join(_SPLIT_NAMES)})([-_.].*)?", re.IGNORECASE)
#: As in the cache of ``datasets``, "imdb-train-00000-of-00002.arrow".
_SPLIT_END = re.compile(rf".*[-_.](?P<split>{'|'.join(_SPLIT_NAMES)})(-\d+-of-\d+)?", re.IGNORECASE)
#: What tells the pieces of one split apart.
_NUMBERS = re.compile(r"[-_.\d]|of|part|shard")


@dataclass(frozen=True)
class RowSource:
    """A file or a split on the Hub.

    Args:
        origin: Its name, for messages.
        version: What changes when its rows do; None where that is not known.
        tables: Reads given columns, of which the second argument holds labels, and gives the rows part by part.
    """

    origin: str
    version: str | None
    tables: Callable[[Sequence[str], str], Iterator[Table]]


def source_files(source: str | Mapping[str, str]) -> tuple[dict[str, list[Path]], list[str]] | None:
    """The local files of each split, and warnings of what was left out; or None for a Hub source.

    Raises:
        UserError: There are none, or none for training.
    """
    warnings: list[str] = []
    if not isinstance(source, str):
        files = {split_named(name): split_files(name, place) for name, place in source.items()}
    else:
        location = resolve(source, "data.source")
        if location.path is None:
            return None
        files, warnings = {"train": [location.path]}, []
        if location.path.is_dir():
            files, warnings = _split_files(location.path)
    if "train" not in files:
        raise UserError(f"data.source: {source} has no train split (found: {', '.join(files)})")
    return files, warnings


def split_named(name: str) -> str:
    """The split ("train", "val", "test") that a name means.

    Raises:
        UserError: It means none.
    """
    if name.lower() not in _SPLIT_NAMES:
        raise UserError(f"data.source: '{name}' is no split; use train, val and test")
    return _SPLIT_NAMES[name.lower()]


def split_files(split: str, name: str) -> list[Path]:
    """The local file that a split is given by, or the files of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        UserError: It is none.
    """
    location = resolve(name, f"data.source.{split}")
    if location.path is not None and (location.path / _SAVED).is_file():
        return _saved_files(location.path)
    if location.path is None or not location.path.is_file():
        raise UserError(
            f"data.source.{split}: '{name}' is no file; a split is one local file, or a folder by Dataset.save_to_disk"
        )
    return [location.path]


def row_sources(
    source: str | Mapping[str, str], encoding: str | None = None
) -> tuple[dict[str, list[RowSource]], list[str]]:
    """What each split ("train", "val", "test") of a source is read from, and warnings of what was left out.

    Args:
        source: A location (file, folder, package resource, Hub id), or a mapping from split to location.
        encoding: That of text files that are not UTF-8.

    Raises:
        UserError: The source cannot be found, or has no train split.
    """
    found = source_files(source)
    if found is None:
        return _hub_sources(str(source))
    files, warnings = found
    return {split: [_file(path, encoding) for path in paths] for split, paths in files.items()}, warnings


def streamed_sources(
    source: str | Mapping[str, str], encoding: str | None = None
) -> tuple[dict[str, list[RowSource]], list[str]]:
    """The same of a source whose train split is Parquet files that are read in batches, local or not.

    Raises:
        UserError: There are no such files, or the source lacks a split of its own for validation or test.
    """
    files: dict[str, list[Path]] = {}
    warnings: list[str] = []
    if isinstance(source, str):
        found = source_files(source)
        if found is None:
            raise UserError(
                f"data.stream: '{source}' is no folder of Parquet files; download it, or give the splits as "
                "data.source={train: 's3://bucket/train-*.parquet', validation: FILE, test: FILE}"
            )
        files, warnings = found
        names = [str(path) for path in files["train"]]
    else:
        places = {split_named(name): place for name, place in source.items()}
        if "train" not in places:
            raise UserError(f"data.source: {dict(source)} has no train split; give train: FILES")
        names = matching(places["train"])
        files = {split: split_files(split, place) for split, place in places.items() if split != "train"}
    for split, word in (("test", "test"), ("val", "validation")):
        if split not in files:
            raise UserError(
                f"data.stream: the source has no {word} split, and none is carved from rows that are streamed; "
                f"give data.source.{word}: FILE"
            )
    if odd := next((name for name in names if not name.lower().endswith(".parquet")), None):
        raise UserError(f"data.stream: {odd} is no .parquet file, and only those are streamed; leave data.stream out")
    held = {split: [_file(path, encoding) for path in files[split]] for split in ("val", "test")}
    train = [RowSource(name, version_of(name), partial(parquet_batches, name)) for name in names]
    return {"train": train, **held}, warnings


def _file(path: Path, encoding: str | None) -> RowSource:
    """A file that is read whole."""
    try:
        with path.open("rb") as file:
            version = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error

    def tables(columns: Sequence[str], label_column: str) -> Iterator[Table]:
        yield read_file(path, columns, label_column, encoding=encoding)

    return RowSource(str(path), f"{version}/{encoding}", tables)


def _split_files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split, and warnings; they are named after it, in a folder that is, or by ``save_to_disk``."""
    if (folder / _SAVED).is_file():
        return {"train": _saved_files(folder)}, []
    found, left_out = _named(folder)
    names = sorted(folder.iterdir())
    data_files = [p for p in names if _is_data(p)]
    deeper = [p for p in names if _is_folder_of_data(p)]
    if not found and not data_files and len(deeper) == 1:
        return _split_files(deeper[0])
    if not found and len(data_files) == 1:
        return {"train": data_files}, _left_out(folder, deeper)
    if not found:
        for path in names:
            if _is_unread_split(path):
                raise unknown_ending(path)
        held = ", ".join(p.name for p in names[:8]) or "nothing"
        raise UserError(
            f"data.source: folder {folder} has no file named after a split, such as train.csv or "
            f"test.parquet (it holds {held}); rename them or give data.source.train and data.source.test"
        )
    warnings = _left_out(folder, left_out)
    for split, paths in found.items():
        if len({format_of(p) for p in paths}) > 1:
            raise UserError(
                f"data.source: split '{split}' of {folder} stands in files of several formats "
                f"({', '.join(p.name for p in paths)}); keep one"
            )
        if len({_NUMBERS.sub("", p.stem) for p in paths}) > 1 and paths[0].parent.name.lower() not in _SPLIT_NAMES:
            warnings.append(f"the {split} split of {folder} is all of {', '.join(p.name for p in paths)}")
    return found, warnings


def _named(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split by their names or those of their folders, and what else holds data."""
    names = sorted(folder.iterdir())
    files = [] if (folder / _SAVED_DICT).is_file() else [p for p in names if _is_data(p) or _is_unread_split(p)]
    folders = [p for p in names if _is_folder_of_data(p)]
    found: dict[str, list[Path]] = {}
    for pattern in (_SPLIT_FILE, _SPLIT_END):
        matches = [(path, pattern.fullmatch(path.stem)) for path in files if _is_data(path)]
        for path, match in matches if not found else ():
            if match:
                found.setdefault(_SPLIT_NAMES[match["split"].lower()], []).append(path)
    used = [path for paths in found.values() for path in paths]
    by_folder: dict[str, list[Path]] = {}
    for path in folders:
        split = _SPLIT_NAMES.get(path.name.lower())
        inside = _saved_files(path) if (path / _SAVED).is_file() else [p for p in sorted(path.iterdir()) if _is_data(p)]
        if split and split not in found and inside:
            by_folder.setdefault(split, []).extend(inside)
            used.append(path)
    found |= by_folder
    if not found and len(folders) == 1:
        found, left_out = _named(folders[0])
        return found, [*left_out, *files]
    return found, [path for path in [*files, *folders] if path not in used]


def _left_out(folder: Path, paths: Sequence[Path | str]) -> list[str]:
    """A warning of what has no place among the splits."""
    named = [str(path.relative_to(folder)) if isinstance(path, Path) else path for path in paths]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return [
        f"{folder}: left out {', '.join(named[:8])}{more}, named after none of train, validation and test; to use it, "
        "give data.source={train: FILE, validation: FILE, test: FILE}"
    ] * bool(named)


def _is_data(path: Path) -> bool:
    return format_of(path) in READERS and path.name not in _METADATA and path.is_file()


def _is_unread_split(path: Path) -> bool:
    return path.suffix.lower() in REMEDIES and not _is_data(path) and bool(_SPLIT_FILE.match(path.name))


def _is_folder_of_data(path: Path) -> bool:
    shown = path.is_dir() and not path.name.startswith(".")
    return shown and any(_is_data(each) for each in (*path.glob("*"), *path.glob("*/*")))


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote, in the order of their rows."""
    try:
        return [folder / each["filename"] for each in json.loads((folder / _SAVED).read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _SAVED}: not as Dataset.save_to_disk writes it ({first_line(error)})") from error


def _hub_sources(source: str) -> tuple[dict[str, list[RowSource]], list[str]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data.source: cannot load '{source}' from the Hub ({first_line(error)}); check the name "
            "and the network, or give a local file or folder (HF_HUB_OFFLINE=1 uses only what is cached)"
        ) from error
    known = {_SPLIT_NAMES[str(split)]: split for split in loaded if str(split) in _SPLIT_NAMES}
    if "train" not in known:
        raise UserError(f"data.source: {source} has no train split (it has {', '.join(map(str, loaded))})")
    others = [str(split) for split in loaded if str(split) not in _SPLIT_NAMES]
    warnings = [f"{source}: left out {', '.join(others)}, none of train, validation and test"] * bool(others)

    def hub_source(split: Any) -> RowSource:
        rows, origin = loaded[split], f"{source} ({split})"

        def tables(columns: Sequence[str], label_column: str) -> Iterator[Table]:
            require_columns(rows.column_names, columns, origin)
            feature = rows.features[label_column]
            names = feature.names if isinstance(feature, datasets.ClassLabel) else None
            row = 1
            for batch in rows.select_columns(list(columns)).with_format("arrow").iter(1024):
                values = {column: cells(batch[column]) for column in columns}
                yield Table(origin, values, range(row, row + len(batch)), label_names=names)
                row += len(batch)

        # ``datasets`` keeps it, and knows when it has changed.
        return RowSource(origin, None, tables)

    return {split: [hub_source(name)] for split, name in known.items()}, warnings
