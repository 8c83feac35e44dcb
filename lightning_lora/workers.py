"""Processes that share tasks: by locks in a folder that all see, on this machine, on several, or on a Ray cluster.

Whoever holds a task's lock does it. A lock dies with its process, so what a killed process has left is done by another
one. On a filesystem without locks nothing is held: two processes may then do the same task.

On Ray the nodes must see the tasks' folder and the data at the same paths and have this package. Ray chooses the node
of a worker and starts it again where its node is lost; what the lost one held is done by whoever gets its lock.
"""

import contextlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning_lora.children import join_children, last_error, start_child
from lightning_lora.errors import BusyError, UserError, first_line
from lightning_lora.files import POLL_S, locked_folder
from lightning_lora.interrupts import StopRequest
from lightning_lora.program import install_line

EXECUTORS = ("local", "ray")
#: How often Ray starts a worker again whose process or node was lost.
RETRIES = 3
#: The folder, beside what the tasks make, that holds a folder to lock for each task under way.
CLAIMS = ".claims"

Item = TypeVar("Item")


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Hold a task for this process.

    Args:
        folder: The folder that the processes share.
        name: The task's.

    Raises:
        BusyError: Another process holds it.
    """
    claim = folder / CLAIMS / name
    with ExitStack() as stack:
        while True:
            try:
                claim.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked_folder(claim, f"another process holds {name}"))
                break
            except (FileNotFoundError, FileExistsError):  # who held it has just removed it
                continue
        yield
        # While it is held, and only now that the task is done: who gets hold of it later checks that first.
        with contextlib.suppress(OSError):
            claim.rmdir()
            claim.parent.rmdir()


def share_tasks(tasks: Iterable[Item], folder: Path, name: Callable[[Item], str], do: Callable[[Item], None]) -> None:
    """Do the tasks that no other process does, and wait until the others are done.

    Args:
        tasks: All tasks.
        folder: The folder that the processes share.
        name: Gives a task's name.
        do: Does a task that this process holds, or returns at once where it is done already.
    """
    left = list(tasks)
    while left:
        busy = []
        for task in left:
            try:
                with claimed(folder, name(task)):
                    do(task)
            except BusyError:
                busy.append(task)
        if left := busy:
            time.sleep(POLL_S)


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and where.

    Args:
        count: Workers; None means one, or as many as a Ray cluster has room for.
        executor: One of ``EXECUTORS``.
        address: Of a Ray cluster; None means one of this machine that ends with the command.
        cpus: CPUs of its Ray node that a worker takes.
        gpus: GPUs of it; None means one where the cluster has any.
        one_gpu_each: Whether workers of this machine take one GPU each, in turn.

    Raises:
        UserError: They do not go together, or Ray is not installed.
    """

    count: int | None = None
    executor: str | None = None
    address: str | None = None
    cpus: float = 1
    gpus: float | None = 0
    one_gpu_each: bool = True

    def __post_init__(self) -> None:
        if self.executor not in (None, *EXECUTORS):
            raise UserError(f"--executor: '{self.executor}' is not one of {', '.join(EXECUTORS)}")
        if self.address and not self.on_ray:
            raise UserError("--address: only --executor ray has one; leave it out")
        if self.count is not None and self.count < 1:
            raise UserError(f"--workers: 1 or more are needed, got {self.count}")
        if self.on_ray:
            import_ray(self.address)

    @property
    def on_ray(self) -> bool:
        """Whether they run on a Ray cluster."""
        return self.executor == "ray"

    @property
    def alone(self) -> bool:
        """Whether the command's own process is the only worker."""
        return not self.on_ray and (self.count or 1) == 1

    def run(self, work: Callable[[], int | None], tasks: int, watch: Callable[[], None]) -> list[str]:
        """Have each worker call a function; return the errors of those that failed.

        Args:
            work: The function, which can be pickled; it takes the tasks that it does from ``share_tasks``.
            tasks: How many tasks there are: more workers make no sense.
            watch: Called again and again in the meantime, to show progress.

        Raises:
            UserError: There is no Ray cluster at the address, or it has no node with what a worker needs.
        """
        if not self.on_ray:
            return _run_here(work, min(self.count or 1, tasks), self.one_gpu_each, watch)
        with ray_cluster(self.address) as ray:
            gpus = self.gpus if self.gpus is not None else float("GPU" in ray.cluster_resources())
            room = room_for(ray.nodes(), self.cpus, gpus)
            needs = {"num_cpus": self.cpus, "num_gpus": gpus}
            return _run_on_ray(ray, work, int(min(tasks, self.count or room)), needs, watch)


def _run_here(work: Callable[[], int | None], count: int, one_gpu_each: bool, watch: Callable[[], None]) -> list[str]:
    import torch

    threads = max(1, torch.get_num_threads() // count)
    gpus = torch.cuda.device_count() if one_gpu_each else 0
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{number}.txt" for number in range(count)]
        processes = []
        for number, output in enumerate(outputs):
            output.touch()
            own = {"CUDA_VISIBLE_DEVICES": visible[number % gpus]} if gpus > 1 else {}
            processes.append(start_child(partial(work_with_threads, work, threads), output, own))
        ended = zip(join_children(processes, watch), outputs, strict=True)
        return [_failure(status, output.read_text(encoding="utf-8")) for status, output in ended if status]


def work_with_threads(work: Callable[[], int | None], threads: int) -> int | None:
    """Do a local worker's work with its share of the threads; what it starts inherits it."""
    import torch

    os.environ |= {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    torch.set_num_threads(threads)
    with StopRequest().listening():
        return work()


def _run_on_ray(
    ray: Any, work: Callable[[], int | None], count: int, needs: Mapping[str, float], watch: Callable[[], None]
) -> list[str]:
    here, failures = str(Path.cwd()), []

    def task() -> tuple[int, str]:
        from lightning_lora.cli import exit_status

        os.chdir(here)
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            status = exit_status(work)
        return status, text.getvalue()

    remote = ray.remote(**needs, max_retries=RETRIES)(task)
    running = [remote.remote() for _ in range(count)]
    while running:
        ready, running = ray.wait(running, num_returns=1, timeout=POLL_S)
        for each in ready:
            try:
                status, text = ray.get(each)
            except ray.exceptions.RayError as error:
                failures.append(f"a worker was lost {RETRIES + 1} times (is memory short?): {first_line(error)}")
            else:
                failures += [_failure(status, text)] if status else []
        watch()
    return failures


def _failure(status: int, text: str) -> str:
    error = last_error(text, status)
    return f"a worker {error}" if error.startswith("ended with") else error


def room_for(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> float:
    """Return how many workers the nodes of a Ray cluster have room for.

    Raises:
        UserError: They have none, for which Ray would wait for ever, or the needs are no numbers from 0 on.
    """
    if not all(0 <= count < math.inf for count in (cpus, gpus)):
        raise UserError(f"--cell_cpus, --cell_gpus: numbers from 0 on are needed, got {cpus} and {gpus}")
    alive = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    needs = {name: count for name, count in {"CPU": cpus, "GPU": gpus}.items() if count}
    room = sum(min((node.get(name, 0) // count for name, count in needs.items()), default=math.inf) for node in alive)
    if not room:
        largest = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in alive)
        raise UserError(f"--executor ray: a worker needs {cpus:g} CPU, {gpus:g} GPU, but the nodes have {largest}")
    return room


def import_ray(address: str | None) -> Any:
    """Import Ray, for the cluster at an address, or for one of this machine alone.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports its use to nobody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address is None:  # Ray reads this when it is imported: a cluster of one's own listens on loopback only
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--executor ray: needs Ray; {install_line('scale')}") from error
    return ray


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Join the Ray cluster at an address, or without one start a cluster that ends with the block.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    ray = import_ray(address)
    started = not ray.is_initialized()
    if started:
        try:
            # "local", as without an address Ray would join any cluster that it finds.
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--address: no Ray cluster at '{address}' ({first_line(error)})") from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
