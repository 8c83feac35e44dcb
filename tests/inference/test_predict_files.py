"""``predict`` over many Parquet files: each row once, in its place, whatever ends and whoever else is at it."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main
from lightning_lora.inference import many_files, predict_files
from lightning_lora.workers import claimed
from tests.faults.processes import Run, kill_in_rows
from tests.inference.conftest import FILES, damaged_inputs, refusal, same, whole, words, write_inputs


def small_pieces(count: int = 0) -> None:
    """Hook: files go through in several chunks, and each takes a while."""
    many_files.CHUNK_ROWS = 16
    write = pq.ParquetWriter.write_table

    def slow(*args: Any) -> None:
        time.sleep(count / 1000)
        write(*args)

    pq.ParquetWriter.write_table = slow


def noted(milliseconds: int) -> None:
    """Hook: who predicts which file is written down."""
    small_pieces(milliseconds)
    predict = predict_files.predict_file

    def note(loaded: Any, job: Any, task: Any, advance: Any) -> None:
        with Path("written.txt").open("a") as file:
            file.write(f"{os.getpid()} {task.source.name}\n")
        predict(loaded, job, task, advance)

    predict_files.predict_file = note


def test_each_file_has_the_rows_that_predict_gives_for_it_alone(
    place: Path, expected: list[pa.Table], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(many_files, "CHUNK_ROWS", 16)
    assert main(words(place)) == 0
    assert "250 rows in 5 files in out" in capsys.readouterr().err
    same(whole(place), expected)
    assert pq.ParquetFile("out/part-0.parquet").num_row_groups == 4
    written = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    monkeypatch.setattr(predict_files, "load_planned", None)  # the model is not loaded for nothing
    assert main(words(place, source=str(place / "in" / "*.parquet"))) == 0
    assert "(5 of them were there)" in capsys.readouterr().err
    assert written == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}


@pytest.mark.parametrize("piece", [1, 10])
def test_after_a_kill_the_same_command_goes_on(
    place: Path, expected: list[pa.Table], piece: int, capsys: pytest.CaptureFixture
) -> None:
    run = Run(words(place), Path("said.txt"), hook=kill_in_rows, argument=piece)
    assert run.wait() == -signal.SIGKILL, run.text()
    done = [path for path in sorted(Path("out").iterdir()) if not path.name.startswith(".")]
    assert [path.name for path in done] == [f"part-{i}.parquet" for i in range((piece - 1) // 4)]
    assert len(list(Path("out").glob(".partial-*"))) == 1
    written = [path.stat().st_mtime_ns for path in done]
    assert main(words(place)) == 0
    same(whole(place), expected)  # and no partial file is left
    assert [path.stat().st_mtime_ns for path in done] == written


def test_processes_share_the_files(place: Path, expected: list[pa.Table]) -> None:
    runs = [Run(words(place), Path(f"said-{i}.txt"), hook=noted, argument=100) for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.text() for run in runs]
    same(whole(place), expected)
    notes = [line.split() for line in Path("written.txt").read_text().splitlines()]
    assert sorted(name for _, name in notes) == [f"part-{i}.parquet" for i in range(FILES)]
    assert {number for number, _ in notes} == {str(run.process.pid) for run in runs}


def test_what_one_of_two_had_begun_when_it_was_killed_the_other_does(place: Path, expected: list[pa.Table]) -> None:
    killed = Run(words(place), Path("killed.txt"), hook=noted, argument=3000)
    killed.wait_for(Path("written.txt").exists)
    other = Run(words(place), Path("other.txt"), hook=small_pieces)
    other.wait_for(lambda: len(list(Path("out").glob("part-*"))) == FILES - 1)
    assert other.process.is_alive()  # it waits for the last
    killed.signal(signal.SIGKILL)
    assert other.wait() == 0, other.text()
    same(whole(place), expected)


def test_sigterm_leaves_nothing_half_written(place: Path) -> None:
    run = Run(words(place), Path("said.txt"), hook=noted, argument=200)
    run.wait_for(Path("written.txt").exists)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.text()
    assert not list(Path("out").glob(".partial-*"))


def work_and_die(job: Any) -> None:
    """A worker; the first dies in its second piece of rows, the others start when it is writing."""
    try:
        Path("first").touch(exist_ok=False)
        kill_in_rows(2)
    except FileExistsError:
        end = time.monotonic() + 60
        while not list(Path("out").glob(".partial-*")) and time.monotonic() < end:
            time.sleep(0.01)
    predict_files.work(job)


def die(job: Any) -> None:
    """A worker that dies in its second piece of rows."""
    kill_in_rows(2)
    predict_files.work(job)


def test_workers_share_the_files(place: Path, expected: list[pa.Table], capsys: pytest.CaptureFixture) -> None:
    assert main(words(place, "--workers", "2")) == 0
    assert capsys.readouterr().err.strip().startswith("250 rows in 5 files in out")
    same(whole(place), expected)


def test_the_files_of_a_killed_worker_are_done_by_the_others(
    place: Path, expected: list[pa.Table], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(predict_files, "work", work_and_die)
    assert main(words(place, "--workers", "2")) == 0
    assert "a worker ended with status -9; other workers have done its files" in capsys.readouterr().err
    same(whole(place), expected)  # and what the killed one left is removed


def test_when_all_workers_are_killed_it_says_what_is_not_done(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(predict_files, "work", die)
    assert main(words(place, "--workers", "2")) == 2
    assert "a worker ended with status -9; 5 files are not done" in refusal(capsys)


def test_without_ray_it_says_how_to_get_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words(place, "--executor", "ray")) == 2
    assert "needs Ray; pip install -c constraints.txt -e '.[scale]'" in refusal(capsys)


def peak(count: int) -> None:
    """Hook: says the peak of the process's memory at its end."""
    from lightning_lora.evaluation.costs import peak_memory_mb

    many_files.CHUNK_ROWS = count
    run = predict_files.run_files

    def measured(cli: Any) -> int:
        status = run(cli)
        print(json.dumps(peak_memory_mb()))
        return status

    predict_files.run_files = measured


def test_a_claim_that_is_removed_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch) -> None:
    mkdir, failing = Path.mkdir, [FileExistsError(), FileNotFoundError()]

    def interrupted(self: Path, *args: Any, **more: Any) -> None:
        if self.name == "a.parquet" and failing:
            raise failing.pop()
        mkdir(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with claimed(tmp_path, "a.parquet"):
        assert not failing


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(place: Path) -> None:
    peaks = []
    for rows in (1_000, 20_000):
        folder = Path(f"in-{rows}")
        folder.mkdir()
        rng = random.Random(0)
        table = {"text": ["a fine film"] * rows, "payload": [rng.randbytes(8000) for _ in range(rows)]}
        pq.write_table(pa.table(table), folder / "a.parquet", row_group_size=rows)  # 8 and 160 MB in one row group
        run = Run(words(place, source=str(folder), output=f"out-{rows}"), Path(f"said-{rows}"), hook=peak, argument=256)
        assert run.wait(300) == 0, run.text()
        peaks.append(json.loads(next(x for x in run.text().splitlines() if x[0] == "{"))["peak_memory_mb"])
        assert pq.read_metadata(f"out-{rows}/a.parquet").num_rows == rows
    assert peaks[1] < peaks[0] + 40, peaks


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(
    place: Path, expected: list[pa.Table], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    assert main(words(place, source=str(place / "in" / "part-[12].parquet"))) == 0
    first = Path("out/part-1.parquet").stat().st_mtime_ns
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        assert main(words(place, "--executor", "ray")) == 0
        assert "250 rows in 5 files in out (2 of them were there)" in capsys.readouterr().err
        same(whole(place), expected)
        assert Path("out/part-1.parquet").stat().st_mtime_ns == first
        damaged_inputs()
        assert main(words(place, "--executor", "ray", source="in", output="other")) == 2
        assert "in/part-0.parquet: not a readable Parquet file" in refusal(capsys)
        assert [path.name for path in Path("other").glob("*.parquet")] == ["part-1.parquet"]
    finally:
        ray.shutdown()


def work_but_for_one(job: Any) -> None:
    """A worker whose process ends at one of the files."""
    predict = predict_files.predict_file

    def end(loaded: Any, job: Any, task: Any, advance: Any) -> None:
        if task.source.name == "part-1.parquet":
            os._exit(1)
        predict(loaded, job, task, advance)

    predict_files.predict_file = end
    predict_files.work(job)


@pytest.mark.faults
def test_a_file_that_always_ends_its_ray_worker_ends_the_command(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(predict_files, "work", work_but_for_one)
    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        assert main(words(place, "--executor", "ray")) == 2
    finally:
        ray.shutdown()
    said = refusal(capsys)
    assert "a worker was lost 4 times" in said and "4 files are not done" in said
    assert not Path("out/part-1.parquet").exists()


@pytest.mark.faults
def test_a_node_of_a_ray_cluster_is_lost_and_each_row_is_there_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes beside the head, one of which is killed while it predicts."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        write_inputs(tmp_path / "in", files=40, rows=400)
        given = words(place, "--executor", "ray", "--address", cluster.address, source="in")
        run = Run(given, tmp_path / "said.txt")
        run.wait_for(lambda: len(list(Path("out").glob("*.parquet"))) >= 2, 300)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert run.wait(400) == 0, run.text()
    finally:
        cluster.shutdown()
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(p.name for p in Path("in").iterdir())
    for source in Path("in").iterdir():
        assert pq.read_table(Path("out") / source.name)["id"].to_pylist() == pq.read_table(source)["id"].to_pylist()
    again = Run(given[: given.index("--executor")], tmp_path / "again.txt")
    assert again.wait(200) == 0 and "(40 of them were there)" in again.text()
