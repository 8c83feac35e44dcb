"""The formats in which a trained model leaves the project, each written and read as other software does it.

=============  ==================================================================================
``adapter``    PEFT's folder: adapter_model.safetensors, adapter_config.json; for PEFT methods
``merged``     a plain transformers folder
``onnx``       an ONNX graph of the merged model, by ``transformers.exporters``
``onnx-int8``  the same with weights of 8 bits, quantized by ONNX Runtime
=============  ==================================================================================

Every folder also holds the tokenizer, which truncates and pads as in training, and ``lightning_lora.json``: label
names, base model and its fingerprint, how texts are encoded. Where a tokenizer cannot truncate as in training,
``encode.py`` does.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import UserError, first_line
from lightning_lora.export.usage import ENCODED
from lightning_lora.quiet import quiet_export, quiet_loading
from lightning_lora.runs.checkpoints import CHECKPOINT_FORMAT, CheckpointIdentity

IDENTITY_FILE = "lightning_lora.json"
FORMATS = ("adapter", "merged", "onnx", "onnx-int8")


def write_identity(folder: Path, identity: CheckpointIdentity, frame: Any, padding: str) -> None:
    """Writes what the files in a folder belong to, and how texts are encoded.

    Args:
        folder: The folder.
        identity: What the weights belong to.
        frame: The ``InputFormat``; where a tokenizer cannot truncate as it says, ``encode.py`` is added.
        padding: To the "longest" text of a batch, or to "max_length".
    """
    encoding = {
        "max_length": frame.max_length,
        "truncation": frame.keep,
        "window_overlap": frame.overlap,
        "prefix": list(frame.prefix),
        "suffix": list(frame.suffix),
        "pad_id": frame.pad_id,
        "padding": padding,
    }
    content = {"format": CHECKPOINT_FORMAT, **asdict(identity), **encoding}
    (folder / IDENTITY_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if frame.keep in ENCODED:
        shutil.copyfile(Path(__file__).with_name("encode.py"), folder / "encode.py")


def write_tokenizer(folder: Path, target: str, frame: Any, padding: str) -> None:
    """Writes the base model's tokenizer, so that it truncates, pads and returns what the model was trained on.

    Args:
        folder: The folder.
        target: What ``from_pretrained`` takes for the base model.
        frame: The ``InputFormat``. Of "both" ends a tokenizer alone keeps the tail, which is the larger part.
        padding: To the "longest" text of a batch, or to "max_length".
    """
    from transformers import AutoTokenizer

    side = "left" if frame.keep in ("tail", "both") else "right"
    # Given here, these are saved with it. Training gives the model no token_type_ids.
    tokenizer = AutoTokenizer.from_pretrained(
        target,
        trust_remote_code=False,
        model_max_length=frame.max_length,
        truncation_side=side,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )
    if tokenizer.pad_token_id != frame.pad_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(frame.pad_id)
    # For those who read tokenizer.json without transformers, which sets both in each call.
    tokenizer.backend_tokenizer.enable_truncation(frame.max_length, direction=side)
    tokenizer.backend_tokenizer.enable_padding(
        pad_id=frame.pad_id, pad_token=tokenizer.pad_token, length=frame.max_length if padding == "max_length" else None
    )
    tokenizer.save_pretrained(folder)


def write_adapter(model: Any, folder: Path, base_target: str, untrained: Callable[[], Any] | None) -> None:
    """Writes a PEFT model's adapter.

    Args:
        model: PEFT's wrapper around the trained model.
        folder: Where to write.
        base_target: What ``from_pretrained`` takes for the base model.
        untrained: For a method that changes the base's weights at the start (PiSSA): gives the same model
            before training. The adapter is then written as plain LoRA of twice the rank, which loads on
            the unchanged base.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = base_target
    # A Hub id means other weights when its author changes them; the revision that was trained on does not.
    config.revision = getattr(model.get_base_model().config, "_commit_hash", None)
    config.modules_to_save = list(dict.fromkeys(config.modules_to_save or []))  # PEFT adds its own guesses
    config.inference_mode = True
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if untrained is not None:
        state = _less_the_start(state, get_peft_model_state_dict(untrained(), save_embedding_layers=False))
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _less_the_start(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA of twice the rank whose product is B A - B0 A0: what training added to the base's own weights."""
    a = {name: torch.cat([value, start[name]], dim=0) for name, value in state.items() if ".lora_A." in name}
    b = {name: torch.cat([value, -start[name]], dim=1) for name, value in state.items() if ".lora_B." in name}
    return {**state, **a, **b}


def rename_base(folder: Path, base_id: str) -> None:
    """Lets an adapter's config name the base model as the Hub does."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_id
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_merged(model: Any, folder: Path) -> None:
    """Writes a plain transformers model."""
    model.config.problem_type = "single_label_classification"
    with quiet_loading():
        model.save_pretrained(folder)


def write_onnx(model: Any, folder: Path, int8: bool, pad_id: int) -> None:
    """Writes a plain transformers model as an ONNX graph for any batch size and length (extra "export")."""
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.quantizers import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    # Two rows of two lengths: neither is taken for a constant.
    token = 2 if pad_id != 2 else 1
    sample: dict[str, Any] = {"input_ids": torch.tensor([[token] * 9, [token] * 5 + [pad_id] * 4])}
    sample["attention_mask"] = (sample["input_ids"] != pad_id).long()
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if int8 else None
    with quiet_export():
        exported = OnnxExporter().export(model.eval(), sample, config=OnnxConfig(dynamic=True, quantizer=quantizer))
        exported.save_pretrained(folder)


def read_identity(folder: Path) -> dict[str, Any]:
    """What an exported folder belongs to.

    Raises:
        UserError: It does not say so.
    """
    path = folder / IDENTITY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"format": None, **content}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); without it nobody knows which base model and labels it belongs to"
        ) from error


def checked_adapter(module: Any, folder: Path) -> None:
    """Refuses an exported adapter that does not belong to the module's base, labels and method.

    Raises:
        UserError: As said.
    """
    try:
        module.identity.check({"lightning_lora": read_identity(folder)})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if module.identity.method == "pissa":
        raise UserError(
            f"{folder}: a PiSSA adapter is exported as plain LoRA on the unchanged base model, for PEFT; here, give "
            "the run's own checkpoint"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter_model.safetensors in it; give the folder 'adapter' of an export")


def load_adapter(module: Any, folder: Path) -> None:
    """Puts an exported adapter into a module that was built for the same base, labels, method and settings.

    Raises:
        UserError: It belongs to something else, or is damaged.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    checked_adapter(module, folder)
    try:
        state = load_file(folder / "adapter_model.safetensors")
        result: Any = set_peft_model_state_dict(module.model, state)
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise UserError(
            f"{folder}: the adapter does not fit ({first_line(error, 150)}); model settings such as adapter.rank "
            "must be those it was trained with"
        ) from error
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    missing = sorted(set(result.missing_keys) & trained)
    if missing or result.unexpected_keys:
        raise UserError(
            f"{folder}: the adapter lacks {len(missing)} weights of this model and holds "
            f"{len(result.unexpected_keys)} of another"
        )
