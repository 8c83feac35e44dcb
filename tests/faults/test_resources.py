"""No room, no memory, no number: each ends in one line, and what was there before is still there."""

import csv
import errno
import json
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_folder, atomic_path, remove_partial, write_text
from lightning_lora.interrupts import Interrupted, StopRequest
from lightning_lora.runs.checkpoints import AtomicCheckpointIO, read_checkpoint
from lightning_lora.training.module import TextClassifier
from tests.conftest import make_rows, write_csv


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    write_csv(tmp_path / "rows.csv", make_rows(120))
    settings = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": "rows.csv", "max_length": 24, "batch_size": 8},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "a.yaml"


def fit(config: Path, *words: str) -> int:
    return main(["fit", "--config", str(config), "--name", "run", *words])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_not_done(config, monkeypatch, capsys, what: str, accumulate: int) -> None:
    """Step 4 is spoilt; the weights are those of step 3, and its rows are named."""
    step, steps_seen, weights = TextClassifier.training_step, [], {}

    def spoilt(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        if self.trainer.global_step == 3:
            steps_seen.extend(batch["rows"].tolist())
            weights.update({n: p.detach().clone() for n, p in self.named_parameters() if p.requires_grad})
            spoiler = next(p for p in self.parameters() if p.requires_grad).sum()
            if what == "loss":
                self.step_guard.losses[-1] = loss * float("nan")
                return loss * float("nan")
            return loss + (spoiler * 0).sqrt()  # finite, but its gradient is not
        return loss

    monkeypatch.setattr(TextClassifier, "training_step", spoilt)
    assert fit(config, "--trainer.accumulate_grad_batches", str(accumulate)) == 2
    said = capsys.readouterr().err
    assert f"the {what} of step 4 is not finite" in said and "rows.csv" in said
    with Path("rows.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    named = [int(n) for n in re.search(r"rows\.csv: ([\d, ]+)\)", said)[1].split(", ")]
    split = {row["row"] for row in read_splits("logs/run/splits.parquet") if row["split"] == "train"}
    assert len(named) == 8 * accumulate == len(steps_seen) and set(named) <= split and max(named) <= len(lines)
    kept = read_checkpoint(Path("logs/run/checkpoints/stopped.ckpt"))["state_dict"]
    for name, value in weights.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)
    record = json.loads(Path("logs/run/run.json").read_text())
    assert record["status"] == "failed" and "step 4" in record["error"]


def read_splits(path: str) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_says_which_setting_gives_the_same_steps(config, monkeypatch, capsys, error) -> None:
    def full(self, batch, batch_idx):
        raise error

    monkeypatch.setattr(TextClassifier, "training_step", full)
    assert fit(config) == 2
    said = capsys.readouterr().err
    assert "--data.batch_size 4 --trainer.accumulate_grad_batches 2" in said
    assert "out of memory" in json.loads(Path("logs/run/run.json").read_text())["error"]


def test_half_the_batch_with_twice_the_accumulation_comes_to_the_same_metrics(config) -> None:
    assert fit(config) == 0
    assert main(["fit", "--config", str(config), "--name", "half", "--data.batch_size", "4",
                 "--trainer.accumulate_grad_batches", "2"]) == 0  # fmt: skip
    one, two = (json.loads(Path(f"logs/{name}/run.json").read_text()) for name in ("run", "half"))
    assert one["steps"] == two["steps"]
    # Sums in another order round otherwise, and Adam's first steps make more of it where a gradient is nearly 0.
    assert two["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], abs=1e-3)
    assert two["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], abs=1e-3)


@pytest.fixture
def small_files(request: pytest.FixtureRequest):
    """No file of this process may grow beyond so many bytes, as with a quota or a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path, small_files) -> None:
    path = tmp_path / "a.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(10)}}, path)
    small_files(100_000)
    with pytest.raises(UserError) as raised:
        io.save_checkpoint({"state_dict": {"w": torch.ones(1_000_000)}}, path)
    assert str(path) in str(raised.value) and "3.8 MiB are needed" in str(raised.value)
    assert list(tmp_path.iterdir()) == [path]
    torch.testing.assert_close(read_checkpoint(path)["state_dict"]["w"], torch.ones(10))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("kind", ["file", "folder", "text"])
def test_every_kind_of_write_says_where_and_how_much(tmp_path: Path, kind: str, number: int, monkeypatch) -> None:
    path = tmp_path / "a"
    if kind == "folder":
        (tmp_path / "b").write_text("x")
    else:
        path.write_text("before")

    def full(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=re.escape(str(path)) + r" cannot be written: .* are needed"):
        if kind == "text":
            monkeypatch.setattr(Path, "write_bytes", full)
            write_text(path, "after")
        else:
            with (atomic_path if kind == "file" else atomic_folder)(path):
                full()
    assert [p.name for p in tmp_path.iterdir()] == (["b"] if kind == "folder" else ["a"])
    assert kind == "folder" or path.read_text() == "before"


@pytest.mark.parametrize("limit", [3_000, 30_000])
def test_a_run_without_room_ends_in_one_line(config, small_files, capfd, limit: int) -> None:
    assert main(["fit", "--config", str(config), "--name", "first"]) == 0  # with it the caches are filled
    files = {p: p.read_bytes() for p in Path("logs/first").rglob("*") if p.is_file()}
    capfd.readouterr()
    small_files(limit)
    status = fit(config)
    said = capfd.readouterr().err
    assert status == 2 and "cannot be written" in said and "are needed" in said and "Traceback" not in said
    assert {p: p.read_bytes() for p in Path("logs/first").rglob("*") if p.is_file()} == files
    assert not list(Path("logs").rglob(".partial-*"))


@pytest.fixture
def mounted(tmp_path: Path):
    """Mounts a filesystem of so many KiB, and mounts it again with other options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a filesystem needs root: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", [8, 40, 80, 120, 200])
def test_a_full_filesystem_ends_a_run_in_one_line(config, mounted, capfd, kilobytes: int) -> None:
    """At another write each time: from the config to the last state; what was there is there."""
    assert main(["fit", "--config", str(config), "--name", "first"]) == 0  # with it the caches are filled
    capfd.readouterr()
    logs = mounted(f"size={kilobytes}k")
    (logs / "earlier").write_text("kept")
    status = fit(config, "--logs_dir", str(logs))
    said = capfd.readouterr().err
    assert status == 2 and "No space left on device" in said and "are needed" in said and "Traceback" not in said, said
    assert (logs / "earlier").read_text() == "kept" and not list(logs.rglob(".partial-*"))
    for state in logs.rglob("*.ckpt"):
        read_checkpoint(state)


def test_a_filesystem_that_may_only_be_read_is_one_line(config, mounted, capfd) -> None:
    logs = mounted("size=4m")
    assert fit(config, "--logs_dir", str(logs)) == 0
    before = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    capfd.readouterr()
    subprocess.run(["mount", "-o", "remount,ro", str(logs)], check=True)
    for words in (["fit", "--config", str(config), "--logs_dir", str(logs)], ["test", "--run", str(logs / "run")]):
        assert main(words) == 2
        said = capfd.readouterr().err
        assert "Read-only file system" in said and str(logs) in said and "Traceback" not in said, said
    subprocess.run(["mount", "-o", "remount,rw", str(logs)], check=True)
    assert {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()} == before


def test_a_folder_that_may_not_be_written_is_one_line(config, tmp_path: Path, capsys) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    (tmp_path / "logs").mkdir(mode=0o555)
    assert fit(config) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "alive") as alive, atomic_path(tmp_path / "dead") as dead:
        name = dead.name.replace(f"-{os.getpid()}-", "-4194304-")  # more than any process number
        (tmp_path / name).touch()
        other = dead.name.replace(".partial-", ".partial-elsewhere-")
        (tmp_path / other).touch()
        remove_partial(tmp_path)
        assert alive.exists() and dead.exists() and (tmp_path / other).exists() and not (tmp_path / name).exists()


@pytest.mark.parametrize(("made_by", "make"), [("touch", atomic_path), ("mkdir", atomic_folder)])
def test_a_signal_at_the_moment_that_a_file_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_by: str, make
) -> None:
    real = getattr(Path, made_by)

    def signalled(self: Path, *args: object, **more: object) -> None:
        real(self, *args, **more)
        if self.name.startswith(".partial-"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Path, made_by, signalled)
    with pytest.raises(Interrupted), StopRequest().listening(), make(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())
