"""Several processes that train one model: which of them writes, and what they agree on.

All of it does nothing, and costs nothing, where there is one process. Imports no torch before there are several.
"""

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


_nonzero_rank = False


def started_with_nonzero_rank() -> bool:
    """Whether torchrun, SLURM's srun or this project's launcher have started this process with another rank than zero.

    That says nothing yet: srun also starts processes that have nothing to do with each other.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] != "0"
    ranks = [os.environ[name] for name in ("LOCAL_RANK", "NODE_RANK") if name in os.environ]
    return any(rank != "0" for rank in ranks or [os.environ.get("SLURM_PROCID", "0")])


def become_nonzero_rank() -> None:
    """Take it from here on that another process has rank zero."""
    global _nonzero_rank  # noqa: PLW0603  # a process is one or the other
    _nonzero_rank = True


def is_rank_zero() -> bool:
    """Whether this process is the one that makes the run's folder, writes into it and prints."""
    return not _nonzero_rank


def count() -> int:
    """Return the number of processes that are connected; 1 before."""
    if "torch" not in sys.modules:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_max(*numbers: float) -> list[float]:
    """Return the largest of each number over all processes, which must all ask at the same point."""
    return _reduced(numbers, "MAX")


def total(*numbers: float) -> list[float]:
    """Return the sum of each number over all processes, which must all ask at the same point."""
    return _reduced(numbers, "SUM")


def mean(value: "Tensor") -> "Tensor":
    """Return the mean of a tensor over all processes, which must all ask at the same point; needs no wait for a GPU."""
    if count() == 1:
        return value
    import torch.distributed as dist

    value = value / count()
    dist.all_reduce(value)
    return value


def gathered(value: Any) -> list[Any]:
    """Return the value of each process, in the order of their ranks, for all of them."""
    values: list[Any] = [value] * count()
    if len(values) > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value, group=_cpu_group(dist.group.WORLD))
    return values


def _reduced(numbers: Sequence[float], how: str) -> list[float]:
    if count() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, getattr(dist.ReduceOp, how), group=_cpu_group(dist.group.WORLD))
    return values.tolist()


@cache
def _cpu_group(world: Any) -> Any:
    """Return a group that communicates through the CPU, so that a number between steps does not wait for a GPU."""
    import torch.distributed as dist

    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
