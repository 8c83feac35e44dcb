"""Trained weights, wherever they lie: a run's checkpoint file, or an exported adapter's folder."""

import json
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import UserError, first_line
from lightning_lora.export.formats import IDENTITY_FILE
from lightning_lora.export.mean_pooled import HEAD_FILE, mean_head
from lightning_lora.models.head import fold_scale
from lightning_lora.runs.checkpoints import checked_checkpoint, load_checkpoint, read_checkpoint, stored_identity


def trained_for(path: Path) -> dict[str, Any]:
    """Returns what the weights were trained to predict: ``label_names`` and ``task``, as a model takes them.

    Raises:
        UserError: They do not say so, or are damaged.
    """
    identity = _read_identity(path) if path.is_dir() else stored_identity(read_checkpoint(path), path)
    return {"label_names": list(identity["label_names"]), "task": identity.get("task", "single_label")}


def trained_steps(path: Path) -> int:
    """Returns the steps that the weights were trained for; 0 where they do not say so."""
    return 0 if path.is_dir() else int(read_checkpoint(path).get("global_step", 0))


def check_weights(module: Any, path: Path) -> None:
    """Refuses weights that belong to something else than the module, which is left as it is.

    Raises:
        UserError: They belong to another base model, labels, method or settings, or are damaged.
    """
    if not path.is_dir():
        checked_checkpoint(module, path)
        return
    try:
        module.identity.check({"lightning_lora": _read_identity(path)})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if module.identity.method == "pissa":
        raise UserError(
            f"{path}: a PiSSA adapter is exported as plain LoRA on the unchanged base model, for PEFT; here, give "
            "the run's own checkpoint"
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"{path}: no adapter_model.safetensors in it; give the folder 'adapter' of an export")
    if module.pooling == "mean" and not (path / HEAD_FILE).is_file():
        raise UserError(f"{path}: no {HEAD_FILE} in it, which holds the head of a model that reads the mean")


def load_weights(module: Any, path: Path) -> None:
    """Puts the weights into a module that was built alike.

    Raises:
        UserError: As ``check_weights``.
    """
    if not path.is_dir():
        load_checkpoint(module, path)
        return
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_weights(module, path)
    fold_scale(module.model)  # exports have it in their weights
    try:
        state = load_file(path / "adapter_model.safetensors")
        if (head := mean_head(module)) is not None:
            state = head.join_adapter(path, state)
        # With ``bias: all`` PEFT writes the biases of modules that are saved whole twice, and reads them once.
        state = {key: value for key, value in state.items() if ".modules_to_save." not in key}
        result: Any = set_peft_model_state_dict(module.model, state)
        if module.temperature is not None:
            module.temperature.fill_(1)  # exports have it in their weights
        if module.thresholds is not None:
            module.thresholds.copy_(torch.tensor(_read_identity(path)["thresholds"]))
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise UserError(
            f"{path}: the adapter does not fit ({first_line(error, 150)}); model settings such as adapter.rank "
            "must be those it was trained with"
        ) from error
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    missing = trained.intersection(result.missing_keys)
    if missing or result.unexpected_keys:
        raise UserError(
            f"{path}: the adapter lacks {len(missing)} weights of this model and holds "
            f"{len(result.unexpected_keys)} of another"
        )


def _read_identity(folder: Path) -> dict[str, Any]:
    path = folder / IDENTITY_FILE
    try:
        return {"format": None, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); without it nobody knows which base model and labels it belongs to"
        ) from error
