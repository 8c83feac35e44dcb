"""What ``kernels.c`` computes, for tensors: attention, linear layers with what follows them, and norms.

It is compiled at installation where there is a C compiler, and used in bfloat16 on a processor with AMX (Intel's
servers from 2023 on). Elsewhere torch computes the same.
"""

import ctypes
import weakref
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora_amx.buffers import BUFFERS

#: What sizes are multiples of.
STEP = 32
#: The compiled code, and what its ``kernels_version`` must give.
COMPILED = Path(__file__).with_name(f"_kernels{EXTENSION_SUFFIXES[0]}")
VERSION = 4

_ADDRESS, _COUNT, _REAL, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "attention_forward": [_ADDRESS] * 7 + [_COUNT] * 5 + [_REAL, _INT],
    "attention_backward": [_ADDRESS] * 11 + [_COUNT] * 5 + [_REAL, _INT],
    "pack_weight": [_ADDRESS] * 2 + [_COUNT] * 2 + [_INT] * 2,
    "linear": [_ADDRESS] * 7 + [_COUNT] * 4 + [_INT] * 3,
    "row_products": [_ADDRESS] * 3 + [_COUNT] * 3 + [_INT],
    "quantize": [_ADDRESS] * 3 + [_COUNT] * 2 + [_INT],
    "linear_int8": [_ADDRESS] * 9 + [_COUNT] * 3 + [_INT] * 2,
    "norm_forward": [_ADDRESS] * 5 + [_COUNT] * 2 + [_REAL, _INT],
    "norm_backward": [_ADDRESS] * 5 + [_COUNT] * 2 + [_INT],
}


def _load() -> tuple[Any, str]:
    """The compiled code, or None and why not, in words."""
    if not (torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()):
        return None, "this processor has no AMX"
    try:
        library = ctypes.CDLL(str(COMPILED))
    except OSError as error:
        if COMPILED.is_file():
            return None, f"the compiled code cannot be loaded: {error}"
        return None, "nothing was compiled at installation, which needs a C compiler; install again with one"
    if library.kernels_version() != VERSION:
        return None, "the compiled code is of another version; install again"
    if not torch.cpu._init_amx():
        return None, "the system does not let this process use AMX"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library, ""


#: The compiled functions; or None, and why.
LIBRARY, MISSING = _load()


def computes(tensor: Tensor) -> bool:
    """Whether tensors such as this one can be passed."""
    return LIBRARY is not None and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


class CompiledAttention:
    """softmax(q k' scaling + mask) v, whose probabilities are found again in the backward pass."""

    @staticmethod
    def computes(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
        """Whether it can: heads of a multiple of 32 wide, and a mask that is the same for all queries."""
        fits = q.shape[:2] == k.shape[:2] and q.shape[3] % STEP == 0 and q.numel() > 0 and k.numel() > 0
        return fits and (mask is None or mask.shape[1:3] == (1, 1)) and computes(q)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, list[Tensor]]:
        """The result, (B, Q, H, D), and what ``backward`` needs.

        Args:
            q: Queries, (B, H, Q, D).
            k: Keys, (B, H, T, D).
            v: Values, as keys.
            mask: What is added to the scores, (B, 1, 1, T).
            scaling: Of the scores.
        """
        batch, heads, asking, width = q.shape
        q = q if q.stride(3) == 1 else q.contiguous()
        if not (k.stride() == v.stride() and k.stride(3) == 1):
            k, v = k.contiguous(), v.contiguous()
        out = BUFFERS.empty(batch * asking, heads * width).view(batch, asking, heads, width)
        sums = torch.empty(batch, heads, asking, dtype=torch.float32)
        added = [] if mask is None else [_added(mask, batch)]
        LIBRARY.attention_forward(
            *(x.data_ptr() for x in (q, k, v)), _apart(q, k), _address(added), out.data_ptr(), sums.data_ptr(),
            batch, heads, asking, k.shape[2], width, scaling, torch.get_num_threads(),
        )  # fmt: skip
        return out, [q, k, v, out, sums, *added]

    @staticmethod
    def backward(grad: Tensor, kept: list[Tensor], scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, of their shapes, by that of the result."""
        q, k, v, out, sums, *added = kept
        batch, heads, asking, width = q.shape
        grad = grad.contiguous()
        grads = [
            BUFFERS.empty(batch * count, heads * width).view(batch, count, heads, width)
            for count in (asking, k.shape[2], k.shape[2])
        ]
        LIBRARY.attention_backward(
            *(x.data_ptr() for x in (grad, out, q, k, v)), _apart(q, k), _address(added), sums.data_ptr(),
            *(x.data_ptr() for x in grads), batch, heads, asking, k.shape[2], width, scaling, torch.get_num_threads(),
        )  # fmt: skip
        of_q, of_k, of_v = (x.transpose(1, 2) for x in grads)
        return of_q, of_k, of_v


def _apart(q: Tensor, k: Tensor) -> Any:
    return (_COUNT * 6)(*q.stride()[:3], *k.stride()[:3])


def _address(tensors: list[Tensor]) -> int | None:
    return tensors[0].data_ptr() if tensors else None


def _added(mask: Tensor, batch: int) -> Tensor:
    """What is added to scores, (B, T): a text's largest 0, which changes nothing, and none so low as to overflow."""
    rows = mask[:, 0, 0].float().clamp(min=-1e30).expand(batch, -1)
    return (rows - rows.amax(1, keepdim=True)).contiguous()


class Then(IntEnum):
    """What becomes of a product and its bias, x, with another tensor."""

    PLAIN = 0
    #: The other is added.
    ADDED = 1
    #: GELU(x); its derivative is put into the other.
    GELU = 2
    #: GELU(x), without another.
    GELU_ALONE = 3
    #: It is multiplied by the other.
    MULTIPLIED = 4


#: By a weight's identity, and whether its transposed is multiplied by: the weight, and its version and address when it
#: was packed, and its packed form.
_packed: dict[tuple[int, bool], tuple[weakref.ref[Tensor], int, int, Tensor]] = {}


def packed(weight: Tensor, across: bool) -> Tensor:
    """A weight as ``linear`` reads it, made once for as long as it stays the same; a copy as large as the weight.

    What is written into ``weight.data`` is not seen.
    """
    version, address = 0 if weight.is_inference() else weight._version, weight.data_ptr()
    key = (id(weight), across)
    known = _packed.get(key)
    if known is not None and known[0]() is weight and known[1] == version and known[2] == address:
        return known[3]
    if known is None or known[0]() is not weight:
        weakref.finalize(weight, _packed.pop, key, None)
    form = pack(weight, across)
    _packed[key] = weakref.ref(weight), version, address, form
    return form


def pack(weight: Tensor, across: bool) -> Tensor:
    """As ``packed``, made anew."""
    depth, width = weight.shape[::-1] if across else weight.shape
    weight = weight.contiguous()
    form = torch.empty(-(-width // STEP) * STEP * depth, dtype=torch.bfloat16)
    LIBRARY.pack_weight(weight.data_ptr(), form.data_ptr(), depth, width, across, torch.get_num_threads())
    return form


def linear(
    rows: Tensor,
    form: Tensor,
    width: int,
    across: bool,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
    then: Then = Then.PLAIN,
    other: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x W + y L + b, and what comes then: (N, width).

    Args:
        rows: x, (N, depth).
        form: W, packed.
        width: Of the result.
        across: Whether L is given as W was: transposed, as a linear layer has it.
        bias: b, (width,).
        low: y, (N, rank), and L, (rank, width); ``across``, (width, rank). The rank is a multiple of 32.
        then: What becomes of it.
        other: What that needs, (N, width).
        out: Where the result is put; it may be the other.
    """
    count, depth = rows.shape
    out = BUFFERS.empty(count, width) if out is None else out
    beside, matrix = (None, None) if low is None else low
    LIBRARY.linear(
        *(None if t is None else t.data_ptr() for t in (rows, form, bias, beside, matrix, other, out)),
        count, depth, width, 0 if beside is None else beside.shape[1], across, then, torch.get_num_threads(),
    )  # fmt: skip
    return out


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """left' right in float32, (rank, width), of (N, rank) and (N, width); the rank is a multiple of 32."""
    out = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32)
    addresses = (t.data_ptr() for t in (left, right, out))
    LIBRARY.row_products(*addresses, *left.shape, right.shape[1], torch.get_num_threads())
    return out


#: Whole numbers in a row are a multiple of.
INT8_STEP = 64


class Int8(NamedTuple):
    """Rows as whole numbers, int8 (N, width and zeros up to a multiple of 64), and each row's unit, float32 (N,)."""

    rows: Tensor
    units: Tensor


def quantize(rows: Tensor) -> Int8:
    """Rows (N, width), contiguous, in units of 1/127 of the largest of each."""
    count, width = rows.shape
    found = _empty_int8(count, width)
    addresses = (t.data_ptr() for t in (rows, *found))
    LIBRARY.quantize(*addresses, count, width, torch.get_num_threads())
    return found


def _empty_int8(count: int, width: int) -> Int8:
    padded = -(-width // INT8_STEP) * INT8_STEP
    return Int8(torch.empty(count, padded, dtype=torch.int8), torch.empty(count, dtype=torch.float32))


class Int8Weight:
    """A linear layer's weight as whole numbers, each result in a unit of its own.

    Args:
        weight: (out, in), of any number format.
        bias: (out,), bfloat16, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight, self.bias, self.width = weight.detach().float(), bias, len(weight)
        #: float32 (out,).
        self.units = weight.abs().amax(1) / 127
        numbers = (weight / self.units.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        columns, depth = -(-self.width // STEP), -(-weight.shape[1] // INT8_STEP)
        padded = numbers.new_zeros(columns * STEP, depth * INT8_STEP)
        padded[: self.width, : weight.shape[1]] = numbers
        # Tiles of 16 columns and 64 rows, two beside each other; a row of a tile has four rows of each column.
        self.form = padded.view(columns, 2, 16, depth, 16, 4).permute(0, 3, 1, 4, 2, 5).contiguous()

    def times(self, x: Int8, then: Then = Then.PLAIN, other: Tensor | None = None) -> Tensor:
        """x W + b, and what comes then (``PLAIN``, ``ADDED``, ``GELU_ALONE``): bfloat16 (N, out).

        Args:
            x: Its rows.
            then: What becomes of it.
            other: What that needs, (N, out).
        """
        out = BUFFERS.empty(len(x.rows), self.width)
        self._times(x, then, other, out, None)
        return out

    def times_quantized(self, x: Int8, then: Then) -> Int8:
        """As ``times``, the result as whole numbers again."""
        out = _empty_int8(len(x.rows), self.width)
        self._times(x, then, None, None, out)
        return out

    def _times(self, x: Int8, then: Then, other: Tensor | None, out: Tensor | None, numbers: Int8 | None) -> None:
        assert then in (Then.PLAIN, Then.ADDED, Then.GELU_ALONE) and (then == Then.ADDED) == (other is not None)
        tensors = (*x, self.form, self.units, self.bias, other, out, *(numbers or (None, None)))
        addresses = (None if t is None else t.data_ptr() for t in tensors)
        LIBRARY.linear_int8(*addresses, *x.rows.shape, self.width, then, torch.get_num_threads())


def norm_forward(rows: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, list[Tensor]]:
    """The layer norm of rows (N, width), the width a multiple of 16, and what ``norm_backward`` needs beside them."""
    count, width = rows.shape
    out, stats = BUFFERS.empty(count, width), torch.empty(count, 2, dtype=torch.float32)
    tensors: Any = (rows, norm.weight, norm.bias, out, stats)
    LIBRARY.norm_forward(*(t.data_ptr() for t in tensors), count, width, norm.eps, torch.get_num_threads())
    return out, [stats]


def norm_backward(grad: Tensor, rows: Tensor, stats: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The gradient of rows by that of their layer norm."""
    out = BUFFERS.empty(*rows.shape)
    tensors = (grad.contiguous(), rows, norm.weight, stats, out)
    LIBRARY.norm_backward(*(t.data_ptr() for t in tensors), *rows.shape, torch.get_num_threads())
    return out
