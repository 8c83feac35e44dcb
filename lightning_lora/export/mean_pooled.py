"""Exports of a model whose head reads the mean of a text's states, for which transformers has no class.

``merged`` is a folder of sentence-transformers: the encoder, the mean, and the head as dense layers. ``adapter`` adapts
the bare encoder, and the head lies beside it. With their weights under the names of ``...ForSequenceClassification``
transformers would load both without a word and read the first token; so it says that the head is new, or refuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora.errors import UserError
from lightning_lora.files import write_json
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.training.module import TextClassifier

HEAD_FILE = "head.safetensors"
#: PEFT writes the names of a model's modules behind this.
_PEFT = "base_model.model."
#: transformers' names of activations that torch.nn has as a class; sentence-transformers loads no others.
_ACTIVATIONS = {"gelu": "GELU", "linear": "Identity", "relu": "ReLU", "silu": "SiLU", "swish": "SiLU", "tanh": "Tanh"}


@dataclass(frozen=True)
class MeanHead:
    """A head that reads the mean of a text's states: linear layers with an activation between them.

    Args:
        layers: Names of the linear layers in the model, in their order.
        sizes: Their (in, out).
        activation: transformers' name of the activation.
        modules: Names of the modules that are the head in the model.
        encoder: The encoder's name in the model.
        has_pooler: Whether transformers gives the encoder alone a pooler, unless told otherwise.
    """

    layers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    activation: str
    modules: tuple[str, ...]
    encoder: str
    has_pooler: bool

    @property
    def activation_class(self) -> str:
        """The activation's class in torch.nn.

        Raises:
            UserError: torch.nn has no class for the activation.
        """
        if self.activation not in _ACTIVATIONS:
            raise UserError(f"torch.nn has no class for the head's activation '{self.activation}'; use onnx")
        return _ACTIVATIONS[self.activation]

    @property
    def folders(self) -> list[str]:
        """The folders of its layers in a folder of sentence-transformers."""
        return [f"{number}_Dense" for number, _ in enumerate(self.layers, 2)]

    def write_sentence_transformer(self, model: Any, folder: Path, max_length: int) -> None:
        """Writes a folder whose ``SentenceTransformer(folder).encode(texts)`` are the logits of a merged model."""
        encoder = getattr(model, self.encoder)
        encoder.save_pretrained(folder)
        # Without this, a pooler would be drawn, announced and not used.
        more = {"model_args": {"add_pooling_layer": False}} if self.has_pooler else {}
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False, **more})
        write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None})
        # The names of before sentence-transformers 5.3, which later versions read too.
        modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": self.sizes[0][0], **modes})
        for name, layer, (inputs, outputs) in zip(self.folders, self.layers, self.sizes, strict=True):
            kind = getattr(nn, "Identity" if layer == self.layers[-1] else self.activation_class)
            path = f"{kind.__module__}.{kind.__qualname__}"
            content = {"in_features": inputs, "out_features": outputs, "bias": True, "activation_function": path}
            write_json(folder / name / "config.json", content)
            tensors = model.get_submodule(layer).state_dict(prefix="linear.")
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name / "model.safetensors")
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *((name, "Dense") for name in self.folders)]
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(kinds)
        ]
        write_json(folder / "modules.json", modules)

    def split_adapter(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns PEFT's weights for the encoder alone, and the head's, named as in a ``torch.nn.Sequential``."""
        encoder = f"{_PEFT}{self.encoder}."
        adapter = {
            key.replace(encoder, _PEFT, 1): value
            for key, value in state.items()
            if not key.startswith(tuple(f"{_PEFT}{module}." for module in self.modules))
        }
        return adapter, {ours: state[theirs] for ours, theirs in self._names()}

    def join_adapter(self, folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns PEFT's weights for the whole model, from those for the encoder alone and the head in a folder."""
        head = load_file(folder / HEAD_FILE)
        names = dict(self._names())
        adapter = {
            key.replace(_PEFT, f"{_PEFT}{self.encoder}.", 1) if key.startswith(_PEFT) else key: value
            for key, value in state.items()
        }
        # A weight that is none of this head's stays, and is found to be one too many.
        return adapter | {names.get(key, key): value for key, value in head.items()}

    def adapt_encoder(self, config: Any, targets: list[str]) -> None:
        """Changes PEFT's config for the whole model into one for the encoder alone.

        Args:
            config: The config.
            targets: Full names of the adapted layers in the whole model: PEFT shortens them to endings that tell apart
                the layers of one model, not those of another.
        """

        def inside(names: Any) -> list[str]:
            return [name.removeprefix(f"{self.encoder}.") for name in names]

        config.task_type = "FEATURE_EXTRACTION"
        config.target_modules = inside(targets)
        if getattr(config, "feedforward_modules", None):
            config.feedforward_modules = sorted(inside(config.feedforward_modules))
        # "score" is a guess of PEFT's for any classifier.
        kept = [name for name in config.modules_to_save if name not in (*self.modules, "score")]
        config.modules_to_save = inside(kept) or None

    def _names(self) -> list[tuple[str, str]]:
        """Each weight's name in a ``torch.nn.Sequential``, where activations count, and PEFT's for it."""
        return [
            (f"{2 * number}.{kind}", f"{_PEFT}{layer}.{kind}")
            for number, layer in enumerate(self.layers)
            for kind in ("weight", "bias")
        ]


def mean_head(classifier: TextClassifier) -> MeanHead | None:
    """Returns the head of a model where it reads the mean of a text's states, else None."""
    if classifier.pooling != "mean":
        return None
    from peft import PeftModel

    model: Any = classifier.model
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config, encoder = model.config, model.base_model_prefix
    entry = ARCHITECTURES[config.model_type]
    name = getattr(config, entry.head_activation, entry.head_activation)
    widths = [config.hidden_size] * len(entry.head_layers) + [config.num_labels]
    pooler = "add_pooling_layer" in signature(type(getattr(model, encoder)).__init__).parameters
    return MeanHead(entry.head_layers, tuple(pairwise(widths)), name, entry.head, encoder, pooler)
