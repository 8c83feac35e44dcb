"""``fit --budget`` by the command: real trials, the run that it leaves, and interruptions."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.experiments import tuning
from lightning_lora.experiments.tuning import Tuner
from lightning_lora.training import length
from tests.conftest import cells_in_process
from tests.faults.processes import Run

#: So short that a trial is over in a second or two.
SHORT = ("--trainer.max_epochs", "1", "--data.max_length", "24", "--seed_everything", "7")


@pytest.fixture
def tuned(own_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search by the command whose second trial is the best, whatever the rows say."""
    cells_in_process(monkeypatch)
    best = Tuner.best.fget
    monkeypatch.setattr(Tuner, "best", property(lambda self: self.trials[1] if len(self.trials) > 1 else best(self)))
    proposals = Tuner._next_point
    monkeypatch.setattr(Tuner, "_next_point", lambda self: proposals(self) if len(self.trials) < 3 else None)
    words = ["fit", "--config", str(own_config / "own.yaml"), *SHORT, "--name", "run", "--logs_dir", str(tmp_path)]
    seen: dict[str, Any] = {}
    move = Tuner._keep

    def remember(self: Tuner) -> object:
        place = self._place(self.trials[1])
        seen["best"] = (place / "checkpoints" / "best.ckpt").read_bytes()
        seen["files"] = {str(path.relative_to(place)) for path in place.rglob("*")}
        return move(self)

    monkeypatch.setattr(Tuner, "_keep", remember)
    assert main([*words, "--budget", "10m"]) == 0
    run = tmp_path / "run"
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == seen["best"]
    assert {path for path in seen["files"] if not (run / path).exists()} == set()
    return run


def test_a_report_takes_what_a_search_chose_for_its_result(tuned: Path, own_config: Path, tmp_path: Path) -> None:
    """The arms are with and without the budget, whatever each seed's search has kept."""
    words = ["fit", "--config", str(own_config / "own.yaml"), *SHORT, "--name", "plain", "--logs_dir", str(tmp_path)]
    assert main(words) == 0
    runs = [str(tmp_path / "plain"), str(tuned)]
    for run in runs:
        assert main(["test", "--run", run, "--before", "false"]) == 0
    assert main(["report", *runs, "--output", "compared"]) == 0
    document = json.loads(Path("compared/report.json").read_text())
    assert [arm["name"] for arm in document["arms"]] == ["no budget", "budget 10 min 0 s"]
    text = Path("compared/report.md").read_text()
    assert "2 runs that differ in budget:" in text
    assert "Training times of run are those of the kept trials" in text


def test_the_best_run_is_a_run_like_any_other(tuned: Path, own_config: Path, tmp_path: Path, capsys) -> None:
    record = json.loads((tuned / "run.json").read_text())
    assert record["name"] == "run" and record["status"] == "finished" and record["tuning"]["kept"] == 1
    assert "--budget 10m" in record["command"]
    assert record["config"] == yaml.safe_load((tuned / "config.yaml").read_text())
    assert record["config"]["trainer"]["max_time"] is None
    assert record["best"]["value"] == record["tuning"]["trials"][1]["f1_macro"]
    # Bit for bit what fit makes of its settings.
    words = ["fit", "--config", str(tuned / "config.yaml"), "--name", "plain", "--logs_dir", str(tmp_path)]
    assert main(words) == 0
    states = [torch.load(run / "checkpoints" / "best.ckpt") for run in (tuned, tmp_path / "plain")]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), name
    # The first trial is what fit trains without a budget.
    words = ["fit", "--config", str(own_config / "own.yaml"), *SHORT, "--name", "default", "--logs_dir", str(tmp_path)]
    assert main(words) == 0
    configs = [run / "config.yaml" for run in (tuned / "trials" / "000", tmp_path / "default")]
    assert yaml.safe_load(configs[0].read_text()) == yaml.safe_load(configs[1].read_text())
    default = json.loads((tmp_path / "default" / "run.json").read_text())
    assert default["best"]["metrics"]["val/loss"] == record["tuning"]["trials"][0]["loss"]
    # Test rows were not read until now.
    assert {path.name for path in tuned.rglob("*.parquet")} == {"splits.parquet", "val.parquet"}
    assert "evaluations" not in record
    capsys.readouterr()
    assert main(["test", "--run", str(tuned)]) == 0
    assert len(pq.read_table(tuned / "predictions" / "test.parquet"))
    assert main(["predict", "--run", str(tuned), "a fine film"]) == 0
    assert main(["fit", "--resume", str(tuned)]) == 0
    assert "has finished already" in capsys.readouterr().out
    assert main(["fit", "--resume", str(tuned), "--trainer.max_epochs", "2"]) == 0
    longer = json.loads((tuned / "run.json").read_text())
    assert longer["epochs"] == 2 and longer["tuning"] == record["tuning"]


def test_the_words(tuned: Path, own_config: Path, tmp_path: Path, capsys) -> None:
    page = (tuned / "tuning.md").read_text()
    assert "Test rows played no part." in page and "| 0 | the default |" in page
    assert "| 1 | learning_rate 0.002 |" in page and page.count("finished, kept") == 1
    words = ["fit", "--config", str(own_config / "own.yaml"), *SHORT, "--name", "run", "--logs_dir", str(tmp_path)]
    capsys.readouterr()
    assert main([*words, "--budget", "10m"]) == 2
    assert "run exists, and a run is never overwritten; choose another name" in capsys.readouterr().err


def test_what_cannot_be_searched_is_one_line(own_config: Path, capsys, monkeypatch) -> None:
    words = ["fit", "--config", str(own_config / "own.yaml"), "--budget", "5m"]
    for more, said in (
        (["--model.method", "tfidf"], "method 'tfidf' has no training"),
        (["--trainer.devices", "2"], "trials run on one device each"),
        (["--trainer.max_time", "00:00:01:00"], "leave trainer.max_time out"),
        (["--trainer.fast_dev_run", "true"], "the best checkpoint is kept"),
        ([*SHORT, "--model.learning_rate", "1e-3", "--data.truncation", "head"], "every setting that would be"),
        (["--resume", "logs/run"], "no run folder"),
        (["--data.label_column", "verdict"], "verdict"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error
    assert main(["compare", "--config", str(own_config / "own.yaml"), "--budget", "5m"]) == 2
    assert "no option --budget" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(words) == 2
    assert "pip install -c constraints.txt -e '.[search]'" in capsys.readouterr().err
    assert not Path("logs").exists() or not [*Path("logs").iterdir()]


def test_a_default_that_cannot_be_trained_is_said_as_fit_says_it(own_config: Path, capsys, monkeypatch) -> None:
    words = ["fit", "--config", str(own_config / "own.yaml"), "--data.max_length", "24"]
    words += ["--model.adapter.target_modules", "[nothing]"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    children = []

    def run_child(commands: list[list[str]], output: Path) -> int:
        children.append(commands)
        status = main(commands[0])
        output.write_text(capsys.readouterr().err)
        return status

    monkeypatch.setattr(tuning, "run_child", run_child)
    assert main([*words, "--budget", "5m", "--name", "run"]) == 2
    assert capsys.readouterr().err.strip() == said and len(children) == 1
    assert not Path("logs/run").exists()


def test_the_search_by_itself_within_its_time(own_config: Path, monkeypatch, capsys) -> None:
    cells_in_process(monkeypatch)
    monkeypatch.setattr(length, "enough_steps", lambda classes: 6)
    words = ["fit", "--config", str(own_config / "own.yaml"), "--budget", "12s", "--data.max_length", "24"]
    assert main(words) == 0
    (run,) = Path("logs").iterdir()
    assert run.name.startswith("rows-budget-")  # the same command without a name finds it again
    record = json.loads((run / "run.json").read_text())
    tuning = record["tuning"]
    assert tuning["used_s"] < 12 + 6 and len(tuning["trials"]) >= 2
    best = max(tuning["trials"], key=lambda trial: (trial["f1_macro"], -trial["loss"]))
    assert tuning["kept"] == best["number"] and record["best"]["value"] == best["f1_macro"]
    said = capsys.readouterr().out
    assert said.count("\ntrial ") == len(tuning["trials"]) and "test rows played no part" in said


@pytest.mark.parametrize(
    ("number", "trial", "budget"),
    [
        (signal.SIGTERM, 0, "5s"),
        pytest.param(signal.SIGINT, 1, "60s", marks=pytest.mark.faults),
        pytest.param(signal.SIGKILL, 1, "60s", marks=pytest.mark.faults),
    ],
)
def test_an_interrupted_search_goes_on(own_config: Path, tmp_path: Path, number: int, trial: int, budget: str) -> None:
    words = ["fit", "--config", str(own_config / "own.yaml"), "--data.max_length", "24", "--trainer.max_epochs", "20"]
    words += ["--name", "run", "--logs_dir", str(tmp_path), "--budget", budget]
    run = Run(words, tmp_path / "stopped.txt")
    run.wait_for((tmp_path / "run" / "trials" / f"00{trial}" / "run.json").is_file)
    run.signal(number)
    if number == signal.SIGINT:  # Ctrl-C reaches all processes
        for child in psutil.Process(run.process.pid).children(recursive=True):
            if "tracker" not in " ".join(child.cmdline()):
                child.send_signal(number)
    status = run.wait(60)
    assert status == (-number if number == signal.SIGKILL else 128 + number), run.text()
    assert number == signal.SIGKILL or "resume with the same command: python main.py fit" in run.text()
    state = json.loads((tmp_path / "run" / "tuning.json").read_text())
    assert [each["status"] for each in state["trials"]] == [*["finished"] * trial, "running"]
    assert main(["fit", "--resume", str(tmp_path / "run")]) == 2
    again = Run(words, tmp_path / "again.txt")
    assert again.wait(120) == 0, again.text()
    assert f"resumed: {trial} trials are done" in again.text()
    assert again.text().count("trial 0 (") == 1 - trial
    tuning = json.loads((tmp_path / "run" / "run.json").read_text())["tuning"]
    assert tuning["used_s"] >= state["used_s"]
    if trial:
        assert tuning["trials"][0]["seconds"] == pytest.approx(state["trials"][0]["seconds"])
