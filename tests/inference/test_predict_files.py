"""``predict`` over many Parquet files: each row once, in its place, whatever ends and whoever else is at it."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.claims import claimed
from lightning_lora.cli import main
from lightning_lora.data.reading import cells
from lightning_lora.inference import file_predictor as predictor
from lightning_lora.inference import many_files, predict_files
from tests.conftest import fit_tiny, make_rows
from tests.faults.processes import Run, kill_in_rows

FILES = 5
NEW = ["prediction", "probability", "p(neg)", "p(pos)"]
ROWS = 50  # a file: more than three chunks of 16


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, ``run``, and Parquet files, ``in``; nothing in it is changed."""
    place = tmp_path_factory.mktemp("many")
    fit_tiny(place, tiny_base)
    write_inputs(place / "in")
    (place / "in" / "_SUCCESS").touch()
    return place


def write_inputs(folder: Path, files: int = FILES, rows: int = ROWS) -> None:
    """Files of texts of all lengths, with columns of several types beside them."""
    folder.mkdir()
    texts = [text for text, _ in make_rows(files * rows, seed=3)]
    for i in range(files):
        numbers = range(i * rows, (i + 1) * rows)
        table = {
            "id": pa.array(numbers, pa.int32()),
            "text": texts[i * rows : (i + 1) * rows],
            "tags": [[str(n)] * (n % 3) or None for n in numbers],
            "kind": pa.array([f"k{n % 4}" for n in numbers]).dictionary_encode(),
        }
        pq.write_table(pa.table(table), folder / f"part-{i}.parquet")


def words(place: Path, *more: str, source: str | None = None, output: str = "out") -> list[str]:
    return ["predict", "--run", str(place / "run"), "--input", source or str(place / "in"), "--output", output, *more]


def whole(place: Path, output: Path = Path("out")) -> list[pa.Table]:
    """The outputs, each with the rows of its input in their order, and nothing beside them."""
    names = [f"part-{i}.parquet" for i in range(FILES)]
    assert sorted(path.name for path in output.iterdir()) == names
    tables = [pq.read_table(output / name) for name in names]
    for name, table in zip(names, tables, strict=True):
        source = pq.read_table(place / "in" / name)
        assert table.column_names == ["text", *NEW, "id", "tags", "kind"]
        for column in source.column_names:
            assert table[column].to_pylist() == source[column].to_pylist()
            assert table.schema.field(column).type == source.schema.field(column).type
    return tables


@pytest.fixture(scope="module")
def expected(place: Path) -> list[pa.Table]:
    """What ``predict`` gives for one file after the other."""
    tables = []
    for i in range(FILES):
        output = place / f"one-{i}.parquet"
        assert main(words(place, source=str(place / "in" / f"part-{i}.parquet"), output=str(output))) == 0
        tables.append(pq.read_table(output))
    return tables


def same(found: list[pa.Table], expected: list[pa.Table]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["prediction"].to_pylist() == other["prediction"].to_pylist()
        for name in ("probability", "p(neg)", "p(pos)"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def refusal(capsys: pytest.CaptureFixture, status: int = 2) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error:") for line in lines) == 1, lines
    return lines[-1]


def small_pieces(count: int = 0) -> None:
    """Hook: files go through in several chunks, and each takes a while."""
    predictor.CHUNK_ROWS = 16
    predicted = predict_files.FilePredictor._predicted

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(count / 1000)
        return predicted(self, *args)

    predict_files.FilePredictor._predicted = slow  # type: ignore[method-assign]


def noted(milliseconds: int) -> None:
    """Hook: who predicts which file is written down."""
    small_pieces(milliseconds)
    write = predict_files.FilePredictor.write

    def note(self: Any, task: Any, *args: Any) -> None:
        with Path("written.txt").open("a") as file:
            file.write(f"{os.getpid()} {task.source.name}\n")
        write(self, task, *args)

    predict_files.FilePredictor.write = note  # type: ignore[method-assign]


def test_each_file_has_the_rows_that_predict_gives_for_it_alone(
    place: Path, expected: list[pa.Table], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(predictor, "CHUNK_ROWS", 16)
    assert main(words(place)) == 0
    assert "250 rows in 5 files in out" in capsys.readouterr().err
    same(whole(place), expected)
    assert pq.ParquetFile("out/part-0.parquet").num_row_groups == 4
    written = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    monkeypatch.setattr(predict_files.FilePredictor, "__init__", None)  # the model is not loaded for nothing
    assert main(words(place, source=str(place / "in" / "*.parquet"))) == 0
    assert "(5 of them were there)" in capsys.readouterr().err
    assert written == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}


def test_chunks_end_where_they_hold_enough_bytes(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 1000] * 5000})
    pq.write_table(table, tmp_path / "wide.parquet")
    with many_files.open_flat(tmp_path / "wide.parquet") as file:
        pieces = list(many_files.read_pieces(file, 4096, 2_000_000))
    assert [piece.num_rows for piece in pieces] == [2048, 2048, 904]
    assert pa.concat_tables(pieces) == table


def test_texts_of_several_columns_and_of_another_name(place: Path, capsys: pytest.CaptureFixture) -> None:
    Path("in").mkdir()
    texts = pq.read_table(place / "in" / "part-0.parquet")["text"].to_pylist()[:3]
    parts = [text.split(" ", 1) for text in texts]
    parts += [[None, texts[0]], [texts[1], ""], [" ", None]]
    table = {"n": range(6), "head": [part[0] for part in parts], "rest": [part[1] for part in parts]}
    table["prediction"] = ["an earlier one"] * 6
    pq.write_table(pa.table(table), "in/a.parquet")
    pq.write_table(pa.table({name: values[:0] for name, values in table.items()}), "in/b.parquet")
    assert main(words(place, "--data.text_column", "[head,rest]", source="in")) == 0
    found = pq.read_table("out/a.parquet")
    assert found.column_names == ["head", "rest", *NEW, "n", "prediction_input"]
    assert found.select(["n", "head", "rest"]).equals(pq.read_table("in/a.parquet").select(["n", "head", "rest"]))
    said = capsys.readouterr().err
    assert said.count("warning: columns") == 1 and "kept: 'prediction' as 'prediction_input'" in said
    assert "1 of 6 rows have no text" in said and "in/a.parquet, row 6 " in said
    Path("texts.txt").write_text("\n".join([*texts, *texts[:2]]))
    assert main(words(place, source="texts.txt", output="alone.parquet")) == 0
    alone = pq.read_table("alone.parquet")
    same([found.slice(0, 5)], [alone])
    single = words(place, "--text_column", "[head,rest]", source="in/a.parquet", output="single.parquet")
    assert main(single) == 0
    assert pq.read_table("single.parquet").schema.equals(found.schema)
    empty = pq.read_table("out/b.parquet")
    assert len(empty) == 0 and empty.column_names == found.column_names


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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data.max_length", "16"], "made with data.max_length '32', not '16'; give another folder"),
        (["--checkpoint", "other.ckpt"], "made with weights"),
        (["--text_column", "kind"], "made with text_column '['text']', not '['kind']'; give another folder"),
    ],
)
def test_outputs_of_other_settings_are_not_mixed(
    place: Path, more: list[str], said: str, capsys: pytest.CaptureFixture, expected: list[pa.Table]
) -> None:
    import torch

    checkpoint = torch.load(place / "run" / "checkpoints" / "best.ckpt", weights_only=False)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name] + 1
    torch.save(checkpoint, "other.ckpt")
    shutil.copytree(place / "in", "in")
    Path("in/part-4.parquet").unlink()
    assert main(words(place, source="in")) == 0
    shutil.copy(place / "in" / "part-4.parquet", "in")
    written = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert main(words(place, *more, source="in")) == 2
    assert said in refusal(capsys)
    assert written == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}


def test_outputs_of_another_input_are_not_mixed(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_inputs(Path("in"), files=2, rows=8)
    assert main(words(place, source="in")) == 0
    table = pq.read_table("in/part-1.parquet")
    texts = ["a" + text[1:] for text in table["text"].to_pylist()]  # as many rows, as many bytes
    pq.write_table(table.set_column(1, "text", [texts]), "in/part-1.parquet")
    assert main(words(place, source="in")) == 2
    assert "out/part-1.parquet was made from another part-1.parquet than in/part-1.parquet; remove it" in refusal(
        capsys
    )
    shutil.copy("in/part-0.parquet", "out/part-1.parquet")
    assert main(words(place, source="in")) == 2
    assert "out/part-1.parquet is there and was not made by predict" in refusal(capsys)


def test_outputs_with_columns_of_an_earlier_version_are_not_mixed(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_inputs(Path("in"), files=2, rows=8)
    assert main(words(place, source="in")) == 0
    Path("out/part-0.parquet").unlink()
    table = pq.read_table("out/part-1.parquet")
    renamed = table.rename_columns(["review", *table.column_names[1:]]).replace_schema_metadata(table.schema.metadata)
    pq.write_table(renamed, "out/part-1.parquet")
    assert main(words(place, source="in")) == 2
    assert "out/part-1.parquet has the columns review, prediction" in refusal(capsys)
    assert not Path("out/part-0.parquet").exists()


def not_utf8() -> pa.Array:
    offsets, data = pa.py_buffer(np.array([0, 4, 8], np.int32)), pa.py_buffer(b"finedu\xffl")
    return pa.StringArray.from_buffers(2, offsets, data)


def test_a_column_of_numbers_is_named_and_other_files_are_done(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_inputs(Path("in"), files=2, rows=4)
    pq.write_table(pa.table({"text": pa.array([5, 6])}), "in/bad.parquet")
    assert main(words(place, source="in")) == 2
    said = refusal(capsys)
    assert "bad.parquet, row 1, column 'text': a text is needed, got 5; the column holds int64" in said
    assert sorted(path.name for path in Path("out").glob("*.parquet")) == ["part-0.parquet", "part-1.parquet"]


BLANK = {
    "null": pa.array(["fine"] * 20 + [None]),
    "blank": pa.array(["fine", " \t\u200b"]),
    "not UTF-8": not_utf8(),
    "all null": pa.array([None, None]),
    "all blank": pa.array(["", " "]),
}


@pytest.mark.parametrize(("kind", "workers"), [*((kind, []) for kind in BLANK), ("null", ["--workers", "2"])])
def test_rows_without_a_text_stay_and_are_counted(
    place: Path, kind: str, workers: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "CHUNK_ROWS", 16)
    column = BLANK[kind]
    write_inputs(Path("in"), files=1, rows=4)
    pq.write_table(pa.table({"text": column, "n": range(len(column))}), "in/bad.parquet")
    assert main(words(place, *workers, source="in")) == 0
    found = pq.read_table("out/bad.parquet")
    empty = [i for i, text in enumerate(cells(column)) if text != "fine"]
    assert [i for i, name in enumerate(found["prediction"].to_pylist()) if name is None] == empty
    assert [i for i, p in enumerate(found["p(pos)"].to_pylist()) if p is None] == empty
    assert found["n"].to_pylist() == list(range(len(column)))
    for _ in range(2):  # also where the output was there already
        said = capsys.readouterr().err
        assert f"warning: {len(empty)} of {len(column) + 4} rows have no text" in said
        assert f"in/bad.parquet, row {empty[0] + 1}" in said
        assert main(words(place, *workers, source="in")) == 0


def test_rows_without_a_text_are_refused_where_asked_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_files.FilePredictor, "__init__", None)  # no model is loaded
    write_inputs(Path("in"), files=2, rows=4)
    pq.write_table(pa.table({"text": BLANK["null"]}), "in/z.parquet")
    assert main(words(place, "--bad_rows", "error", source="in")) == 2
    assert "in/z.parquet, row 21, column 'text': a text is needed, got null" in refusal(capsys)
    assert not Path("out").exists()


def test_damaged_pages_are_said_of_their_file(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_inputs(Path("in"), files=2, rows=40)
    content = bytearray(Path("in/part-0.parquet").read_bytes())
    content[40:400] = bytes(360)
    Path("in/part-0.parquet").write_bytes(content)
    assert main(words(place, source="in", output="out")) == 2
    assert "in/part-0.parquet: not a readable Parquet file" in refusal(capsys)
    assert [path.name for path in Path("out").glob("*.parquet")] == ["part-1.parquet"]


def prepare_wrong(kind: str) -> None:
    Path("in").mkdir()
    good = {"text": ["fine", "dull"]}
    if kind == "text":
        Path("in/notes.txt").write_text("x")
    elif kind == "damaged":
        Path("in/a.parquet").write_bytes(b"PAR1 nothing")
    elif kind == "twice":
        for name in ("in/x", "in/y"):
            Path(name).mkdir()
            pq.write_table(pa.table(good), f"{name}/a.parquet")
    elif kind == "column":
        pq.write_table(pa.table({"body": ["fine"]}), "in/a.parquet")
    elif kind == "doubled":
        pq.write_table(pa.Table.from_arrays([["a"], [1], [2]], names=["text", "n", "n"]), "in/a.parquet")
    else:
        pq.write_table(pa.table(good), "in/a.parquet")


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("empty", ["--input", "in", "--output", "out"], "in holds no"),
        ("text", ["--input", "in", "--output", "out"], "no .parquet files in in (it holds notes.txt)"),
        ("good", ["--input", "no/*.parquet", "--output", "out"], "no file matches 'no/*.parquet'"),
        ("text", ["--input", "in/*", "--output", "out"], "'in/notes.txt' matches, but only .parquet files"),
        ("damaged", ["--input", "in", "--output", "out"], "in/a.parquet: not a readable Parquet file"),
        ("twice", ["--input", "in/*/*.parquet", "--output", "out"], "would have the same output, a.parquet"),
        ("column", ["--input", "in", "--output", "out"], "in/a.parquet: no column 'text'; it has: body"),
        ("doubled", ["--input", "in", "--output", "out"], "column 'n' is duplicated"),
        ("good", ["--input", "in", "--output", "in"], "lies in the folder of the input"),
        ("good", ["--input", "in", "--output", "in/labels"], "lies in the folder of the input"),
        ("good", ["--input", "in", "--output", "in/a"], "lies in the folder of the input"),
        ("good", ["--input", "in", "--output", "out.parquet"], "a folder is needed"),
        ("good", ["--input", "in"], "a folder is needed"),
        ("good", ["--input", "in", "--output", "out", "--format", "csv"], "are Parquet files; leave it out"),
        ("good", ["--input", "in", "--output", "out", "--workers", "0"], "--workers: 1 or more are needed, got 0"),
        ("good", ["--input", "in", "--output", "out", "--executor", "dask"], "'dask' is not one of local, ray"),
        ("good", ["--input", "in", "--output", "out", "--address", "x"], "--address: only --executor ray has one"),
        ("good", ["--input", "in/a.parquet", "--workers", "2"], "--workers: only for many input files"),
        ("good", ["a text", "--executor", "ray"], "--executor: only for many input files"),
        ("good", ["a text", "--trainer.devices", "2"], "predict runs on one device; --workers shares many files"),
    ],
)
def test_wrong_words_are_one_line(
    place: Path, kind: str, given: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    if kind == "empty":
        Path("in").mkdir()
        said = "no .parquet files in in (it holds nothing)"
    else:
        prepare_wrong(kind)
    assert main(["predict", "--run", str(place / "run"), *given]) == 2
    assert said in refusal(capsys)
    assert not Path("out").exists()


def test_without_ray_it_says_how_to_get_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words(place, "--executor", "ray")) == 2
    assert "needs Ray; pip install -c constraints.txt -e '.[scale]'" in refusal(capsys)


def peak(count: int) -> None:
    """Hook: says the peak of the process's memory at its end."""
    from lightning_lora.evaluation.costs import peak_memory_mb

    predictor.CHUNK_ROWS = count
    run = predict_files.run_files

    def measured(cli: Any) -> int:
        status = run(cli)
        print(json.dumps(peak_memory_mb()))
        return status

    predict_files.run_files = measured


def test_a_pattern_leaves_its_own_output_out(place: Path, capsys: pytest.CaptureFixture) -> None:
    Path("data").mkdir()
    write_inputs(Path("data/in"), files=2, rows=4)
    for there in ("", "(2 of them were there)"):
        assert main(words(place, source="data/*/*.parquet", output="data/labels")) == 0
        said = capsys.readouterr().err
        assert "8 rows in 2 files in data/labels" in said and there in said


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
        write_inputs(Path("in"), files=2, rows=4)
        pq.write_table(pa.table({"text": pa.array([5, 6])}), "in/bad.parquet")
        assert main(words(place, "--executor", "ray", source="in", output="other")) == 2
        assert "in/bad.parquet, row 1, column 'text': a text is needed, got 5" in refusal(capsys)
        assert len(list(Path("other").glob("*.parquet"))) == 2
    finally:
        ray.shutdown()


def work_but_for_one(job: Any) -> None:
    """A worker whose process ends at one of the files."""
    write = predict_files.FilePredictor.write

    def end(self: Any, task: Any, *args: Any) -> None:
        if task.source.name == "part-1.parquet":
            os._exit(1)
        write(self, task, *args)

    predict_files.FilePredictor.write = end  # type: ignore[method-assign]
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
