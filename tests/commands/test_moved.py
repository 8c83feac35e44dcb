"""A run whose data and base model were typed as relative paths, used from another folder."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

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
    capsys.readouterr()
    assert main(["sample", "--run", "moved"]) == 0

    # It stays one that can be moved where it is trained further from here.
    assert main(["fit", "--resume", "moved", "--trainer.max_epochs", "2"]) == 0
    config = yaml.safe_load(Path("moved/config.yaml").read_text())
    assert config["data"]["source"] == "rows.csv" and config["model"]["base_model"] == "base"
    assert json.loads(Path("moved/run.json").read_text())["config"] == config
    assert main(["test", "--run", "moved"]) == 0
    *_, third = json.loads(Path("moved/run.json").read_text())["evaluations"].values()

    # Other rows behind the same path are not taken for the run's.
    write_csv(away / "rows.csv", make_rows(100))
    capsys.readouterr()
    assert main(["validate", "--run", "moved"]) in (0, 2)
    said = capsys.readouterr().err
    assert "data.source of the run leads to another place" in said or "was trained" in said
    (away / "rows.csv").unlink()
    (home / "rows.csv").unlink()
    capsys.readouterr()
    assert main(["test", "--run", "moved"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: data.source: no file or folder 'rows.csv'") and said.count("\n") == 1
    assert main(["predict", "--run", "moved", *text]) == 0  # which needs no rows

    write_csv(away / "other.csv", make_rows(80))
    shutil.move(home / "base", away / "other")
    assert main(["test", "--run", "moved", "--data.source", "other.csv", "--model.base_model", "other"]) == 0
    *_, last = json.loads(Path("moved/run.json").read_text())["evaluations"].values()
    assert last["after"] == third["after"] != first["after"]
