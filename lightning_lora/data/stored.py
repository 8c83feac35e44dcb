"""Prepared splits kept for reuse: a second run neither reads nor splits the source again."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.data import prepare
from lightning_lora.data.prepare import Prepared, SourceOptions
from lightning_lora.data.rows import Rows, SplitRows
from lightning_lora.data.sources import source_files
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_folder
from lightning_lora.fingerprint import code_fingerprint


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_lora``, or ``~/.cache/lightning_lora``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_lora"


def stored_splits(options: SourceOptions, cache_dir: Path) -> Prepared:
    """The splits that the options describe, from the store where they are, else prepared and stored.

    A Hub source is always read again: ``datasets`` keeps it, and knows when it has changed.

    Raises:
        UserError: As ``prepare``; or the store cannot be written.
    """
    key = store_key(options)
    if key is None:
        return prepare.prepare(options)
    entry = cache_dir / "splits" / key
    if entry.is_dir():
        try:
            return _read(entry)
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(entry, ignore_errors=True)
    prepared = prepare.prepare(options)
    try:
        _write(entry, prepared)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {entry} ({error.strerror or error}); set another folder"
        ) from error
    return prepared


def store_key(options: SourceOptions) -> str | None:
    """A key of all that the splits depend on: options, the files' names and bytes, the code; None for the Hub."""
    found = source_files(prepare.source_of(options))
    if found is None:
        return None
    files, warnings = found
    facts = dataclasses.asdict(options) | {"warnings": warnings}
    if isinstance(options.label_names, Mapping):  # whose order is that of the classes
        facts["label_names"] = {"mapping": [*options.label_names.items()]}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode())
    digest.update(code_fingerprint("data.prepare").encode())
    for path in (path for paths in files.values() for path in paths):
        digest.update(f"\n{path}\n".encode())
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()[:32]


def _write(entry: Path, prepared: Prepared) -> None:
    import pyarrow.parquet as pq

    facts = {
        field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared) if field.name != "splits"
    }
    with atomic_folder(entry) as staging:
        pq.write_table(_table(prepared), staging / "rows.parquet")
        (staging / "facts.json").write_text(json.dumps(facts))


def _table(prepared: Prepared) -> Any:
    import pyarrow as pa

    parts = prepared.splits.values()
    return pa.table(
        {
            "split": np.concatenate([np.full(len(rows), name) for name, rows in prepared.splits.items()]),
            "origin": [origin for rows in parts for origin in rows.origins],
            "row": np.concatenate([rows.numbers for rows in parts]),
            "text": [text for rows in parts for text in rows.texts],
            "label": np.concatenate([rows.labels for rows in parts]),
        }
    )


def _read(entry: Path) -> Prepared:
    import pyarrow.parquet as pq

    facts = json.loads((entry / "facts.json").read_text())
    # Not read_table: it imports pandas, half a second before every training run.
    with pq.ParquetFile(entry / "rows.parquet") as file:
        table = file.read()
    split = table.column("split").to_numpy()
    found: dict[str, SplitRows] = {}
    for name in dict.fromkeys(split.tolist()):
        part = table.filter(split == name)
        found[name] = Rows(
            part.column("text").to_pylist(),
            np.array(part.column("label").to_numpy()),
            part.column("origin").to_pylist(),
            np.array(part.column("row").to_numpy()),
        )
    return Prepared(splits=found, **facts)
