"""Encoder layers evaluated with whole numbers (int8), where ``kernels.c`` computes them.

Weights count in units of 1/127 of the largest of each result's, and are quantized when an evaluation begins, after
the adapters were added to them; rows count in units of 1/127 of the largest of each, and are quantized on their way.
Sums are exact (int32). Attention, norms, what is added to a result, the embeddings, the head and a last layer of the
first token alone stay in bfloat16. Nothing is calibrated, so no rows are needed for it.
"""

import torch
from torch import Tensor, nn

from lightning_lora.errors import UserError
from lightning_lora_amx import kernels
from lightning_lora_amx.attention import COMPILED, attend
from lightning_lora_amx.encoder_layer import FusedEncoderLayer, LayerParts
from lightning_lora_amx.fused_linear import Weights
from lightning_lora_amx.kernels import Int8Weight, Then, quantize


class Int8Layer:
    """An encoder layer of quantized weights.

    Args:
        parts: Of the layer.
        weights: What its linear layers multiply by, adapters added.
    """

    def __init__(self, parts: LayerParts, weights: list[Weights]) -> None:
        self.linears = [Int8Weight(w.weight, w.bias) for w in weights]
        self.norms, self.heads = parts.norms, parts.heads

    def __call__(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's result, (B, T, H), of states (B, T, H) and what is added to the scores."""
        batch, length, width = states.shape
        *asked, out, up, down = self.linears
        rows = states.reshape(-1, width).contiguous()
        numbers = quantize(rows)
        q, k, v = (x.times(numbers).view(batch, length, self.heads, -1).transpose(1, 2) for x in asked)
        context = attend(q, k, v, mask, q.shape[-1] ** -0.5, True).reshape(-1, width)
        first = out.times(quantize(context), Then.ADDED, rows)
        middle, _ = kernels.norm_forward(first, self.norms[0])
        activated = up.times_quantized(quantize(middle), Then.GELU_ALONE)
        second = down.times(activated, Then.ADDED, middle)
        result, _ = kernels.norm_forward(second, self.norms[1])
        return result.view(states.shape)


def check_machine() -> None:
    """Refuses int8 on a machine that cannot compute it.

    Raises:
        UserError: As said.
    """
    if torch.cuda.is_available():
        raise refusal("it is for machines without a GPU")
    if kernels.LIBRARY is None:
        raise refusal(kernels.MISSING)


def check_int8(model: nn.Module, attention: str | None) -> int:
    """The number of layers that can be computed so.

    Args:
        model: What is to be evaluated.
        attention: The name of its attention; None where frozen weights are not kept in bfloat16.

    Raises:
        UserError: There is none, or the machine cannot.
    """
    check_machine()
    if attention is None:
        raise refusal(
            "all else is computed in bfloat16: it needs trainer.precision bf16-mixed, model.speedups.frozen_weights "
            "auto and a method that leaves the encoder frozen"
        )
    if attention != COMPILED:
        raise refusal("it needs model.attention auto or exact")
    if not (layers := _layers(model)):
        raise refusal(
            "no layer of this model before its last is such as BERT's, frozen, with at most LoRA, its sizes "
            f"multiples of {kernels.STEP}"
        )
    return len(layers)


def refusal(why: str) -> UserError:
    """What is said where it cannot be."""
    return UserError(f"--int8: {why}; `python main.py export` makes an int8 file for ONNX Runtime")


def begin_int8(model: nn.Module) -> None:
    """Lets encoder layers compute with whole numbers until ``end_int8``.

    Args:
        model: In evaluation mode, its adapters merged.

    Raises:
        UserError: One of those that were counted before cannot.
    """
    for layer in _layers(model):
        weights = layer.multiplied(torch.bfloat16)
        if weights is None or any(w.a is not None for w in weights):
            raise refusal("a layer has more than one adapter, trains biases, or is kept in another number format")
        layer.int8_layer = Int8Layer(layer.parts, weights)


def _layers(model: nn.Module) -> list[FusedEncoderLayer]:
    found = (m for m in model.modules() if isinstance(m, FusedEncoderLayer))
    return [layer for layer in found if layer.parts.sizes_fit and not layer.first_token_only]


def end_int8(model: nn.Module) -> None:
    """Lets encoder layers compute in bfloat16 again."""
    for module in model.modules():
        if isinstance(module, FusedEncoderLayer):
            module.int8_layer = None
