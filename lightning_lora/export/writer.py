"""How ``export`` writes one format of a trained model."""

import importlib.util
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_lora.data.tokens import InputFormat
from lightning_lora.errors import UserError
from lightning_lora.export.formats import write_adapter, write_identity, write_merged, write_onnx, write_tokenizer
from lightning_lora.locations import PACKAGE_PREFIX, resolve
from lightning_lora.models.methods import merged
from lightning_lora.models.quantization import Quantization
from lightning_lora.runs.checkpoints import load_checkpoint
from lightning_lora.training.module import TextClassifier

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class FormatWriter:
    """Writes one format at a time.

    Args:
        model: The trained model.
        checkpoint: Its weights.
        config: Settings of the command.
        frame: How texts are encoded.
    """

    model: TextClassifier
    checkpoint: Path
    config: Any
    frame: InputFormat

    @property
    def target(self) -> str:
        """What ``from_pretrained`` takes for the base model, from any working folder."""
        location = resolve(self.config.model.base_model, "model.base_model")
        return str(location.path.resolve()) if location.path else location.name

    @cached_property
    def plain(self) -> Any:
        """The merged model, as transformers has it; one trained on a quantized base is merged in full precision."""
        whole = build_model(self.config, self.model.label_names, Quantization())
        load_checkpoint(whole, self.checkpoint, any_quantization=True)
        plain = merged(whole.tuned).eval()
        plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
        return plain

    def write(self, form: str, folder: Path) -> None:
        """Writes a format into its folder, with tokenizer and identity.

        Raises:
            UserError: A package for it is missing.
        """
        if form == "adapter":
            pissa = self.config.model.method == "pissa"
            untrained = (lambda: build_model(self.config, self.model.label_names).model) if pissa else None
            write_adapter(self.model.model, folder, self.target, untrained)
        elif form == "merged":
            write_merged(self.plain, folder)
        else:
            if (what := missing_packages()) is not None:
                raise UserError(what)
            write_onnx(self.plain, folder, form == "onnx-int8", self.frame.pad_id)
        write_tokenizer(folder, self.target, self.frame, self.config.data.padding)
        # Where the base lies on this machine says nothing elsewhere, and is nobody's business.
        identity = replace(self.model.identity, base_model=public_name(self.config))
        write_identity(folder, identity, self.frame, self.config.data.padding)


def build_model(config: Any, label_names: list[str], quantization: Quantization | None = None) -> TextClassifier:
    """A fresh model of the run's settings."""
    settings = {**config.model.as_dict(), "label_names": label_names}
    if quantization is not None:
        settings["quantization"] = asdict(quantization)
    return TextClassifier(**settings).eval()


def missing_packages() -> str | None:
    """What to install for ONNX, or None."""
    for name in _ONNX_PACKAGES:
        if importlib.util.find_spec(name) is None:
            return f"onnx needs the package '{name}': pip install -e '.[export]' in this project's folder"
    return None


def public_name(config: Any) -> str:
    """The base model's name as others may read it: of a local folder only the last part."""
    name = config.model.base_model
    local = not name.startswith(PACKAGE_PREFIX) and not resolve(name, "model.base_model").is_hub
    return config.base_model_id or (Path(name).name if local else name)
