"""Local folders that transformers would load as another base model than the one they look like, or not at all."""

import json
from pathlib import Path

from lightning_lora.errors import UserError
from lightning_lora.program import command_line


def check_folder(path: Path) -> None:
    """Refuse a local path that is no base model.

    Raises:
        UserError: It is a run, an adapter, an export or a single file; what to give instead is named.
    """
    if (what := _other_than_a_model(path)) is not None:
        raise UserError(f"model.base_model: '{path}' {what}")


def _other_than_a_model(path: Path) -> str | None:
    run = path.parent.parent if path.suffix == ".ckpt" else path
    if (run / "run.json").is_file() or (run / "checkpoints").is_dir():
        merged, said = run / "export" / "merged", "is of a run, which holds what was trained and no base model"
        export = "" if _is_model(merged) else f"export it with {command_line('export', '--run', run)} and "
        return f"{said}; {export}set model.base_model: {merged}"
    if path.is_file():
        return "is a file; give the folder with config.json, the weights and the tokenizer"
    if (path / "adapter_config.json").is_file():  # transformers would load the base model that it names
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        merged = path.parent / "merged"
        instead = f"set model.base_model: {merged}" if _is_model(merged) else "merge the two by PEFT's merge_and_unload"
        return f"is a PEFT adapter for the base model '{base}'; to start from both, {instead}"
    inside = [path / "merged"] if _is_model(path / "merged") else []
    if (path / "modules.json").is_file():  # of sentence-transformers, whose encoder may have a folder of its own
        inside = [each.parent for each in sorted(path.glob("*/config.json")) if any(each.parent.glob("*model*.*"))]
    if inside and not (path / "config.json").is_file():
        return f"has the base model in a folder of it; set model.base_model: {inside[0]}"
    return None


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()
