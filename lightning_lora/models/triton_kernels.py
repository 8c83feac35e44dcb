"""Kernels in Triton: attention within short texts, and adding and normalizing in one pass.

Attention within texts of at most 128 tokens has a whole text in one block, forward and backward. FlashAttention works
in blocks of 128 queries and keys, so a text of 40 tokens costs what one of 128 does, and sums a query's gradient over
blocks in a buffer of its own. Here a block is as long as the longest text of the batch, and there is nothing to sum:
results do not depend on an order.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Dimensions of a head that are known to work.
HEAD_DIMENSIONS = (16, 32, 64, 128)
#: Largest difference of ``add_norm`` from torch, by norm: bfloat16 rounds to 8 bits, and torch rounds the sum too.
NORM_TOLERANCE = 0.01


@triton.jit
def _of_text(source, rows, stride, start, d, there):  # type: ignore[no-untyped-def]
    return tl.load(source + rows * stride + start + d[None, :], mask=there, other=0.0)


@triton.jit
def _probabilities(q, k, i, length, scale, BLOCK: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    scores = tl.dot(q, tl.trans(k)) * scale
    seen = (i < length)[None, :]
    if WINDOW >= 0:
        apart = i[:, None] - i[None, :]
        seen = seen & (apart <= WINDOW) & (apart >= -WINDOW)
    scores = tl.where(seen, scores, -1.0e30)
    weights = tl.where(seen, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    return weights / tl.maximum(tl.sum(weights, 1), 1.0e-30)[:, None]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    Q,
    K,
    V,
    OUT,
    OFFSETS,
    scale,
    qt,
    qh,
    kt,
    kh,
    vt,
    vh,
    ot,
    oh,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
):
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(OFFSETS + text).to(tl.int64)
    length = tl.load(OFFSETS + text + 1).to(tl.int64) - start
    if length > 0:
        i, d = tl.arange(0, BLOCK), tl.arange(0, D)
        there = (i < length)[:, None]
        rows = (start + i)[:, None]
        q = _of_text(Q, rows, qt, head * qh, d, there)
        k = _of_text(K, rows, kt, head * kh, d, there)
        v = _of_text(V, rows, vt, head * vh, d, there)
        p = _probabilities(q, k, i, length, scale, BLOCK, WINDOW)
        out = tl.dot(p.to(v.dtype), v)
        tl.store(OUT + rows * ot + head * oh + d[None, :], out.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    Q, K, V, G, DQ, DK, DV, OFFSETS, scale, qt, qh, kt, kh, vt, vh, gt, gh, ot, oh,
    BLOCK: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(OFFSETS + text).to(tl.int64)
    length = tl.load(OFFSETS + text + 1).to(tl.int64) - start
    if length > 0:
        i, d = tl.arange(0, BLOCK), tl.arange(0, D)
        there = (i < length)[:, None]
        rows = (start + i)[:, None]
        q = _of_text(Q, rows, qt, head * qh, d, there)
        k = _of_text(K, rows, kt, head * kh, d, there)
        v = _of_text(V, rows, vt, head * vh, d, there)
        g = _of_text(G, rows, gt, head * gh, d, there)
        p = _probabilities(q, k, i, length, scale, BLOCK, WINDOW)
        places = rows * ot + head * oh + d[None, :]
        dv = tl.dot(tl.trans(p.to(g.dtype)), g)
        tl.store(DV + places, dv.to(DV.dtype.element_ty), mask=there)
        of_p = tl.dot(g, tl.trans(v))
        of_scores = (p * (of_p - tl.sum(p * of_p, 1)[:, None]) * scale).to(q.dtype)
        dq = tl.dot(of_scores, k)
        tl.store(DQ + places, dq.to(DQ.dtype.element_ty), mask=there)
        dk = tl.dot(tl.trans(of_scores), q)
        tl.store(DK + places, dk.to(DK.dtype.element_ty), mask=there)


class ShortAttention(torch.autograd.Function):
    """softmax(Q K' scaling) V within each text."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scaling: float, window: int | None
    ) -> Tensor:
        """Compute (T, H, D) of q, k, v (T, H, D), float16 or bfloat16, with contiguous heads.

        Args:
            ctx: What ``backward`` needs.
            q: Queries.
            k: Keys.
            v: Values.
            offsets: Where each text begins and the last one ends, int32 (N + 1,): all of T.
            longest: Tokens of a text at most, up to 128.
            scaling: Of the scores.
            window: A token attends to those at this distance at most; None for all of its text.
        """
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        block, out = _block(longest), torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, offsets)
        ctx.settings = block, scaling, -1 if window is None else window
        grid = (len(offsets) - 1, q.shape[1])
        strides = [s for x in (q, k, v, out) for s in x.stride()[:2]]
        _forward[grid](
            q, k, v, out, offsets, scaling, *strides, block, q.shape[2], ctx.settings[2], num_warps=_warps(block)
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of q, k and v."""
        q, k, v, offsets = ctx.saved_tensors
        block, scaling, window = ctx.settings
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        found = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
        strides = [s for x in (q, k, v, grad, found[0]) for s in x.stride()[:2]]
        grid = (len(offsets) - 1, q.shape[1])
        _backward[grid](
            q, k, v, grad, *found, offsets, scaling, *strides, block, q.shape[2], window, num_warps=_warps(block)
        )
        return *found, None, None, None, None


def takes(dimension: int) -> bool:
    """Whether attention by these kernels is known to work for heads of so many dimensions."""
    return dimension in HEAD_DIMENSIONS


def compile_kernels(
    lengths: Iterable[int], heads: int, dimension: int, dtype: torch.dtype, device: torch.device
) -> list[Future[None]]:
    """Start to compile the kernels of ``ShortAttention``, side by side: each by itself takes a second or more.

    Args:
        lengths: Tokens of the longest texts of the batches to come.
        heads: Heads of q, k and v, which lie side by side in memory.
        dimension: Dimensions of a head.
        dtype: Of q, k and v.
        device: The GPU.
    """

    def compile_one(job: tuple[int, bool]) -> None:
        block, back = job
        kernel, tensors, strides = (_backward, 7, 5) if back else (_forward, 4, 4)
        sizes = [heads * dimension, dimension] * strides
        with torch.cuda.device(device):
            kernel.warmup(
                *[dtype] * tensors, torch.int32, 0.125, *sizes, block, dimension, -1,
                num_warps=_warps(block), grid=(1,),
            )  # fmt: skip

    jobs = list(product(sorted({_block(length) for length in lengths}, reverse=True), (True, False)))
    pool = ThreadPoolExecutor(len(jobs))
    started = [pool.submit(compile_one, job) for job in jobs]
    pool.shutdown(wait=False)
    return started


def _block(longest: int) -> int:
    return int(max(16, triton.next_power_of_2(longest)))


def _warps(block: int) -> int:
    return 8 if block > 64 else 4


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
    """Return ``norm(x + residual)``, summed in float32, (..., H) of (..., H), in the format of ``x``: bfloat16.

    The residual has any format; the norm is over the last dimension, with weight and bias.
    """
    x, residual = x.contiguous(), residual.contiguous()
    out, block = torch.empty_like(x), triton.next_power_of_2(x.shape[-1])
    warps = min(max(block // 256, 1), 8)
    rows = (x.numel() // x.shape[-1],)
    _add_norm[rows](x, residual, norm.weight, norm.bias, out, x.shape[-1], norm.eps, block, num_warps=warps)
    return out


@cache
def add_norm_works(width: int, device: torch.device) -> bool:
    """Whether ``add_norm`` is found to give what torch gives, on random states of a width."""
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
