"""Data parallel training: Lightning's DDP strategy, in processes that torchrun starts and ends together."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import lightning_lora
from lightning_lora.errors import UserError
from lightning_lora.processes import become_nonzero_rank

#: Holds the process that started this one: once it has been killed, the parent is another.
_LAUNCHER = "LIGHTNING_LORA_LAUNCHER"


def data_parallel(strategy: str) -> DDPStrategy:
    """Return Lightning's strategy for several devices, by its name there; "auto" is "ddp"."""
    find_unused = strategy == "ddp_find_unused_parameters_true"
    # No module here has buffers that change in training, so none have to be sent before each step.
    known = signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    return DDPStrategy(find_unused_parameters=find_unused, **options)


def run_processes(words: Sequence[str], count: int, num_nodes: int) -> int | None:
    """Run a command in a process for each device, where neither torchrun nor SLURM has started these.

    All end when one of them fails, and a signal to this process is passed on.

    Args:
        words: The command and its options.
        count: The devices of all machines, more than one.
        num_nodes: The machines.

    Returns:
        The exit status; None where the command is to run in this process.

    Raises:
        UserError: Several machines are asked for, or SLURM has started another number of processes.
    """
    launched = "WORLD_SIZE" in os.environ
    if not launched and SLURMEnvironment.detect():
        launched, tasks = True, int(os.environ["SLURM_NTASKS"])
        if tasks != count:  # one process would train on one device, and the others would idle
            raise UserError(
                f"trainer.devices: {count} devices, but SLURM has {tasks} tasks; start with srun --ntasks={count}"
            )
    if launched:
        threading.Thread(target=_end_with_launcher, daemon=True).start()
        return None
    if num_nodes > 1:
        raise UserError("trainer.num_nodes: several machines need a launcher: torchrun, or SLURM's srun")
    here = str(Path(lightning_lora.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    logging.disable()  # each process says itself why it ends
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)("-m", "lightning_lora", *words)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_LAUNCHER]
    return 0


def silence_nonzero_rank() -> None:
    """Write and print nothing from here on."""
    become_nonzero_rank()
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process


def _end_with_launcher() -> None:
    """Have this process save and stop when its launcher is killed, which passes no signal on.

    Its own launcher may have been killed while this process was still importing.
    """
    launcher = int(os.environ.get(_LAUNCHER, os.getppid()))
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
