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
from torch.nn import functional as F

from lightning_lora.devices import compute_dtype
from lightning_lora.models.base import Base

#: Whether torch has the operator of ``one_pass``, which it keeps for its compiler.
_ONE_PASS = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


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
        merged_evaluation: Evaluate with the product of A and B added to the weights of such a LoRA layer.
    """

    frozen_weights: Literal["auto", "float32"] = "auto"
    first_token_only: bool = True
    fused_lora: bool = True
    fused_bias: bool = True
    merged_evaluation: bool = True


def install(base: Base, speedups: Speedups) -> list[str]:
    """Puts the replacements into a base model that a method has been applied to; says in words what was done."""
    done = []
    if speedups.first_token_only and cut_last_layer(base):
        done.append("last layer for the first token only")
    if speedups.fused_lora and (count := fuse_lora(base.model)):
        done.append(f"{count} LoRA layers fused" + (", merged in evaluation" if speedups.merged_evaluation else ""))
    if speedups.fused_bias and _ONE_PASS and not torch.cuda.is_available():
        fuse_bias(base.model)  # which shows in bfloat16 only
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


def one_pass(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows W' + b; for bfloat16 on a CPU by oneDNN, without torch's copy of the bias for each row."""
    low = bias is not None and rows.dtype == weight.dtype == bias.dtype == torch.bfloat16
    if _ONE_PASS and low and rows.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained; it only ever replaces the class of one that is there."""

    def forward(self, x: Tensor) -> Tensor:
        """x W' + b; x of shape (..., in), the result (..., out)."""
        dtype = compute_dtype(x)
        if dtype != torch.bfloat16 or self.weight.dtype != dtype or self.weight.requires_grad:
            return super().forward(x)
        return FrozenLinearFunction.apply(x, self.weight, self.bias)


class FrozenLinearFunction(torch.autograd.Function):
    """``one_pass``, and the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer's output in the number format of its weight."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        return one_pass(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input."""
        (weight,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        return grad.mm(weight).view(ctx.shape).to(ctx.input_dtype), None, None


class FusedLora(lora.Linear):
    """PEFT's layer, computed by ``FusedLoraFunction`` while it has one adapter that is neither merged nor dropped out.

    It only ever replaces the class of a layer that PEFT has made, so everything else is PEFT's.
    """

    #: W + scaling B A while a model is evaluated (``begin_evaluation``); PEFT's own merging would change W itself.
    evaluated_weight: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W' + b + scaling x A' B'; x of shape (..., in), the result (..., out)."""
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        if self.evaluated_weight is not None:
            rows = x.reshape(-1, x.shape[-1]).to(self.evaluated_weight.dtype)
            bias = None if base.bias is None else base.bias.to(rows.dtype)
            with torch.autocast(x.device.type, enabled=False):
                return one_pass(rows, self.evaluated_weight, bias).view(*x.shape[:-1], -1)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return FusedLoraFunction.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """The adapter, where it is the only one, and nothing but the product of its matrices is added."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or self.disable_adapters or len(names) != 1:
            return None
        plain = isinstance(self.lora_dropout[names[0]], nn.Identity) or not self.training
        frozen = not any(p.requires_grad for p in self.base_layer.parameters())
        return names[0] if plain and frozen and not self.lora_bias[names[0]] else None

    def merge_for_evaluation(self, dtype: torch.dtype | None) -> None:
        """Computes with W and its update in one matrix of the given number format, or that of W."""
        name = self._plain_adapter()
        if name is not None:
            weight: Any = self.base_layer.weight
            merged = weight.float() + self.get_delta_weight(name).float()
            self.evaluated_weight = merged.to(dtype or weight.dtype)


def begin_evaluation(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Merges fused LoRA layers for as long as their weights do not change; ``end_evaluation`` undoes it.

    Args:
        model: In evaluation mode.
        dtype: In which autocast multiplies, or None where it is off.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FusedLora):
                module.merge_for_evaluation(dtype)


def end_evaluation(model: nn.Module) -> None:
    """Lets fused LoRA layers compute with W, A and B again."""
    for module in model.modules():
        if isinstance(module, FusedLora):
            module.evaluated_weight = None


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
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            weight, a_low, b_low = weight.to(dtype), a.to(dtype), b.to(dtype)
            out = one_pass(rows, weight, None if bias is None else bias.to(dtype))
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
