"""Comparisons of tiny arms: an experiment whose axis is the method."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score

from lightning_lora.cli import main
from lightning_lora.commands.compare import choose_arms, method_settings
from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.errors import UserError
from lightning_lora.experiments import evaluating, runner
from lightning_lora.experiments.plan import flatten
from lightning_lora.experiments.resolving import resolve
from lightning_lora.runs.checkpoints import read_checkpoint
from lightning_lora.runs.folder import RunFolder
from tests.conftest import cells_in_process, make_rows, run_in_process, write_csv

ARMS = ["none", "head", "lora", "full"]


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run."""
    found: list[list[str]] = []

    def run(commands: list[list[str]], output: Path) -> int:
        found.extend(commands)
        return run_in_process(commands, output)

    for module in (runner, evaluating):
        monkeypatch.setattr(module, "run_child", run)
    return found


def write_config(place: Path, base: Path, **more: object) -> Path:
    write_csv(place / "rows.csv", make_rows(240, ("neg", "pos", "mixed")))
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3},
        "data": {"source": str(place / "rows.csv"), "max_length": 24, "cache_dir": str(place / "cache")},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
        **more,
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def compared(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compared")
    config = write_config(place, make_base("bert"))
    words = ["--config", str(config), "--logs_dir", str(place / "logs"), "--name", "four", "--arms", *ARMS]
    with pytest.MonkeyPatch.context() as patch:
        cells_in_process(patch)
        assert main(["compare", *words, "--data.batch_size", "8"]) == 0
    return place / "logs" / "four"


def cell(folder: Path, arm: str, seed: int = 42) -> Path:
    return folder / "cells" / f"arm-{arm}__seed-{seed}"


def predictions(folder: Path, arm: str) -> dict:
    return pq.read_table(cell(folder, arm) / "predictions" / "test.parquet").to_pydict()


def test_metrics_are_those_of_scikit_learn_with_intervals_and_costs(compared: Path) -> None:
    document = json.loads((compared / "report.json").read_text())
    arms = {arm["name"]: arm for arm in document["arms"]}
    assert list(arms) == ARMS and document["baseline"] == "none" and document["split"] == "test"
    for name, arm in arms.items():
        said, values = predictions(compared, name), arm["values"]
        assert values["accuracy"] == pytest.approx(accuracy_score(said["label"], said["prediction"]), abs=1e-6)
        expected = f1_score(said["label"], said["prediction"], average="macro", zero_division=0)
        assert values["f1_macro"] == pytest.approx(expected, abs=1e-6)
        low, high = arm["intervals"]["accuracy"]
        normal = 1.96 * np.sqrt(values["accuracy"] * (1 - values["accuracy"]) / len(said["label"]))
        assert (high - low) / 2 == pytest.approx(normal, rel=0.2, abs=0.01)
        assert abs((low + high) / 2 - values["accuracy"]) < 0.05
        assert values["checkpoint_bytes"] == (cell(compared, name) / "checkpoints" / "best.ckpt").stat().st_size
        assert values["peak_memory_mb"] > 0
    assert arms["none"]["values"]["trainable_params"] == 0 and "train_tokens_per_s" not in arms["none"]["values"]
    rows = {row["arm"]: row for row in csv.DictReader((compared / "report.csv").open())}
    assert rows["full"]["trainable parameters"] == f"{arms['full']['values']['trainable_params']:,.0f}"
    assert (compared / "report.png").stat().st_size > 10_000
    assert "python main.py compare" in (compared / "report.md").read_text()


def test_differences_are_paired_with_the_baseline(compared: Path) -> None:
    arms = {arm["name"]: arm for arm in json.loads((compared / "report.json").read_text())["arms"]}
    base = predictions(compared, "none")
    assert arms["none"]["difference"] is None
    for name in ARMS[1:]:
        said = predictions(compared, name)
        assert said["row"] == base["row"]
        difference = accuracy_score(said["label"], said["prediction"]) - accuracy_score(
            base["label"], base["prediction"]
        )
        assert arms[name]["difference"]["estimate"]["mean"] == pytest.approx(difference, abs=1e-6)
        assert arms[name]["difference"]["verdict"] == "one seed"


def test_an_arm_without_training_keeps_the_fresh_head(compared: Path) -> None:
    state = read_checkpoint(cell(compared, "none") / "checkpoints" / "best.ckpt")["state_dict"]
    assert any(name.endswith("classifier.weight") for name in state)
    assert RunFolder(cell(compared, "none")).read()["costs"]["train_s"] == 0


def again(compared: Path, tmp_path: Path, *words: str) -> tuple[int, Path]:
    folder = tmp_path / "logs" / "four"
    if not folder.exists():
        shutil.copytree(compared, folder)
    config = str(compared.parents[1] / "tiny.yaml")
    common = ["compare", "--config", config, "--logs_dir", str(tmp_path / "logs"), "--name", "four"]
    return main([*common, "--data.batch_size", "8", *words]), folder


def test_the_same_command_again_trains_nothing(compared: Path, tmp_path: Path, ran: list) -> None:
    status, folder = again(compared, tmp_path, "--arms", *ARMS)
    assert status == 0 and ran == []
    arms = [json.loads((each / "report.json").read_text())["arms"] for each in (compared, folder)]
    assert arms[0] == arms[1]


def test_another_arm_or_seed_trains_only_that(compared: Path, tmp_path: Path, ran: list) -> None:
    assert again(compared, tmp_path, "--arms", *ARMS, "bitfit")[0] == 0
    assert [words[0] for words in ran] == ["fit", "validate", "test"]
    ran.clear()
    _, folder = again(compared, tmp_path, "--arms", "head", "full", "--seed_everything", "42", "7")
    assert [words[0] for words in ran] == ["fit", "validate"] * 2 + ["test"] * 2
    arms = json.loads((folder / "report.json").read_text())["arms"]
    assert [arm["seeds"] for arm in arms] == [[42, 7]] * 2 and arms[1]["difference"]["verdict"] != "one seed"


def test_arms_of_the_config_and_one_that_fails(make_base, tmp_path: Path) -> None:
    arms = {"small": {"model": {"adapter": {"rank": 2}}}, "broken": {"data": {"source": "nowhere.csv"}}}
    config = write_config(tmp_path, make_base("bert"), arms=arms)
    assert main(["compare", "--config", str(config), "--name", "mine"]) == 1
    found = json.loads(Path("logs/mine/report.json").read_text())["arms"]
    assert [arm["name"] for arm in found] == ["small", "broken"]
    assert found[1]["values"] == {} and "nowhere.csv" in found[1]["reason"]
    ranks = read_checkpoint(cell(Path("logs/mine"), "small") / "checkpoints" / "best.ckpt")["state_dict"]
    assert all(value.shape[0] == 2 for name, value in ranks.items() if "lora_A" in name)


@pytest.mark.parametrize(
    ("names", "described", "said"),
    [
        (["loora"], None, "no arm 'loora'"),
        (["lora-int7"], None, "no arm 'lora-int7'"),
        (["lora", "lora"], None, "is given twice"),
        (["../x"], {"../x": {}}, "is no folder name"),
        (None, ["lora"], "a mapping of each arm's name"),
    ],
)
def test_wrong_arm_names(names, described, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_arms(names, described)


def test_arms_by_method_and_quantization() -> None:
    arms = choose_arms(["dora-nf4", "full"], None)
    assert arms["dora-nf4"]["model"]["method"] == "dora" and arms["dora-nf4"]["model"]["quantization"]["bits"] == 4
    assert arms["full"]["model"]["method"] == "full" and arms["full"]["model"]["quantization"]["bits"] is None
    assert list(choose_arms(None, None)) == ARMS
    assert list(choose_arms(None, {8: {}, 16: {"model": {"adapter": {"rank": 16}}}})) == ["8", "16"]


def test_one_arm_of_a_config_is_what_fit_trains(make_base, tmp_path: Path, capsys) -> None:
    arms = {"small": {"model": {"adapter": {"rank": 2}}}, "large": {"model": {"adapter": {"rank": 4}}}}
    config = str(write_config(tmp_path, make_base("bert"), arms=arms))
    one = ConfiguredRun("fit", ["--config", config, "--arm", "small", "--data.max_length", "9"]).settings()
    other = resolve([yaml.safe_load(Path(config).read_text().partition("arms:")[0])], [], flatten(arms["small"]))
    assert one == other | {"data": other["data"] | {"max_length": 9}} and one["model"]["adapter"]["rank"] == 2
    ablation = tmp_path / "ablation.yaml"
    ablation.write_text("question: Which?\n")
    for words, said in (
        (["--config", config], "describes the arms small, large; choose one with --arm, or train all: .*compare"),
        (["--config", config, "--arm", "no"], "'no' is none of them"),
        (["--arm", "small"], "--arm: no config that is given describes arms"),
        (["--config", str(ablation)], "is an ablation: .*ablate --config"),
    ):
        assert main(["fit", *words]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_too_few_steps_for_a_validation_pass_are_refused_before_training(make_base, tmp_path: Path, capsys) -> None:
    config = str(write_config(tmp_path, make_base("bert")))
    words = ["compare", "--config", config, "--arms", "tfidf", "lora", "--name", "few", "--trainer.max_steps", "2"]
    assert main(words) == 2 and not Path("logs").exists()
    assert re.search(r"arm-lora__seed-\d+: training ends after 2 steps, before the first", capsys.readouterr().err)


def test_method_arms_reset_only_what_the_method_does_not_take(make_base) -> None:
    model = {"base_model": str(make_base("bert")), "adapter": {"alpha": 32, "target_modules": "query_value"}}
    config = {"model": {**model, "quantization": {"bits": 8}, "frozen_dropout": True}, "data": {"source": "x.csv"}}
    settings = {
        name: resolve([config], [], {"model": method_settings(name, {})})["model"]
        for name in ("none", "lora", "vera", "full")
    }
    assert settings["lora"]["adapter"]["alpha"] == 32
    assert settings["vera"]["adapter"]["target_modules"] == "query_value"
    assert all(each["quantization"]["bits"] is None for each in settings.values())
    assert settings["lora"]["frozen_dropout"] and not settings["full"]["frozen_dropout"]


@pytest.mark.parametrize(
    ("arms", "flags", "said"),
    [
        ({"a": {}, "b": {"model": {"adapter": {"rnk": 2}}}}, [], "rnk"),
        ({"a": {}, "b": {"model": {"method": "full", "adapter": {"rank": 2}}}}, [], "b: model.adapter.rank"),
        ({"a": {}, "b": {"model": {"method": "pissa", "quantization": {"bits": 4}}}}, [], "b: model.quantization"),
        ({"a": {}, "b": {"model": {"method": "loora"}}}, [], "no method 'loora'"),
        ({"a": {}, "b": {"model": {"method": "head"}}}, ["--model.method", "full"], "arm-b__seed-42 is about head"),
        ({"a": {}, "b": {}}, [], "arms a and b have the same settings"),
    ],
)
def test_impossible_arms_are_refused_before_training(make_base, tmp_path, ran, capsys, arms, flags, said) -> None:
    config = write_config(tmp_path, make_base("bert"), arms=arms)
    assert main(["compare", "--config", str(config), *flags]) == 2
    assert said in capsys.readouterr().err and ran == [] and not Path("logs").exists()


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("./nowhere", "no file or folder './nowhere'"),
        (
            "nobody/nothing",
            "no model 'nobody/nothing' from the Hub (Cannot reach ",
        ),
        (".", "no model in '.' (it has no config.json)"),
    ],
)
def test_a_base_that_is_not_there_is_refused_before_any_arm_is_trained(
    base: str, said: str, make_base, tmp_path: Path, ran: list, capsys
) -> None:
    arms = {"good": {}, "bad": {"model": {"base_model": base}}}
    config = write_config(tmp_path, make_base("bert"), arms=arms)
    assert main(["compare", "--config", str(config), "--name", "mine"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: bad: model.base_model: {said}") and error.count("\n") == 1
    assert not ran and not Path("logs").exists()


def test_a_hub_that_cannot_be_reached_is_asked_once(make_base, tmp_path: Path) -> None:
    config = write_config(tmp_path, make_base("bert"))
    words = ["compare", "--config", str(config), "--model.base_model", "nobody/nothing"]
    code = f"import sys; from lightning_lora.cli import main; sys.exit(main({words}))"
    # A port of this machine at which nobody listens.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "Retrying" not in done.stderr
    assert "no model 'nobody/nothing' from the Hub (" in done.stderr.splitlines()[-1]
    assert not Path("logs").exists()


def test_test_rows_of_several_files_are_measured_by_file_too(tiny_base: Path, tmp_path: Path, capsys) -> None:
    config = write_config(tmp_path, tiny_base)
    rows = make_rows(100)
    for name, part in (("train", rows[:60]), ("test-a", rows[60:75]), ("test-b", rows[75:])):
        write_csv(tmp_path / f"{name}.csv", part)
    source = f"{{train: {tmp_path}/train.csv, test: '{tmp_path}/test-*.csv'}}"
    words = ["--config", str(config), "--name", "files", "--arms", "tfidf", "majority", "--data.source", source]
    assert main(["compare", *words]) == 0
    report = Path("logs/files/report.md").read_text()
    assert "## accuracy by file or split" in report and "| arm | test-a.csv | test-b.csv |" in report
    for arm in ("tfidf", "majority"):
        table = pq.read_table(cell(Path("logs/files"), arm) / "predictions" / "test.parquet").to_pandas()
        found = RunFolder(cell(Path("logs/files"), arm)).read()["evaluations"]["test"]
        shown = []
        for origin, part in table.groupby("origin"):
            for name, score in (("accuracy", accuracy_score), ("f1_macro", partial(f1_score, average="macro"))):
                expected = score(part["label"], part["prediction"])
                assert found["after_by_file"][origin][name] == pytest.approx(expected)
                shown += [f"{expected:.4f}"] * (name == "accuracy")
        assert f"| {arm} | {shown[0]} | {shown[1]} |" in report
        assert "| test-a.csv | " in (cell(Path("logs/files"), arm) / "test.md").read_text()
