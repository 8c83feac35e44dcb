"""The formats in which a trained model leaves the project, each written as other software reads it.

=============  ==================================================================================
``adapter``    PEFT's folder: adapter_model.safetensors, adapter_config.json; for PEFT methods
``merged``     a plain transformers folder; of sentence-transformers where the head reads the mean
``onnx``       an ONNX graph of the merged model, by ``transformers.exporters``
``onnx-int8``  the same with weights of 8 bits, quantized by ONNX Runtime
=============  ==================================================================================

Every folder also holds the tokenizer, which truncates and pads as in training, and ``lightning_lora.json``: label
names, base model and its fingerprint, how texts are encoded. Where a tokenizer cannot truncate as in training,
``encode.py`` does.
"""

import copy
import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_lora.data.pairs import is_pair
from lightning_lora.data.tokens import InputFormat
from lightning_lora.errors import UserError
from lightning_lora.export.mean_pooled import HEAD_FILE, MeanHead, mean_head
from lightning_lora.files import write_json
from lightning_lora.locations import PACKAGE_PREFIX, resolve
from lightning_lora.models.head import divide_output, fold_scale
from lightning_lora.models.methods import merged
from lightning_lora.models.quantization import Quantization
from lightning_lora.program import install_line
from lightning_lora.quiet import quiet_export, quiet_loading
from lightning_lora.runs.checkpoints import CHECKPOINT_FORMAT, CheckpointIdentity, load_checkpoint
from lightning_lora.tasks import PROBLEM_TYPES
from lightning_lora.training.module import TextClassifier

FORMATS = ("adapter", "merged", "onnx", "onnx-int8")
IDENTITY_FILE = "lightning_lora.json"
#: Truncations that no tokenizer does by itself, so that exports bring ``encode.py``.
ENCODED = ("both", "windows")
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class FormatWriter:
    """Writes a trained model, of a checkpoint, in one format at a time; ``config`` has the settings of the command."""

    model: TextClassifier
    checkpoint: Path
    config: Any
    input_format: InputFormat

    def write(self, name: str, folder: Path) -> None:
        """Writes a format into its folder, with tokenizer and identity."""
        if name == "adapter":
            self._write_adapter(folder)
        elif name == "merged":
            self.merged.config.problem_type = PROBLEM_TYPES[self.model.task]
            with quiet_loading():
                if self.mean_head is None:
                    self.merged.save_pretrained(folder)
                else:
                    self.mean_head.write_sentence_transformer(self.merged, folder, self.input_format.max_length)
        else:
            write_onnx(self.merged, folder, name == "onnx-int8", self.input_format)
        write_tokenizer(folder, self._base_target, self.input_format, self.config.data.padding)
        # A path of this machine says nothing elsewhere, and is nobody's business.
        identity = replace(self.model.identity, base_model=public_name(self.config))
        write_identity(folder, identity, self.input_format, self.config.data.padding, shown_thresholds(self.model))

    @cached_property
    def merged(self) -> Any:
        """The merged model, as transformers has it; one trained on a quantized base is merged in full precision."""
        whole = self._untrained(Quantization())
        load_checkpoint(whole, self.checkpoint, any_quantization=True)
        fold_scale(whole.model)
        fold_temperature(whole)
        plain = merged(whole.tuned).eval()
        plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
        return plain

    def _untrained(self, quantization: Quantization) -> TextClassifier:
        labels = {"label_names": self.model.label_names, "task": self.model.task}
        return build_model(self.config, {**labels, "quantization": asdict(quantization)})

    @cached_property
    def mean_head(self) -> MeanHead | None:
        """The head, where it reads the mean of a text's states."""
        return mean_head(self.model)

    @property
    def _base_target(self) -> str:
        """What ``from_pretrained`` takes for the base model, from any working folder."""
        location = resolve(self.config.model.base_model, "model.base_model")
        return str(location.path.resolve()) if location.path else location.name

    def _write_adapter(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model: Any = self.model.model  # PEFT's wrapper
        config = copy.deepcopy(model.peft_config["default"])
        config.base_model_name_or_path = self._base_target
        # The author of a Hub id may change its weights; the revision that was trained on stays.
        config.revision = getattr(model.get_base_model().config, "_commit_hash", None)
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save or []))  # PEFT adds its own guesses
        config.inference_mode = True
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        if self.config.model.method == "pissa":
            # PiSSA changes the base's weights at the start. LoRA of twice the rank whose product is B A - B0 A0, what
            # training added to the base's own weights, loads on the unchanged base.
            untrained = self._untrained(self.model.quantization).model
            start = get_peft_model_state_dict(untrained, save_embedding_layers=False)
            for key, value in state.items():
                if ".lora_A." in key:
                    state[key] = torch.cat([value, start[key]], dim=0)
                elif ".lora_B." in key:
                    state[key] = torch.cat([value, -start[key]], dim=1)
            config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
        folder.mkdir(parents=True)
        if self.mean_head is not None:
            self.mean_head.adapt_encoder(config, self.model.target_modules)
            state, head = self.mean_head.split_adapter(state)
            save_file({key: value.contiguous() for key, value in head.items()}, folder / HEAD_FILE)
        config.save_pretrained(folder)
        tensors = {key: value.contiguous().clone() for key, value in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def require_onnx() -> None:
    """Refuses to write ONNX files without the packages for it."""
    for package in _ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"onnx needs the package '{package}': {install_line('export')}")


def write_onnx(model: Any, folder: Path, int8: bool, input_format: InputFormat) -> None:
    """Writes a plain transformers model as an ONNX graph for any batch size and length (extra "export")."""
    require_onnx()
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.quantizers import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    # Two rows of two lengths: neither is taken for a constant.
    pad_id = input_format.pad_id
    token = 2 if pad_id != 2 else 1
    sample: dict[str, Any] = {"input_ids": torch.tensor([[token] * 9, [token] * 5 + [pad_id] * 4])}
    sample["attention_mask"] = (sample["input_ids"] != pad_id).long()
    if input_format.types:
        sample["token_type_ids"] = torch.zeros_like(sample["input_ids"])
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if int8 else None
    with quiet_export():
        exported = OnnxExporter().export(model.eval(), sample, config=OnnxConfig(dynamic=True, quantizer=quantizer))
        exported.save_pretrained(folder)


def write_tokenizer(folder: Path, target: str, input_format: InputFormat, padding: str) -> None:
    """Writes the base model's tokenizer, so that it truncates, pads and returns what the model was trained on.

    Of "both" ends a tokenizer alone keeps the tail, the larger part.

    Args:
        folder: The folder.
        target: What ``from_pretrained`` takes for the base model.
        input_format: How texts are encoded.
        padding: To the "longest" text of a batch, or to "max_length".
    """
    from transformers import AutoTokenizer

    pad_id, max_length = input_format.pad_id, input_format.max_length
    side = "left" if input_format.keep in ("tail", "both") else "right"
    # Given here, these are saved with it. Training gives the model token_type_ids of pairs only.
    tokenizer = AutoTokenizer.from_pretrained(
        target,
        trust_remote_code=False,
        model_max_length=max_length,
        truncation_side=side,
        padding_side="right",
        model_input_names=["input_ids", *["token_type_ids"] * bool(input_format.types), "attention_mask"],
    )
    if tokenizer.pad_token_id != pad_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    # For those who read tokenizer.json without transformers, which sets both in each call.
    strategy = input_format.keep if is_pair(input_format.keep) else "longest_first"
    tokenizer.backend_tokenizer.enable_truncation(max_length, strategy=strategy, direction=side)
    width = max_length if padding == "max_length" else None
    tokenizer.backend_tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.pad_token, length=width)
    tokenizer.save_pretrained(folder)


def shown_thresholds(model: TextClassifier) -> list[float] | None:
    """Returns the probability from which on each of several labels is predicted; None of others."""
    if (thresholds := model.decision_thresholds("test")) is None:
        return None
    return [float(str(value)) for value in thresholds.float().cpu().numpy()]  # the shortest that is the same number


def fold_temperature(model: TextClassifier) -> None:
    """Puts the temperature into the weights of the head and the thresholds, as other software knows none."""
    if model.temperature is not None:
        divide_output(model.model, len(model.label_names), model.temperature.item())
        model.thresholds = model.decision_thresholds("test")
        model.temperature.fill_(1)


def write_identity(
    folder: Path,
    identity: CheckpointIdentity,
    input_format: InputFormat,
    padding: str,
    thresholds: list[float] | None = None,
) -> None:
    """Writes what the files in a folder belong to and how texts are encoded; with ``encode.py`` where it is needed."""
    encoding = asdict(input_format)
    encoding |= {"truncation": encoding.pop("keep"), "window_overlap": encoding.pop("overlap"), "padding": padding}
    content = {"format": CHECKPOINT_FORMAT, **asdict(identity), **encoding}
    content |= {} if thresholds is None else {"thresholds": thresholds}
    write_json(folder / IDENTITY_FILE, content)
    if input_format.keep in ENCODED:
        shutil.copyfile(Path(__file__).with_name("encode.py"), folder / "encode.py")


def build_model(config: Any, changes: Mapping[str, Any]) -> TextClassifier:
    """Returns an untrained model of the run's settings, with what is predicted and other changes to them."""
    return TextClassifier(**{**config.model.as_dict(), **changes}).eval()


def public_name(config: Any) -> str:
    """Returns the base model's name as others may read it: of a local folder only the last part."""
    name = config.model.base_model
    local = not name.startswith(PACKAGE_PREFIX) and not resolve(name, "model.base_model").is_hub
    return config.base_model_id or (Path(name).name if local else name)
