"""Data parallel training: Lightning's DDP strategy, and how its processes are begun and ended."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_lora
from lightning_lora.errors import UserError
from lightning_lora.processes import follow

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
#: Seconds that the others have to end by themselves after one of the processes has failed.
PATIENCE_S = 10
_FOLLOWER = "LIGHTNING_LORA_FOLLOWER"
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def device_count(trainer: Any) -> int:
    """Return the devices of all nodes that the trainer's settings ask for.

    Raises:
        UserError: This machine does not have them; or torchrun has started another number of processes.
    """
    devices, nodes, accelerator = trainer["devices"], int(trainer["num_nodes"]), trainer["accelerator"]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        if nodes < 1:
            raise ValueError("at least one machine is needed")
        count = nodes * Trainer(accelerator=accelerator, devices=devices, **quiet).num_devices
    except (MisconfigurationException, TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"trainer.devices {devices}, num_nodes {nodes}, accelerator {accelerator}: {' '.join(str(error).split())}; "
            "--trainer.accelerator auto takes what this machine has"
        ) from error
    started = int(os.environ.get("WORLD_SIZE", "0"))
    if started and started != count:
        raise UserError(
            f"trainer.devices: {started} processes were started, but the trainer is to have {count} devices; give "
            "--trainer.devices (a machine) and --trainer.num_nodes as they were started"
        )
    return count


def strategy_for(trainer: dict[str, Any], words: Sequence[str]) -> "DataParallel | str":
    """The strategy for a trainer's settings, of which one of ``STRATEGIES`` is the strategy.

    Args:
        trainer: Its settings.
        words: Those of the command.

    Raises:
        UserError: As ``device_count``.
    """
    if device_count(trainer) == 1:
        return "auto"
    return DataParallel(words, trainer["strategy"] == "ddp_find_unused_parameters_true")


class DataParallel(DDPStrategy):
    """DDP whose processes end together, whichever of them is killed.

    Args:
        words: The words of the command, with which the others are begun where neither torchrun nor SLURM does.
        find_unused: Look for weights that a step does not use.
    """

    def __init__(self, words: Sequence[str], find_unused: bool) -> None:
        # No module here has buffers that change in training, so none have to be sent before each step.
        super().__init__(find_unused_parameters=find_unused, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.words = list(words)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes, self.words)


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, but for two things.

    The others are begun with the words of this command, not with those of the process, which may be at another
    (``ablate`` and ``compare`` begin commands of their own). And when one fails, this process is not killed at once: it
    learns of it from the connection, writes its record and says so.
    """

    #: The processes that this one has begun.
    begun: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, environment: Any, num_processes: int, num_nodes: int, words: list[str]) -> None:
        super().__init__(environment, num_processes, num_nodes)
        self.words = words

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Begins the others, where nothing else has, and calls the function."""
        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise UserError(f"trainer.devices, trainer.num_nodes: {str(error).strip()}") from error
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch, args=(self.begun,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        cluster = self.cluster_environment
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
        os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = str(cluster.node_rank()), str(cluster.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)
        here = str(Path(lightning_lora.__file__).parents[1])
        paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        for rank in range(1, self.num_processes):
            environment = {**os.environ, "LOCAL_RANK": str(rank), "PYTHONPATH": os.pathsep.join(paths), _FOLLOWER: "1"}
            command = [sys.executable, "-m", "lightning_lora", *self.words]
            # Standard input is a line of life: it ends when this process does, however it ends.
            self.begun.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))


def follow_the_leader() -> None:
    """Writes and prints nothing from here on, and ends when the process that has begun this one has ended."""
    follow()
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process
    if os.environ.get(_FOLLOWER):
        line = os.dup(0)  # a number of its own, as others may use standard input

        def wait() -> None:
            while os.read(line, 1):
                pass
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def end_followers(well: bool) -> None:
    """Waits for the processes that this one has begun; where it has not ended well, ends them."""
    end = time.monotonic() + (PATIENCE_S * 3 if well else 0)
    while Launcher.begun:
        follower = Launcher.begun.pop()
        try:
            follower.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            follower.kill()
            follower.wait()
        if follower.stdin is not None:
            with contextlib.suppress(OSError):
                follower.stdin.close()
        if not Launcher.begun:  # another run of this process begins its own
            if dist.is_initialized():
                dist.destroy_process_group()
            for name in _VARIABLES:
                os.environ.pop(name, None)


def _watch(begun: list[subprocess.Popen]) -> None:
    """Ends this process if one of the others has failed, and this one has not ended by itself some time later."""
    while not any(process.poll() for process in list(begun)):
        time.sleep(1)
    time.sleep(PATIENCE_S)
    if begun:  # not waited for yet: this process is stuck in a talk with one that is gone
        print("a process of this run has ended; ending the others", file=sys.stderr, flush=True)
        for process in begun:
            process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
