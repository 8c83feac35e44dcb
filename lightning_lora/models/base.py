"""A Hugging Face encoder or language model with a classification head, loaded and checked."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from lightning_lora.errors import UserError, first_line
from lightning_lora.locations import Location, resolve
from lightning_lora.models.architectures import ARCHITECTURES, Architecture
from lightning_lora.models.head import FRESH, make_scalable, outside_backbone, prepare_head, unloaded
from lightning_lora.models.quantization import Quantization, prepare_quantized, quantization_config
from lightning_lora.program import command_line
from lightning_lora.quiet import quiet_loading
from lightning_lora.seeding import torch_stream
from lightning_lora.tasks import PROBLEM_TYPES, Task
from lightning_lora.tokenizer import load_tokenizer, tokens_beyond

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: The first that is there holds the token numbers.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model")


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Args:
        model: A ``...ForSequenceClassification`` model of transformers (its classes are made at run time).
        architecture: Its entry in the table, or None when it has none.
        head_modules: Modules to train and save whole: the head, and what else was newly initialised.
        fingerprint: SHA-256 of the pretrained weights and the tokenizer.
        head: What was done with its head, in words that follow "base model with".
        pooling_file: What sentence-transformers says of how its states become one, if it is of theirs.
    """

    model: Any
    architecture: Architecture | None
    head_modules: list[str]
    fingerprint: str
    head: str = FRESH
    pooling_file: Path | None = None

    @property
    def fresh_head(self) -> bool:
        """Whether the head is new."""
        return self.head.startswith(FRESH)

    @property
    def own_head(self) -> bool:
        """Whether its head is of a class of one's own that gets the states of all tokens, as RoBERTa's head does."""
        if self.architecture is not None and self.architecture.pooler:  # which leaves one state a text
            return False
        parts = [m for name in outside_backbone(self.model) for m in self.model.get_submodule(name).modules()]
        known = ("torch.", "transformers.", "peft.", "bitsandbytes.", "lightning_lora.")
        return not all(type(part).__module__.startswith(known) for part in parts)

    @property
    def reads_last(self) -> bool:
        """Whether its head reads the last token: transformers calls the heads of language models "score"."""
        return hasattr(self.model, "score")


def load_base(
    base_model: str,
    label_names: Sequence[str],
    seed: int,
    quantization: Quantization | None = None,
    task: Task = "single_label",
) -> Base:
    """The base model with a head for the labels; anything newly initialised is a function of the seed.

    A head that it brings along is kept where it is one for the same labels (``models/head.py``).

    Args:
        base_model: A Hub id, a local folder, or ``package:NAME/path``.
        label_names: Names of the classes in the order of their numbers.
        seed: The run's seed; the head has a stream of its own.
        quantization: How the encoder's linear layers are stored; full precision by default.
        task: What is predicted.

    Raises:
        UserError: There is no such model, the machine cannot quantize it, it is no encoder for classification,
            or it lacks weights outside the head, or embeddings for tokens of its tokenizer.
    """
    location = resolve(base_model, "model.base_model")
    if location.path is not None and (what := _other_than_a_model(location.path)) is not None:
        raise UserError(f"model.base_model: '{location.path}' {what}")
    config, theirs = _load_config(location, label_names, task)
    # Without a tokenizer the data says so, in its own words.
    tokenizer = load_tokenizer(location.target, "model.base_model") if _tokenizer_file(location) else None
    text = config.get_text_config()
    if tokenizer is not None and not 0 <= (text.pad_token_id or 0) < getattr(text, "vocab_size", math.inf):
        _set_padding(config, tokenizer.pad_token_id)  # with none that the embedding has the model could not be made
    quantization = quantization or Quantization()
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None and quantization.bits is not None:
        raise UserError(
            f"model.quantization: the head of architecture '{config.model_type}' is not known, and must not be "
            f"quantized; known are {', '.join(ARCHITECTURES)}"
        )
    not_quantized = [*architecture.head, *architecture.pooler] if architecture else []

    def load(stored: Any) -> tuple[Any, dict[str, Any], str]:
        with torch_stream(seed, "head"), quiet_loading():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                location.target,
                config=config,
                output_loading_info=True,
                # A head of other labels is replaced; anything else that does not fit is refused below.
                ignore_mismatched_sizes=True,
                dtype="float32",
                quantization_config=stored,
                trust_remote_code=False,
            )
        with torch_stream(seed, "head"):
            return model, info, prepare_head(model, set(info["missing_keys"]), head_names, theirs, label_names)

    stored = quantization_config(quantization, not_quantized, base_model)
    try:
        head_names = list(architecture.head) if architecture else outside_backbone(unloaded(config))
        model, info, head = load(stored)
    except Exception as error:  # a damaged file raises kinds of several libraries
        raise UserError(
            f"model.base_model: cannot load '{base_model}' for sequence classification ({first_line(error)})"
        ) from error
    fresh = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    if stored is not None and torch.cuda.is_available():
        # There a quantized base is made on the GPU, and a new head drawn by the GPU's generator: take the CPU's.
        plain = dict(load(None)[0].named_modules())
        for name in plain.keys() & not_quantized:
            model.get_submodule(name).load_state_dict(plain[name].state_dict())
    if stored is not None:
        prepare_quantized(model)
    head_modules = _head_modules(model, architecture, fresh, base_model)
    if tokenizer is not None:
        _check_embeddings(model, tokenizer, location)
        # Behind another number all positions would be others; and there the last token is not looked for.
        if not first_position(model):
            _set_padding(model.config, tokenizer.pad_token_id)
    pooling = _find(location, "1_Pooling/config.json")
    base = Base(model, architecture, head_modules, weights_fingerprint(location), head, pooling)
    if task == "regression" and base.fresh_head:
        make_scalable(model, head_names)
    if base.reads_last:  # in one pass: the cache of keys and values, for generation, is never read
        model.config.get_text_config().use_cache = False
    return base


def _other_than_a_model(path: Path) -> str | None:
    """What a local path is that transformers would load as another base model than it looks like, or not at all."""
    run = path.parent.parent if path.suffix == ".ckpt" else path
    if (run / "run.json").is_file() or (run / "checkpoints").is_dir():
        merged, said = run / "export" / "merged", "is of a run, which holds what was trained and no base model"
        export = "" if _has_config(merged) else f"export it with {command_line('export', '--run', run)} and "
        return f"{said}; {export}set model.base_model: {merged}"
    if path.is_file():
        return "is a file; give the folder with config.json, the weights and the tokenizer"
    if (path / "adapter_config.json").is_file():  # transformers would load the base model that it names
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        merged, instead = path.parent / "merged", "merge the two by PEFT's merge_and_unload"
        if _has_config(merged):
            instead = f"set model.base_model: {merged}"
        return f"is a PEFT adapter for the base model '{base}'; to start from both, {instead}"
    inside = [path / "merged"] if _has_config(path / "merged") else []
    if (path / "modules.json").is_file():  # of sentence-transformers, whose encoder may have a folder of its own
        inside = [each.parent for each in sorted(path.glob("*/config.json")) if any(each.parent.glob("*model*.*"))]
    if inside and not _has_config(path):
        return f"has the base model in a folder of it; set model.base_model: {inside[0]}"
    return None


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def weights_fingerprint(location: Location) -> str:
    """SHA-256 over the bytes of the pretrained weights and of the tokenizer, wherever they lie.

    The tokenizer belongs to it: with other token numbers the same weights read other words.
    """
    digest = hashlib.sha256()
    for path in [*_weight_files(location), *_tokenizer_file(location)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def linear_modules(base: Base) -> list[str]:
    """Full names of the linear layers (quantized or GPT-2's too) in the encoder's numbered layers, never the head.

    Routers to experts (PhiMoE's) are none: they give more than a tensor.
    """
    backbone = f"{base.model.base_model_prefix}."
    return [
        name
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not type(module).__name__.endswith("Router")
        if name.startswith(backbone) and any(part.isdecimal() for part in name.split("."))
    ]


def below_layer(name: str) -> str:
    """The part of a module's name after the numbered layer: "attention.self.query" and the like."""
    parts = name.split(".")
    return ".".join(parts[max(i for i, part in enumerate(parts) if part.isdecimal()) + 1 :])


def _load_config(location: Location, label_names: Sequence[str], task: Task) -> tuple[Any, list[str]]:
    """The base model's config with our labels, and the names of its own."""
    try:
        config = AutoConfig.from_pretrained(location.target, trust_remote_code=False)
        theirs = [str(name) for _, name in sorted(config.id2label.items())]
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
        config.problem_type = PROBLEM_TYPES[task]
        if getattr(config, "attention_type", None) == "block_sparse":  # BigBird's, whose layers become full for good
            config.attention_type = "original_full"  # with the first batch of short texts
        return config, theirs
    except Exception as error:  # a damaged config raises many kinds
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.base_model: '{location.name}' brings code of its own, which is never run here; use a model of "
                "an architecture that transformers has"
            ) from error
        what = "in that folder" if location.path else "check the name and the network, or give a local folder"
        raise UserError(f"model.base_model: no usable model '{location.name}' ({first_line(error)}); {what}") from error


def _set_padding(config: Any, pad_id: int) -> None:
    for each in (config, config.get_text_config()):
        each.pad_token_id = pad_id


def first_position(model: nn.Module) -> int:
    """The position of a text's first token: behind the padding token's number for RoBERTa and its kin, else 0."""
    for name, module in model.named_modules():
        if "position" in name and (padding := getattr(module, "padding_idx", None)) is not None:
            return int(padding) + 1
    return 0


def _check_embeddings(model: Any, tokenizer: Any, location: Location) -> None:
    """Refuse tokens that the model has no embedding for."""
    try:
        rows = len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):  # an architecture that has no table of tokens
        return
    if not (beyond := tokens_beyond(tokenizer, rows)):
        return
    size = max(tokenizer.get_vocab().values()) + 1
    source = location.target
    raise UserError(
        f"model.base_model: the tokenizer of '{location.name}' has {len(beyond)} tokens, such as '{beyond[0]}', beyond "
        f'the {rows} that the model has an embedding for; give them one with: python -c "from transformers import '
        f"AutoModel as M, AutoTokenizer as T; m = M.from_pretrained('{source}'); m.resize_token_embeddings({size}); "
        f"m.save_pretrained('resized'); T.from_pretrained('{source}').save_pretrained('resized')\" and set "
        "model.base_model: resized"
    )


def _head_modules(model: Any, arch: Architecture | None, fresh: set[str], name: str) -> list[str]:
    """The head, and the pooler where it is fresh; a fresh weight anywhere else means a broken base."""
    known = arch.pooler if arch else [f"{model.base_model_prefix}.pooler"]
    poolers = [module for module in known if any(key.startswith(f"{module}.") for key in fresh)]
    head = [*poolers, *(arch.head if arch else outside_backbone(model))]
    stray = sorted(key for key in fresh if not any(key.startswith(f"{module}.") for module in head))
    if stray:
        raise UserError(
            f"model.base_model: '{name}' lacks or has in another shape {len(stray)} weights outside the head, "
            f"such as {stray[0]}; it is not a whole checkpoint of this architecture"
        )
    return head


def _find(location: Location, name: str) -> Path | None:
    """A file of the base model, from its folder or the Hub's cache; None when it has none of that name."""
    found = cached_file(location.target, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _tokenizer_file(location: Location) -> list[Path]:
    return [path for name in _TOKENIZER_FILES if (path := _find(location, name))][:1]


def _weight_files(location: Location) -> list[Path]:
    for name in _WEIGHT_FILES:
        if (path := _find(location, name)) is not None:
            if name.endswith(".index.json"):
                shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
                return [path.parent / shard for shard in shards]
            return [path]
    raise UserError(f"model.base_model: '{location.name}' holds none of {', '.join(_WEIGHT_FILES)}")


def enable_gradient_checkpointing(model: Any) -> None:
    """Makes a transformers model compute activations again in the backward pass, where its architecture can."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"model.gradient_checkpointing: architecture '{model.config.model_type}' cannot; leave it out")
    model.activation_checkpointing_enable({"use_reentrant": False})
    # It also makes the embeddings ask for gradients, with which even a frozen encoder would be gone through backwards.
    model.disable_input_require_grads()
