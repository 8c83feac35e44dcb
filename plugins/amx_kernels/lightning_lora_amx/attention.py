"""The attention of ``kernels.c``, registered with transformers, and the choice between it and torch's."""

from functools import partial

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_lora.models.attention import (
    AttentionMath,
    TorchAttention,
    additive_mask,
    attend_without_backward,
    exact_attention,
    torch_only,
)
from lightning_lora_amx.kernels import CompiledAttention

#: Name for ``set_attn_implementation``.
COMPILED = "exact_amx"


def choose(q: Tensor, k: Tensor, mask: Tensor | None) -> AttentionMath | None:
    """The compiled attention where it can compute, else None."""
    return CompiledAttention if CompiledAttention.computes(q, k, mask) else None


def way(q: Tensor, k: Tensor, mask: Tensor | None, compiled: bool) -> AttentionMath:
    """What computes the attention and its gradients."""
    return (choose(q, k, mask) if compiled else None) or TorchAttention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, compiled: bool) -> Tensor:
    """The result alone, (B, Q, H, D), of (B, H, Q, D), (B, H, T, D) and (B, H, T, D)."""
    return attend_without_backward(q, k, v, mask, scaling, choose if compiled else torch_only)


AttentionInterface.register(COMPILED, partial(exact_attention, choose=choose))
AttentionMaskInterface.register(COMPILED, additive_mask)
