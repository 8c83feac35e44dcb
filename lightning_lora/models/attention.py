"""Attention without a GPU, registered with transformers under a name of its own.

There the backward pass of torch's fused attention is slow, and transformers' eager one makes passes over the T x T
scores that can be saved. This one scales and adds the mask within the matrix product, and gives its gradients by hand.
It is exact attention: softmax(Q K' scaling + mask) V. Without gradients torch's own is taken where it is faster.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, eager_mask
from transformers.models.bert.modeling_bert import eager_attention_forward

from lightning_lora.devices import compute_dtype

#: The name for ``set_attn_implementation``.
EXACT = "exact"


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
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
        out = ExactAttention.apply(query, key, value, attention_mask, scaling)
    else:
        out = attend_without_backward(query, key, value, attention_mask, scaling).transpose(1, 2)
    return out.expand(-1, length, -1, -1) if cut else out, None


class ExactAttention(torch.autograd.Function):
    """Softmax attention that keeps q, k, v and the probabilities for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Of (B, H, Q, D), (B, H, T, D), (B, H, T, D) and what is added to scores, (B, 1, 1 or Q, T): (B, Q, H, D)."""
        shape = query.shape
        dtype = compute_dtype(query)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x.reshape(-1, *x.shape[2:]).to(dtype) for x in (query, key, value))
            out, shares = attend(q, k, v, mask, scaling)
        ctx.save_for_backward(q, k, v, shares)
        ctx.scaling, ctx.heads, ctx.dtypes = scaling, shape[:2], (query.dtype, key.dtype, value.dtype)
        return out.view(shape).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, shares = ctx.saved_tensors
        grad = grads[0].transpose(1, 2).reshape(q.shape)
        found = attend_backward(grad, q, k, v, shares, ctx.scaling)
        return *(g.view(*ctx.heads, *g.shape[1:]).to(t) for g, t in zip(found, ctx.dtypes, strict=True)), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """The result, (N, Q, D), and the probabilities, (N, Q, T), of q (N, Q, D) and k and v (N, T, D).

    Args:
        q: Of all texts and heads, N of them.
        k: As q.
        v: As q.
        mask: What is added to the scores: (B, 1, 1 or Q, T), where N is B times the number of heads.
        scaling: Of the scores.
    """
    if mask is not None:
        mask, shape = finite(mask, q.dtype), (len(mask), len(q) // len(mask), q.shape[1], k.shape[1])
        if mask.shape[2] == 1:  # added within the product
            scores = torch.baddbmm(mask.expand(-1, shape[1], -1, -1).flatten(0, 1), q, k.mT, alpha=scaling)
        else:
            scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scaling)
            scores.view(shape).add_(mask)
    else:
        scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scaling)
    shares = softmax(scores)
    return shares.bmm(v), shares


def attend_without_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The result alone, (B, H, Q, D), of (B, H, Q, D), (B, H, T, D) and (B, H, T, D): torch's where it is faster."""
    dtype = compute_dtype(q)
    if not _uneven(k.shape[2], dtype):
        mask = None if mask is None else finite(mask, dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    with torch.autocast(q.device.type, enabled=False):
        rows, keys, values = (x.reshape(-1, *x.shape[2:]).to(dtype) for x in (q, k, v))
        return attend(rows, keys, values, mask, scaling)[0].view(q.shape)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shares: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by that of the result."""
    none = q.new_empty(1)
    grad_v = shares.mT.bmm(grad)
    grad_scores = torch._softmax_backward_data(grad.bmm(v.mT), shares, -1, shares.dtype)
    grad_q = torch.baddbmm(none, grad_scores, k, beta=0, alpha=scaling)
    grad_k = torch.baddbmm(none, grad_scores.mT, q, beta=0, alpha=scaling)
    return grad_q, grad_k, grad_v


def _uneven(width: int, dtype: torch.dtype) -> bool:
    """Whether torch's softmax over so many scores is slow: what is left after 32 at a time it takes one by one.

    Measured; from 100 on that is too small a part to matter (docs/LOG.md).
    """
    return dtype == torch.bfloat16 and width % 32 != 0 and width < 100


def softmax(scores: Tensor) -> Tensor:
    """Of the last dimension, in the number format of the scores."""
    if _uneven(scores.shape[-1], scores.dtype):
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(-1)


def finite(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in another number format without -inf: a row of nothing else would become NaN."""
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
