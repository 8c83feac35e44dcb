"""Trained weights, wherever they lie: a run's checkpoint file, or an exported adapter's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.export.formats import checked_adapter, load_adapter, read_identity
from lightning_lora.runs.checkpoints import checked_checkpoint, load_checkpoint, read_checkpoint, stored_labels


def weights_labels(path: Path) -> Sequence[str]:
    """The label names that the weights were trained with.

    Raises:
        UserError: They do not say so, or are damaged.
    """
    return read_identity(path)["label_names"] if path.is_dir() else stored_labels(read_checkpoint(path), path)


def trained_steps(path: Path) -> int:
    """Steps that the weights were trained for; 0 where they do not say so.

    Raises:
        UserError: They are damaged.
    """
    return 0 if path.is_dir() else int(read_checkpoint(path).get("global_step", 0))


def check_weights(module: Any, path: Path) -> None:
    """Refuses weights that belong to something else than the module, which is left as it is.

    Raises:
        UserError: They belong to another base model, labels, method or settings, or are damaged.
    """
    if path.is_dir():
        checked_adapter(module, path)
    else:
        checked_checkpoint(module, path)


def load_weights(module: Any, path: Path) -> None:
    """Puts the weights into a module that was built alike.

    Raises:
        UserError: As ``check_weights``.
    """
    if path.is_dir():
        load_adapter(module, path)
    else:
        load_checkpoint(module, path)
