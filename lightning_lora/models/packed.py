"""Attention within each text of a packed batch, registered with transformers, and the first token of each text.

A packed batch (``data/packing.py``) is one row of all texts' tokens. The models hand the texts' offsets through to the
attention function, which is all that must know where one text ends and the next begins; and what the head reads, the
first token of each text, is taken behind the last layer's attention, so that head and pooler see a batch of one token.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_lora.devices import compute_dtype
from lightning_lora.models.base import Base

#: Name for ``set_attn_implementation``.
PACKED = "packed"
#: Tokens of a text at most that the kernels for short texts take.
SHORT_TEXT = 128


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; as transformers' attention functions: (1, T, H, D) of q, k and v, (1, H, T, D).

    Args:
        module: The attention layer.
        query: (1, H, T, D).
        key: (1, H, T, D).
        value: (1, H, T, D).
        attention_mask: None.
        scaling: Of the scores; by default D ** -0.5.
        dropout: On the attention's probabilities, in training.
        cu_seq_lens_q: Where each text begins and the last one ends, int32 (N + 1,).
        max_length_q: Tokens of the longest text at most.
        sliding_window: A token attends to tokens at a distance below this; None for all of its text.
        kwargs: What other implementations take.
    """
    dtype = compute_dtype(query)
    # Not x[0], whose gradient is copied into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    window = None if sliding_window is None else sliding_window - 1
    if not dropout and has_flash(q):
        short = short_attention() if max_length_q <= SHORT_TEXT else None
        if short is not None and short.takes(q.shape[-1]):
            found = short.ShortAttention.apply(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
        else:
            found = flash_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        found = padded_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, dropout, window)
    return found[None], None


@cache
def triton_kernels() -> Any:
    """Return the module of the kernels in Triton; None where that is missing."""
    try:
        from lightning_lora.models import triton_kernels as module
    except ImportError:
        return None
    return module


def short_attention() -> Any:
    """Return the module of the kernels for short texts; None where it is missing or they were found wanting."""
    return None if _found_wanting else triton_kernels()


def compile_attention(model: Any, lengths: Iterable[int]) -> list[Future[None]]:
    """Start to compile the kernels for short texts that a model on a GPU will use, where it uses any.

    Args:
        model: A transformers model.
        lengths: Tokens of the longest texts of the batches to come.
    """
    config, short, dtype = model.config, short_attention(), compute_dtype(next(model.parameters()))
    heads = getattr(config, "num_attention_heads", 0)
    lengths = [length for length in lengths if length <= SHORT_TEXT]
    if short is None or not heads or not lengths or dtype not in (torch.bfloat16, torch.float16):
        return []
    dimension = config.hidden_size // heads
    found = short.compile_kernels(lengths, heads, dimension, dtype, model.device) if short.takes(dimension) else []
    return list(found)


#: Why the kernels for short texts are not used.
_found_wanting: list[str] = []


def leave_short_attention(reason: str) -> bool:
    """Use FlashAttention for short texts too from here on; return whether that changes anything."""
    if short_attention() is None:
        return False
    _found_wanting.append(reason)
    return True


def take_short_attention() -> None:
    """Undo ``leave_short_attention``."""
    _found_wanting.clear()


def has_flash(query: Tensor) -> bool:
    """Whether torch's FlashAttention for texts of various lengths takes such queries."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _has_varlen(query.device.index)


@cache
def _has_varlen(device: int | None) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return callable(varlen_attn)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Attention by torch's ``scaled_dot_product_attention`` on padded copies, on any device: (T, H, D) of (T, H, D)."""
    starts, lengths = offsets[:-1].long(), offsets.diff().long()
    at = torch.arange(longest, device=q.device)
    there = at < lengths[:, None]  # (N, L)
    tokens = (starts[:, None] + at).clamp(max=len(q) - 1)
    queries, keys, values = (x[tokens].transpose(1, 2) for x in (q, k, v))  # (N, H, L, D)
    mask = there[:, None, None, :]
    if window is not None:
        mask = mask & ((at[:, None] - at).abs() <= window)
    mask = mask | ~there[:, None, :, None]  # what is not there attends somewhere, or it would be NaN
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling)
    out = out.transpose(1, 2)
    # Each token is one of its text's: the place in (N, L) that it was copied to.
    text = torch.searchsorted(offsets[1:].contiguous().long(), torch.arange(len(q), device=q.device), right=True)
    return out[text, torch.arange(len(q), device=q.device) - starts[text]]


class _Deterministic(torch.autograd.Function):
    """Pass a result on; from its gradient on, torch's algorithms are deterministic."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        """Return a view."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Switch over."""
        only = torch.is_deterministic_algorithms_warn_only_enabled()
        _settings.append((torch.are_deterministic_algorithms_enabled(), _fills(), only))
        _use_deterministic(True, False)
        return grads[0]


class _AsBefore(torch.autograd.Function):
    """Pass arguments on; behind their gradients, torch's algorithms are what they were before ``_Deterministic``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return views."""
        return tuple(each.view_as(each) for each in arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Switch back."""
        if _settings:
            _use_deterministic(*_settings.pop())
        return grads


_settings: list[tuple[bool, bool, bool]] = []


def _fills() -> bool:
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def _use_deterministic(on: bool, fills: bool, warn_only: bool = False) -> None:
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@contextmanager
def deterministic_as_before() -> Iterator[None]:
    """Undo what ``_Deterministic`` has set where a backward pass in this block ends in an error."""
    try:
        yield
    finally:
        if _settings:
            _use_deterministic(*_settings[0])
            _settings.clear()


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float,
    window: int | None,
    fixed_order: bool = True,
) -> Tensor:
    """Attention by torch's FlashAttention for texts of various lengths, (T, H, D) of (T, H, D); repeatable.

    Its backward pass adds a query's gradient over blocks of keys, in no fixed order unless that is asked for; a text of
    one block has no order. Elsewhere the fixed order costs time (docs/performance.md), and only here it is asked for.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling}
    if window is not None:
        options["window_size"] = (window, window)
    several_blocks = fixed_order and torch.is_grad_enabled() and longest > (128 if q.shape[-1] <= 64 else 64)
    if several_blocks:
        q, k, v = _AsBefore.apply(q, k, v)
    out: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
    return _Deterministic.apply(out) if several_blocks else out


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Mask nothing: where texts begin and end is said by their offsets."""


class FirstTokens:
    """Where the texts of a packed batch begin, for the hooks that take the first token of each, or the mean."""

    def __init__(self) -> None:
        self.starts: Tensor | None = None
        self.offsets: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether the batch of this forward pass is packed."""
        return self.starts is not None

    @contextmanager
    def at(self, starts: Tensor, offsets: Tensor) -> Iterator[None]:
        """The texts begin there, (N,), and end where the next begins, (N + 1,), in this block."""
        self.starts, self.offsets = starts, offsets
        try:
            yield
        finally:
            self.starts = self.offsets = None

    def mean(self, states: Tensor) -> Tensor:
        """The mean of each text's states, float32 (N, D) of (1, T, D); 0 of a text that is not there. Repeatable."""
        assert self.offsets is not None
        with torch.autocast(states.device.type, enabled=False):
            # Unsafe: a check of the offsets would wait for the GPU.
            total = torch.segment_reduce(states.squeeze(0).float(), "sum", offsets=self.offsets, axis=0, unsafe=True)
            return total / self.offsets.diff()[:, None].clamp(min=1)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Continue with the first token of each text, (N, 1, H) of (B, T, H), padded or packed: a forward pre-hook."""
        return tuple(self.take(a) if isinstance(a, Tensor) and a.ndim == 3 else a for a in args)

    def take(self, states: Tensor) -> Tensor:
        """The first token of each text."""
        if self.starts is not None:
            return states.squeeze(0).index_select(0, self.starts)[:, None]
        # A copy: as a view, the next linear layer would go through a batched product with a copy of its weights a text.
        return states[:, :1].contiguous()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Reduce what the encoder gives of a packed batch to the first token of each text: a forward hook."""
        if self.starts is None:
            return None
        if isinstance(output, Tensor):
            return self.take(output)
        output.last_hidden_state = self.take(output.last_hidden_state)
        return output


def why_not_packed(base: Base) -> str | None:
    """Say why batches for this model cannot be packed; None where they can."""
    kind, architecture = base.model.config.model_type, base.architecture
    if architecture is None:
        return f"architecture '{kind}' is not in the table (models/architectures.py)"
    if base.reads_last:
        return f"the attention of architecture '{kind}' is causal"
    if not architecture.packs:
        return f"architecture '{kind}' computes attention by code of its own"
    if base.own_head:
        return "the head is of your own, and may read all tokens"
    if any(isinstance(module, _BatchNorm) for module in base.model.modules()):
        return "batch normalization would count places without a text"
    if getattr(base.model.config, "classifier_pooling", "cls") != "cls":
        return "the head reads the mean of all tokens"
    return None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, no_mask)
