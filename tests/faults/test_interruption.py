"""Killed, signalled, damaged: a run goes on and comes to what it would have come to, bit for bit."""

import csv
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.conftest import KINDS, make_rows, write_csv, write_kind
from tests.faults.processes import Run, kill_at_the_end, kill_in_rotation, kill_in_write, slow_steps

#: Dropout everywhere, two epochs, validation within them, accumulated steps: what is hard to go on with.
SETTINGS = {
    "model": {"learning_rate": 5e-3, "frozen_dropout": True, "adapter": {"dropout": 0.1}},
    "data": {"max_length": 24, "batch_size": 4},
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "precision": "32-true",
        "accumulate_grad_batches": 2,
        "val_check_interval": 0.5,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}


@pytest.fixture(scope="module")
def place(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its data, and an undisturbed run."""
    folder = tmp_path_factory.mktemp("interruption")
    write_csv(folder / "rows.csv", make_rows(200))
    return undisturbed(folder, make_base("bert"), {"source": str(folder / "rows.csv")})


def undisturbed(folder: Path, base: Path, data: dict[str, object], **model: object) -> Path:
    """Writes the config of rows with further settings, and runs it."""
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    settings["model"] |= {"base_model": str(base), **model}
    settings["data"] |= {**data, "cache_dir": str(folder / "cache")}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    run = begin(folder, "undisturbed", folder)
    assert run.wait() == 0, run.text()
    return folder


def begin(place: Path, name: str, logs: Path, *words: str, **more) -> Run:
    given = ["fit", "--config", str(place / "run.yaml"), "--name", name, "--logs_dir", str(logs), *words]
    return Run(given, logs / f"{name}.txt", **more)


def go_on(run: Path, **more) -> Run:
    return Run(["fit", "--resume", str(run)], run.parent / f"{run.name}.txt", **more)


def same(run: Path, other: Path) -> None:
    """The two runs came to the same weights, states, metrics, logs and predictions, and left the same files."""
    for name in ("best.ckpt", "last.ckpt"):
        one, two = (torch.load(r / "checkpoints" / name, weights_only=True) for r in (run, other))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert plain(one.get(key)) == plain(two.get(key)), (name, key)
    records = [json.loads((r / "run.json").read_text()) for r in (run, other)]
    for record in records:
        for split in record["data"]["splits"].values():
            split.pop("from_cache", None)  # the first run of all has tokenized, the others have not
    for key in ("status", "metrics", "best", "steps", "model", "data"):
        assert records[0][key] == records[1][key], key
    for key in ("train_rows", "train_tokens"):
        assert records[0]["costs"][key] == records[1]["costs"][key], key
    assert logged(run) == logged(other)
    for file in ("splits.parquet", "predictions/val.parquet"):
        assert pq.read_table(run / file).equals(pq.read_table(other / file))
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if "events.out" not in p.name} for r in (run, other)]
    assert names[0] == names[1]


def plain(value: object) -> object:
    """Nested values with tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def logged(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: (int(row["step"]), sorted(row)))


def test_a_run_repeats_bit_for_bit(place: Path, tmp_path: Path) -> None:
    run = begin(place, "again", tmp_path)
    assert run.wait() == 0, run.text()
    same(tmp_path / "again", place / "undisturbed")


def finish(run: Path) -> str:
    """Goes on until the run has finished; what was said."""
    again = go_on(run)
    assert again.wait() == 0, again.text()
    return again.text()


def kill_trial(place: Path, logs: Path, number: int, seconds: float) -> None:
    """A run that is killed, perhaps again while it goes on, and then comes to the undisturbed end."""
    rng = random.Random(number)
    name = f"killed-{number}"
    environment = {"TMPDIR": "/dev/shm"} if number % 2 and Path("/dev/shm").is_dir() else {}
    kind = ("moment", "moment", "moment", "write", "rotation")[number % 5]
    if kind == "moment":
        run = begin(place, name, logs, environment=environment)
        run.wait_for((logs / name).exists)
        run.process.join(rng.uniform(0, seconds))
        run.signal(signal.SIGKILL)
    else:
        hook = kill_in_write if kind == "write" else kill_in_rotation
        run = begin(place, name, logs, hook=hook, argument=rng.randint(1, 12), environment=environment)
    run.wait()
    if number % 3 == 0:
        again = go_on(logs / name, environment=environment)
        again.process.join(rng.uniform(0, seconds))
        again.signal(signal.SIGKILL)
        again.wait()
    finish(logs / name)
    same(logs / name, place / "undisturbed")
    shutil.rmtree(logs / name)


def duration(place: Path, logs: Path) -> float:
    """Seconds that a run takes here from its folder on."""
    import time

    run = begin(place, "timed", logs)
    run.wait_for((logs / "timed").exists)
    started = time.monotonic()
    assert run.wait() == 0, run.text()
    return time.monotonic() - started


@pytest.mark.parametrize("number", [0, 3, 4])
def test_a_killed_run_goes_on_bit_for_bit(place: Path, tmp_path: Path, number: int) -> None:
    kill_trial(place, tmp_path, number, 2.0)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_of_each_kind_go_on_bit_for_bit(kind: str, make_base, tmp_path: Path) -> None:
    """Thresholds and temperature, the scale of numbers and pairs included."""
    more = {"threshold": "per_label", "calibrate": True} if kind == "multi_label" else {}
    undisturbed(tmp_path, make_base("bert"), write_kind(tmp_path / "rows.csv", kind, 200), **more)
    for number in (0, 3, 4):
        kill_trial(tmp_path, tmp_path, number, 2.0)


@pytest.mark.faults
def test_fifty_kills(place: Path, tmp_path: Path) -> None:
    seconds = duration(place, tmp_path)
    for number in range(50):
        kill_trial(place, tmp_path, number, seconds)


def test_a_run_that_is_killed_behind_its_last_step_needs_no_more_training(place: Path, tmp_path: Path) -> None:
    run = begin(place, "run", tmp_path, hook=kill_at_the_end)
    run.wait()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    assert "continued from 36 steps" in finish(tmp_path / "run")
    same(tmp_path / "run", place / "undisturbed")


def signal_trial(place: Path, logs: Path, number: int, steps: int) -> None:
    """A run that is asked to stop saves that step and ends in time with the signal's status."""
    import time

    name = f"signalled-{number}"
    chosen = (signal.SIGTERM, signal.SIGINT)[number % 2]
    run = begin(place, name, logs, hook=slow_steps, argument=10)
    rows = logs / name / "checkpoints" / "last.ckpt"
    run.wait_for(rows.exists)
    run.process.join(steps * 0.02)
    asked = time.monotonic()
    run.signal(chosen)
    status = run.wait(30)
    if status != 0:  # it may have finished before
        assert time.monotonic() - asked < 10
        assert status == 128 + chosen, run.text()
        assert "resume with: python main.py fit --resume" in run.text()
        assert json.loads((logs / name / "run.json").read_text())["status"] == "interrupted"
        finish(logs / name)
    same(logs / name, place / "undisturbed")
    shutil.rmtree(logs / name)


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(place: Path, tmp_path: Path, number: int) -> None:
    signal_trial(place, tmp_path, number, 12)


@pytest.mark.faults
def test_twenty_signals(place: Path, tmp_path: Path) -> None:
    for number in range(20):
        signal_trial(place, tmp_path, number, random.Random(number).randint(0, 60))


def test_a_scheduler_s_warning_has_the_job_begun_again_once(place: Path, tmp_path: Path) -> None:
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "scontrol"
    stand_in.write_text(f"#!/bin/sh\necho $@ >> {called}\n")
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_NTASKS": "1"}
    run = begin(place, "job", tmp_path, hook=slow_steps, argument=10, environment=environment)
    run.wait_for((tmp_path / "job" / "checkpoints" / "last.ckpt").exists)
    run.signal(signal.SIGUSR1)
    assert run.wait(30) == 128 + signal.SIGUSR1, run.text()
    assert called.read_text() == "requeue 17\n"
    # The scheduler runs the same command again.
    again = begin(place, "job", tmp_path, environment={**environment, "SLURM_RESTART_COUNT": "1"})
    assert again.wait() == 0, again.text()
    same(tmp_path / "job", place / "undisturbed")


@pytest.fixture(scope="module")
def stopped(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two saved states."""
    logs = tmp_path_factory.mktemp("stopped")
    run = begin(place, "run", logs, hook=kill_in_rotation, argument=9)
    run.wait()
    # The rotation was cut off: what was to be the newest is still the one before.
    checkpoints = logs / "run" / "checkpoints"
    assert not (checkpoints / "last.ckpt").exists()
    (checkpoints / "last-next.ckpt").replace(checkpoints / "last.ckpt")
    return logs / "run"


def damaged(content: bytes, way: int) -> bytes:
    """The content cut off, or with one bit turned, somewhere."""
    rng = random.Random(way)
    if way % 4 == 0:
        return content[: rng.randrange(len(content))]
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


@pytest.mark.parametrize("way", [0, 1])
def test_a_damaged_state_is_left_for_the_one_before(place: Path, stopped: Path, tmp_path: Path, way: int) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    newest, before = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "last-before.ckpt"
    newest.write_bytes(damaged(newest.read_bytes(), way))
    said = finish(run)
    assert said.count("warning:") == 1 and str(newest) in said and str(before) in said
    same(run, place / "undisturbed")


def test_damage_is_found_wherever_it_is(stopped: Path, tmp_path: Path) -> None:
    """Every cut is refused; a turned bit is refused, or lies where it changes nothing."""
    from lightning_lora.errors import UserError
    from lightning_lora.runs.checkpoints import read_checkpoint

    content = (stopped / "checkpoints" / "last.ckpt").read_bytes()
    whole = plain(read_checkpoint(stopped / "checkpoints" / "last.ckpt"))
    refused = 0
    for way in range(200):
        (tmp_path / "a.ckpt").write_bytes(damaged(content, way))
        try:
            assert plain(read_checkpoint(tmp_path / "a.ckpt")) == whole and way % 4
        except UserError:
            refused += 1
    assert refused > 100


def test_where_no_state_is_whole_nothing_is_begun(stopped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    for name in ("last.ckpt", "last-before.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"")
    again = go_on(run)
    assert again.wait() == 2
    assert "no state to resume from" in again.text() and "Traceback" not in again.text()


def test_one_process_at_a_time_trains_a_run(place: Path, tmp_path: Path) -> None:
    run = begin(place, "run", tmp_path, hook=slow_steps, argument=20)
    run.wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").exists)
    second = Run(["fit", "--resume", str(tmp_path / "run")], tmp_path / "second.txt")
    assert second.wait() == 75 and "is being trained by another process" in second.text()
    assert run.wait() == 0, run.text()
    same(tmp_path / "run", place / "undisturbed")


def test_changed_data_is_not_gone_on_with(place: Path, stopped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    write_csv(tmp_path / "rows.csv", make_rows(200, seed=1))
    config["data"]["source"] = str(tmp_path / "rows.csv")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    again = go_on(run)
    assert again.wait() == 2 and "rows are not those that" in again.text()


def test_a_finished_run_is_left_alone_and_options_are_refused(place: Path, tmp_path: Path) -> None:
    done = Path(shutil.copytree(place / "undisturbed", tmp_path / "run"))
    assert "has finished already" in finish(done)
    other = Run(["fit", "--resume", str(done), "--model.learning_rate", "1"], tmp_path / "o.txt")
    assert other.wait() == 2 and "would make it another run" in other.text()


@pytest.mark.faults
def test_runs_that_begin_at_once_do_not_meet(place: Path, tmp_path: Path) -> None:
    """Twenty times two runs of the same settings, without a name, in one folder."""
    words = ["fit", "--config", str(place / "run.yaml"), "--logs_dir", str(tmp_path / "logs")]
    for number in range(20):
        runs = [Run(words, tmp_path / f"{number}-{i}.txt") for i in range(2)]
        assert [run.wait() for run in runs] == [0, 0]
    made = sorted((tmp_path / "logs").iterdir())
    assert len(made) == 40
    for run in made:
        one, two = (torch.load(r / "checkpoints/best.ckpt", weights_only=True) for r in (run, place / "undisturbed"))
        assert plain(one["state_dict"]) == plain(two["state_dict"])
