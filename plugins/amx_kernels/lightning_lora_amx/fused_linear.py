"""Linear layers whose own weights are frozen, with or without LoRA, computed and differentiated in few passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.devices import compute_dtype
from lightning_lora_amx import kernels
from lightning_lora_amx.buffers import BUFFERS
from lightning_lora_amx.kernels import STEP, Then

#: Whether torch has the operators of ``one_pass``, which it keeps for its compiler.
ONE_PASS = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
#: Called by their full names, as torch otherwise looks through all forms of an operator at each call.
_LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if ONE_PASS else None
_LINEAR_ADDED: Any = torch.ops.mkldnn._linear_pointwise.binary if ONE_PASS else None
_GELU_BACKWARD = torch.ops.aten.gelu_backward.default
#: So many rows at which oneDNN 3.12 multiplies by a narrow matrix with one thread, and how wide its pieces are then.
_NARROW_ROWS = range(704, 1024)
_NARROW_WIDTH = 256


def one_pass(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None) -> Tensor:
    """rows W' + b, and what is to be added to it, without passes of their own for either where that can be.

    In bfloat16 on a CPU oneDNN does it, without torch's copy of the bias for each row.

    Args:
        rows: (N, in), contiguous.
        weight: W, (out, in).
        bias: b, (out,).
        added: (N, out), contiguous.
    """
    low = rows.dtype == weight.dtype == torch.bfloat16 and rows.device.type == "cpu"
    if not (ONE_PASS and low) or bias is None or bias.dtype != torch.bfloat16:
        out = F.linear(rows, weight, bias)
        return out if added is None else out.add_(added)
    if added is None:
        return _LINEAR(rows, weight, bias, "none", [], "")
    if _is_narrow(rows, weight.shape[0]):
        return add_product(added + bias, rows, weight.t())
    return _LINEAR_ADDED(rows, added, weight, bias, "add")


def add_product(into: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """``into``, (N, out), to which the product of rows (N, in) and a matrix (in, out) was added in place."""
    if not _is_narrow(rows, matrix.shape[1]):
        return into.addmm_(rows, matrix)
    for start in range(0, matrix.shape[1], _NARROW_WIDTH):
        piece = slice(start, start + _NARROW_WIDTH)
        into[:, piece].addmm_(rows, matrix[:, piece])
    return into


def _is_narrow(rows: Tensor, width: int) -> bool:
    """Whether the product is one that is up to twice as fast in pieces.

    Measured (docs/LOG.md): from a few hundred rows on, and until there are enough for two threads, oneDNN has one
    thread multiply by a matrix that is much taller than wide, such as the second of a feed-forward block.
    """
    tall = rows.shape[1] >= 2 * width and _NARROW_WIDTH < width < 1024
    return tall and rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and len(rows) in _NARROW_ROWS


@dataclass
class Weights:
    """What one linear layer multiplies by at this moment.

    Args:
        weight: W, (out, in).
        bias: b, (out,).
        a: A of its adapter, (rank, in); None where it has none, or where W holds it.
        b: B, (out, rank).
        scaling: What the adapter's product is multiplied by.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


class SharedInput:
    """Linear layers of one input: W x + b + scaling B A x of each, and the backward pass, for adapters only.

    Against PEFT's composition of modules it keeps no scaled copies for the backward pass, reads the input once for all
    adapters, and adds into its results instead of making new ones.

    Args:
        layers: Of each layer.
        dtype: In which all is computed; adapters are brought to it, weights have it.
    """

    def __init__(self, layers: Sequence[Weights], dtype: torch.dtype) -> None:
        self.layers = layers
        self.adapted = [i for i, layer in enumerate(layers) if layer.a is not None]
        of_a = [layer.a for layer in layers if layer.a is not None]
        self.a = (of_a[0] if len(of_a) == 1 else torch.cat(of_a)).to(dtype) if of_a else None
        #: B of each adapter, scaled: a smaller matrix to scale than any result.
        self.b = [(layer.b * layer.scaling).to(dtype) for layer in layers if layer.b is not None]

    def forward(self, rows: Tensor, added: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """The layers' results, (N, out) each, of an input (N, in); and what A makes of it, (N, ranks).

        Args:
            rows: The input, contiguous.
            added: What is added to the results.
        """
        outs = [one_pass(rows, layer.weight, layer.bias, added) for layer in self.layers]
        if self.a is None:
            return outs, None
        inner = rows.mm(self.a.t())
        for i, b, part in zip(self.adapted, self.b, self._parts(inner, 1), strict=True):
            outs[i].addmm_(part, b.t())
        return outs, inner

    def forward_gelu(self, rows: Tensor, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """GELU of the only layer's result; what ``backward`` needs to go back through it; and as ``forward``."""
        (raised,), inner = self.forward(rows)
        return F.gelu(raised), raised, inner

    def backward(
        self,
        grads: Sequence[Tensor],
        rows: Tensor | None,
        inner: Tensor | None,
        wanted: bool = True,
        into: Tensor | None = None,
        gelu: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of the input, None where it is not wanted, and those of A and B of each adapter in turn.

        Args:
            grads: Of the results.
            rows: The input; it is needed where a layer has an adapter.
            inner: What ``forward`` gave beside its results.
            wanted: Whether the input's is.
            into: What else reaches the input; it is changed.
            gelu: Where the input is GELU of something, what was given to go back through it.
        """
        adapters: list[Tensor] = []
        grad_inner = None
        if self.a is not None and rows is not None and inner is not None:
            parts = [grads[i].mm(b) for i, b in zip(self.adapted, self.b, strict=True)]
            grad_inner = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            of_a = self._parts(grad_inner.t().mm(rows), 0)
            for i, grad_a, kept in zip(self.adapted, of_a, self._parts(inner, 1), strict=True):
                a: Any = self.layers[i].a
                # In this order, as the product of a tall transposed matrix is twice as slow on a CPU.
                grad_b = kept.t().mm(grads[i]).t().to(a.dtype).mul_(self.layers[i].scaling)
                adapters += [grad_a.to(a.dtype), grad_b]
        if not wanted:
            return None, adapters
        for grad, layer in zip(grads, self.layers, strict=True):
            into = grad.mm(layer.weight) if into is None else add_product(into, grad, layer.weight)
        if grad_inner is not None and self.a is not None and into is not None:
            into.addmm_(grad_inner, self.a)
        return (into if gelu is None or into is None else _GELU_BACKWARD(into, gelu)), adapters

    def _parts(self, whole: Tensor, dim: int) -> Sequence[Tensor]:
        return [whole] if len(self.b) == 1 else whole.split([b.shape[1] for b in self.b], dim)


class CompiledInput:
    """As ``SharedInput``, by ``kernels.c``: adapters are multiplied by along with the weights.

    What A of all adapters makes of the input lies side by side, with zeros up to a multiple of 32.
    """

    def __init__(self, layers: Sequence[Weights]) -> None:
        self.layers = layers
        self.adapted = [i for i, layer in enumerate(layers) if layer.a is not None]
        self.places: dict[int, slice] = {}
        self.a: Tensor | None = None
        #: B of each adapter, scaled, at its place among zeros: (out, ranks).
        self.lows: dict[int, Tensor] = {}
        end = 0
        for i in self.adapted:
            rank = cast(Tensor, layers[i].a).shape[0]
            self.places[i], end = slice(end, end + rank), end + rank
        if not self.adapted:
            return
        ranks = -(-end // STEP) * STEP
        self.a = torch.zeros(ranks, layers[0].weight.shape[1], dtype=torch.bfloat16)
        for i, place in self.places.items():
            layer: Any = layers[i]
            self.a[place] = layer.a
            self.lows[i] = torch.zeros(len(layer.weight), ranks, dtype=torch.bfloat16)
            torch.mul(layer.b, layer.scaling, out=self.lows[i][:, place])

    def forward(self, rows: Tensor, added: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """As ``SharedInput.forward``."""
        inner, then = self._inner(rows), Then.PLAIN if added is None else Then.ADDED
        return [self._result(i, rows, inner, then, added) for i in range(len(self.layers))], inner

    def forward_gelu(self, rows: Tensor, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As ``SharedInput.forward_gelu``."""
        inner = self._inner(rows)
        slope = BUFFERS.empty(len(rows), len(self.layers[0].weight)) if backward else None
        then = Then.GELU if backward else Then.GELU_ALONE
        return self._result(0, rows, inner, then, slope), slope, inner

    def _inner(self, rows: Tensor) -> Tensor | None:
        if self.a is None:
            return None
        return kernels.linear(rows, kernels.pack(self.a, True), len(self.a), True)

    def _result(self, i: int, rows: Tensor, inner: Tensor | None, then: Then, other: Tensor | None) -> Tensor:
        layer = self.layers[i]
        low = None if inner is None or i not in self.lows else (inner, self.lows[i])
        form, width = kernels.packed(layer.weight, True), len(layer.weight)
        return kernels.linear(rows, form, width, True, layer.bias, low, then, other)

    def backward(
        self,
        grads: Sequence[Tensor],
        rows: Tensor | None,
        inner: Tensor | None,
        wanted: bool = True,
        into: Tensor | None = None,
        gelu: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As ``SharedInput.backward``."""
        grads = [grad.contiguous() for grad in grads]
        of_inner: Tensor | None = None
        adapters: list[Tensor] = []
        if self.a is not None and rows is not None and inner is not None:
            for i in self.adapted:
                then, form = Then.PLAIN if of_inner is None else Then.ADDED, kernels.pack(self.lows[i], False)
                of_inner = kernels.linear(grads[i], form, len(self.a), False, None, None, then, of_inner, of_inner)
            assert of_inner is not None
            of_a = kernels.row_products(of_inner, rows)
            for i, place in self.places.items():
                of_b = kernels.row_products(inner, grads[i])[place].t().mul(self.layers[i].scaling)
                adapters += [of_a[place], of_b]
        if not wanted:
            return None, adapters
        low = None if of_inner is None or self.a is None else (of_inner, self.a)
        for grad, layer in zip(grads, self.layers, strict=True):
            then, other = (Then.PLAIN, None) if into is None else (Then.ADDED, into)
            if gelu is not None:
                then, other = Then.MULTIPLIED, gelu
            form, width = kernels.packed(layer.weight, False), layer.weight.shape[1]
            into, low = kernels.linear(grad, form, width, False, None, low, then, other, into), None
        return into, adapters


def shared_input(layers: Sequence[Weights], dtype: torch.dtype, compiled: bool) -> SharedInput | CompiledInput:
    """What computes linear layers of one input.

    Args:
        layers: Of each layer.
        dtype: In which all is computed.
        compiled: Whether by ``kernels.c``, which needs sizes that are multiples of 32.
    """
    return CompiledInput(layers) if compiled else SharedInput(layers, dtype)


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained; it only ever replaces the class of one that is there."""

    def forward(self, x: Tensor) -> Tensor:
        """x W' + b; x of shape (..., in), the result (..., out)."""
        dtype = compute_dtype(x)
        if dtype != torch.bfloat16 or self.weight.dtype != dtype or self.weight.requires_grad:
            return super().forward(x)
        return FrozenWeightFunction.apply(x, Weights(self.weight, self.bias))


class FusedLora(lora.Linear):
    """PEFT's layer, computed in few passes while it has one adapter that is neither merged nor dropped out.

    It only ever replaces the class of a layer that PEFT has made, so everything else is PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W' + b + scaling x A' B'; x of shape (..., in), the result (..., out)."""
        weights = None if args or kwargs else self.weights()
        if weights is None:
            return super().forward(x, *args, **kwargs)
        return FrozenWeightFunction.apply(x, weights, *(w for w in (weights.a, weights.b) if w is not None))

    def weights(self) -> Weights | None:
        """What the layer multiplies by; None where it does more, or trains more than its adapter."""
        base: Any = self.base_layer
        if any(p.requires_grad for p in base.parameters()):
            return None
        if self.merged and self.disable_adapters:  # PEFT unmerges it first
            return None
        if self.merged or self.disable_adapters:
            return Weights(base.weight, base.bias)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.lora_bias[names[0]]:
            return None
        if self.training and not isinstance(self.lora_dropout[names[0]], nn.Identity):
            return None
        a: Any = self.lora_A[names[0]].weight
        b: Any = self.lora_B[names[0]].weight
        return Weights(base.weight, base.bias, a, b, self.scaling[names[0]])


class FrozenWeightFunction(torch.autograd.Function):
    """A linear layer with a low-rank update or without, of which only the update is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Weights, *adapter: Tensor) -> Tensor:
        """The layer's output, in autocast's number format or that of the input."""
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if weights.bias is None else weights.bias.to(dtype)
            low = Weights(weights.weight.to(dtype), bias, weights.a, weights.b, weights.scaling)
            ctx.layer = SharedInput([low], dtype)
            rows = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
            (out,), inner = ctx.layer.forward(rows)
        ctx.save_for_backward(*((rows, inner) if adapter else (None, None)))
        ctx.shape, ctx.input_dtype = x.shape, x.dtype
        # No view: some architectures (Longformer) scale what a linear layer gives in place.
        return out.contiguous().resize_(*x.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, of A and of B."""
        rows, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x, adapter = ctx.layer.backward([grad], rows, inner, ctx.needs_input_grad[0])
        return (None if grad_x is None else grad_x.view(ctx.shape).to(ctx.input_dtype)), None, *adapter


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
