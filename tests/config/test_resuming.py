"""Runs that are trained for longer than planned, and runs that never began."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.saving import validates_within
from tests.conftest import make_rows, write_csv

CONSTANT = ["--model.schedule", "constant", "--model.warmup_ratio", "0"]


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    write_csv(tmp_path / "rows.csv", make_rows(120))
    settings = {
        "model": {"base_model": str(tiny_base), "learning_rate": 5e-3},
        "data": {"source": "rows.csv", "max_length": 24, "batch_size": 8},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False, "log_every_n_steps": 1},
    }
    settings["trainer"]["max_epochs"] = 1
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "a.yaml"


def fit(config: Path, name: str, *words: str) -> int:
    return main(["fit", "--config", str(config), "--name", name, *words])


def same(one: str, other: str) -> None:
    """Two runs came to the same weights, metrics and curves."""
    for file in ("best.ckpt", "last.ckpt"):
        states = [
            torch.load(f"logs/{name}/checkpoints/{file}", weights_only=True)["state_dict"] for name in (one, other)
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    records = [RunFolder(Path("logs") / name).read() for name in (one, other)]
    for key in ("status", "metrics", "best", "steps", "epochs"):
        assert records[0][key] == records[1][key], key
    assert Path(f"logs/{one}/metrics.csv").read_text() == Path(f"logs/{other}/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (["--trainer.max_epochs", "1"], ["--trainer.max_epochs", "3"]),
        (["--trainer.max_steps", "22", "--trainer.max_epochs", "9"], ["--trainer.max_steps=33"]),
    ],
)
def test_a_run_with_a_constant_rate_is_trained_further_as_if_planned_so(config, capsys, first, more) -> None:
    assert fit(config, "long", *CONSTANT, "--trainer.max_epochs", "3") == 0
    assert fit(config, "run", *CONSTANT, *first) == 0
    assert main(["test", "--run", "logs/run", "--before", "false"]) == 0
    capsys.readouterr()
    assert main(["fit", "--resume", "logs/run", *more]) == 0
    assert capsys.readouterr().err.split("\n\n")[-1] == (
        "warning: test in run.json are of the weights before; evaluate again\n"
    )
    same("run", "long")
    record = RunFolder(Path("logs/run")).read()
    name, value = more[0].lstrip("-").partition("=")[0], int(more[-1].rpartition("=")[2])
    assert record["resumed"][-1]["changed"][name][1] == value
    assert record["config"] == yaml.safe_load(Path("logs/run/config.yaml").read_text())
    assert record["config"]["trainer"][name.rpartition(".")[2]] == value


def test_a_schedule_that_depends_on_the_steps_is_laid_out_anew_with_a_warning(config, capsys) -> None:
    """Against the closed form: the line from the peak to 0 over all steps, from where the run stands."""
    assert fit(config, "run", "--trainer.max_epochs", "1", "--model.warmup_ratio", "0") == 0
    done = RunFolder(Path("logs/run")).read()["steps"]
    capsys.readouterr()
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "3"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(lines) == 1 and f"planned for {done} steps and is planned for {3 * done} from here on" in lines[0]
    with Path("logs/run/metrics.csv").open(newline="") as file:
        rates = {int(r["step"]): float(r["learning_rate"]) for r in csv.DictReader(file) if r["learning_rate"]}
    for step in range(3 * done):
        planned = done if step < done else 3 * done
        assert rates[step] == pytest.approx(5e-3 * (1 - step / planned)), step


def test_an_interrupted_run_can_be_given_more_epochs(config, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.training import saving
    from lightning_lora.training.module import TextClassifier

    step = TextClassifier.training_step

    def interrupt(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    assert fit(config, "long", *CONSTANT, "--trainer.max_epochs", "2") == 0
    with monkeypatch.context() as patch:
        patch.setattr(TextClassifier, "training_step", interrupt)
        patch.setattr(saving, "SHARE", 1e9)
        assert fit(config, "run", *CONSTANT, "--trainer.max_epochs", "1") == 130
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "2"]) == 0
    same("run", "long")


def test_a_run_that_ended_within_an_epoch_is_continued_with_a_warning(config, capsys) -> None:
    assert fit(config, "run", *CONSTANT, "--trainer.max_steps", "5") == 0
    assert main(["fit", "--resume", "logs/run", "--trainer.max_steps", "9", "--trainer.max_epochs", "4"]) == 0
    assert "warning: the run ended 5 batches into an epoch" in capsys.readouterr().err
    assert RunFolder(Path("logs/run")).read()["steps"] == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.max_epochs", "1"], ""),
        (["--trainer.max_epochs", "0"], "--trainer.max_epochs: 0, but logs/run has done 1 already"),
        (["--trainer.max_steps", "30"], "--trainer.max_epochs: 1, but logs/run has done 1 already"),
        (
            ["--trainer.max_epochs", "3", "--trainer.max_steps", "3"],
            "--trainer.max_steps: 3, but logs/run has done 11 already",
        ),
        (["--model.learning_rate", "1"], "'--model.learning_rate' would make it another run"),
        (["--config", "a.yaml"], "'--config' would make it another run"),
        (["--trainer.max_epochs", "3", "--data.batch_size=4"], "'--data.batch_size' would make it another run"),
    ],
)
def test_other_options_and_limits_that_leave_nothing_to_do_are_refused(config, capsys, words, said: str) -> None:
    assert fit(config, "run") == 0
    files = {path: path.read_bytes() for path in Path("logs/run").rglob("*") if path.is_file()}
    assert main(["fit", "--resume", "logs/run", *words]) == (2 if said else 0)
    assert said in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in Path("logs/run").rglob("*") if path.is_file()}


def test_a_method_that_plans_by_its_steps_is_not_trained_further(config, capsys) -> None:
    assert fit(config, "run", "--model.method", "adalora") == 0
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "2"]) == 2
    assert "adalora" in capsys.readouterr().err
    assert RunFolder(Path("logs/run")).read()["status"] == "finished"


def test_a_finished_run_stays_finished_where_its_data_is_gone(config, capsys) -> None:
    assert fit(config, "run") == 0
    record = Path("logs/run/run.json").read_text()
    write_csv(Path("rows.csv"), make_rows(120, seed=1))
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "2"]) == 2
    assert "rows are not those" in capsys.readouterr().err
    assert Path("logs/run/run.json").read_text() == record
    write_csv(Path("rows.csv"), make_rows(120))
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "2"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--data.text_column", "txet"],
        ["--data.source", "nowhere.csv"],
        ["--data.label_names", "[a,b]"],
        ["--model.base_model", "nowhere"],
        ["--data.max_length", "4000"],
        ["--model.adapter.target_modules", "[nowhere]"],
        ["--trainer.limit_train_batches", "3", "--trainer.accumulate_grad_batches", "2"],
    ],
)
def test_a_run_that_never_began_leaves_no_folder_and_its_name_is_free(config, capsys, words: list[str]) -> None:
    assert fit(config, "run", *words) == 2
    assert capsys.readouterr().err.strip().startswith("error: ")
    assert not list(Path("logs").iterdir())
    assert fit(config, "run", "--trainer.max_steps", "1") == 0


def test_a_run_that_began_stays_with_its_record(config, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.errors import UserError
    from lightning_lora.training.module import TextClassifier

    def fail(self, batch, batch_idx):
        raise UserError("in the first step")

    monkeypatch.setattr(TextClassifier, "training_step", fail)
    assert fit(config, "run") == 2
    record = json.loads(Path("logs/run/run.json").read_text())
    assert record["status"] == "failed" and record["error"] == "in the first step"


def test_reports_do_not_take_an_evaluation_of_earlier_weights(config: Path) -> None:
    """A run that is trained for longer and keeps other weights: what was said of those before does not count."""
    assert fit(config, "run", *CONSTANT, "--trainer.max_epochs", "1", "--model.learning_rate", "2e-2") == 0
    run = ["--run", "logs/run"]
    assert main(["test", *run]) == 0 and main(["validate", *run]) == 0
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "6"]) == 0
    record = json.loads(Path("logs/run/run.json").read_text())
    assert record["best"]["step"] != record["evaluations"]["test"]["step"]
    assert main(["report", "logs/run", "--output", "before"]) == 0
    assert json.loads(Path("before/report.json").read_text())["split"] == "validation"
    assert main(["test", *run]) == 0
    record = json.loads(Path("logs/run/run.json").read_text())
    first, second = (record["evaluations"][name]["after"]["accuracy"] for name in ("test", "test-2"))
    assert first != second
    assert main(["report", "logs/run", "--output", "after"]) == 0
    (arm,) = json.loads(Path("after/report.json").read_text())["arms"]
    assert arm["values"]["accuracy"] == pytest.approx(second)


def test_the_step_before_a_validation_pass_is_known_where_the_interval_runs_on_through_epochs() -> None:
    """Of 29 batches an epoch every seventh of all: in the second epoch the first pass is within batch 6, the 35th."""
    progress = SimpleNamespace(total=SimpleNamespace(ready=35), current=SimpleNamespace(ready=6))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), total_batch_idx=34)
    settings = {"accumulate_grad_batches": 1, "num_training_batches": 29, "val_check_batch": 7}
    trainer: Any = SimpleNamespace(**settings, check_val_every_n_epoch=None, fit_loop=loop)
    assert [validates_within(trainer, taken) for taken in (4, 5, 6)] == [False, True, False]
