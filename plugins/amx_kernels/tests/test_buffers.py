"""Memory is used again when nothing holds it any more, and not before."""

import threading

import torch
from torch import Tensor

from lightning_lora_amx.buffers import LEAST, Buffers

ROWS = LEAST // 64


class Keep(torch.autograd.Function):
    """Saves what it is given for its backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0].float().sum(), None


def test_a_piece_is_used_again_once_it_is_free() -> None:
    buffers = Buffers()
    first = buffers.empty(ROWS, 64)
    assert first.shape == (ROWS, 64) and first.dtype == torch.bfloat16 and first.is_contiguous()
    address = first.data_ptr()
    assert buffers.empty(ROWS, 64).data_ptr() != address  # and that one is free again at once
    view = first.view(-1, 128)[3:]
    del first
    assert all(buffers.empty(ROWS, 64).data_ptr() != address for _ in range(3))  # the view holds it
    del view
    held = [buffers.empty(ROWS - 5, 64) for _ in range(2)]
    assert address in {tensor.data_ptr() for tensor in held}
    assert held[0].shape == (ROWS - 5, 64)


def test_what_a_backward_pass_needs_is_held() -> None:
    buffers = Buffers()
    x, other = torch.ones(1, requires_grad=True), buffers.empty(ROWS, 64).fill_(1)
    address = other.data_ptr()
    out = Keep.apply(x, other)
    del other
    taken = [buffers.empty(ROWS, 64).fill_(7) for _ in range(4)]
    assert address not in {tensor.data_ptr() for tensor in taken}
    out.backward()
    assert x.grad.item() == ROWS * 64
    del out, taken
    assert address in {tensor.data_ptr() for tensor in [buffers.empty(ROWS, 64) for _ in range(6)]}


def test_a_longer_one_is_made_where_none_is_long_enough() -> None:
    buffers = Buffers()
    short = buffers.empty(ROWS, 64)
    del short
    long = buffers.empty(2 * ROWS, 64)
    assert long.shape == (2 * ROWS, 64)
    address = long.data_ptr()
    del long
    again = buffers.empty(ROWS, 64)  # new ones are as long as the longest was
    assert again.data_ptr() == address
    assert buffers.empty(ROWS, 64).untyped_storage().nbytes() == 2 * ROWS * 64 * 2


def test_small_ones_and_those_forgotten_are_the_librarys() -> None:
    buffers = Buffers()
    assert buffers.empty(2, 64).untyped_storage().nbytes() == 2 * 64 * 2
    kept = buffers.empty(ROWS, 64).fill_(3)
    buffers.forget()
    assert not any(buffers._used.values())
    buffers.empty(ROWS, 64).fill_(5)
    assert (kept == 3).all()


def test_what_was_made_while_evaluating_can_be_learnt_with() -> None:
    buffers = Buffers()
    with torch.inference_mode():
        del [buffers.empty(ROWS, 64)][:]
    x = torch.ones(1, requires_grad=True)
    Keep.apply(x, buffers.empty(ROWS, 64).fill_(0)).backward()
    assert x.grad is not None


def test_each_thread_has_its_own() -> None:
    buffers = Buffers()
    del [buffers.empty(ROWS, 64)][:]
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(len(buffers._used)))
    thread.start()
    thread.join()
    assert seen == [0] and len(buffers._used) == 1
