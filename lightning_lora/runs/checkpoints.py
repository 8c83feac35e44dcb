"""Checkpoints: written whole or not at all, and only loaded where they belong."""

import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_lora.errors import UserError, first_line
from lightning_lora.files import atomic_path
from lightning_lora.tasks import Task

CHECKPOINT_FORMAT = 1
_KEY = "lightning_lora"
#: Parts of an identity that must be equal, and why.
_MUST_BE_EQUAL = {
    "label_names": "names and order must be the same",
    "method": "other weights are trained by another method",
    "task": "its outputs mean something else",
    "quantization": "the same adapter gives other results on other weights",
}


@dataclass(frozen=True)
class CheckpointIdentity:
    """What a checkpoint of trained weights belongs to.

    Args:
        base_model: The base model's name.
        base_fingerprint: SHA-256 of its pretrained weights.
        label_names: Names of the classes in the order of their numbers.
        method: How it was fine-tuned.
        quantization: How the frozen weights were stored ("none", "int8", "nf4", ...).
        adapter: Options that say how the trained weights are applied, such as alpha.
        task: What is predicted.
    """

    base_model: str
    base_fingerprint: str
    label_names: list[str]
    method: str
    quantization: str = "none"
    adapter: dict[str, Any] = field(default_factory=dict)
    task: Task = "single_label"

    def write_to(self, checkpoint: dict[str, Any]) -> None:
        """Store the identity in a checkpoint."""
        checkpoint[_KEY] = {"format": CHECKPOINT_FORMAT, **asdict(self)}

    def check(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that belongs to something else.

        Raises:
            UserError: It is of another program, format, base model, method, or of other label names.
        """
        stored = stored_identity(checkpoint)
        if stored["format"] != CHECKPOINT_FORMAT:
            raise UserError(f"the checkpoint has format {stored['format']}; this version reads {CHECKPOINT_FORMAT}")
        if stored["base_fingerprint"] != self.base_fingerprint:
            raise UserError(
                f"the checkpoint was trained on base model '{stored['base_model']}' with other weights than "
                f"'{self.base_model}' has; use the base model it was trained on"
            )
        for name, why in _MUST_BE_EQUAL.items():
            if (found := stored.get(name, "single_label")) != (own := getattr(self, name)):
                raise UserError(f"the checkpoint was trained with {name} {found!r}, not {own!r}; {why}")
        for name, value in stored["adapter"].items():
            if (own_value := self.adapter.get(name)) not in (value, "last"):  # its head never read another
                what = name if name == "pooling" else f"adapter.{name}"
                raise UserError(
                    f"the checkpoint was trained with {what} {value}, not {own_value}: its "
                    "weights would be applied in another way than in training"
                )

    @staticmethod
    def check_keys(state: Mapping[str, Tensor], expected: set[str], own: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not exactly the trained ones of this model.

        Raises:
            UserError: A trained weight is missing, there is one too many, or a shape differs.
        """
        faults = [f"lacks {name}" for name in sorted(expected - {*state})]
        faults += [f"holds {name}, which is not trained here" for name in sorted({*state} - expected)]
        for name in sorted(expected & {*state}):
            if (there := tuple(state[name].shape)) != (here := tuple(own[name].shape)):
                faults.append(f"holds {name}, which has shape {there} there and {here} here")
        if faults:
            raise UserError(
                f"the checkpoint {faults[0]} (faults: {len(faults)}); model settings such as adapter.rank and "
                "adapter.target_modules must be those it was trained with"
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to disk and renames it; failures are raised."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint; when that fails, an earlier one at this path is as it was."""
        del storage_options
        tensors: list[Tensor] = [value for value in tree_leaves(checkpoint) if isinstance(value, Tensor)]
        # Through a file of Python's: where there is no room, torch's own writer says only that a write failed.
        with (
            atomic_path(Path(path), sum(value.nbytes for value in tensors)) as staging,
            staging.open("wb") as file,
        ):
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # what really went wrong; the other came on the way out
                    raise error.__context__ from None
                raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the content of a checkpoint that is whole; nothing in it is run, whatever ``weights_only`` says."""
        del map_location, weights_only
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint; tensors and plain values only, nothing in it is run.

    Raises:
        UserError: It is missing, damaged, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load takes changed numbers for what was saved
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{path}: damaged: '{damaged}' in it is not what was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error, 150)})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of a trained model")
    return checkpoint


def stored_identity(checkpoint: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Return what a checkpoint, perhaps read from a path, says that it belongs to.

    Raises:
        UserError: It does not say so.
    """
    stored = checkpoint.get(_KEY)
    if not isinstance(stored, dict):
        where = path or "the checkpoint"
        raise UserError(f"{where} was not written by lightning_lora: it does not say what it belongs to")
    return stored


class ResumePoints:
    """The last states of a training run, from which it can be resumed: the newest, and the one before.

    Args:
        folder: The run's folder of checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.newest = folder / "last.ckpt"
        #: While the run has not ended.
        self.before = folder / "last-before.ckpt"
        #: Where a new state is written before it takes the place of the newest.
        self.next = folder / "last-next.ckpt"

    def rotate(self) -> None:
        """Make what is at ``next`` the newest, and the newest the one before."""
        if self.newest.exists():
            self.newest.replace(self.before)
        self.next.replace(self.newest)

    def tidy(self) -> None:
        """Remove what the newest state makes superfluous."""
        self.before.unlink(missing_ok=True)
        self.next.unlink(missing_ok=True)

    def find(self) -> tuple[Path | None, str | None]:
        """Return the newest state that is whole (None where there never was one), and a warning about a damaged one.

        Raises:
            UserError: There are some, and all are damaged.
        """
        damage: list[str] = []
        for path in (self.newest, self.before):
            if not path.exists():
                continue
            try:
                read_checkpoint(path)
            except UserError as error:
                damage.append(str(error))
            else:
                return path, f"{damage[0]}; resuming from the state before it, {path}" if damage else None
        if damage:
            raise UserError(f"no state to resume from: {'; '.join(damage)}")
        return None, None


def load_checkpoint(module: LightningModule, path: Path, any_quantization: bool = False) -> None:
    """Put the trained weights of a checkpoint into a module that was built alike.

    Args:
        module: The module.
        path: The checkpoint.
        any_quantization: Take weights that were trained on a base stored otherwise, as merging does.

    Raises:
        UserError: The checkpoint is damaged or does not belong to the module.
    """
    module.load_state_dict(checked_checkpoint(module, path, any_quantization)["state_dict"], strict=False)


def checked_checkpoint(module: LightningModule, path: Path, any_quantization: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint that belongs to the module, whose weights are left as they are.

    Raises:
        UserError: The checkpoint is damaged or does not belong to the module.
    """
    checkpoint = read_checkpoint(path)
    try:
        if any_quantization:
            stored_identity(checkpoint)["quantization"] = module.identity.quantization  # type: ignore[union-attr]
        module.on_load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return checkpoint
