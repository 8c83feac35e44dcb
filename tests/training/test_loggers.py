"""Loggers that a config adds: beside TensorBoard and ``metrics.csv``, with the settings, in one run."""

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers.logger import Logger

from lightning_lora.cli import main
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.training import loggers
from tests.conftest import make_rows, write_csv


class ServiceLogger(Logger):
    """Stands in for a service whose runs have ids."""

    began: ClassVar[list[str]] = []
    logged: ClassVar[dict[str, list[dict[str, Any]]]] = {}

    def __init__(self, run_id: str | None = None) -> None:
        super().__init__()
        self.run_id = run_id

    @property
    def experiment(self) -> str:
        """Begins a run where none is given, as services do when they are first used."""
        if self.run_id is None:
            self.run_id = f"run-{len(self.began)}"
        self.began.append(self.run_id)
        return self.run_id

    @property
    def name(self) -> str:
        return "service"

    @property
    def version(self) -> str | None:
        return self.run_id

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        self.logged.setdefault("hyperparameters", []).append(dict(params))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged.setdefault("metrics", []).append({**metrics, "step": step})


@pytest.fixture
def words(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LIGHTNING_LORA_ALLOW", "tests.training.test_loggers")
    monkeypatch.setitem(loggers.RUN_ARGUMENTS, "ServiceLogger", "run_id")
    ServiceLogger.began.clear()
    ServiceLogger.logged.clear()
    write_csv(tmp_path / "rows.csv", make_rows(80))
    settings = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": "rows.csv", "max_length": 24, "batch_size": 8},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_progress_bar": False,
            "logger": [{"class_path": "tests.training.test_loggers.ServiceLogger"}],
        },
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "--config", "a.yaml", "--name", "run"]


def test_a_logger_of_a_config_is_added_with_the_settings_and_continued(words: list[str], capsys) -> None:
    assert main(words) == 0
    with Path("logs/run/metrics.csv").open(newline="") as file:
        assert any(row["val/loss"] for row in csv.DictReader(file))
    assert list(Path("logs/run").glob("events.out.*"))
    (settings,) = ServiceLogger.logged["hyperparameters"]
    assert settings["model.learning_rate"] == 1e-3 and settings["model.adapter.rank"] == 8
    assert any("val/loss" in row for row in ServiceLogger.logged["metrics"])
    assert set(ServiceLogger.began) == {"run-0"}
    assert json.loads(Path("logs/run/run.json").read_text())["loggers"] == {"ServiceLogger": "run-0"}
    # Neither an evaluation nor a longer training begins a second run.
    assert main(["test", "--run", "logs/run"]) == 0
    assert "tensorboard --logdir" in capsys.readouterr().out
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "2"]) == 0
    assert set(ServiceLogger.began) == {"run-0"} and len(ServiceLogger.logged["hyperparameters"]) == 1
    # Another run of the same config is one of its own.
    assert main(["fit", "--config", "logs/run/config.yaml", "--name", "other"]) == 0
    assert len(set(ServiceLogger.began)) == 2


@pytest.mark.parametrize(("method", "factors"), [("lora", {"": 1}), ("lora_plus", {"": 1, "/x16": 16})])
def test_the_learning_rate_is_one_curve_and_one_for_each_multiple(words: list[str], method: str, factors: dict) -> None:
    """Against the closed form of the schedule; weights with and without decay have the same rate."""
    more = ["--model.warmup_ratio", "0", "--trainer.log_every_n_steps", "2", "--trainer.accumulate_grad_batches", "2"]
    assert main([*words, *more, "--trainer.max_epochs", "3", "--model.method", method]) == 0
    record = json.loads(Path("logs/run/run.json").read_text())
    with Path("logs/run/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["learning_rate"]]
    steps, peak = record["steps"], record["model"]["learning_rate"]
    assert {key for key in rows[0] if "rate" in key} == {f"learning_rate{name}" for name in factors}
    assert [int(row["step"]) for row in rows] == list(range(1, steps, 2))
    for row in rows:
        now = peak * (1 - int(row["step"]) / steps)
        assert {name: float(row[f"learning_rate{name}"]) for name in factors} == {
            name: pytest.approx(factor * now) for name, factor in factors.items()
        }


def test_settings_are_not_logged_where_that_is_switched_off(words: list[str]) -> None:
    assert main([*words, "--trainer.enable_autolog_hparams", "false"]) == 0
    assert "hyperparameters" not in ServiceLogger.logged


def test_without_loggers_nothing_points_to_them(words: list[str], capsys) -> None:
    assert main([*words, "--trainer.logger", "false"]) == 0
    assert not list(Path("logs/run").glob("events*")) and not Path("logs/run/metrics.csv").exists()
    assert main(["test", "--run", "logs/run"]) == 0
    assert "tensorboard" not in capsys.readouterr().out and not list(Path("logs/run").glob("events*"))


@pytest.mark.parametrize(
    ("name", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("CometLogger", "comet-ml")]
)
def test_a_missing_package_is_named_with_what_installs_it(words: list[str], capsys, name: str, package: str) -> None:
    others = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "mine"}}]
    for given in ({"class_path": f"lightning.pytorch.loggers.{name}"},), others:
        logger = [{"class_path": f"lightning.pytorch.loggers.{name}"}, *given][: 1 + (given is others)]
        Path("b.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
        assert main([*words, "--config", "b.yaml"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: trainer: a class that the config") and error.endswith(
            f"missing: pip install {package}"
        )
        assert not list(Path("logs").iterdir())


def test_the_confusion_matrix_has_the_truth_in_rows() -> None:
    logits, labels = np.eye(3, dtype=np.float32)[[0, 0, 1]], np.array([0, 0, 2])
    figure = loggers.confusion_figure(Predictions(logits, labels, ["a", "b", "c"], np.arange(3)))
    shares = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shares, [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    assert figure.axes[0].get_ylabel() == "True class"
