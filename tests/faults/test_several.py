"""Several processes that train one model come to what one comes to, and end together."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.conftest import KINDS, make_rows, write_csv, write_kind
from tests.faults.processes import Run, few_steps, slow_steps
from tests.faults.test_interruption import SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config without dropout, rows that no number of processes divides, and a run of one process."""
    folder = tmp_path_factory.mktemp("several")
    write_csv(folder / "rows.csv", make_rows(203))
    return run_of_one(folder, make_base, {"source": str(folder / "rows.csv")})


def run_of_one(folder: Path, make_base, data: dict[str, object], **model: object) -> Path:
    """Writes the config of rows with further settings, and runs it by one process."""
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    base = make_base("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings["model"] = {"learning_rate": 5e-3, "base_model": str(base), **model}
    settings["data"] |= {**data, "cache_dir": str(folder / "cache")}
    settings["trainer"]["max_epochs"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    run = Run(words(folder, "one", folder), folder / "one.txt")
    assert run.wait() == 0, run.text()
    return folder


def words(place: Path, name: str, logs: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(place / "run.yaml"), "--name", name, "--logs_dir", str(logs), *more]


def begin(given: list[str], output: Path, count: int, **more) -> list[Run]:
    """The processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "NODE_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    runs = []
    for rank in range(count):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        runs.append(Run(given, output.with_name(f"{output.name}-{rank}.txt"), environment=environment, **more))
    return runs


def ended(runs: list[Run], seconds: float = 120) -> list[int]:
    end = time.monotonic() + seconds
    return [run.wait(max(0.1, end - time.monotonic())) for run in runs]


def alike(run: Path, other: Path) -> None:
    """Weights and metrics are equal but for rounding, counts and names of files are equal."""
    for name in ("best.ckpt", "last.ckpt"):
        one, two = (torch.load(r / "checkpoints" / name, weights_only=True) for r in (run, other))
        assert one["state_dict"].keys() == two["state_dict"].keys() and one["global_step"] == two["global_step"]
        for key, value in one["state_dict"].items():
            torch.testing.assert_close(value, two["state_dict"][key], rtol=1e-4, atol=1e-5)
    records = [json.loads((r / "run.json").read_text()) for r in (run, other)]
    assert records[0]["metrics"].keys() == records[1]["metrics"].keys()
    for name, value in records[0]["metrics"].items():
        assert value == pytest.approx(records[1]["metrics"][name], rel=1e-5, abs=1e-5), name
    for key in ("train_rows", "train_tokens"):
        assert records[0]["costs"][key] == records[1]["costs"][key], key
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if "events.out" not in p.name} for r in (run, other)]
    assert names[0] == names[1]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_several_processes_come_to_what_one_comes_to(place: Path, tmp_path: Path, count: int) -> None:
    runs = begin(words(place, "run", tmp_path, "--trainer.devices", str(count)), tmp_path / "out", count)
    assert ended(runs) == [0] * count, runs[0].text()
    alike(tmp_path / "run", place / "one")
    said = [run.text() for run in runs]
    assert f"{count} processes share the 4 texts of a batch" in said[0]
    assert not any("run folder" in text for text in said[1:])
    speed = json.loads((tmp_path / "run" / "run.json").read_text())["speed"]
    assert (speed["processes"], speed["nodes"]) == (count, 1)


@pytest.mark.faults
def test_several_processes_share_packed_batches(place: Path, tmp_path: Path) -> None:
    more = ("--model.speedups.packing", "true", "--trainer.devices", "3")
    runs = begin(words(place, "three", tmp_path, *more), tmp_path / "out", 3)
    assert ended(runs) == [0] * 3, runs[0].text()
    alike(tmp_path / "three", place / "one")


def test_several_processes_train_as_long_as_one_does(place: Path, tmp_path: Path) -> None:
    """As many epochs as their rows take for enough steps, stopped at the same validation pass, within an epoch."""
    more = ("--trainer.max_epochs", "null", "--data.val_size", "100", "--model.learning_rate", "0")
    one = Run(words(place, "one", tmp_path, *more), tmp_path / "one.txt", hook=few_steps, argument=60)
    assert one.wait() == 0, one.text()
    given = words(place, "two", tmp_path, "--trainer.devices", "2", *more)
    runs = begin(given, tmp_path / "out", 2, hook=few_steps, argument=60)
    assert ended(runs) == [0] * 2, runs[0].text()
    alike(tmp_path / "two", tmp_path / "one")
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert records[0]["length"] == records[1]["length"] and records[0]["length"]["by"] == "rule"
    assert records[0]["stopped_by"] == records[1]["stopped_by"] is not None
    assert records[0]["steps"] == records[1]["steps"] < records[0]["length"]["steps"]


@pytest.mark.faults
def test_several_processes_share_batches_by_tokens(place: Path, tmp_path: Path) -> None:
    """Steps of unlike numbers of texts, in two parts each, some of fewer texts than processes."""
    more = ("--data.batch_by", "tokens", "--data.max_length", "48")
    one = Run(words(place, "one", tmp_path, *more), tmp_path / "one.txt")
    assert one.wait() == 0, one.text()
    runs = begin(words(place, "three", tmp_path, "--trainer.devices", "3", *more), tmp_path / "out", 3)
    assert ended(runs) == [0] * 3, runs[0].text()
    alike(tmp_path / "three", tmp_path / "one")


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_train_and_test_each_kind_as_one_does(kind: str, make_base, tmp_path: Path) -> None:
    """Thresholds and temperature are chosen on the validation rows of all, as the scale of numbers on training rows."""
    more: dict[str, object] = {"threshold": "per_label", "calibrate": True} if kind == "multi_label" else {}
    more |= {"pooling": "mean"} if kind == "regression" else {}  # else nearly one number, which has no correlation
    place = run_of_one(tmp_path, make_base, write_kind(tmp_path / "rows.csv", kind, 203), **more)
    (tmp_path / "two").mkdir()
    runs = begin(words(place, "run", tmp_path / "two", "--trainer.devices", "2"), tmp_path / "out", 2)
    assert ended(runs) == [0] * 2, runs[0].text()
    alike(tmp_path / "two" / "run", place / "one")
    tested_alike(place, tmp_path)


@pytest.mark.faults
def test_several_processes_test_as_one_does(place: Path, tmp_path: Path) -> None:
    """Each row is counted once, also where the last batch cannot be divided, before and after training."""
    tested_alike(place, tmp_path)


def tested_alike(place: Path, tmp_path: Path) -> None:
    """The run of one process has the same test metrics and predictions by one process and by three."""
    evaluated = []
    tmp_path = tmp_path / "tested"
    tmp_path.mkdir()
    for name, more in (("one", ()), ("three", ("--trainer.devices", "3"))):
        shutil.copytree(place / "one", tmp_path / name)
        run = Run(["test", "--run", str(tmp_path / name), *more], tmp_path / f"{name}.txt")
        assert run.wait() == 0, run.text()
        record = json.loads((tmp_path / name / "run.json").read_text())
        table = pq.read_table(tmp_path / name / "predictions" / "test.parquet")
        evaluated.append((record["evaluations"]["test"], table))
    (one, table), (three, other) = evaluated
    for when in ("before", "after", "thresholds"):
        assert one.get(when, {}) == pytest.approx(three.get(when, {}), rel=1e-5, abs=1e-4)
    assert one["rows"] == three["rows"] and one["rows"] % 3
    for column in table.column_names:
        values, others = table[column].to_pylist(), other[column].to_pylist()
        assert values == (pytest.approx(others, rel=1e-5, abs=1e-5) if isinstance(values[0], float) else others)


def stop_trial(place: Path, logs: Path, number: int) -> None:
    """One of two processes is killed or signalled; both end in time, and the run goes on to the same weights."""
    rng = random.Random(number)
    name = f"stopped-{number}"
    runs = begin(words(place, name, logs, "--trainer.devices", "2"), logs / name, 2, hook=slow_steps, argument=20)
    runs[0].wait_for((logs / name / "checkpoints" / "last.ckpt").exists)
    runs[0].process.join(rng.uniform(0, 1.5))
    chosen = (signal.SIGTERM, signal.SIGKILL)[number % 2]
    asked = time.monotonic()
    runs[number // 2 % 2].signal(chosen)
    statuses = ended(runs, 30)
    assert time.monotonic() - asked < 30
    if chosen == signal.SIGTERM:
        assert statuses in ([143, 143], [0, 0]), runs[0].text()
    else:
        assert all(statuses) or statuses.count(0) == 1, runs[0].text()
    again = begin(["fit", "--resume", str(logs / name)], logs / f"{name}-again", 2)
    assert ended(again) == [0, 0], again[0].text()
    alike(logs / name, place / "one")
    shutil.rmtree(logs / name)


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.faults), 3])
def test_when_one_process_ends_the_other_does(place: Path, tmp_path: Path, number: int) -> None:
    stop_trial(place, tmp_path, number)


@pytest.mark.faults
def test_ten_ends(place: Path, tmp_path: Path) -> None:
    for number in range(10):
        stop_trial(place, tmp_path, number)


def test_a_step_that_would_spoil_the_weights_is_done_by_none_of_them(place: Path, tmp_path: Path) -> None:
    given = words(place, "run", tmp_path, "--trainer.devices", "2", "--model.learning_rate", "1e30")
    runs = begin(given, tmp_path / "out", 2)
    assert ended(runs) == [2, 2], runs[0].text()
    said = runs[0].text()
    assert "is not finite" in said and str(tmp_path / "run" / "checkpoints" / "stopped.ckpt") in said
    rows = said.split("look at its rows")[1].split(": ")[1].split(")")[0]
    assert len(rows.split(", ")) == 8  # of both processes


def test_what_was_started_and_what_was_asked_for_must_agree(place: Path, tmp_path: Path) -> None:
    runs = begin(words(place, "run", tmp_path), tmp_path / "out", 2)
    assert ended(runs) == [2, 2]
    assert "2 processes were started, but the trainer is to have 1" in runs[0].text()


def test_rows_are_enough_for_all(place: Path, tmp_path: Path) -> None:
    run = Run(words(place, "run", tmp_path, "--trainer.devices", "8"), tmp_path / "out.txt")
    assert run.wait() == 2 and "4 texts a step cannot be shared by 8 devices" in run.text()
    run = Run(words(place, "sharded", tmp_path, "--trainer.devices", "2", "--trainer.strategy", "fsdp"), tmp_path / "o")
    assert run.wait() == 2 and "trainer.strategy: 'fsdp' is not one of" in run.text()


@pytest.mark.faults
def test_a_run_begins_and_ends_its_own_processes(place: Path, tmp_path: Path) -> None:
    """One command, no torchrun: stopped, killed, gone on with; nothing is left running."""
    given = words(place, "run", tmp_path, "--trainer.devices", "2")
    states = tmp_path / "run" / "checkpoints" / "last.ckpt"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ['SLOW'] != '0':\n    from lightning_lora.training import saving\n"
        "    from tests.faults.processes import slow_steps\n    saving.SHARE = 1e9\n    slow_steps(100)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    for attempt, chosen in enumerate((signal.SIGTERM, signal.SIGKILL, None)):
        current = given if not attempt else ["fit", "--resume", str(tmp_path / "run")]
        environment["SLOW"] = "1" if chosen else "0"
        run = Run(current, tmp_path / f"{attempt}.txt", environment=environment)
        begun = states.stat().st_mtime_ns if attempt else 0
        run.wait_for(lambda begun=begun: states.exists() and states.stat().st_mtime_ns > begun, 120)
        begun_processes = psutil.Process(run.process.pid).children(recursive=True)
        assert len(begun_processes) == 2
        if chosen:
            run.signal(chosen)
        assert run.wait() == {signal.SIGTERM: 143, signal.SIGKILL: -9, None: 0}[chosen], run.text()
        assert not psutil.wait_procs(begun_processes, timeout=30)[1]
    alike(tmp_path / "run", place / "one")


@pytest.mark.faults
def test_two_hosts(place: Path, tmp_path: Path) -> None:
    """torchrun on two hosts that only a network connects: two network namespaces."""

    def ip(*given: str) -> bool:
        return subprocess.run(["ip", *given], capture_output=True, check=False).returncode == 0

    hosts = ("ll-test-0", "ll-test-1")
    try:
        if not (shutil.which("ip") and all(ip("netns", "add", host) for host in hosts)):
            pytest.skip("network namespaces need root and iproute2")
        assert ip("link", "add", "ll0", "netns", hosts[0], "type", "veth", "peer", "name", "ll0", "netns", hosts[1])
        processes = []
        for rank, host in enumerate(hosts):
            assert ip("-n", host, "addr", "add", f"10.213.7.{rank + 1}/24", "dev", "ll0")
            assert ip("-n", host, "link", "set", "ll0", "up") and ip("-n", host, "link", "set", "lo", "up")
            command = ["ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=ll0", "OMP_NUM_THREADS=1"]
            command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
            command += ["--node_rank", str(rank), "--master_addr", "10.213.7.1", "--master_port", "29555"]
            more = ("--trainer.devices", "2", "--trainer.num_nodes", "2")
            command += [str(ROOT / "main.py"), *words(place, "run", tmp_path, *more)]
            with (tmp_path / f"{host}.txt").open("w") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output))
        assert [process.wait(300) for process in processes] == [0, 0], (tmp_path / f"{hosts[0]}.txt").read_text()
    finally:
        for host in hosts:
            ip("netns", "del", host)
    alike(tmp_path / "run", place / "one")
    assert "4 processes on 2 machines share" in (tmp_path / f"{hosts[0]}.txt").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["speed"]["nodes"] == 2


@pytest.mark.faults
def test_torchrun_is_asked_to_stop_and_goes_on(place: Path, tmp_path: Path) -> None:
    """The launcher itself, which passes a signal on to its processes, and ends what it began."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from lightning_lora.cli import main\nfrom lightning_lora.training import saving\n"
        "from tests.faults.processes import slow_steps\n"
        "saving.SHARE = 1e9\nslow_steps(100)\nsys.exit(main(sys.argv[1:]))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29561"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = [*launcher, str(script), *words(place, "run", tmp_path, "--trainer.devices", "2")]
    with (tmp_path / "out.txt").open("w") as output:
        process = subprocess.Popen(given, stdout=output, stderr=output, env=environment)
        state, end = tmp_path / "run" / "checkpoints" / "last.ckpt", time.monotonic() + 120
        while not state.exists() and process.poll() is None:
            assert time.monotonic() < end, (tmp_path / "out.txt").read_text()
            time.sleep(0.01)
        begun = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) != 0
        assert not psutil.wait_procs(begun, timeout=10)[1]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "interrupted" and record["interrupted_by"] == "SIGTERM"
    again = [*launcher, str(ROOT / "main.py"), "fit", "--resume", str(tmp_path / "run")]
    done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads((tmp_path / "run" / "run.json").read_text())["resumed"][0]["steps"] < 51
    alike(tmp_path / "run", place / "one")


def srun(given: list[str], output: Path, count: int, environment: dict[str, str], **more) -> list[Run]:
    """The tasks of one machine, as SLURM's srun would start them: it says who they are by its variables alone."""
    common = {"SLURM_JOB_ID": "21", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": str(count), "SLURM_NNODES": "1"}
    common |= {"SLURM_NTASKS_PER_NODE": str(count), "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", **environment}
    return [
        Run(
            given,
            output.with_name(f"{output.name}-{rank}.txt"),
            environment={**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            **more,
        )
        for rank in range(count)
    ]


@pytest.mark.faults
def test_a_scheduler_warns_two_tasks_and_one_of_them_has_the_job_begun_again(place: Path, tmp_path: Path) -> None:
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    for name in ("scontrol", "srun"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(f"#!/bin/sh\necho {name} $@ >> {called}\n")
        stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    given = words(place, "job", tmp_path, "--trainer.devices", "2")
    runs = srun(given, tmp_path / "out", 2, environment, hook=slow_steps, argument=50)
    runs[0].wait_for((tmp_path / "job" / "checkpoints" / "last.ckpt").exists, 120)
    for run in runs:  # srun passes the signal on to all of its tasks
        run.signal(signal.SIGUSR1)
    assert ended(runs, 40) == [128 + signal.SIGUSR1] * 2, runs[0].text()
    assert called.read_text() == "scontrol requeue 21\n"
    again = srun(given, tmp_path / "again", 2, {**environment, "SLURM_RESTART_COUNT": "1"})
    assert ended(again) == [0, 0], again[0].text()
    assert "continued from" in again[0].text()
    alike(tmp_path / "job", place / "one")
