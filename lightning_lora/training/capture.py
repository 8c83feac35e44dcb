"""Capturing a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback


def capture(function: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """Capture what a function launches, without running it; return what runs it.

    Args:
        function: Works on tensors that keep their addresses.
        pool: Memory that graphs share, as by ``torch.cuda.graph_pool_handle``; None for memory of its own.
        device: Of the tensors.

    Raises:
        RuntimeError: Something in the function cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            function()
    except Exception as error:
        # torch leaves the generator of random numbers in the state of a capture (2.11, 2.13: "Offset increment outside
        # graph capture"), in which nothing draws from it any more; its copy is not in it.
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())
        raise error.__context__ or error from None
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def ours(thing: Any, *packages: str) -> bool:
    """Whether a class or function is of this package, or of the given ones: then what it does in a capture is known."""
    return bool(thing.__module__.startswith(("lightning_lora.", *packages)))


def callback_is_ours(callback: Any) -> bool:
    """Whether a callback is of this package or of Lightning, and calls nothing else."""
    called = (
        [value for value in vars(callback).values() if callable(value)] if isinstance(callback, LambdaCallback) else []
    )
    return all(ours(thing, "lightning.") for thing in (type(callback), *called))
