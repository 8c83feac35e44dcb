"""Replacements that make a step cheaper and are the same but for rounding. Each stands alone and has a switch.

What each is worth, and what did not help, is in docs/LOG.md, with its figures.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.models.base import Base


@dataclass
class Speedups:
    """What is done for speed. None of it changes what is learnt beyond rounding.

    Args:
        frozen_weights: Number format in which frozen weights are kept: "auto" (bfloat16 where the run computes in
            bf16-mixed, else float32) or "float32". Trained weights are always kept in float32.
        first_token_only: Compute the last layer, from its attention on, for the first token alone, where the head
            reads no other (bert, roberta, electra, distilbert, deberta).
        fused_lora: Compute a LoRA layer that has no dropout in one step with a backward pass of its own.
    """

    frozen_weights: Literal["auto", "float32"] = "auto"
    first_token_only: bool = True
    fused_lora: bool = True


def install(base: Base, speedups: Speedups) -> list[str]:
    """Puts the replacements into a base model that a method has been applied to; says in words what was done."""
    done = []
    if speedups.first_token_only and cut_last_layer(base):
        done.append("last layer for the first token only")
    if speedups.fused_lora and (count := fuse_lora(base.model)):
        done.append(f"{count} LoRA layers fused")
    return done


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


class FusedLora(lora.Linear):
    """PEFT's layer, computed by ``FusedLoraFunction`` while it has one adapter that is neither merged nor dropped out.

    It only ever replaces the class of a layer that PEFT has made, so everything else is PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W' + b + scaling x A' B'; x of shape (..., in), the result (..., out)."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.merged or self.disable_adapters) and len(names) == 1
        if not plain or not isinstance(self.lora_dropout[names[0]], nn.Identity) or self.lora_bias[names[0]]:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return super().forward(x)
        return FusedLoraFunction.apply(x, base.weight, base.bias, a, b, self.scaling[names[0]])


class FusedLoraFunction(torch.autograd.Function):
    """A linear layer with a low-rank update, of which only the update is trained.

    Against PEFT's composition of modules it keeps no scaled copies for the backward pass and adds into its results
    instead of making new ones.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """The layer's output, in autocast's number format or that of the input."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            weight, a_low, b_low = weight.to(dtype), a.to(dtype), b.to(dtype)
            out = F.linear(rows, weight, None if bias is None else bias.to(dtype))
            inner = rows.mm(a_low.t())
            out.addmm_(inner, b_low.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a_low, b_low, inner)
        ctx.scaling, ctx.shape, ctx.input_dtype, ctx.adapter_dtype = scaling, x.shape, x.dtype, a.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, of A and of B."""
        rows, weight, a, b, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_inner = grad.mm(b).mul_(ctx.scaling)
        grad_a = grad_inner.t().mm(rows).to(ctx.adapter_dtype)
        # In this order, as the product of a tall transposed matrix is twice as slow on a CPU.
        grad_b = inner.t().mm(grad).t().to(ctx.adapter_dtype).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.mm(weight).addmm_(grad_inner, a).view(ctx.shape).to(ctx.input_dtype)
        return grad_x, None, None, grad_a, grad_b, None


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
