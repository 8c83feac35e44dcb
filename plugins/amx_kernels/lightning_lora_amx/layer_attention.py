"""The attention of an encoder layer, from its input to what its output projection reads, and the way back.

Of all tokens, or of the first alone, where a head reads no other: then keys and values are never made. A score is
q (W x + b) = (q W) x + q b: W is multiplied by the one query instead of by all tokens, and q b, the same for all of
them, does nothing to a softmax. The result is the sum of p (W x + b) = W (sum of p x) + b.
"""

from typing import Any, cast

import torch
from torch import Tensor

from lightning_lora_amx.attention import attend, way
from lightning_lora_amx.fused_linear import Weights, shared_input

#: What a backward pass needs; None where no adapter asks for it.
Kept = list[Tensor | None]


class EveryToken:
    """Attention of all tokens.

    Args:
        weights: Of query, key and value.
        heads: Of the attention.
        dtype: In which all is computed.
        compiled: Whether by ``kernels.c`` where it can be.
    """

    def __init__(self, weights: list[Weights], heads: int, dtype: torch.dtype, compiled: bool) -> None:
        self.layer = shared_input(weights, dtype, compiled)
        self.heads = heads
        self.compiled = compiled

    @property
    def trained(self) -> bool:
        """Whether there is an adapter."""
        return bool(self.layer.adapted)

    def forward(self, states: Tensor, mask: Tensor | None, backward: bool) -> tuple[Tensor, Kept]:
        """The result (B * T, H) of states (B, T, H) and what is added to the scores; and what is to be kept."""
        batch, length, width = states.shape
        results, inner = self.layer.forward(states.view(-1, width))
        q, k, v = (result.view(batch, length, self.heads, -1).transpose(1, 2) for result in results)
        scaling = q.shape[-1] ** -0.5
        if not backward:
            return attend(q, k, v, mask, scaling, self.compiled).reshape(-1, width), []
        self.way = way(q, k, mask, self.compiled)
        out, kept = self.way.forward(q, k, v, mask, scaling)
        return out.reshape(-1, width), [inner, *kept]

    def backward(
        self, grad: Tensor, states: Tensor, kept: Kept, wanted: bool, beside: Tensor
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of the states (B * T, H), with what reaches them beside, and those of the adapters.

        Args:
            grad: Of the result.
            states: As for ``forward``.
            kept: What it gave.
            wanted: Whether the states' gradient is.
            beside: The gradient that goes past the attention; it is changed.
        """
        inner, *attended = kept
        batch, length, width = states.shape
        of_heads = grad.view(batch, length, self.heads, -1)
        found = self.way.backward(of_heads, cast(list[Tensor], attended), of_heads.shape[-1] ** -0.5)
        grads = [x.transpose(1, 2).reshape(-1, width) for x in found]
        return self.layer.backward(grads, states.view(-1, width), inner, wanted, beside)


class FirstToken:
    """Attention of the first token to all, with its result for that token alone.

    Args:
        weights: Of query, key and value.
        heads: Of the attention.
        dtype: In which all is computed.
        compiled: Whether by ``kernels.c`` where it can be.
    """

    def __init__(self, weights: list[Weights], heads: int, dtype: torch.dtype, compiled: bool) -> None:
        self.query = shared_input(weights[:1], dtype, compiled)
        self.compiled = compiled
        self.key, self.value = (PerHead(w, heads, dtype) for w in weights[1:])
        self.heads = heads

    @property
    def trained(self) -> bool:
        """Whether there is an adapter."""
        return bool(self.query.adapted) or any(layer.a is not None for layer in (self.key, self.value))

    def forward(self, states: Tensor, mask: Tensor | None, backward: bool) -> tuple[Tensor, Kept]:
        """The result (B, H) of states (B, T, H) and what is added to the scores; and what is to be kept."""
        batch, _, width = states.shape
        (rows,), inner = self.query.forward(states[:, 0].contiguous())
        q = rows.view(batch, self.heads, -1).transpose(0, 1).contiguous()
        asked, asked_inner = self.key.times_transposed(q)
        # Each head asks all states, which are keys and values at once.
        asked, mask = asked.transpose(0, 1)[:, None], None if mask is None else mask[:, :, :1]
        self.way = way(asked, states[:, None], mask, self.compiled)
        out, kept = self.way.forward(asked, states[:, None], states[:, None], mask, q.shape[-1] ** -0.5)
        seen = out[:, :, 0].transpose(0, 1).contiguous()
        out, seen_inner = self.value.times(seen)
        return out.transpose(0, 1).reshape(batch, width), [inner, q, asked_inner, seen, seen_inner, *kept]

    def backward(
        self, grad: Tensor, states: Tensor, kept: Kept, wanted: bool, beside: Tensor
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As ``EveryToken.backward``; the gradients of the result and beside are of the first token, (B, H)."""
        inner, q, asked_inner, seen, seen_inner, *attended = kept
        batch, _, width = states.shape
        assert q is not None and seen is not None
        of_out = grad.view(batch, self.heads, -1).transpose(0, 1).contiguous()
        of_seen, back = self.value.times_transposed(of_out)
        of_value = self.value.adapter_gradients(back, seen, of_out, seen_inner)
        of_heads = of_seen.transpose(0, 1)[:, :, None]
        found = self.way.backward(of_heads, cast(list[Tensor], attended), q.shape[-1] ** -0.5)
        of_asked = found[0][:, 0].transpose(0, 1).contiguous()
        of_q, forth = self.key.times(of_asked, bias=False)
        of_key = self.key.adapter_gradients(asked_inner, of_asked, q, forth)
        rows = of_q.transpose(0, 1).reshape(batch, width)
        first, of_query = self.query.backward([rows], states[:, 0].contiguous(), inner, wanted, beside)
        if first is None:
            return None, [*of_query, *of_key, *of_value]
        into = found[1][:, 0] + found[2][:, 0]
        into[:, 0] += first
        return into.reshape(-1, width), [*of_query, *of_key, *of_value]


class PerHead:
    """A linear layer with at most LoRA, whose results are a head's each, applied in one or the other direction.

    Args:
        layer: Its weights.
        heads: Of the attention.
        dtype: In which all is computed.
    """

    def __init__(self, layer: Weights, heads: int, dtype: torch.dtype) -> None:
        self.layer = layer
        self.weight = layer.weight.view(heads, -1, layer.weight.shape[1])
        self.bias = None if layer.bias is None else layer.bias.view(heads, 1, -1)
        self.a = None if layer.a is None else layer.a.to(dtype)
        self.b = None if layer.b is None else (layer.b * layer.scaling).to(dtype).view(heads, -1, layer.b.shape[1])

    def times(self, x: Tensor, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """W x + b of each head, (heads, B, D), of (heads, B, H); and what A makes of it."""
        out = x.bmm(self.weight.mT)
        if bias and self.bias is not None:
            out += self.bias
        if self.a is None or self.b is None:
            return out, None
        inner = x @ self.a.t()
        return out.baddbmm_(inner, self.b.mT), inner

    def times_transposed(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """W' y of each head, (heads, B, H), of (heads, B, D); and what B' makes of it."""
        out = y.bmm(self.weight)
        if self.a is None or self.b is None:
            return out, None
        inner = y.bmm(self.b)
        return out + inner @ self.a, inner

    def adapter_gradients(self, back: Tensor | None, x: Tensor, y: Tensor, forth: Tensor | None) -> list[Tensor]:
        """Gradients of A and B, where y W x was summed: from B' y and x, and from y and A x."""
        if back is None or forth is None:
            return []
        a: Any = self.layer.a
        of_a = back.flatten(0, 1).t().mm(x.flatten(0, 1))
        of_b = y.mT.bmm(forth).flatten(0, 1)
        return [of_a.to(a.dtype), of_b.to(a.dtype).mul_(self.layer.scaling)]
