"""Several processes that train one model: which of them writes, and what they tell each other.

All of it does nothing, and costs nothing, where there is one process. Imports no torch before there are several.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


_following = False


def started_to_follow() -> bool:
    """Whether torchrun, SLURM's srun or this project's launcher have started this process behind another one.

    That says nothing yet: srun also starts processes that have nothing to do with each other.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] != "0"
    ranks = [os.environ[name] for name in ("LOCAL_RANK", "NODE_RANK") if name in os.environ]
    return any(rank != "0" for rank in ranks or [os.environ.get("SLURM_PROCID", "0")])


def follow() -> None:
    """From here on another process leads."""
    global _following  # noqa: PLW0603  # a process is one or the other
    _following = True


def is_leader() -> bool:
    """Whether this process is the one that makes the run's folder, writes into it and prints."""
    return not _following


def count() -> int:
    """Processes that have met; 1 before."""
    if not _met():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def agreed(*numbers: float) -> list[float]:
    """The largest of each number over all processes, which must all ask at the same point."""
    return _reduced(numbers, "MAX")


def total(*numbers: float) -> list[float]:
    """The sum of each number over all processes, which must all ask at the same point."""
    return _reduced(numbers, "SUM")


def mean(value: "Tensor") -> "Tensor":
    """The mean of a tensor over all processes, which must all ask at the same point; does not wait for a GPU."""
    if count() == 1:
        return value
    import torch.distributed as dist

    value = value / count()
    dist.all_reduce(value)
    return value


def gathered(value: Any) -> list[Any]:
    """The value of each process, in the order of their ranks, for all of them."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_group())
    return values


def _met() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _reduced(numbers: Sequence[float], how: str) -> list[float]:
    if count() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, getattr(dist.ReduceOp, how), group=_group())
    return values.tolist()


_groups: dict[Any, Any] = {}


def _group() -> Any:
    """A group that talks through the CPU: a word between steps must not wait for a GPU's queue."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo")
    return _groups[world]
