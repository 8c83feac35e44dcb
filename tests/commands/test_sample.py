import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder
from tests.commands.test_fit_test_predict import fitted  # noqa: F401  # a run that was fitted and tested


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_a_sample_shows_rows_as_they_are_and_counts_the_hits(fitted: RunFolder, wide, capsys) -> None:  # noqa: F811
    capsys.readouterr()
    assert main(["sample", "--run", str(fitted.path), "--n", "12"]) == 0
    out = capsys.readouterr().out
    rows = pq.read_table(fitted.path / "predictions" / "test.parquet").to_pylist()
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert f"of all {len(rows)} test rows {hits} are right ({hits / len(rows):.2%})" in out
    assert f"{out.count('✓ hit')} of these 12 are right" in out
    assert out.count("✓ hit") + out.count("✗ miss") == 12
    source = (fitted.path.parents[1] / "rows.csv").read_text().splitlines()
    shown = 0
    for row in rows:
        text, label = source[row["row"] - 1].rsplit(",", 1)
        assert label == row["label"]
        shown += text in out
    assert shown == 12


def test_validation_rows_are_those_of_the_best_checkpoint_where_it_was_validated(fitted, tmp_path, capsys) -> None:  # noqa: F811
    run = Path(shutil.copytree(fitted.path, tmp_path / "run"))
    table = pq.read_table(run / "predictions" / "val.parquet")
    index = table.column_names.index("prediction")
    wrong = ["neg" if label == "pos" else "pos" for label in table.column("label").to_pylist()]
    pq.write_table(table.set_column(index, "prediction", [wrong]), run / "predictions" / "val-best.parquet")
    record = RunFolder(run).read()
    record["evaluations"]["val"] = {"fingerprint": record["data"]["splits"]["val"]["fingerprint"]}
    RunFolder(run).write(record)
    assert main(["sample", "--run", str(run), "--split", "val"]) == 0
    assert f"of all {len(table)} val rows 0 are right" in capsys.readouterr().out


def test_another_seed_shows_other_rows_and_the_same_seed_the_same(fitted: RunFolder, wide, capsys) -> None:  # noqa: F811
    def sample(seed: int) -> str:
        capsys.readouterr()
        assert main(["sample", "--run", str(fitted.path), "--seed", str(seed), "--n", "5"]) == 0
        return capsys.readouterr().out

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(("only", "sign", "other"), [("hits", "✓", "✗"), ("misses", "✗", "✓")])
def test_only_hits_or_only_misses(fitted: RunFolder, tmp_path: Path, wide, capsys, only, sign, other) -> None:  # noqa: F811
    run = Path(shutil.copytree(fitted.path, tmp_path / "run"))
    table = pq.read_table(run / "predictions" / "test.parquet")
    wrong = ["neg" if p == "pos" else "pos" for p in table.column("prediction").to_pylist()[:4]]
    index = table.column_names.index("prediction")
    values = [*wrong, *table.column("prediction").to_pylist()[4:]]
    pq.write_table(table.set_column(index, "prediction", [values]), run / "predictions" / "test.parquet")
    capsys.readouterr()
    assert main(["sample", "--run", str(run), "--only", only, "--n", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count(sign) == 3 and other not in out


def test_a_run_that_was_not_tested_says_what_to_type(fitted: RunFolder, tmp_path: Path, capsys) -> None:  # noqa: F811
    run = Path(shutil.copytree(fitted.path, tmp_path / "run"))
    (run / "predictions" / "test.parquet").unlink()
    assert main(["sample", "--run", str(run)]) == 2
    assert f"python main.py test --run {run}" in capsys.readouterr().err


def test_rows_are_those_of_the_weights_and_the_data_of_the_run(fitted: RunFolder, tmp_path, capsys) -> None:  # noqa: F811
    """Not those of an evaluation before training went on, nor of one on another file."""
    run = RunFolder(Path(shutil.copytree(fitted.path, tmp_path / "run")))
    record = run.read()
    first = record["evaluations"].pop("test")
    record["evaluations"] = {"test": {**first, "fingerprint": "other"}, "test-2": first}
    run.write(record)
    shutil.copy(run.path / "predictions" / "test.parquet", run.path / "predictions" / "test-2.parquet")
    (run.path / "predictions" / "test.parquet").write_text("of other rows")
    assert main(["sample", "--run", str(run.path)]) == 0
    record["best"]["step"] += 1
    run.write(record)
    assert main(["sample", "--run", str(run.path)]) == 2
    assert (
        f"has not predicted the test rows; run first: python main.py test --run {run.path}" in capsys.readouterr().err
    )


def test_a_source_that_has_changed_is_not_shown_for_what_was_tested(fitted: RunFolder, tmp_path: Path, capsys) -> None:  # noqa: F811
    import yaml

    run = Path(shutil.copytree(fitted.path, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    lines = Path(config["data"]["source"]).read_text().splitlines()
    flipped = [line.replace(",neg", ",x").replace(",pos", ",neg").replace(",x", ",pos") for line in lines[1:]]
    Path("changed.csv").write_text("\n".join([lines[0], *flipped]) + "\n")
    config["data"]["source"] = "changed.csv"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["sample", "--run", str(run)]) == 2
    assert "the source has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--n", "0"], ["--only", "some"], []])
def test_words_that_make_no_sense_are_one_line(fitted: RunFolder, capsys, words: list[str]) -> None:  # noqa: F811
    run = ["--run", str(fitted.path)] if words else []
    assert main(["sample", *run, *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_it_needs_no_torch(fitted: RunFolder) -> None:  # noqa: F811
    import subprocess
    import sys

    code = (
        "import sys, json; from lightning_lora.cli import main; main(sys.argv[1:]); "
        "print(json.dumps([m for m in ('torch', 'lightning', 'transformers', 'datasets') if m in sys.modules]))"
    )
    words = [sys.executable, "-c", code, "sample", "--run", str(fitted.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(done.stdout.strip().splitlines()[-1]) == []
