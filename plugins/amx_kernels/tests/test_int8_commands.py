"""``--int8`` of test, validate and predict, on a model whose layers have sizes for it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score

from lightning_lora.cli import main
from lightning_lora_amx import kernels
from tests.conftest import fit_tiny, make_rows

pytestmark = pytest.mark.skipif(kernels.LIBRARY is None, reason=kernels.MISSING)


@pytest.fixture(scope="module")
def run(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in bfloat16."""
    place = tmp_path_factory.mktemp("int8")
    base = make_base("bert", hidden_size=64, num_attention_heads=2, intermediate_size=96)
    run = fit_tiny(place, base, rows=160, epochs=3, precision="bf16-mixed")
    assert main(["test", "--run", str(run), "--int8", "true"]) == 0
    return run


def test_accuracy_and_speed_stand_beside_those_without(run: Path) -> None:
    evaluation = json.loads((run / "run.json").read_text())["evaluations"]["test"]
    plain, int8 = (pq.read_table(run / "predictions" / f"{name}.parquet") for name in ("test", "test-int8"))
    for found, key in ((plain, "after"), (int8, "int8")):
        truth = accuracy_score(found["label"].to_pylist(), found["prediction"].to_pylist())
        assert evaluation[key]["accuracy"] == pytest.approx(truth)
    assert plain["row"] == int8["row"]
    assert evaluation["int8_flipped"] == np.sum(np.array(plain["prediction"]) != np.array(int8["prediction"]))
    apart = np.abs(np.array(plain["logit(pos)"]) - np.array(int8["logit(pos)"]))
    assert 0 < apart.max() < 0.2
    rate = evaluation["rows"] / evaluation["int8_s"]
    table = (run / "test.md").read_text()
    assert f"| int8 | {evaluation['int8']['accuracy']:.4f} |" in table
    assert f"({rate:.1f} texts/s, 1 of 2 layers)" in table
    low, high = evaluation["int8_accuracy_difference"]
    assert low <= evaluation["int8"]["accuracy"] - evaluation["after"]["accuracy"] <= high
    assert f"{evaluation['int8_flipped']} labels, accuracy {low:+.4f} to {high:+.4f}" in table


def test_it_is_said_where_both_lie(run: Path, capsys) -> None:
    assert main(["test", "--run", str(run), "--int8", "true", "--before", "false"]) == 0
    said = capsys.readouterr().out
    assert "test rows in int8 (1 of 2 layers)" in said and "-int8.parquet" in said


def test_validate_has_it_too(run: Path) -> None:
    assert main(["validate", "--run", str(run), "--int8", "true"]) == 0
    assert "int8" in json.loads((run / "run.json").read_text())["evaluations"]["val"]
    assert (run / "predictions" / "val-best-int8.parquet").is_file()


def test_predictions_are_those_of_test_in_int8(run: Path, tmp_path: Path) -> None:
    truth = pq.read_table(run / "predictions" / "test-int8.parquet")
    source = dict(enumerate([text for text, _ in make_rows(160)], 1))
    texts = [source[row - 1] for row in truth["row"].to_pylist()]  # its heading is row 1
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet")
    words = ["predict", "--run", str(run), "--input"]
    one, many = tmp_path / "one.parquet", tmp_path / "many"
    for more in ([], ["--int8", "true"]):
        assert main([*words, str(tmp_path / "in" / "a.parquet"), "--output", str(one), *more]) == 0
        found = pq.read_table(one)["probability"]
        if not more:
            plain = found
    assert found != plain
    np.testing.assert_allclose(np.array(found), np.array(truth["probability"]), atol=1e-6)
    assert main([*words, str(tmp_path / "in"), "--output", str(many), "--int8", "true"]) == 0
    assert pq.read_table(many / "a.parquet")["probability"] == found


def test_outputs_of_both_kinds_are_not_mixed(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["the film was fine"]}), tmp_path / "in" / "a.parquet")
    words = ["predict", "--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert main([*words, "--int8", "true"]) != 0
    assert "was made with int8" in capsys.readouterr().err


def test_a_run_that_cannot_is_refused_before_anything_is_done(run: Path, capsys) -> None:
    before = json.loads((run / "run.json").read_text())
    for command in ("test", "predict"):
        words = [command, "--run", str(run), "--int8", "true", "--trainer.precision", "32-true"]
        assert main([*words, *(["a film"] if command == "predict" else [])]) != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "--int8: " in said[0] and "bf16-mixed" in said[0]
    assert json.loads((run / "run.json").read_text()) == before
