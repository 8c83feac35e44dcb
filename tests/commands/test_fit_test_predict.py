"""The commands end to end on a tiny base model, in this process."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score, f1_score, log_loss

from lightning_lora.cli import main
from lightning_lora.commands import evaluate
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.module import TextClassifier
from tests.conftest import make_rows, write_csv


@pytest.fixture(scope="module")
def fitted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was fitted and tested; tests that change it work on a copy."""
    place = tmp_path_factory.mktemp("fitted")
    write_csv(place / "rows.csv", make_rows(240))
    config = {
        "model": {"base_model": str(tiny_base), "learning_rate": 5e-3},
        "data": {
            "source": str(place / "rows.csv"),
            "max_length": 32,
            "cache_dir": str(place / "cache"),
            "batch_size": 8,
        },
        "trainer": {"max_epochs": 6, "accelerator": "cpu", "precision": "32-true"},
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(place / "tiny.yaml"), "--name", "run", "--logs_dir", str(place / "logs")]) == 0
    folder = RunFolder.open(place / "logs" / "run")
    assert main(["test", "--run", str(folder.path)]) == 0
    return folder


@pytest.fixture
def copy(fitted: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(fitted.path, tmp_path / "logs" / "copy")))


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_the_run_folder_holds_everything(fitted: RunFolder) -> None:
    names = {str(p.relative_to(fitted.path)) for p in fitted.path.rglob("*") if p.is_file()}
    expected = "config.yaml run.json metrics.csv splits.parquet test.md checkpoints/best.ckpt checkpoints/last.ckpt"
    assert set(expected.split()) | {"predictions/val.parquet", "predictions/test.parquet"} <= names
    assert any(name.startswith("events.out.") for name in names)
    assert not [name for name in names if "/." in name or name.startswith(".")]


def test_fit_imports_only_what_it_needs(fitted: RunFolder, tmp_path: Path) -> None:
    """In a process of its own: nothing of other commands, methods, tasks and options, each of which would cost all."""
    code = (
        "import sys; from lightning_lora.cli import main; status = main(sys.argv[1:])\n"
        "print(status, *(name for name in sys.modules if name.partition('.')[0] == 'lightning_lora'))"
    )
    config = fitted.path.parents[1] / "tiny.yaml"
    words = ["fit", "--config", str(config), "--logs_dir", str(tmp_path / "logs"), "--trainer.max_epochs", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=root)
    status, *modules = done.stdout.splitlines()[-1].split()
    assert status == "0"
    assert len(modules) <= 78, modules


def test_the_record_says_what_was_done_and_what_came(fitted: RunFolder) -> None:
    record = fitted.read()
    assert record["status"] == "finished"
    assert record["seed"] == 42
    assert record["data"]["splits"]["train"]["rows"] == 173
    assert {name: len(split["fingerprint"]) for name, split in record["data"]["splits"].items()} == {
        "train": 64, "val": 64, "test": 64,
    }  # fmt: skip
    assert record["data"]["label_names"] == ["neg", "pos"]
    costs = record["costs"]
    for name in ("train_s", "train_tokens_per_s", "peak_memory_mb", "trainable_params", "total_params"):
        assert costs[name] > 0, name
    assert costs["checkpoint_bytes"] == (fitted.checkpoints / "best.ckpt").stat().st_size
    assert record["config"]["trainer"]["precision"] == "32-true"
    assert record["command"].startswith("python main.py fit --config")
    assert {"commit", "dirty", "fingerprint"} == set(record["code"])


def test_the_table_of_before_and_after_is_scikit_learns(fitted: RunFolder) -> None:
    evaluation = fitted.read()["evaluations"]["test"]
    rows = rows_of(fitted.path / "predictions" / "test.parquet")
    truth, preds = [row["label"] for row in rows], [row["prediction"] for row in rows]
    after = evaluation["after"]
    assert after["accuracy"] == pytest.approx(accuracy_score(truth, preds), abs=1e-6)
    assert after["f1_macro"] == pytest.approx(f1_score(truth, preds, average="macro"), abs=1e-6)
    probabilities = [[row["p(neg)"], row["p(pos)"]] for row in rows]
    assert after["loss"] == pytest.approx(log_loss(truth, probabilities, labels=["neg", "pos"]), abs=1e-5)
    assert after["accuracy"] > evaluation["before"]["accuracy"] + 0.3
    assert evaluation["rows"] == 48 and evaluation["majority_accuracy"] == 0.5
    assert "| after |" in (fitted.path / "test.md").read_text()


def test_before_is_the_model_that_training_started_from(fitted: RunFolder, tiny_base: Path) -> None:
    """Against plain transformers: the base with the head of the same seed, on the same rows."""
    from transformers import AutoTokenizer

    from lightning_lora.models.base import load_base

    model = load_base(str(tiny_base), ["neg", "pos"], 42).model.eval()
    source = fitted.path.parents[1] / "rows.csv"
    lines = source.read_text().splitlines()
    numbers = [row["row"] for row in rows_of(fitted.path / "predictions" / "test.parquet")]
    texts, truth = zip(*(lines[number - 1].split(",") for number in numbers), strict=True)
    batch = AutoTokenizer.from_pretrained(tiny_base)(
        list(texts), truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([["neg", "pos"].index(t) for t in truth]))
    before = fitted.read()["evaluations"]["test"]["before"]
    assert before["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_the_best_checkpoint_is_of_the_best_validation_epoch(fitted: RunFolder) -> None:
    with (fitted.path / "metrics.csv").open() as file:
        scores = [float(row["val/f1_macro"]) for row in csv.DictReader(file) if row["val/f1_macro"]]
    assert len(scores) == 6
    assert fitted.read()["best"]["value"] == pytest.approx(max(scores), abs=1e-6)


def test_tensorboard_shows_curves_metrics_settings_pictures_and_texts(fitted: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fitted.path))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "train/loss_step",
        "val/loss",
        "val/f1_macro",
        "val/recall/pos",
        "val/f1_binary",
        "test/accuracy",
    } <= scalars
    assert [tag for tag in scalars if "lr" in tag or "rate" in tag] == ["learning_rate"]
    assert {"val/confusion_matrix", "test/confusion_matrix"} <= set(events.Tags()["images"])
    tensors = set(events.Tags()["tensors"])
    assert "test_pr/pos" in tensors
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_fit_again_never_touches_the_first_run(fitted: RunFolder, capsys: pytest.CaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in fitted.path.rglob("*")}
    config = fitted.path.parents[1] / "tiny.yaml"
    assert main(["fit", "--config", str(config), "--name", "run", "--logs_dir", str(fitted.path.parent)]) == 2
    assert "a run is never overwritten" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in fitted.path.rglob("*")}


def test_a_second_run_takes_its_tokens_from_the_cache_and_comes_to_the_same(fitted: RunFolder, tmp_path: Path) -> None:
    config = fitted.path.parents[1] / "tiny.yaml"
    assert main(["fit", "--config", str(config), "--name", "again", "--logs_dir", str(tmp_path)]) == 0
    again = RunFolder.open(tmp_path / "again").read()
    assert all(again["data"]["splits"][split]["from_cache"] for split in ("train", "val"))
    assert again["metrics"] == fitted.read()["metrics"]


def test_validate_gives_what_fit_found(copy: RunFolder) -> None:
    assert main(["validate", "--run", str(copy.path)]) == 0
    record = copy.read()
    assert record["evaluations"]["val"]["after"]["f1_macro"] == pytest.approx(record["best"]["value"], abs=1e-6)


def predict(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main(["predict", *words]) == 0
    return capsys.readouterr().out


def test_predictions_on_test_rows_are_those_of_test(fitted: RunFolder, tmp_path: Path, capsys) -> None:
    rows = rows_of(fitted.path / "predictions" / "test.parquet")
    lines = (fitted.path.parents[1] / "rows.csv").read_text().splitlines()
    texts = [lines[row["row"] - 1].split(",")[0] for row in rows]
    path = write_csv(tmp_path / "mine.csv", [(text, "?") for text in texts], header=("review", "note"))
    for ending, read in ((".csv", None), (".jsonl", None), (".parquet", rows_of)):
        output = tmp_path / f"out{ending}"
        predict(
            capsys, "--run", str(fitted.path), "--input", str(path), "--text_column", "review", "--output", str(output)
        )
        if read is None:
            lines = output.read_text().splitlines()
            found = list(csv.DictReader(lines)) if ending == ".csv" else [json.loads(line) for line in lines]
        else:
            found = read(output)
        assert [row["review"] for row in found] == texts and "text" not in found[0]
        assert [row["prediction"] for row in found] == [row["prediction"] for row in rows]
        np.testing.assert_allclose([float(row["p(pos)"]) for row in found], [row["p(pos)"] for row in rows], atol=1e-5)


def test_words_on_the_command_line_are_texts_and_nothing_else(fitted: RunFolder, capsys, reviews: Path) -> None:
    texts = ["a fine film", str(reviews), "null", "5", "{a: b}", "[bold]dull[/bold]", '"quoted", text']
    out = predict(capsys, "--run", str(fitted.path), *texts, "--format", "jsonl")
    assert [json.loads(line)["text"] for line in out.splitlines()] == texts


def test_texts_from_standard_input_a_line_each(fitted: RunFolder, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.stdin",
        io.StringIO("the film was a story brilliant charming deep\nthe film was a story awful dull boring\n"),
    )
    out = predict(capsys, "--run", str(fitted.path), "--format", "csv")
    assert [row["prediction"] for row in csv.DictReader(out.splitlines())] == ["pos", "neg"]


def test_a_table_for_people(fitted: RunFolder, capsys) -> None:
    out = predict(capsys, "--run", str(fitted.path), "a brilliant charming film " * 20)
    assert "prediction" in out and "pos" in out and max(map(len, out.splitlines())) <= 80


def test_prediction_needs_only_the_run_folder(copy: RunFolder, capsys) -> None:
    for name in ("splits.parquet", "run.json", "metrics.csv"):
        (copy.path / name).unlink()
    config = yaml.safe_load(copy.config.read_text())
    config["data"]["source"] = "gone.csv"
    copy.config.write_text(yaml.safe_dump(config))
    assert "neg" in predict(capsys, "--run", str(copy.path), "an awful dull film", "--format", "csv")


def test_explicit_flags_win_over_the_run(copy: RunFolder) -> None:
    assert main(["test", "--run", str(copy.path), "--data.test_rows", "10", "--before", "false"]) == 0
    evaluations = copy.read()["evaluations"]
    assert evaluations["test-2"]["rows"] == 10 and "before" not in evaluations["test-2"]
    assert "--data.test_rows 10" in evaluations["test-2"]["command"]


def test_a_second_test_overwrites_nothing(copy: RunFolder) -> None:
    kept = {name: (copy.path / name).read_bytes() for name in ("test.md", "predictions/test.parquet")}
    first = copy.read()["evaluations"]["test"]
    assert main(["test", str(copy.path), "--checkpoint", "last"]) == 0  # the folder alone will do
    assert copy.read()["evaluations"]["test"] == first
    assert copy.read()["evaluations"]["test-2"]["checkpoint"].endswith("last.ckpt")
    assert kept == {name: (copy.path / name).read_bytes() for name in kept}


@pytest.mark.parametrize("change", ["source", "seed"])
def test_rows_that_were_trained_on_are_not_tested_on(copy: RunFolder, tmp_path: Path, change: str, capsys) -> None:
    words = ["--data.split_seed", "1"]
    if change == "source":
        rows = make_rows(260)  # begins with the run's own rows: carving again would mix them
        words = ["--data.source", str(write_csv(tmp_path / "more.csv", rows))]
    before = copy.record.read_bytes()
    assert main(["test", "--run", str(copy.path), *words]) == 2
    assert "was trained or chosen on" in capsys.readouterr().err
    assert copy.record.read_bytes() == before


def test_a_pass_over_some_rows_names_those_rows(copy: RunFolder) -> None:
    assert main(["test", "--run", str(copy.path), "--data.test_rows", "7", "--before", "false"]) == 0
    assert copy.read()["evaluations"]["test-2"]["rows"] == 7
    whole = {row["row"]: row for row in rows_of(copy.path / "predictions" / "test.parquet")}
    for row in rows_of(copy.path / "predictions" / "test-2.parquet"):
        assert row["label"] == whole[row["row"]]["label"] and row["prediction"] == whole[row["row"]]["prediction"]


def test_settings_of_training_are_refused(copy: RunFolder, capsys) -> None:
    for command, setting in (("test", "model.learning_rate"), ("validate", "trainer.max_epochs")):
        assert main([command, "--run", str(copy.path), f"--{setting}", "1"]) == 2
        assert capsys.readouterr().err == f"error: --{setting}: {command} does not use it; leave it out\n"


def test_a_part_of_a_pass_is_refused_as_it_would_be_the_longest_texts(copy: RunFolder, capsys) -> None:
    for limit in ("0.2", "2"):
        assert main(["test", "--run", str(copy.path), "--trainer.limit_test_batches", limit]) == 2
        assert "begin with the longest texts" in (told := capsys.readouterr().err) and "set data.test_rows" in told


def refit(fitted: RunFolder, *words: str) -> tuple[int, RunFolder]:
    status = main(["fit", "--config", str(fitted.path.parents[1] / "tiny.yaml"), "--name", "other", *words])
    return status, RunFolder(Path("logs/other"))


def test_the_best_weights_are_those_that_were_validated_where_max_steps_end_an_epoch(fitted: RunFolder) -> None:
    """Lightning ends such an epoch like any other, with the metrics of the pass before."""
    an_epoch = fitted.read()["steps"] // fitted.read()["epochs"]
    status, folder = refit(fitted, "--trainer.max_steps", str(an_epoch + 3))
    best = folder.read()["best"]
    assert status == 0 and best["step"] == an_epoch
    assert main(["validate", "--run", str(folder.path)]) == 0
    (found,) = folder.read()["evaluations"].values()
    assert found["after"]["f1_macro"] == pytest.approx(best["value"], abs=1e-6)


@pytest.mark.parametrize("stop", [["--trainer.max_steps", "3"], ["--trainer.limit_val_batches", "0.0"]])
def test_a_run_without_validation_keeps_its_weights_and_says_so(fitted: RunFolder, stop: list[str], capsys) -> None:
    status, folder = refit(fitted, *stop)
    said = capsys.readouterr()
    assert status == 0 and "--checkpoint last" in said.out and "warning: " in said.err
    assert main(["test", str(folder.path)]) == 2
    assert "--checkpoint last" in capsys.readouterr().err
    assert main(["test", str(folder.path), "--checkpoint", "last"]) == 0
    # What the warning advises works.
    advised = re.search(r"raise (trainer.max_steps) to (\d+), or set (trainer.val_check_interval) to (\d+)", said.err)
    assert (advised is not None) == (stop[0] == "--trainer.max_steps")
    for name, value in zip(*[iter(advised.groups() if advised else ())] * 2, strict=True):
        words = ["fit", "--config", str(fitted.path.parents[1] / "tiny.yaml"), "--name", name, *stop]
        assert main([*words, f"--{name}", value]) == 0
        assert (Path("logs") / name / "checkpoints" / "best.ckpt").is_file()


def test_fast_dev_run_runs_and_keeps_nothing(fitted: RunFolder, capsys) -> None:
    status, folder = refit(fitted, "--trainer.fast_dev_run", "true")
    assert status == 0 and not folder.checkpoints.exists()
    assert "no checkpoint was kept" in capsys.readouterr().out


def test_callbacks_of_a_config_serve_fit_and_harm_nothing_later(fitted: RunFolder, tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}},
        {"class_path": "lightning.pytorch.callbacks.RichProgressBar"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "own")}},
    ]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "max_epochs": 1}}))
    status, folder = refit(fitted, "--config", str(tmp_path / "more.yaml"))
    assert status == 0 and list((tmp_path / "own").glob("*.ckpt"))
    assert main(["test", str(folder.path)]) == 0
    assert main(["predict", "--run", str(folder.path), "a fine film"]) == 0


def test_a_run_that_diverges_has_failed(fitted: RunFolder, capsys) -> None:
    status, folder = refit(fitted, "--model.learning_rate", "1e30", "--trainer.gradient_clip_val", "null")
    assert status == 2 and "is not finite" in capsys.readouterr().err
    assert folder.read()["status"] == "failed"


def test_its_own_config_does_a_run_again(fitted: RunFolder) -> None:
    assert main(["fit", "--config", str(fitted.config), "--name", "same"]) == 0
    assert RunFolder.open(Path("logs/same")).read()["metrics"] == fitted.read()["metrics"]


def test_checkpoints_are_written_by_the_atomic_writer_and_gradients_are_clipped(fitted: RunFolder) -> None:
    from lightning_lora.config.configured_run import ConfiguredRun
    from lightning_lora.runs.checkpoints import AtomicCheckpointIO

    run = ConfiguredRun("fit", ["--config", str(fitted.config)])
    run.build(RunFolder.create(Path("logs"), None, "x"))
    assert isinstance(run.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert run.trainer.gradient_clip_val == 1.0


def test_a_run_without_a_first_step_is_one_line(tiny_base: Path, tmp_path: Path, capsys) -> None:
    path = write_csv(tmp_path / "one.csv", [(text, "same") for text, _ in make_rows(20)])
    words = ["--model.base_model", str(tiny_base), "--data.source", str(path), "--name", "bad", "--data.val_size", "2"]
    assert main(["fit", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "every row of the train split has the label 'same'" in captured.err


def test_fit_says_which_epoch_is_kept_and_its_values_are_those_of_validate(fitted: RunFolder, capsys) -> None:
    """The last epoch is worse: its learning rate is too high once the rows are learnt."""
    words = ["--trainer.max_epochs", "4", "--model.schedule", "constant", "--model.learning_rate", "0.05"]
    status, folder = refit(fitted, *words)
    assert status == 0
    said = capsys.readouterr().out
    best, last = folder.read()["best"], folder.read()["metrics"]
    with (folder.path / "metrics.csv").open(newline="") as file:
        passes = [row for row in csv.DictReader(file) if row["val/loss"]]
    scores = [float(row["val/f1_macro"]) for row in passes]
    latest = max(range(len(scores)), key=lambda i: (scores[i], i))  # of equally good ones
    assert best["epoch"] == latest + 1 < 4  # the case is what it is meant to be
    assert best["step"] == int(passes[best["epoch"] - 1]["step"]) + 1
    assert best["metrics"]["val/loss"] != last["val/loss"]
    assert main(["validate", "--run", str(folder.path)]) == 0
    after = folder.read()["evaluations"]["val"]["after"]
    assert best["metrics"] == pytest.approx({f"val/{name}": value for name, value in after.items()}, abs=1e-6)
    values = ", ".join(f"val/{name} {after[name]:.4f}" for name in ("accuracy", "f1_macro", "loss"))
    assert f"kept: epoch {best['epoch']}, step {best['step']} (best val/f1_macro): {values}\n" in said
    assert f"last validation: val/accuracy {last['val/accuracy']:.4f}, " in said


def test_an_interrupted_run_leaves_a_record(tiny_base: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.training.module import TextClassifier

    step = TextClassifier.training_step

    def interrupt(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TextClassifier, "training_step", interrupt)
    words = ["--model.base_model", str(tiny_base), "--data.source", str(reviews), "--name", "stopped"]
    status = main(
        [
            "fit",
            *words,
            "--data.max_length",
            "32",
            "--data.val_size",
            "10",
            "--data.train_rows",
            "100",
            "--data.test_rows",
            "10",
        ]
    )
    assert status == 130
    assert RunFolder.open(Path("logs/stopped")).read()["status"] == "interrupted"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["test"], "test needs a trained run: --run"),
        (["predict", "a text"], "predict needs a trained run: --run"),
        (["predict", "--run", "RUN", "x", "--text_column", "a"], "only an --input file has columns"),
        (["predict", "--run", "RUN", "x", "--output", "o.csv", "--format", "csv"], "leave --format out"),
        (["test", "--run", "nowhere"], "nowhere is no run folder"),
        (["predict", "--run", "RUN", "--input", "nowhere.csv"], "--input: no file 'nowhere.csv'"),
        (["predict", "--run", "RUN", "x", "--output", "out.xlsx"], "must end in one of"),
        (
            ["predict", "--run", "RUN", "x", "--format", "xml"],
            "format: expected one of 'table', 'csv', 'jsonl', got 'xml'",
        ),
        (["predict", "--run", "RUN", ""], "command line, text 1, column 'text': a text is needed"),
        (["test", "--run", "RUN", "--checkpoint", "x.ckpt"], "has no checkpoint x.ckpt"),
        (["test", "--run", "RUN", "--model.adapter.rank", "4"], "such as adapter.rank"),
        (["test", "--run", "RUN", "--data.label_names", "[pos,neg]"], "names and order must be the same"),
    ],
)
def test_wrong_words_are_one_line(fitted: RunFolder, capsys, words: list[str], said: str) -> None:
    assert main([str(fitted.path) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_run_without_checkpoint_is_not_tested(copy: RunFolder, capsys) -> None:
    shutil.rmtree(copy.checkpoints)
    assert main(["test", "--run", str(copy.path)]) == 2
    assert "has no checkpoint best.ckpt" in capsys.readouterr().err


def test_an_interrupted_pass_in_int8_keeps_the_evaluation_before_it(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pass = evaluate._run_pass

    def interrupted(cli: Any, *arguments: Any) -> Any:
        if cli.model.int8:
            raise KeyboardInterrupt
        return run_pass(cli, *arguments)

    monkeypatch.setattr(TextClassifier, "check_int8", lambda self, precision: 2)
    monkeypatch.setattr(evaluate, "_run_pass", interrupted)
    before = set(copy.read()["evaluations"])
    assert main(["validate", "--run", str(copy.path), "--int8", "true"]) == 130
    (new,) = set(copy.read()["evaluations"]) - before
    kept = copy.read()["evaluations"][new]
    assert kept["after"]["accuracy"] > 0 and "int8" not in kept and (copy.path / f"{new}.md").is_file()
