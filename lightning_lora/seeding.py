"""Independent random streams from one seed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for the named stream ("head", "adapter", "order", ...), a fixed function of both.

    Streams are kept apart so that one choice does not move another: a model with another adapter
    still starts from the same head and sees the same rows in the same order.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def torch_stream(seed: int, stream: str) -> Iterator[None]:
    """Runs the block with torch's generators at the start of the named stream, then puts them back."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(stream_seed(seed, stream))
        yield
