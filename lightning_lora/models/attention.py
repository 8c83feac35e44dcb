"""Attention without a GPU, registered with transformers under a name of its own.

There the backward pass of torch's fused attention is slow, and transformers' eager one makes passes over the T x T
scores that can be saved. This one scales and adds the mask within the matrix product, and gives its gradients by hand.
It is exact attention: softmax(Q K' scaling + mask) V. Without gradients torch's own is taken where it is faster.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, eager_mask
from transformers.models.bert.modeling_bert import eager_attention_forward

from lightning_lora.devices import compute_dtype

#: Name for ``set_attn_implementation``.
EXACT = "exact"


class AttentionMath(Protocol):
    """What computes attention and its gradients."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, list[Tensor]]:
        """As ``TorchAttention.forward``."""

    @staticmethod
    def backward(grad: Tensor, kept: list[Tensor], scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """As ``TorchAttention.backward``."""


#: Chooses what computes attention for queries, keys and a mask; None for torch.
Choose = Callable[[Tensor, Tensor, Tensor | None], AttentionMath | None]


def torch_only(q: Tensor, k: Tensor, mask: Tensor | None) -> AttentionMath | None:
    """The choice of this package itself."""
    return None


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    choose: Choose = torch_only,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' attention functions: q, k, v of shape (B, H, T, D), the result (B, T, H, D).

    Where the module says so (``first_token_only``) only the first token's result is computed, and repeated.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout and module.training:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    length = query.shape[2]
    cut = getattr(module, "first_token_only", False)
    if cut:
        query = query[:, :, :1]
        attention_mask = None if attention_mask is None else attention_mask[:, :, :1]
    if torch.is_grad_enabled():
        out = ExactAttention.apply(query, key, value, attention_mask, scaling, choose)
    else:
        out = attend_without_backward(query, key, value, attention_mask, scaling, choose)
    return out.expand(-1, length, -1, -1) if cut else out, None


class ExactAttention(torch.autograd.Function):
    """Softmax attention with a backward pass of its own."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, choose: Choose
    ) -> Tensor:
        """Of (B, H, Q, D), (B, H, T, D), (B, H, T, D) and what is added to scores, (B, 1, 1 or Q, T): (B, Q, H, D)."""
        dtype = compute_dtype(query)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x.to(dtype) for x in (query, key, value))
            ctx.way = choose(q, k, mask) or TorchAttention
            out, kept = ctx.way.forward(q, k, v, mask, scaling)
        ctx.save_for_backward(*kept)
        ctx.scaling, ctx.dtypes = scaling, (query.dtype, key.dtype, value.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        found = ctx.way.backward(grads[0], list(ctx.saved_tensors), ctx.scaling)
        return *(g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)), None, None, None


class TorchAttention:
    """Softmax attention by torch, which keeps q, k, v and the probabilities for its backward pass."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, list[Tensor]]:
        """The result, (B, Q, H, D), and what ``backward`` needs; of queries (B, H, Q, D), keys and values (B, H, T, D).

        The mask, (B, 1, 1 or Q, T), is added to the scores.
        """
        shape = q.shape
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        if mask is not None:
            mask, scored = finite(mask, q.dtype), (len(mask), len(q) // len(mask), q.shape[1], k.shape[1])
            if mask.shape[2] == 1:  # added within the product
                scores = torch.baddbmm(mask.expand(-1, scored[1], -1, -1).flatten(0, 1), q, k.mT, alpha=scaling)
            else:
                scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scaling)
                scores.view(scored).add_(mask)
        else:
            scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scaling)
        shares = softmax(scores)
        return shares.bmm(v).view(shape).transpose(1, 2), [q, k, v, shares]

    @staticmethod
    def backward(grad: Tensor, kept: list[Tensor], scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, of their shapes, by that of the result."""
        q, k, v, shares = kept
        batch, heads = grad.shape[0], grad.shape[2]
        grad = grad.transpose(1, 2).reshape(q.shape)
        none = q.new_empty(1)
        of_v = shares.mT.bmm(grad)
        of_scores = torch._softmax_backward_data(grad.bmm(v.mT), shares, -1, shares.dtype)
        of_q = torch.baddbmm(none, of_scores, k, beta=0, alpha=scaling)
        of_k = torch.baddbmm(none, of_scores.mT, q, beta=0, alpha=scaling)
        of_q, of_k, of_v = (x.view(batch, heads, *x.shape[1:]) for x in (of_q, of_k, of_v))
        return of_q, of_k, of_v


def attend_without_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, choose: Choose = torch_only
) -> Tensor:
    """The result alone, (B, Q, H, D), of (B, H, Q, D), (B, H, T, D) and (B, H, T, D): torch's where it is faster."""
    dtype = compute_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        chosen = choose(q, k, mask)
        if chosen is not None or _uneven(k.shape[2], dtype):
            return (chosen or TorchAttention).forward(q, k, v, mask, scaling)[0]
        mask = None if mask is None else finite(mask, dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2)


def _uneven(width: int, dtype: torch.dtype) -> bool:
    """Whether torch's softmax over so many scores is slow: what is left after 32 at a time it takes one by one.

    Measured; from 100 on that is too small a part to matter (docs/LOG.md).
    """
    return dtype == torch.bfloat16 and width % 32 != 0 and width < 100


def softmax(scores: Tensor) -> Tensor:
    """Of the last dimension, in the dtype of the scores."""
    if _uneven(scores.shape[-1], scores.dtype):
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(-1)


def finite(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in another dtype without -inf: a row of nothing else would become NaN."""
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)


def additive_mask(*args: Any, mask_function: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """What is added to the scores: (B, 1, 1, T) where only padding is masked, else transformers' (B, 1, T, T).

    None where nothing is masked.
    """
    if mask_function is not bidirectional_mask_function or attention_mask is None:
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask}
        return eager_mask(*args, **kwargs)
    if bool(attention_mask.all()):
        return None
    mask = torch.zeros(attention_mask.shape, dtype=kwargs["dtype"], device=attention_mask.device)
    return mask.masked_fill_(attention_mask == 0, torch.finfo(mask.dtype).min)[:, None, None, :]


AttentionInterface.register(EXACT, exact_attention)
AttentionMaskInterface.register(EXACT, additive_mask)
