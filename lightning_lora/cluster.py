"""Cells of an ablation as tasks of a Ray cluster: Ray says which node, and tries again where a node is lost.

What a task does is what ``ablate`` does on one machine (the same folder, claims, resuming, records), so that all
nodes must see the ablation's folder and the data at the same paths. A cell whose node was lost is resumed on another
one from its last state.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_lora.errors import BusyError, UserError
from lightning_lora.files import POLL_S

#: How often Ray begins a cell again whose node or process was lost.
RETRIES = 10


def import_ray(address: str | None) -> Any:
    """The module ``ray``, for the cluster at an address, or for one of this machine alone.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells nobody of itself
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address is None:  # Ray reads this when it is imported: a cluster of one's own listens on loopback only
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--executor ray: needs Ray; pip install -c constraints.txt -e '.[scale]'") from error
    return ray


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """The module ``ray``, joined to the cluster at an address; without one to a cluster that ends with the block.

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
            said = " ".join(str(error).split())[:200]
            raise UserError(f"--address: no Ray cluster at '{address}' ({said})") from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def run_on_ray(
    names: Sequence[str],
    train: Callable[[str], str],
    address: str | None,
    needs: Mapping[str, float],
    done: Callable[[str, str], None],
) -> None:
    """Runs a task for each name, as many at once as the cluster has room for.

    Args:
        names: Of the cells.
        train: What a task does on its node: trains the cell of this name, and gives its line of progress. It is
            sent there, and raises ``BusyError`` while another process holds the cell.
        address: The cluster's; None for one on this machine that ends with this process.
        needs: CPUs and GPUs of a cell, as ``num_cpus`` and ``num_gpus``.
        done: Called here with each name and what was said, in the order in which they end.

    Raises:
        UserError: There is no cluster at the address, or it has no node with what a cell needs.
    """
    with ray_cluster(address) as ray:
        check_room(ray.nodes(), needs)
        here = str(Path.cwd())

        def task(name: str) -> str:
            os.chdir(here)
            while True:
                try:
                    return train(name)
                except BusyError:  # what a lost node has begun may still run
                    time.sleep(POLL_S)

        remote = ray.remote(**needs, max_retries=RETRIES, retry_exceptions=False)(task)
        begun = {remote.remote(name): name for name in names}
        while begun:
            (ready, *_), _ = ray.wait(list(begun), num_returns=1)
            name = begun.pop(ready)
            try:
                said = ray.get(ready)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                said = f"lost: {lines[-1]}"
            done(name, said)


def check_room(nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float]) -> None:
    """Refuses what no node could ever run, which Ray would wait for without a word.

    Raises:
        UserError: As said.
    """
    if not all(0 <= count < math.inf for count in needs.values()):
        raise UserError(f"--cell_cpus, --cell_gpus: numbers from 0 on are needed, got {[*needs.values()]}")
    having = {"num_cpus": "CPU", "num_gpus": "GPU"}
    alive = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    if not any(all(node.get(having[key], 0) >= count for key, count in needs.items()) for node in alive):
        wanted = ", ".join(f"{count:g} {having[key]}" for key, count in needs.items())
        largest = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in alive)
        raise UserError(f"--cell_cpus, --cell_gpus: a cell needs {wanted}, but the nodes have {largest}")
