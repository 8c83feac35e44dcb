"""The Parquet files that ``predict`` takes together: which they are, how they are read, what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main
from lightning_lora.data.reading import cells
from lightning_lora.inference import many_files, predict_files
from tests.inference.conftest import NEW, damaged_inputs, refusal, same, words, write_inputs


def test_chunks_end_where_they_hold_enough_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_files, "CHUNK_BYTES", 2_000_000)
    table = pa.table({"text": ["x" * 1000] * 5000})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "wide.parquet")
    (task,) = many_files.plan_files([tmp_path / "in" / "wide.parquet"], Path("out"), ["text"], [])
    chunks = [rows.table for rows in many_files.read_rows(task, ["text"])]
    assert [len(chunk) for chunk in chunks] == [2048, 2048, 904]
    assert [number for chunk in chunks for number in chunk.rows] == [*range(1, 5001)]
    assert pa.chunked_array([part for chunk in chunks for part in chunk.columns["text"].chunks]) == table["text"]


def test_other_files_of_a_folder_are_left_out_with_a_warning(place: Path, capsys: pytest.CaptureFixture) -> None:
    Path("in").mkdir()
    pq.write_table(pq.read_table(place / "in" / "part-0.parquet").slice(0, 3), "in/a.parquet")
    Path("in/more.csv").write_text("text\na fine film\n")
    assert main(words(place, source="in")) == 0
    assert "warning: --input: left out more.csv, as only .parquet files" in capsys.readouterr().err


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


def not_utf8() -> pa.Array:
    offsets, data = pa.py_buffer(np.array([0, 4, 8], np.int32)), pa.py_buffer(b"finedu\xffl")
    return pa.StringArray.from_buffers(2, offsets, data)


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
    monkeypatch.setattr(many_files, "CHUNK_ROWS", 16)
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
    monkeypatch.setattr(predict_files, "load_planned", None)  # no model is loaded
    write_inputs(Path("in"), files=2, rows=4)
    pq.write_table(pa.table({"text": BLANK["null"]}), "in/z.parquet")
    assert main(words(place, "--bad_rows", "error", source="in")) == 2
    assert "in/z.parquet, row 21, column 'text': a text is needed, got null" in refusal(capsys)
    assert not Path("out").exists()


def test_damaged_pages_are_said_of_their_file(place: Path, capsys: pytest.CaptureFixture) -> None:
    damaged_inputs()
    assert main(words(place, source="in", output="out")) == 2
    assert "in/part-0.parquet: not a readable Parquet file" in refusal(capsys)
    assert [path.name for path in Path("out").glob("*.parquet")] == ["part-1.parquet"]


def test_a_pattern_leaves_its_own_output_out(place: Path, capsys: pytest.CaptureFixture) -> None:
    Path("data").mkdir()
    write_inputs(Path("data/in"), files=2, rows=4)
    for there in (False, True):
        assert main(words(place, source="data/*/*.parquet", output="data/labels")) == 0
        said = capsys.readouterr().err
        assert "8 rows in 2 files in data/labels" in said and ("(2 of them were there)" in said) == there


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
    elif kind == "numbers":
        pq.write_table(pa.table({"text": [5, 6]}), "in/a.parquet")
    elif kind == "doubled":
        pq.write_table(pa.Table.from_arrays([["a"], [1], [2]], names=["text", "n", "n"]), "in/a.parquet")
    elif kind == "good":
        pq.write_table(pa.table(good), "in/a.parquet")


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("empty", ["--input", "in", "--output", "out"], "--input: no file matches 'in/*.parquet'"),
        ("text", ["--input", "in", "--output", "out"], "--input: no file matches 'in/*.parquet'"),
        ("good", ["--input", "no/*.parquet", "--output", "out"], "no file matches 'no/*.parquet'"),
        ("text", ["--input", "in/*", "--output", "out"], "'in/notes.txt' matches, but only .parquet files"),
        ("damaged", ["--input", "in", "--output", "out"], "in/a.parquet: not a readable Parquet file"),
        ("twice", ["--input", "in/*/*.parquet", "--output", "out"], "would have the same output, a.parquet"),
        ("column", ["--input", "in", "--output", "out"], "in/a.parquet: no column 'text'; it has: body"),
        (
            "numbers",
            ["--input", "in", "--output", "out"],
            "in/a.parquet: column 'text' holds int64, but texts are needed",
        ),
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
    prepare_wrong(kind)
    assert main(["predict", "--run", str(place / "run"), *given]) == 2
    assert said in refusal(capsys)
    assert not Path("out").exists()
