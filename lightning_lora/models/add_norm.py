"""Adding a residual and normalizing the sum in one pass over memory, by Triton, for evaluation in bfloat16."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

#: Largest difference from torch, by norm: bfloat16 rounds to 8 bits, and torch rounds the sum too.
NORM_TOLERANCE = 0.01


@triton.jit
def _add_norm(X, RESIDUAL, WEIGHT, BIAS, OUT, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    there = i < width
    x = tl.load(X + row + i, mask=there, other=0.0).to(tl.float32)
    x += tl.load(RESIDUAL + row + i, mask=there, other=0.0).to(tl.float32)
    centred = tl.where(there, x - tl.sum(x, 0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(WEIGHT + i, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + i, mask=there, other=0.0).to(tl.float32)
    tl.store(OUT + row + i, (centred * scale * weight + bias).to(OUT.dtype.element_ty), mask=there)


def add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return ``norm(x + residual)``, summed in float32, (..., H) of (..., H), in the format of ``x``.

    Args:
        x: bfloat16.
        residual: Any format.
        norm: Over the last dimension, with weight and bias.
    """
    x, residual = x.contiguous(), residual.contiguous()
    out, block = torch.empty_like(x), triton.next_power_of_2(x.shape[-1])
    warps = min(max(block // 256, 1), 8)
    rows = (x.numel() // x.shape[-1],)
    _add_norm[rows](x, residual, norm.weight, norm.bias, out, x.shape[-1], norm.eps, block, num_warps=warps)
    return out


@cache
def works(width: int, device: torch.device) -> bool:
    """Whether the kernel is found to give what torch gives, on random states of a width."""
    draw = torch.Generator(device).manual_seed(0)
    x, residual = (torch.randn(7, width, generator=draw, device=device).bfloat16() for _ in range(2))
    norm = nn.LayerNorm(width, device=device).requires_grad_(False)
    norm.weight.uniform_(0.5, 2, generator=draw)
    norm.bias.normal_(generator=draw)
    try:
        found = add_norm(x, residual, norm)
    except Exception:  # of a compiler that is not there, or of a device that Triton does not know
        return False
    wanted = norm(x.float() + residual.float())
    return bool((found - wanted).norm() <= NORM_TOLERANCE * wanted.norm())
