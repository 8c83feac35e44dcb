"""What a local folder is that was given as base model and holds none, and what to give instead."""

import json
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
#: By the task of an adapter, the class of PEFT that loads it with its base model.
_PEFT_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}


def check_folder(path: Path) -> None:
    """Refuse a local path that transformers would not load as the base model it looks like.

    Raises:
        UserError: It is something else; what to give instead is named.
    """
    if (what := _other_than_a_model(path)) is not None:
        raise UserError(f"model.base_model: '{path}' {what}")


def _other_than_a_model(path: Path) -> str | None:
    if path.is_file():
        if path.suffix == ".ckpt":
            run = path.parent.parent
            return f"is a checkpoint of a run, which holds what was trained and no base model; {_from_run(run)}"
        return "is a file; give the folder with config.json, the weights and the tokenizer"
    if (path / "adapter_config.json").is_file():  # transformers would load the base model that it names
        return _adapter(path)
    if (path / "run.json").is_file() or (path / "checkpoints").is_dir():
        return f"is the folder of a run, which holds what was trained and no base model; {_from_run(path)}"
    if (path / "merged" / "config.json").is_file():
        return f"is an export in several forms; set model.base_model: {path / 'merged'}"
    has_weights = _has_weights(path)
    if not has_weights and any(path.glob("*.onnx")):
        beside = path.parent / "merged"
        instead = f"set model.base_model: {beside}" if (beside / "config.json").is_file() else "give PyTorch weights"
        return f"holds an ONNX graph, which cannot be trained; {instead}"
    if (path / "config.json").is_file():
        return None
    inner = [each.parent for each in sorted(path.glob("*/config.json")) if _has_weights(each.parent)]
    if (path / "modules.json").is_file() and inner:
        return f"is a sentence-transformers model with its encoder inside; set model.base_model: {inner[0]}"
    if not has_weights and ((path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()):
        return "holds a tokenizer and no model; give the folder that has config.json and the weights too"
    return None


def _has_weights(folder: Path) -> bool:
    return any(found for pattern in _WEIGHTS for found in folder.glob(pattern))


def _from_run(run: Path) -> str:
    merged = run / "export" / "merged"
    if (merged / "config.json").is_file():
        return f"set model.base_model: {merged}"
    return f"export it with python main.py export --run {run} and set model.base_model: {merged}"


def _adapter(path: Path) -> str:
    config = _read(path / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    said = f"is the folder of a PEFT adapter for the base model '{base}', and no base model"
    merged = path.parent / "merged"
    if path.name == "adapter" and (merged / "config.json").is_file():
        return f"{said}; to start from both, set model.base_model: {merged}"
    loader = _PEFT_CLASSES.get(str(config.get("task_type")))
    if loader is None or not base:
        return f"{said}; start from that one, or merge the two with PEFT's merge_and_unload"
    target, tokenizer = path.with_name(f"{path.name}-merged"), path if (path / "tokenizer.json").is_file() else base
    names = _read(path / "lightning_lora.json").get("label_names") or _head_rows(path)
    labels = f", num_labels={len(names)}, id2label={dict(enumerate(names))}" if names else ""
    merge = f"M.from_pretrained('{path}'{labels}).merge_and_unload().save_pretrained('{target}')"
    return (
        f'{said}; to start from both, merge them with: python -c "from peft import {loader} as M; from transformers '
        f"import AutoTokenizer as T; {merge}; T.from_pretrained('{tokenizer}').save_pretrained('{target}')\" "
        f"and set model.base_model: {target}"
    )


def _head_rows(path: Path) -> list[str]:
    """Names for as many labels as the saved head of an adapter has; none where it has no head."""
    from safetensors import safe_open

    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        return []
    with safe_open(weights, "pt") as file:
        for key in sorted(file.keys(), reverse=True):
            if "lora_" not in key and key.endswith(("classifier.weight", "out_proj.weight", "score.weight")):
                return [f"LABEL_{i}" for i in range(file.get_slice(key).get_shape()[0])]
    return []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
