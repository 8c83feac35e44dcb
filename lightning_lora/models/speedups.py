"""Replacements that make a step cheaper without changing what is computed, up to rounding; each has a switch.

What each gains, and what did not help, is in docs/LOG.md, with its figures.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any, Literal, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.activations import GELUActivation

from lightning_lora.models.attention import EXACT
from lightning_lora.models.base import Base
from lightning_lora.models.kernel_plugins import kernel_plugins
from lightning_lora.models.packed import FirstTokens, triton_kernels

#: Largest difference of ``gelu_of_product`` from torch, by norm: bfloat16 rounds to 8 bits.
GELU_TOLERANCE = 0.01


@dataclass
class Speedups:
    """What is done for speed. None of it changes what is learned beyond rounding.

    Args:
        frozen_weights: Number format in which frozen weights are kept: "auto" (bfloat16 where the run computes in
            bf16-mixed, else float32) or "float32". Trained weights are always kept in float32.
        first_token_only: Compute the last layer, from its attention on, for the first token alone, where the head
            reads no other (bert, roberta, electra, distilbert, deberta).
        merged_evaluation: Evaluate with the product of B and A added to the weights of each LoRA layer.
        cast_once: On a GPU, cast the states that several layers read to the precision of their products once.
        fused_lora: On a GPU, add what LoRA adds within the product with B.
        low_norms: On a GPU, evaluate a run in bf16-mixed with states in bfloat16 between the layers, as a model in
            bfloat16 has them; within a layer norm they are summed in float32 all the same.
        fused_gelu: On a GPU, evaluate a run in bf16-mixed with GELU computed within the product before it, in its form
            with tanh (Hendrycks and Gimpel 2016): by norm it differs by less than what bfloat16's rounding does.
        kernels: Use the kernels of installed plugins (``models/kernel_plugins.py``).
        packing: Lay the texts of a batch end to end, without padding: true, false, or "auto" (on a GPU, where the
            architecture can).
        cuda_graphs: Capture a training step once for each size of a packed batch and replay it, which saves the
            launching of its kernels: true, false, or "auto" (on a GPU, where the method can).
    """

    frozen_weights: Literal["auto", "float32"] = "auto"
    first_token_only: bool = True
    merged_evaluation: bool = True
    cast_once: bool = True
    fused_lora: bool = True
    low_norms: bool = True
    fused_gelu: bool = True
    kernels: bool = True
    packing: Literal["auto"] | bool = "auto"
    cuda_graphs: Literal["auto"] | bool = "auto"


def install(base: Base, speedups: Speedups, tokens: FirstTokens | None = None, reads_first: bool = True) -> list[str]:
    """Install the replacements in a model that a method was applied to; return in words what was done.

    Args:
        base: The base model.
        speedups: Which.
        tokens: Where the texts of a packed batch begin.
        reads_first: Whether the head reads the first token alone.
    """
    done = []
    reads_first = reads_first and not base.own_head
    if reads_first and take_first_tokens(base, tokens or FirstTokens(), speedups.first_token_only):
        done.append("last layer for the first token only")
    if speedups.cast_once:
        cast_once(base)
    if speedups.fused_lora:
        for layer in _mergeable(base.model):
            layer.forward = partial(_lora_forward, layer, layer.forward)  # type: ignore[method-assign]
    if speedups.merged_evaluation and (count := sum(1 for _ in _mergeable(base.model))):
        done.append(f"{count} LoRA layers merged in evaluation")
    for plugin in kernel_plugins() if speedups.kernels else ():
        done += plugin.install(base)
    return done


def choose_attention(asked: str, loaded: str, known: bool, training: bool, speedups: Speedups) -> str:
    """Return the name of the attention implementation; "auto" is ``EXACT`` without a GPU.

    Args:
        asked: By the configuration.
        loaded: What transformers chose.
        known: Whether the architecture is in the table; others get "eager" in training.
        training: Or evaluation.
        speedups: Whether plugins may replace the choice.
    """
    chosen = asked
    if asked == "auto" and torch.cuda.is_available():
        chosen = loaded
    elif asked == "auto" and known and loaded == "sdpa":
        chosen = EXACT
    elif asked == "auto":
        chosen = "eager" if training else loaded
    for plugin in kernel_plugins() if speedups.kernels else ():
        chosen = plugin.attention(chosen)
    return chosen


def cast_once(base: Base) -> None:
    """Cast what several layers read to the dtype of their products once, on a GPU, and not in each of them.

    Of an attention these are its queries, keys and values, and of a LoRA layer its weight and its A.
    """
    projections = base.architecture.query_value if base.architecture is not None else ()
    for module in base.model.modules():
        children = dict(module.named_children())
        if isinstance(module, lora.Linear) or (len(projections) > 1 and set(projections) <= set(children)):
            module.register_forward_pre_hook(_cast, with_kwargs=True)


def _cast(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if not torch.is_autocast_enabled("cuda"):
        return None

    def cast(value: Any) -> Any:
        states = isinstance(value, Tensor) and value.is_cuda and value.ndim == 3 and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype("cuda")) if states else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _lora_forward(layer: lora.Linear, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward pass of a LoRA layer: base(x) + B A dropout(x) scaling, added within the product with B.

    PEFT scales and adds tensors of the layer's output's size: three passes over memory, and as many in the backward
    pass.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not x.is_cuda or layer.disable_adapters or layer.merged or len(names) != 1 or args or kwargs:
        return plain(x, *args, **kwargs)
    return lora_in_product(layer, names[0], x)


def lora_in_product(layer: lora.Linear, name: str, x: Tensor) -> Tensor:
    """Compute base(x) + scaling B A dropout(x) of an adapter, (..., out) of (..., in)."""
    out = layer.base_layer(x)
    low = layer.lora_A[name](layer.lora_dropout[name](x)) * layer.scaling[name]
    weight = cast(nn.Linear, layer.lora_B[name]).weight
    return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), weight.mT).view(out.shape)


def take_first_tokens(base: Base, tokens: FirstTokens, cut: bool) -> bool:
    """Reduce states to the first token of each text, which the head reads; return whether the last layer is cut.

    Args:
        base: The base model.
        tokens: Where the texts of a packed batch begin.
        cut: Continue with the first token alone behind the last layer's attention, where the architecture can. Else
            only packed batches are reduced, which the head could not read.
    """
    architecture = base.architecture
    if architecture is not None and architecture.attention_end is not None and (cut or architecture.packs):
        pattern = rf"({base.model.base_model_prefix}\..*\.(\d+))\.{re.escape(architecture.attention_end)}"
        found = [match for name, _ in base.model.named_modules() if (match := re.fullmatch(pattern, name))]
        last = max(found, key=lambda match: int(match[2]))
        end = base.model.get_submodule(last[0])
        if not cut:
            end.register_forward_pre_hook(lambda *given: tokens.before(*given) if tokens.packed else None)
            return False
        end.register_forward_pre_hook(tokens.before)
        for module in base.model.get_submodule(last[1]).modules():
            vars(module)["first_token_only"] = True  # read by ``attention.exact_attention``
        return True
    if architecture is not None and architecture.states is not None and architecture.packs:
        base.model.get_submodule(architecture.states).register_forward_hook(tokens.after)
    return False


def begin_evaluation(
    model: nn.Module, dtype: torch.dtype | None, speedups: Speedups, engine: str | None = None
) -> None:
    """Merge LoRA layers and prepare plugins until ``end_evaluation``; meanwhile no weight may change.

    PEFT's own merging and unmerging would leave rounding errors in the frozen weights.

    Args:
        model: In evaluation mode.
        dtype: In which autocast multiplies, or None where it is off.
        speedups: What is done.
        engine: The engine of a plugin that is asked for; it needs merged weights.

    Raises:
        UserError: A layer cannot be evaluated by the engine.
    """
    end_evaluation(model)  # one that was interrupted
    with torch.inference_mode(False), torch.no_grad():
        for layer in list(_mergeable(model)) if speedups.merged_evaluation or engine else ():
            name, weight = layer.active_adapters[0], cast(nn.Linear, layer.base_layer).weight
            layer.frozen_weight = weight.data
            merged = (weight.float() + layer.get_delta_weight(name).float()).to(dtype or weight.dtype)
            weight.data = _kept(layer, merged) if weight.is_cuda else merged
            layer.merged_adapters.append(name)
    if dtype == torch.bfloat16 and on_gpu(model):
        if speedups.low_norms:
            lower_norms(model)
        if speedups.fused_gelu:
            fuse_gelu(model)
    for plugin in kernel_plugins() if speedups.kernels else ():
        plugin.begin_evaluation(model, engine)


def end_evaluation(model: nn.Module) -> None:
    """Undo ``begin_evaluation``."""
    for plugin in kernel_plugins():
        plugin.end_evaluation(model)
    for layer in model.modules():
        if isinstance(layer, lora.Linear) and hasattr(layer, "frozen_weight"):
            cast(nn.Linear, layer.base_layer).weight.data = cast(Tensor, layer.frozen_weight)
            layer.merged_adapters.clear()
            del layer.frozen_weight
    for module in model.modules():
        if "evaluation_forward" in vars(module):
            del module.forward, module.evaluation_forward


def on_gpu(model: nn.Module) -> bool:
    """Whether the model is on a GPU."""
    return any(parameter.is_cuda for parameter in model.parameters())


def lower_norms(model: nn.Module) -> None:
    """Let layer norms, and what is added before them, compute in bfloat16 until ``end_evaluation``.

    Autocast would have them give float32, and add what comes next in float32. Where a layer of the model is a product,
    an addition and a norm (BERT's ``BertOutput`` and its like), the two latter are one kernel, where that works.
    """
    kernel = triton_kernels()
    for module in list(model.modules()):
        forward: Any = None
        if type(module) is nn.LayerNorm:
            forward = partial(_low_norm, module)
        elif kernel is not None and _ends_in_norm(module):
            norm = cast(nn.LayerNorm, module.LayerNorm)
            if kernel.add_norm_works(norm.normalized_shape[0], norm.weight.device):
                forward = partial(_low_output, module, kernel.add_norm)
        if forward is not None:
            module.forward = module.evaluation_forward = forward


def fuse_gelu(model: nn.Module) -> None:
    """Let layers that are a product and a GELU, such as ``BertIntermediate``, be one until ``end_evaluation``."""
    for module in list(model.modules()):
        product = _product_before_gelu(module)
        if product is not None and gelu_in_product_works(product.weight.device):
            forward: Any = partial(_gelu_of_product, product)
            module.forward = module.evaluation_forward = forward


def _product_before_gelu(module: nn.Module) -> nn.Linear | None:
    """The layer, with LoRA merged, of a module that is a product and an exact GELU, on which nobody listens."""
    children = dict(module.named_children())
    if set(children) != {"dense", "intermediate_act_fn"}:
        return None
    dense, activation = children["dense"], children["intermediate_act_fn"]
    layer = dense.base_layer if isinstance(dense, lora.Linear) and hasattr(dense, "frozen_weight") else dense
    gelu = type(activation) is GELUActivation and activation.act is nn.functional.gelu
    alone = list(signature(type(module).forward).parameters) == ["self", "hidden_states"]
    heard = any(each._forward_hooks for each in (dense, activation))
    return layer if type(layer) is nn.Linear and layer.bias is not None and gelu and alone and not heard else None


def _gelu_of_product(layer: nn.Linear, hidden_states: Tensor) -> Tensor:
    return gelu_of_product(hidden_states, layer.weight, layer.bias)


def gelu_of_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x W' + b), (..., out) in bfloat16, at once where cuBLAS can; of x (..., in), W (out, in) and b (out,)."""
    rows, matrix = x.flatten(0, -2).bfloat16(), weight.bfloat16()
    return torch._addmm_activation(bias.bfloat16(), rows, matrix.t(), use_gelu=True).view(*x.shape[:-1], -1)


@cache
def gelu_in_product_works(device: torch.device) -> bool:
    """Whether ``gelu_of_product`` is found to give what torch gives after the product, on random states."""
    draw = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=draw, device=device) for _ in range(2))
    bias = torch.randn(64, generator=draw, device=device)
    try:
        found = gelu_of_product(x, weight / 8, bias)
    except Exception:  # it is not a public function of torch
        return False
    wanted = nn.functional.gelu(nn.functional.linear(x, weight / 8, bias))
    return bool((found - wanted).norm() <= GELU_TOLERANCE * wanted.norm())


def _ends_in_norm(module: nn.Module) -> bool:
    """Whether a module is a product, an addition and a layer norm over the last dimension, on which nobody listens."""
    if {name for name, _ in module.named_children()} != {"dense", "dropout", "LayerNorm"}:
        return False
    norm = cast(nn.LayerNorm, module.LayerNorm)
    takes = list(signature(type(module).forward).parameters)
    plain = type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 and norm.bias is not None
    return plain and takes == ["self", "hidden_states", "input_tensor"] and not norm._forward_hooks


def _low_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if each is None else each.to(torch.bfloat16) for each in (norm.weight, norm.bias))
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.layer_norm(x.to(torch.bfloat16), norm.normalized_shape, weight, bias, norm.eps)


def _low_output(
    module: nn.Module, add_norm: Callable[..., Tensor], hidden_states: Tensor, input_tensor: Tensor
) -> Tensor:
    """The forward pass of a module like ``BertOutput``, without dropout."""
    return add_norm(cast(nn.Linear, module.dense)(hidden_states).to(torch.bfloat16), input_tensor, module.LayerNorm)


def _kept(layer: lora.Linear, merged: Tensor) -> Tensor:
    """Copy a merged weight to where the one before it was: captured CUDA graphs know its address."""
    kept = cast("Tensor | None", getattr(layer, "merged_weight", None))
    if kept is None or (kept.device, kept.dtype) != (merged.device, merged.dtype):
        layer.merged_weight = merged
        return merged
    return kept.copy_(merged)


def _mergeable(model: nn.Module) -> Iterator[lora.Linear]:
    """LoRA layers of one enabled adapter without bias or variant (DoRA) around a frozen, unquantized weight."""
    for module in model.modules():
        if not isinstance(module, lora.Linear) or type(module.base_layer) is not nn.Linear or module.lora_variant:
            continue
        names = [name for name in module.active_adapters if name in module.lora_A]
        free = not (module.merged or module.disable_adapters or module.base_layer.weight.requires_grad)
        if free and len(names) == 1 and not module.lora_bias[names[0]]:
            yield module


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights in another dtype, except in modules that also train weights of their own."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if all(not p.requires_grad and p.dtype == torch.float32 for p in own):
            for parameter in own:
                parameter.data = parameter.data.to(dtype)
        # PEFT would cast the input of each adapter to the adapter's dtype; autocast casts the adapter instead.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
