"""Whole encoder layers in one step without a GPU, with a backward pass of their own.

A layer of attention and feed-forward, each added to its input and then normalised (as in BERT, Devlin et al. 2019),
whose weights are frozen and of which at most LoRA is trained, needs few of the passes that its modules make when each
keeps, copies and hands on what any other might want. What comes out is the same but for rounding. Whether it may be
computed so is looked at in each call; where not, the layer's own modules compute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUActivation

from lightning_lora.devices import compute_dtype
from lightning_lora.models.attention import EXACT
from lightning_lora.models.base import Base
from lightning_lora_amx import kernels
from lightning_lora_amx.attention import COMPILED
from lightning_lora_amx.fused_linear import FrozenLinear, FusedLora, Weights, shared_input
from lightning_lora_amx.layer_attention import EveryToken, FirstToken

#: Called by their full names, as torch otherwise looks through all forms of an operator at each call.
_NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward.default


@dataclass(frozen=True)
class LayerNames:
    """Paths of modules inside a numbered layer of attention and feed-forward, each added to its input and normalised.

    Args:
        linears: Query, key, value, the attention's output, and the feed-forward block's two.
        norms: Behind the attention and behind the feed-forward block.
        activation: Between the feed-forward block's two.
    """

    linears: tuple[str, str, str, str, str, str]
    norms: tuple[str, str]
    activation: str


_BERT = LayerNames(
    linears=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    activation="intermediate.intermediate_act_fn",
)
#: By ``model_type``.
LAYERS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": LayerNames(
        linears=(
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ),
        norms=("sa_layer_norm", "output_layer_norm"),
        activation="ffn.activation",
    ),
}


@dataclass
class LayerParts:
    """The modules of one encoder layer.

    Args:
        linears: Query, key, value, the attention's output, and the feed-forward block's two.
        norms: Behind the attention and behind the feed-forward block.
        dropouts: All that there are; none may be active.
        heads: Of the attention.
        config: The model's, which names the attention to be used.
        sizes_fit: Whether linear layers and norms have sizes for ``kernels.c``.
    """

    linears: list[Any]
    norms: list[nn.LayerNorm]
    dropouts: list[nn.Dropout]
    heads: int
    config: Any
    sizes_fit: bool


def fuse_layers(base: Base) -> int:
    """Lets every encoder layer that can be computed in one step be; gives their number."""
    names = LAYERS.get(base.model.config.model_type)
    if names is None:
        return 0
    count = 0
    for module in base.model.modules():
        parts = find_parts(module, names, base.model.config)
        if parts is not None:
            module.__class__ = type(f"Fused{type(module).__name__}", (FusedEncoderLayer, type(module)), {})
            module.parts = parts
            count += 1
    return count


def find_parts(module: nn.Module, names: LayerNames, config: Any) -> LayerParts | None:
    """The parts of a layer; None for a module that is none, or has more to train, or to compute, than there is here."""
    try:
        linears = [module.get_submodule(name) for name in names.linears]
        norms: list[Any] = [module.get_submodule(name) for name in names.norms]
        activation = module.get_submodule(names.activation)
    except AttributeError:
        return None
    plain = all(isinstance(m, FusedLora) or type(m) in (nn.Linear, FrozenLinear) for m in linears)
    weights = [p for m in linears for p in getattr(m, "base_layer", m).parameters()]
    weights += [p for norm in norms for p in norm.parameters()]
    if not plain or type(activation) is not GELUActivation or any(p.requires_grad for p in weights):
        return None
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    fit = all(size % kernels.STEP == 0 for weight in weights for size in weight.shape)
    fit = fit and all(norm.bias is not None for norm in norms)
    return LayerParts(linears, norms, dropouts, config.num_attention_heads, config, fit)


class FusedEncoderLayer(nn.Module):
    """An encoder layer of transformers, computed by ``EncoderLayerFunction`` while that is the same.

    It only ever replaces the class of a layer that transformers has made.
    """

    parts: LayerParts
    first_token_only = False
    #: What computes the layer while a model is evaluated in int8 (``int8_layer.py``).
    int8_layer: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The layer's result of states (B, T, H) and what is added to the scores: (B, T, H), or (B, 1, H)."""
        weights = self.weights(hidden_states)
        more = (*args, kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values"))
        if weights is None or any(argument is not None for argument in more):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        adapters = [w for layer in weights for w in (layer.a, layer.b) if w is not None]
        backward = torch.is_grad_enabled() and (hidden_states.requires_grad or bool(adapters))
        with torch.autocast(hidden_states.device.type, enabled=False):
            if self.int8_layer is not None and not backward:
                return self.int8_layer(hidden_states, attention_mask)
            return EncoderLayerFunction.apply(hidden_states, attention_mask, self, weights, backward, *adapters)

    def weights(self, states: Tensor) -> list[Weights] | None:
        """What the linear layers multiply by; None where something is asked for that is not computed here."""
        parts, dtype = self.parts, states.dtype
        usual = states.device.type == "cpu" and parts.config._attn_implementation in (EXACT, COMPILED)
        usual = usual and compute_dtype(states) == dtype and all(n.weight.dtype == dtype for n in parts.norms)
        if not usual or (self.training and any(d.p for d in parts.dropouts)):
            return None
        return self.multiplied(dtype)

    def multiplied(self, dtype: torch.dtype) -> list[Weights] | None:
        """What the linear layers multiply by; None where that is not all, or of another number format."""
        found = []
        for linear in self.parts.linears:
            weights = linear.weights() if isinstance(linear, FusedLora) else Weights(linear.weight, linear.bias)
            if weights is None or any(t.dtype != dtype for t in (weights.weight, weights.bias) if t is not None):
                return None
            found.append(weights)
        return found


class EncoderLayerFunction(torch.autograd.Function):
    """Attention and feed-forward, each added to its input and normalised, of frozen weights and trained adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        mask: Tensor | None,
        layer: FusedEncoderLayer,
        weights: list[Weights],
        backward: bool,
        *adapters: Tensor,
    ) -> Tensor:
        """The layer's result; with ``backward`` what that needs is kept."""
        parts, dtype = layer.parts, states.dtype
        batch, _, width = states.shape
        states = states.contiguous()
        compiled = parts.sizes_fit and parts.config._attn_implementation == COMPILED and kernels.computes(states)
        attention = (FirstToken if layer.first_token_only else EveryToken)(weights[:3], parts.heads, dtype, compiled)
        out, up, down = (shared_input([linear], dtype, compiled) for linear in weights[3:])

        context, kept = attention.forward(states, mask, backward)
        beside = states[:, 0].contiguous() if layer.first_token_only else states.view(-1, width)
        (first,), out_inner = out.forward(context, beside)
        middle, first_stats = normalised(first, parts.norms[0], compiled)
        activated, gelu, up_inner = up.forward_gelu(middle, backward)
        (second,), down_inner = down.forward(activated, middle)
        result, second_stats = normalised(second, parts.norms[1], compiled)
        if backward:
            inputs = zip((context, middle, activated), (out, up, down), strict=True)
            read = [x if linear.adapted else None for x, linear in inputs]  # by adapters
            inner = (out_inner, up_inner, down_inner)
            ctx.save_for_backward(states, *kept, *read, *inner, gelu, first, *first_stats, second, *second_stats)
            ctx.layers, ctx.norms, ctx.kept = (attention, out, up, down), parts.norms, len(kept)
        return result.view(batch, -1, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the states, and those of the adapters."""
        attention, out, up, down = ctx.layers
        saved = ctx.saved_tensors  # read once: with gradient checkpointing it can be only once
        states, *kept = saved[: 1 + ctx.kept]
        context, middle, activated, out_inner, up_inner, down_inner, gelu, *normed = saved[1 + len(kept) :]
        of_norm = len(normed) // 2
        below = ctx.needs_input_grad[0]

        of_second = normalised_backward(grads[0].reshape(-1, states.shape[-1]), normed[of_norm:], ctx.norms[1])
        of_raised, of_down = down.backward([of_second], activated, down_inner, gelu=gelu)
        of_middle, of_up = up.backward([of_raised], middle, up_inner, into=of_second)
        of_first = normalised_backward(of_middle, normed[:of_norm], ctx.norms[0])
        inside = below or attention.trained
        of_context, of_out = out.backward([of_first], context, out_inner, inside)
        of_states, of_attention = None, []
        if inside:
            of_states, of_attention = attention.backward(of_context, states, kept, below, of_first)
        shaped = None if of_states is None else of_states.view(states.shape)
        return shaped, None, None, None, None, *of_attention, *of_out, *of_up, *of_down


def normalised(rows: Tensor, norm: nn.LayerNorm, compiled: bool) -> tuple[Tensor, list[Tensor]]:
    """The layer norm of rows, and what the backward pass needs beside them."""
    if compiled:
        return kernels.norm_forward(rows, norm)
    result, *stats = torch.native_layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return result, stats


def normalised_backward(grad: Tensor, normed: Sequence[Tensor], norm: nn.LayerNorm) -> Tensor:
    """The gradient of rows, by themselves and what was given beside them."""
    rows, *stats = normed
    if len(stats) == 1:
        return kernels.norm_backward(grad, rows, stats[0], norm)
    return _NORM_BACKWARD(grad, rows, norm.normalized_shape, *stats, norm.weight, norm.bias, [True, False, False])[0]
