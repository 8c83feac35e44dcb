"""A run whose data and base model were typed as relative paths, used from another folder."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_lora import load_run
from lightning_lora.cli import main
from tests.conftest import make_rows, write_csv


def test_a_run_is_tested_predicts_and_exports_from_another_folder_and_after_a_move(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    write_csv(home / "rows.csv", make_rows(80))
    shutil.copytree(tiny_base, home / "base")
    words = ["--model.base_model", "base", "--data.source", "rows.csv", "--data.max_length", "32", "--name", "a"]
    config = home / "a.yaml"
    config.write_text("trainer: {max_epochs: 1, accelerator: cpu}\n")
    assert main(["fit", "--config", str(config), *words]) == 0
    assert main(["test", "--run", "logs/a"]) == 0
    (first,) = json.loads(Path("logs/a/run.json").read_text())["evaluations"].values()
    text = ["The service was good and the room was clean."]
    expected = load_run("logs/a", accelerator="cpu").predict(text).probabilities

    monkeypatch.chdir(away)
    shutil.move(home / "logs" / "a", away / "moved")
    assert main(["test", "--run", "moved"]) == 0
    _, second = json.loads(Path("moved/run.json").read_text())["evaluations"].values()
    assert second["after"] == first["after"] and second["fingerprint"] == first["fingerprint"]
    assert (load_run("moved", accelerator="cpu").predict(text).probabilities == expected).all()
    assert main(["export", "--run", "moved", "--formats", "[adapter]"]) == 0

    (home / "rows.csv").unlink()
    capsys.readouterr()
    assert main(["test", "--run", "moved"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: data.source: no file or folder 'rows.csv'") and said.count("\n") == 1
    assert main(["predict", "--run", "moved", *text]) == 0  # which needs no rows

    write_csv(away / "other.csv", make_rows(80))
    shutil.move(home / "base", away / "other")
    assert main(["test", "--run", "moved", "--data.source", "other.csv", "--model.base_model", "other"]) == 0
    third = [*json.loads(Path("moved/run.json").read_text())["evaluations"].values()][2]
    assert third["after"] == first["after"]
