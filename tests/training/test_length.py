"""How long a run trains where that is left open: the rule, what wins over it, and what is said and kept of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_lora import TextClassifier, TextDataModule, training_length
from lightning_lora.cli import main
from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.experiments.given_runs import GivenRun
from lightning_lora.runs.folder import RunFolder, as_configured
from lightning_lora.training import length as rule
from lightning_lora.training.length import (
    ENOUGH_STEPS,
    PATIENCE,
    VALIDATIONS,
    describe_length,
    length_words,
    plan_length,
)
from tests.config.test_resuming import same
from tests.conftest import cells_in_process, make_rows, slow_but, write_csv

Fit = Callable[..., int]


@pytest.mark.parametrize(
    ("steps_per_epoch", "val_rows", "epochs", "check_every", "patience"),
    [
        (2, 100, 150, 15, 4),  # 300 / 2
        (8, 99, 39, 3, None),  # 300 / 8 = 37.5, up to a multiple of 3; too few rows to stop by
        (63, 500, 5, 1, 4),
        (157, 500, 2, 1, None),  # two passes are too few to stop by
        (299, 500, 2, 1, None),
        (300, 500, 1, 1, None),
        (7500, 12000, 1, 1, None),
    ],
)
def test_the_rule_in_closed_form(steps_per_epoch, val_rows, epochs, check_every, patience) -> None:
    found = plan_length(steps_per_epoch, val_rows)
    assert (found.epochs, found.check_every, found.patience) == (epochs, check_every, patience)
    assert found.settings == {"max_epochs": epochs, "check_val_every_n_epoch": check_every}


def test_the_rule_for_any_number_of_steps() -> None:
    for steps in range(1, 1300):
        found = plan_length(steps, 100)
        every = found.check_every or 0
        assert found.epochs * steps >= ENOUGH_STEPS and found.epochs % every == 0
        assert (found.epochs - every) * steps < ENOUGH_STEPS  # no more than it takes
        assert found.epochs // every < 2 * VALIDATIONS + 1
        assert found.epochs < VALIDATIONS or found.epochs // every >= VALIDATIONS


@pytest.mark.parametrize(
    ("interval", "epochs", "patience"),
    [(7, 154, 9), (15, 150, 4), (50, 150, None), (0.5, 150, 120), (1, 150, 60)],
)
def test_a_typed_interval_stays_and_stops_no_earlier(interval: float, epochs: int, patience: int | None) -> None:
    """By itself the rule validates every 15 of 150 epochs, and stops after 60 without a better value."""
    found = plan_length(2, 100, interval)
    assert (found.epochs, found.check_every, found.patience) == (epochs, None, patience)
    assert found.settings == {"max_epochs": epochs}


def test_least_epochs_and_steps_that_are_typed_are_kept() -> None:
    assert [plan_length(63, 0, classes=count).epochs for count in (2, 18, 19, 42)] == [5, 5, 5, 11]
    assert plan_length(300, 0, min_epochs=5).epochs == 5
    assert plan_length(300, 0, min_steps=1300).epochs == 5
    assert plan_length(100, 0, min_epochs=5, min_steps=700).epochs == 7


@pytest.fixture
def fit(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """``fit`` of 80 rows, 8 a step, with 100 to validate; 120 steps are enough."""
    monkeypatch.setattr(rule, "ENOUGH_STEPS", 120)
    settings = {
        "model": {"base_model": str(tiny_base), "learning_rate": 5e-3},
        "data": {"max_length": 24, "batch_size": 8, "val_size": 100, "test_size": 20},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False, "log_every_n_steps": 1},
    }
    settings["data"]["source"] = str(write_csv(tmp_path / "rows.csv", make_rows(200)))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return lambda *words, name="run": main(["fit", "--config", "a.yaml", "--name", name, *words])


def record_of(name: str) -> dict:
    return RunFolder(Path("logs") / name).read()


#: Nothing is learnt, so that all validation passes are equally good.
STANDING = ["--model.learning_rate", "0"]


def test_few_rows_are_seen_often_until_validation_says_stop(fit: Fit, capsys) -> None:
    assert fit(*STANDING) == 0
    out, record = capsys.readouterr().out, record_of("run")
    assert (
        "training length: 12 epochs = 120 steps, for 80 rows (at least 120 steps; trainer.max_epochs), validated every "
        "epoch; stops early when 4 validations in a row bring no better val/f1_macro\n" in out
    )
    assert ": 5 of 12 epochs, 50 steps\n" in out and "kept: epoch 5, step 50 " in out  # of equally good ones the last
    assert "stopped by EarlyStopping: val/f1_macro did not improve in 4 validations\n" in out
    assert (record["epochs"], record["steps"], record["best"]["epoch"]) == (1 + PATIENCE, 50, 5)
    planned = record["length"]
    assert (planned["by"], planned["epochs"], planned["steps"], planned["patience"]) == ("rule", 12, 120, 4)
    config = yaml.safe_load(Path("logs/run/config.yaml").read_text())
    assert config == record["config"]
    assert (config["trainer"]["max_epochs"], config["trainer"]["check_val_every_n_epoch"]) == (12, 1)
    (stopping,) = config["trainer"]["callbacks"]
    assert stopping["class_path"].endswith(".EarlyStopping") and stopping["init_args"]["patience"] == 4


def test_many_classes_take_more_steps(fit: Fit, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "STEPS_A_CLASS", 75)  # for two of them
    assert fit(*STANDING) == 0
    expected = "15 epochs = 150 steps, for 80 rows (at least 150 steps, 75 a class; trainer.max_epochs)"
    assert expected in capsys.readouterr().out and record_of("run")["length"]["at_least_steps"] == 150


def test_a_run_that_validation_ended_stays_so_or_goes_on_for_longer(fit: Fit, capsys) -> None:
    assert fit(*STANDING) == 0
    ended = record_of("run")
    # Killed behind its last step, before the record said so.
    Path("logs/run/run.json").write_text(json.dumps({**ended, "status": "running"}))
    assert main(["fit", "--resume", "logs/run"]) == 0
    record = record_of("run")
    for key in ("status", "steps", "epochs", "stopped_by", "best", "metrics", "length", "config"):
        assert record[key] == ended[key], key
    capsys.readouterr()
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "7"]) == 0
    out, record = capsys.readouterr().out, record_of("run")
    assert "training length: 7 epochs = 70 steps (trainer.max_epochs 7)" in out and "stopped by" not in out
    assert (record["epochs"], record["stopped_by"], record["length"]["by"]) == (7, None, "typed")
    # Validation passes are counted from there.
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "20"]) == 0
    assert record_of("run")["epochs"] == 9 and record_of("run")["stopped_by"]


def test_a_time_limit_within_the_last_epoch_is_said(fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    step = TextClassifier.training_step
    monkeypatch.setattr(TextClassifier, "training_step", lambda *words: (time.sleep(0.3), step(*words))[1])
    assert fit("--trainer.max_epochs", "1", "--trainer.max_time", "00:00:00:01") == 0
    assert "stopped by the time limit of" in capsys.readouterr().out
    assert record_of("run")["steps"] < 10 and record_of("run")["best"]["step"] == record_of("run")["steps"]


def test_few_validation_rows_end_nothing(fit: Fit, capsys) -> None:
    assert fit(*STANDING, "--data.val_size", "20", "--data.train_rows", "80") == 0
    out, record = capsys.readouterr().out, record_of("run")
    assert "does not stop early, as 20 validation rows are too few to judge by (100 are enough)" in out
    assert (record["epochs"], record["stopped_by"], record["best"]["epoch"]) == (12, None, 12)


def test_validation_comes_about_ten_times(fit: Fit, capsys) -> None:
    """3 steps an epoch: 40 epochs, every 4 of which are validated, the last one too."""
    assert fit("--data.train_rows", "20", "--data.val_size", "20") == 0
    assert "40 epochs = 120 steps, for 20 rows" in (out := capsys.readouterr().out)
    assert "validated every 4 epochs" in out
    rows = Path("logs/run/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/loss")
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == 10
    assert record_of("run")["metrics"]["val/f1_macro"] <= record_of("run")["best"]["value"]


EARLY = {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 9}}]}


@pytest.mark.parametrize(
    ("trainer", "epochs", "every", "patience", "said"),
    [
        ({"max_epochs": 3}, 3, 1, None, "3 epochs = 30 steps (trainer.max_epochs 3)"),
        ({"max_steps": 7}, None, 1, None, "7 steps (trainer.max_steps 7)"),
        ({"max_epochs": 3, "max_steps": 25}, 3, 1, None, "at most 3 epochs and 25 steps (trainer.max_epochs 3, "),
        ({"check_val_every_n_epoch": 5}, 15, 5, None, "15 epochs = 150 steps, for 80 rows"),
        ({"val_check_interval": 0.5}, 12, 1, 8, "validated every 0.5 epochs; stops early when 8 validations"),
        ({"val_check_interval": 5}, 12, 1, 8, "validated every 0.5 epochs; stops early when 8 validations"),
        (EARLY, 12, 1, 9, "12 epochs = 120 steps, for 80 rows"),
        ({"max_time": "00:01:00:00"}, 12, 1, 4, "trainer.max_epochs) (trainer.max_time 00:01:00:00), validated"),
        ({"limit_val_batches": 0}, 12, 1, None, "12 epochs = 120 steps, for 80 rows"),
        ({"limit_train_batches": 4}, 30, 3, 4, "30 epochs = 120 steps"),
        ({"limit_train_batches": 4.0}, 30, 3, 4, "30 epochs = 120 steps"),
        ({"limit_train_batches": 0.2}, 60, 6, 4, "60 epochs = 120 steps"),
        ({"accumulate_grad_batches": 4}, 40, 4, 4, "40 epochs = 120 steps"),
        ({"min_epochs": 14}, 14, 1, 4, "14 epochs = 140 steps"),
    ],
)
def test_typed_settings_win_over_their_part_of_the_rule(
    fit: Fit, trainer: dict, epochs: int | None, every: int, patience: int | None, said: str
) -> None:
    Path("b.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    run = ConfiguredRun("fit", ["--config", "a.yaml", "--config", "b.yaml"])
    run.build(RunFolder.create(Path("logs"), None, "x"))
    assert run.trainer.max_epochs == epochs
    assert run.trainer.check_val_every_n_epoch == every
    stopping = [each.patience for each in run.trainer.callbacks if isinstance(each, EarlyStopping)]
    assert stopping == ([] if patience is None else [patience])
    assert said in length_words(describe_length(run.settings()["trainer"], run.datamodule, run.length))


def test_one_batch_to_find_faults_and_a_method_that_trains_nothing_need_no_length(fit: Fit, capsys) -> None:
    assert fit("--trainer.fast_dev_run", "true", name="fast") == 0
    assert fit("--model.method", "none", name="none") == 0
    assert "training length" not in capsys.readouterr().out
    assert "length" not in record_of("fast") and record_of("none")["config"]["trainer"]["max_epochs"] is None


@pytest.mark.parametrize("rows", [80, 20])
def test_a_run_of_the_rule_resumes_bit_for_bit(fit: Fit, monkeypatch: pytest.MonkeyPatch, rows: int, capsys) -> None:
    """Validated every epoch, or every 4; interrupted within one of them, and in the one after a validation pass."""
    step, at = TextClassifier.training_step, [0]

    def interrupt(self, batch, batch_idx):
        if self.trainer.global_step == at[0]:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    words = ["--data.train_rows", str(rows), "--model.learning_rate", "2e-2"]
    assert fit(*words, name="long") == 0
    long = record_of("long")
    with monkeypatch.context() as patch:
        patch.setattr(TextClassifier, "training_step", interrupt)
        patch.setattr("lightning_lora.training.saving.SHARE", 1e9)
        at[0] = 17
        assert fit(*words) == 130
        at[0] = 41
        assert main(["fit", "--resume", "logs/run"]) == 130
    capsys.readouterr()
    assert main(["fit", "--resume", "logs/run"]) == 0
    assert f"for {rows} rows (at least 120 steps; trainer.max_epochs)" in capsys.readouterr().out
    same("run", "long")
    for key in ("length", "config", "stopped_by"):
        assert record_of("run")[key] == long[key], key


def test_what_was_left_open_is_open_for_other_rows_and_the_same_command(fit: Fit, capsys) -> None:
    assert fit("--trainer.max_time", "00:00:10:00") == 0
    words = ["fit", "--config", "logs/run/config.yaml", "--name", "other", "--data.train_rows", "40"]
    folder = RunFolder(Path("logs/run"))
    assert (
        as_configured(folder.settings(), folder.read())
        == ConfiguredRun("fit", ["--config", "a.yaml", "--trainer.max_time", "00:00:10:00"]).settings()
    )
    assert main(words) == 0
    assert record_of("other")["length"]["epochs"] == 24
    assert len(record_of("other")["config"]["trainer"]["callbacks"]) == 1
    runs = [GivenRun(Path(name), record_of(name), {}).settings for name in ("run", "other")]
    assert {key for key in {*runs[0], *runs[1]} if runs[0].get(key) != runs[1].get(key)} == {"data.train_rows"}


def test_cells_of_other_rows_have_other_lengths_and_neither_confound_nor_go_stale(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    cells_in_process(monkeypatch)
    plan = {"question": "How many rows?", "base": "a.yaml", "axes": {"rows": {"data.train_rows": [40, 80]}}}
    Path("rows.yaml").write_text(yaml.safe_dump(plan | {"baseline": {"rows": 40}, "seeds": [1]}))
    words = ["ablate", "--config", "rows.yaml", "--name", "rows"]
    assert main(words) == 0
    assert "confounder" not in capsys.readouterr().out
    assert {record_of(f"rows/cells/rows-{n}__seed-1")["length"]["epochs"] for n in (40, 80)} == {12, 24}
    assert main(words) == 0
    assert "cells: 2 arms x 1 seeds = 2; 2 are finished\n" in capsys.readouterr().out
    assert not Path("logs/rows/stale").exists()


def test_an_own_trainer_trains_as_long_and_to_the_same_weights(fit: Fit, tiny_base: Path) -> None:
    assert fit("--model.learning_rate", "2e-2") == 0
    data = TextDataModule("rows.csv", str(tiny_base), max_length=24, batch_size=8, val_size=100, test_size=20)
    model = TextClassifier(str(tiny_base), data.label_names, learning_rate=2e-2)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(**training_length(data), gradient_clip_val=1.0, **quiet)
    trainer.fit(model, data)
    record = record_of("run")
    assert (trainer.max_epochs, trainer.current_epoch, trainer.global_step) == (12, record["epochs"], record["steps"])
    theirs = torch.load("logs/run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    ours = model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items() if name in ours)


def test_arguments_that_are_given_are_returned_and_have_priority(fit: Fit, tiny_base: Path) -> None:
    data = TextDataModule("rows.csv", str(tiny_base), max_length=24, batch_size=8, val_size=100, test_size=20)
    always = {"callbacks": [], "use_distributed_sampler": False}
    assert training_length(data, max_epochs=3, callbacks=[]) == {"max_epochs": 3, **always}
    assert training_length(data, max_steps=3, use_distributed_sampler=True) == {"max_steps": 3} | always | {
        "use_distributed_sampler": True
    }
    assert training_length(data, "adalora")["callbacks"] == []  # which does not stop early
    own = Callback()
    found = training_length(data, callbacks=own, accumulate_grad_batches=2)
    assert found["max_epochs"] == 24 and found["accumulate_grad_batches"] == 2
    assert found["callbacks"][0] is own and isinstance(found["callbacks"][1], EarlyStopping)
    assert training_length(data, overfit_batches=2)["max_epochs"] == 60
    mine = EarlyStopping("val/loss")
    assert training_length(data, callbacks=[mine])["callbacks"] == [mine]


@pytest.mark.parametrize("by", slow_but(["tokens"], ["texts", "tokens"]))
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 4}, {"limit_train_batches": 0.4}])
def test_the_steps_are_those_that_lightning_counts(fit: Fit, tiny_base: Path, by: str, settings: dict) -> None:
    data = TextDataModule("rows.csv", str(tiny_base), max_length=24, batch_size=8, batch_by=by)
    model = TextClassifier(str(tiny_base), data.label_names, learning_rate=5e-3)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(**training_length(data, **settings), **quiet)
    trainer.fit(model, data)
    assert trainer.global_step == trainer.estimated_stepping_batches >= 120
