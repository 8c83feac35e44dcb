"""Replacements that make a step cheaper without changing what is computed, up to rounding; each has a switch.

What each gains, and what did not help, is in docs/LOG.md, with its figures.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lightning_lora.models.attention import EXACT
from lightning_lora.models.base import Base
from lightning_lora.models.kernel_plugins import kernel_plugins


@dataclass
class Speedups:
    """What is done for speed. None of it changes what is learned beyond rounding.

    Args:
        frozen_weights: Number format in which frozen weights are kept: "auto" (bfloat16 where the run computes in
            bf16-mixed, else float32) or "float32". Trained weights are always kept in float32.
        first_token_only: Compute the last layer, from its attention on, for the first token alone, where the head
            reads no other (bert, roberta, electra, distilbert, deberta).
        merged_evaluation: Evaluate with the product of B and A added to the weights of each LoRA layer.
        kernels: Use the kernels of installed plugins (``models/kernel_plugins.py``).
    """

    frozen_weights: Literal["auto", "float32"] = "auto"
    first_token_only: bool = True
    merged_evaluation: bool = True
    kernels: bool = True


def install(base: Base, speedups: Speedups) -> list[str]:
    """Install the replacements in a model that a method was applied to; return in words what was done."""
    done = []
    if speedups.first_token_only and cut_last_layer(base):
        done.append("last layer for the first token only")
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


def cut_last_layer(base: Base) -> bool:
    """Continue with the first token alone behind the last layer's attention; return whether the architecture can."""
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
            weight.data = (weight.float() + layer.get_delta_weight(name).float()).to(dtype or weight.dtype)
            layer.merged_adapters.append(name)
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


def _mergeable(model: nn.Module) -> Iterator[lora.Linear]:
    """LoRA layers of one enabled adapter without bias or variant (DoRA) around a frozen, unquantized weight."""
    for module in model.modules():
        if not isinstance(module, lora.Linear) or type(module.base_layer) is not nn.Linear or module.lora_variant:
            continue
        names = [name for name in module.active_adapters if name in module.lora_A]
        free = not (module.merged or module.disable_adapters or module.base_layer.weight.requires_grad)
        if free and len(names) == 1 and not module.lora_bias[names[0]]:
            yield module


def lower_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights in another number format, except in modules that also train weights of their own."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if all(not p.requires_grad and p.dtype == torch.float32 for p in own):
            for parameter in own:
                parameter.data = parameter.data.to(dtype)
        # PEFT would cast the input of each adapter to the adapter's format; autocast casts the adapter instead.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
