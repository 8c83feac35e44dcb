"""The files of each split of a source: a file, a folder, a mapping or a Hub data set; and how their rows are read."""

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_lora.data.labels import few
from lightning_lora.data.reading import (
    BATCH_ROWS,
    READERS,
    REMEDIES,
    Table,
    arrow_tables,
    file_system,
    format_of,
    read_tables,
    require_columns,
)
from lightning_lora.errors import UserError, first_line
from lightning_lora.locations import PACKAGE_PREFIX, resolve

SPLITS = ("train", "val", "test")
#: Of what a web server says of a file, that which changes with its content.
_VALIDATORS = ("ETag", "Content-MD5", "Digest", "Last-Modified")
_SPLIT_NAMES = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val"}
_SPLIT_NAMES |= {"dev": "val", "test": "test", "testing": "test"}
#: JSON files that libraries write beside the data.
_METADATA = {"state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "config.json"}
_METADATA.add("croissant.json")
_NAMES = "|".join(_SPLIT_NAMES)
#: How a path names its split: "train-00000-of-00002.parquet" or "train/a.csv"; else as in the cache of ``datasets``,
#: "imdb-train-00000-of-00002.arrow".
_SPLIT_PATHS = (
    re.compile(rf"(?:.*/)?(?P<split>{_NAMES})(?:/.*|[-_.][^/]*)", re.IGNORECASE),
    re.compile(rf".*[-_.](?P<split>{_NAMES})(?:-\d+-of-\d+)?\.\w+", re.IGNORECASE),
)
#: What tells the files of one split apart.
_NUMBERS = re.compile(r"[-_.\d]|of|part|shard")


@dataclass(frozen=True)
class RowSource:
    """A file or a split on the Hub.

    Args:
        origin: Its name, for messages.
        version: What changes when its rows do; None where that is not known.
        tables: Reads given columns, part by part.
    """

    origin: str
    version: str | None
    tables: Callable[[Sequence[str]], Iterator[Table]]


def row_sources(
    source: str | Mapping[str, str],
    encoding: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, list[RowSource]], list[str]]:
    """What each split ("train", "val", "test") of a source is read from, and warnings of what was left out.

    Args:
        source: A location (file, folder, package resource, Hub id), or a mapping from split to files.
        encoding: That of text files that are not UTF-8.
        splits: Of a data set on the Hub, which of its splits are "train", "val" and "test"; by default those that are
            called so.
    """
    warnings: list[str] = []
    if not isinstance(source, str):
        files = {_split_named(name): _matching(place, f"data.source.{name}") for name, place in source.items()}
    else:
        path = resolve(source, "data.source").path
        if path is None:
            return _hub_sources(source, splits)
        files = {"train": [str(path)]}
        if path.is_dir():
            files, warnings = _split_files(path)
    if "train" not in files:
        raise UserError(f"data.source: {source} has no train split (found: {', '.join(files)})")
    return {split: [_file(name, encoding) for name in names] for split, names in files.items()}, warnings


def _split_named(name: str) -> str:
    if name.lower() not in _SPLIT_NAMES:
        raise UserError(f"data.source: '{name}' is no split; use train, val and test")
    return _SPLIT_NAMES[name.lower()]


def _matching(place: str, key: str) -> list[str]:
    """The sorted names of the files that a file, a folder or a pattern means, local or on an fsspec filesystem."""
    if "://" in place:
        filesystem, path = file_system(place)
        try:
            path = f"{path.rstrip('/')}/*" if filesystem.isdir(path) else path
            found = [filesystem.unstrip_protocol(name) for name in filesystem.glob(path) if is_data(Path(name))]
        except Exception as error:  # each filesystem has exceptions of its own
            raise UserError(f"{key}: {place} cannot be listed ({first_line(error)})") from error
    else:
        local = Path(resolve(place, key).target if place.startswith(PACKAGE_PREFIX) else place).expanduser()
        if local.is_file():  # also one whose name looks like a pattern
            return [str(local)]
        pattern = f"{glob.escape(str(local))}/*" if local.is_dir() else str(local)
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207
        found = [name for name in names if is_data(Path(name)) and Path(name).is_file()]
    if not found:
        raise UserError(f"{key}: no file matches '{place}' (from {Path.cwd()}); give a file, a folder or a pattern")
    return sorted(found)


def _file(name: str, encoding: str | None) -> RowSource:
    """A file, whose version changes with its size and time, on the web with what the server says of its content."""
    filesystem, path = file_system(name)
    version: str | None
    try:
        version = f"{filesystem.ukey(path)}/{encoding}"
        if "http" in filesystem.protocol:  # where the key is of the address alone
            info = filesystem.info(path)
            said = [info[header] for header in _VALIDATORS if header in info]
            version = f"{version}/{said}" if said else None
    except Exception as error:  # each filesystem has exceptions of its own
        raise UserError(f"{name}: cannot be read ({first_line(error)})") from error
    return RowSource(name, version, partial(read_tables, name, encoding=encoding))


def _split_files(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The files of each split of a folder, and warnings."""
    files = [path for path in sorted(folder.rglob("*")) if is_data(path) and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found: dict[str, list[Path]] = {}
    for pattern in _SPLIT_PATHS:
        named = [(path, pattern.fullmatch(path.relative_to(folder).as_posix())) for path in files if not found]
        for path, match in named:
            if match:
                found.setdefault(_SPLIT_NAMES[match["split"].lower()], []).append(path)
    top = [path for path in files if path.parent == folder]
    if not found and (len(top) == 1 or (folder / "state.json").is_file()):  # by save_to_disk of a Dataset
        found = {"train": top}
    if not found:
        held = few([path.name for path in sorted(folder.iterdir())]) or "nothing"
        raise UserError(
            f"data.source: folder {folder} has no file named after a split, such as train.csv or "
            f"test.parquet (it holds {held}); rename them or give data.source.train and data.source.test"
        )
    used = {path for paths in found.values() for path in paths}
    warnings = _left_out(str(folder), [path.relative_to(folder).as_posix() for path in files if path not in used])
    for split, paths in found.items():
        if len({_NUMBERS.sub("", path.name) for path in paths}) > 1:
            warnings.append(f"the {split} split of {folder} is all of {few([path.name for path in paths])}")
    return {split: [str(path) for path in paths] for split, paths in found.items()}, warnings


def is_data(path: Path) -> bool:
    """Whether a path is that of rows, also of ones in a format that is not read, as a workbook."""
    known = format_of(path) in READERS or path.suffix.lower() in REMEDIES
    return known and path.name not in _METADATA and not path.name.startswith((".", "cache-"))


def _left_out(source: str, names: Sequence[str]) -> list[str]:
    """A warning of what has no place among the splits, if there is something."""
    return [
        f"{source}: left out {few(names)}, named after none of train, validation and test; to use it, "
        "give data.source={train: FILE, validation: FILE, test: FILE}"
    ] * bool(names)


def _hub_sources(
    source: str, splits: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, list[RowSource]], list[str]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data.source: cannot load '{source}' from the Hub ({first_line(error)}); check the name "
            "and the network, or give a local file or folder (HF_HUB_OFFLINE=1 uses only what is cached)"
        ) from error
    found = splits or {_SPLIT_NAMES[str(split)]: [str(split)] for split in loaded if str(split) in _SPLIT_NAMES}
    if "train" not in found:
        raise UserError(f"data.source: {source} has no train split (it has {', '.join(map(str, loaded))})")

    def tables(split: Any, columns: Sequence[str]) -> Iterator[Table]:
        rows, origin = loaded[split], f"{source} ({split})"
        require_columns(rows.column_names, columns, origin)
        batches = rows.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS)
        return arrow_tables(origin, rows.features.arrow_schema, batches)

    # ``datasets`` keeps the rows itself, and knows when they have changed: no version.
    sources = {
        name: [RowSource(f"{source} ({split})", None, partial(tables, split)) for split in each]
        for name, each in found.items()
    }
    # What a known data set leaves out is not asked for.
    unknown = [] if splits else [str(split) for split in loaded if str(split) not in _SPLIT_NAMES]
    return sources, _left_out(source, unknown)
