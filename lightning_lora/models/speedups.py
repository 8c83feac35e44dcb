"""Replacements that make a step cheaper and are the same but for rounding. Each stands alone and has a switch.

What each is worth, and what did not help, is in docs/LOG.md, with its figures.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_lora.models import kernels
from lightning_lora.models.attention import COMPILED, EXACT
from lightning_lora.models.base import Base
from lightning_lora.models.encoder_layer import FusedEncoderLayer, fuse_layers
from lightning_lora.models.fused_linear import ONE_PASS, FrozenLinear, FusedLora
from lightning_lora.models.int8_layer import begin_int8, end_int8


@dataclass
class Speedups:
    """What is done for speed. None of it changes what is learnt beyond rounding.

    Args:
        frozen_weights: Number format in which frozen weights are kept: "auto" (bfloat16 where the run computes in
            bf16-mixed, else float32) or "float32". Trained weights are always kept in float32.
        first_token_only: Compute the last layer, from its attention on, for the first token alone, where the head
            reads no other (bert, roberta, electra, distilbert, deberta).
        fused_lora: Compute a LoRA layer that has no dropout in one step with a backward pass of its own.
        fused_bias: Compute a frozen linear layer in bfloat16 on a CPU without a pass of its own for the bias; a fused
            LoRA layer always is.
        fused_layers: Compute a whole encoder layer of which at most such adapters are trained in one step without a GPU
            (bert, roberta, electra, distilbert).
        compiled: Compute attention and such layers by this project's C code, where it was compiled at installation and
            the processor has AMX (``models/kernels.py``).
        merged_evaluation: Evaluate with the product of A and B added to the weights of such a LoRA layer.
    """

    frozen_weights: Literal["auto", "float32"] = "auto"
    first_token_only: bool = True
    fused_lora: bool = True
    fused_bias: bool = True
    fused_layers: bool = True
    compiled: bool = True
    merged_evaluation: bool = True


def install(base: Base, speedups: Speedups) -> list[str]:
    """Puts the replacements into a base model that a method has been applied to; says in words what was done."""
    done = []
    if speedups.first_token_only and cut_last_layer(base):
        done.append("last layer for the first token only")
    if speedups.fused_lora and (count := fuse_lora(base.model)):
        done.append(f"{count} LoRA layers fused" + (", merged in evaluation" if speedups.merged_evaluation else ""))
    if speedups.fused_bias and ONE_PASS and not torch.cuda.is_available():
        fuse_bias(base.model)  # which shows in bfloat16 only
    if speedups.fused_layers and not torch.cuda.is_available() and (count := fuse_layers(base)):
        done.append(f"{count} encoder layers in one step each")
    return done


def choose_attention(asked: str, loaded: str, known: bool, training: bool, speedups: Speedups) -> str:
    """The name of the attention: as asked for; "auto" is what transformers chose, but without a GPU ``EXACT``.

    Args:
        asked: By the configuration.
        loaded: What transformers chose.
        known: Whether the architecture is known by name; others get "eager", and that for training only.
        training: Or evaluation.
        speedups: Whether ``EXACT`` is computed by compiled code where it can be.
    """
    chosen = asked
    if asked == "auto" and torch.cuda.is_available():
        chosen = loaded
    elif asked == "auto" and known and loaded == "sdpa":
        chosen = EXACT
    elif asked == "auto":
        chosen = "eager" if training else loaded
    return COMPILED if chosen == EXACT and speedups.compiled and kernels.LIBRARY else chosen


def describe_computing(model: nn.Module, attention: str, speedups: Speedups, lowered: bool) -> list[str]:
    """What a model computes with, in words.

    Args:
        model: With the replacements put in.
        attention: The name of its attention.
        speedups: What is done.
        lowered: Whether frozen weights are kept in bfloat16.
    """
    said = [f"{EXACT if attention == COMPILED else attention} attention"]
    if not lowered:
        return said
    said.append("frozen weights in bfloat16")
    layers = [module for module in model.modules() if isinstance(module, FusedEncoderLayer)]
    fitting = sum(layer.parts.sizes_fit for layer in layers)
    if attention == COMPILED and layers:
        said.append(f"{fitting} of {len(layers)} layers compiled")
    elif attention == EXACT and speedups.compiled:
        said.append(f"no compiled layers ({kernels.MISSING})")
    if count := sum(isinstance(module, FrozenLinear) for module in model.modules()):
        said.append(f"{count} linear layers with their bias in one pass")
    return said


def cut_last_layer(base: Base) -> bool:
    """Goes on with the first token alone behind the attention of the last layer; whether the architecture allows it."""
    if base.architecture is None or base.architecture.attention_end is None:
        return False
    pattern = rf"({base.model.base_model_prefix}\..*\.(\d+))\.{re.escape(base.architecture.attention_end)}"
    found = [match for name, _ in base.model.named_modules() if (match := re.fullmatch(pattern, name))]
    last = max(found, key=lambda match: int(match[2]))
    base.model.get_submodule(last[0]).register_forward_pre_hook(_first_token)
    for module in base.model.get_submodule(last[1]).modules():
        module.first_token_only = True  # read by ``attention.exact_attention``
    return True


def _first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # A copy: as a view, the next linear layer would go through a batched product with a copy of its weights a text.
    return tuple(a[:, :1].contiguous() if isinstance(a, Tensor) and a.ndim == 3 else a for a in args)


def fuse_lora(model: nn.Module) -> int:
    """Makes every plain LoRA layer compute in one step, where that is the same; gives their number."""
    count = 0
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.__class__ = FusedLora
            count += 1
    return count


def fuse_bias(model: nn.Module) -> int:
    """Makes frozen linear layers outside of adapters take their bias along where they can; gives their number."""
    adapted = {id(inner) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for inner in layer.modules()}
    count = 0
    for module in model.modules():
        outside = type(module) is nn.Linear and id(module) not in adapted
        if outside and module.bias is not None and not any(p.requires_grad for p in module.parameters()):
            module.__class__ = FrozenLinear
            count += 1
    return count


def begin_evaluation(model: nn.Module, dtype: torch.dtype | None, merged: bool = True, int8: bool = False) -> None:
    """Merges fused LoRA layers for as long as their weights do not change; ``end_evaluation`` undoes it.

    Args:
        model: In evaluation mode.
        dtype: In which autocast multiplies, or None where it is off.
        merged: Whether to merge.
        int8: Whether to merge in any case, and then to let layers compute in int8.

    Raises:
        UserError: A layer cannot.
    """
    end_evaluation(model)  # one that was broken off
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FusedLora) and (merged or int8):
                module.merge_for_evaluation(dtype)
        if int8:
            begin_int8(model)


def end_evaluation(model: nn.Module) -> None:
    """Lets fused LoRA layers compute with W, A and B again, and layers in bfloat16."""
    end_int8(model)
    for module in model.modules():
        if isinstance(module, FusedLora):
            module.evaluated_weight = None


def lower_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps frozen weights in another number format; those of a module that trains one of its own stay as they are."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if all(not p.requires_grad and p.dtype == torch.float32 for p in own):
            for parameter in own:
                parameter.data = parameter.data.to(dtype)
        # PEFT would cast the input of each adapter to the adapter's format; autocast casts the adapter instead.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
