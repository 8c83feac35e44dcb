"""What a config may be: plain settings, of bounded size, that name nothing but classes for training."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from lightning_lora.config.resolved import reopen
from lightning_lora.errors import UserError

#: From where a config may name classes (``class_path``); more by ``LIGHTNING_LORA_ALLOW``, which no config can set.
ALLOWED = tuple(f"lightning.pytorch.{room}" for room in ("callbacks", "loggers", "profilers"))
ALLOW_VARIABLE = "LIGHTNING_LORA_ALLOW"
#: Settings of such classes that say where they write.
_PLACES = ("dirpath", "save_dir", "root_dir", "log_dir", "directory")
#: So many values may a config stand for once its aliases are followed.
_MOST_VALUES = 100_000


def restrict_imports() -> None:
    """Lets configs name classes of ``ALLOWED`` only; naming another imports nothing.

    Raises:
        UserError: The variable holds what is no import path.
    """
    more = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip()]
    try:
        jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *more])
    except ValueError as error:
        raise UserError(f"{ALLOW_VARIABLE}: import paths separated by commas are needed ({error})") from error


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; those of a run without the defaults of its method, see ``reopen``.

    Raises:
        UserError: It cannot be read, is no YAML, holds something else than settings, one twice, or more than
            a config can hold.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check(node, path)
        config = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"--config: {path} is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, dict):
        raise UserError(f"--config: {path} holds no settings")
    if path.with_name("run.json").is_file():
        reopen(config)
    return config


def check_places(settings: Any, inside: Iterable[Path], key: str = "trainer") -> None:
    """Refuses classes that a config would let write elsewhere than in the given folders.

    Raises:
        UserError: A place is outside.
    """
    folders = [folder.resolve() for folder in inside]
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name in _PLACES and isinstance(value, str):
                place = Path(value).expanduser().resolve()
                if not any(place.is_relative_to(folder) for folder in folders):
                    raise UserError(f"{key}.{name}: {value} lies outside the working folder and --logs_dir")
            check_places(value, folders, f"{key}.{name}")
    elif isinstance(settings, list):
        for i, value in enumerate(settings):
            check_places(value, folders, f"{key}[{i}]")


def _check(root: yaml.Node, path: Path) -> None:
    """Counts the values that the aliases stand for, and refuses a key that stands twice (YAML keeps the last)."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise UserError(f"--config: {path}:{node.start_mark.line + 1}: a value that holds itself")
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for name, value in node.value:
                if isinstance(name, yaml.ScalarNode) and name.value != "<<":
                    if name.value in names:
                        raise UserError(
                            f"--config: {path}:{name.start_mark.line + 1}: '{name.value}' is a duplicate key"
                        )
                    names.add(name.value)
                total += size(name) + size(value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(item) for item in node.value)
        open_nodes.discard(id(node))
        if total > _MOST_VALUES:
            raise UserError(f"--config: {path} stands for more than {_MOST_VALUES:,} values; its aliases explode")
        sizes[id(node)] = total
        return total

    size(root)
