"""``--track``: against MLflow, Weights & Biases and Trackio where they are installed; nothing leaves this machine."""

import csv
import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.training import trackers
from tests.commands.test_tasks import write_config
from tests.conftest import PAIR_HEADER, make_pairs, make_rows, write_csv

KINDS = ("mlflow", "wandb", "trackio")
HOW = "needs `pip install {}`, which `make` leaves out"


def importorskip(name: str) -> Any:
    return pytest.importorskip(name, reason=HOW.format(name))


@pytest.fixture
def words(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_csv(tmp_path / "rows.csv", make_rows(80))
    settings = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": "rows.csv", "max_length": 24, "batch_size": 8, "truncation": "both"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "--config", "a.yaml", "--name", "run"]


def record(run: str = "logs/run") -> dict[str, Any]:
    return json.loads((Path(run) / "run.json").read_text())


def logged_losses() -> dict[int, float]:
    with Path("logs/run/metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}


class Recorder(trackers.Logger):
    """Stands in for a tracker; fails from a call on."""

    def __init__(self, known: dict[str, Any], calls: list[Any], fails_at: int) -> None:
        super().__init__()
        self.known, self.calls, self.fails_at = known, calls, fails_at
        self.experiment = SimpleNamespace(log_artifact=self.artifact, finish=lambda: self.add("finish", None))

    def add(self, *call: Any) -> None:
        if len(self.calls) >= self.fails_at:
            raise ConnectionError("the server is gone\nand more")
        self.calls.append(call)

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return self.known["id"] or "started-1"

    def artifact(self, path: str, name: str, type: str) -> None:
        self.add("file", name)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        self.add("settings", params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.add(step, metrics)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(calls=[], fails_at=10**9)
    monkeypatch.setattr(trackers, "missing_package", lambda kind: None)
    make = lambda known: Recorder(known, found.calls, found.fails_at)  # noqa: E731
    monkeypatch.setitem(trackers._MAKERS, "trackio", make)
    return found


def test_fit_resume_and_test_write_to_one_tracked_run(words: list[str], recorder: SimpleNamespace) -> None:
    assert main([*words, "--track", "trackio"]) == 0
    known = {"kind": "trackio", "run": "run", "group": None, "id": "started-1", "store": None}
    assert record()["tracker"] == known and "track" not in Path("logs/run/config.yaml").read_text()
    settings = dict(recorder.calls)["settings"]
    assert settings["model.learning_rate"] == record()["model"]["learning_rate"]
    best = {step: call for step, call in recorder.calls if isinstance(call, dict) and "val-best/loss" in call}
    kept = {name.replace("/", "-best/", 1): value for name, value in record()["best"]["metrics"].items()}
    assert best == {record()["best"]["step"]: kept}
    assert recorder.calls[-2:] == [("file", "run-config.yaml"), ("finish", None)]
    recorder.calls.clear()
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "2"]) == 0
    assert record()["tracker"] == known and not any(call[0] == "settings" for call in recorder.calls)
    recorder.calls.clear()
    assert main(["test", "--run", "logs/run"]) == 0
    tested = record()["evaluations"]["test"]
    assert recorder.calls[0] == (tested["step"], {f"test/{k}": v for k, v in tested["after"].items()})
    assert recorder.calls[1:] == [("file", "run-test.md"), ("finish", None)]
    said = json.dumps(recorder.calls, default=str)
    assert not any(text in said for text, _ in make_rows(80))


@pytest.mark.parametrize("calls", [0, 3])
def test_a_tracker_that_fails_costs_a_warning_and_not_the_run(
    words: list[str], recorder: SimpleNamespace, capsys, calls: int
) -> None:
    recorder.fails_at = calls
    assert main([*words, "--track", "trackio"]) == 0
    error = capsys.readouterr().err
    assert error.count("warning: --track trackio: nothing more is written to it: the server is gone\n") == 1
    assert record()["status"] == "finished" and logged_losses() and len(recorder.calls) == calls
    assert main(["test", "--run", "logs/run"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--track", "mlflow"], "--track mlflow: its package is missing: pip install mlflow"),
        (["--track_group", "a"], "--track_group: nothing is tracked; give --track too"),
        (["--track", "mlflow", "--budget", "1m"], "--track: the trials of --budget are not tracked; leave it out"),
    ],
)
def test_what_cannot_be_tracked_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys, options: list[str], message: str
) -> None:
    nothing_installed = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(trackers, "importlib", nothing_installed)
    assert main([*words, *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    assert not Path("logs").exists()


def test_a_tracked_run_is_tested_without_the_package(words: list[str], recorder: Any, monkeypatch, capsys) -> None:
    assert main([*words, "--track", "trackio"]) == 0
    monkeypatch.setattr(trackers, "missing_package", lambda kind: f"pip install {kind}")
    monkeypatch.setitem(trackers._MAKERS, "trackio", lambda known: __import__("no_such_package"))
    assert main(["test", "--run", "logs/run"]) == 0
    assert "nothing more is written to it: pip install trackio" in capsys.readouterr().err


def test_mlflow_holds_the_run_and_its_model_predicts_texts(words: list[str], tmp_path: Path, monkeypatch) -> None:
    """Against MLflow's own client and the run's own predictions."""
    mlflow = importorskip("mlflow")
    from lightning_lora import load_run

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracked.db")
    assert main([*words, "--track", "mlflow", "--trainer.max_epochs", "2"]) == 0
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "3"]) == 0
    assert main(["test", "--run", "logs/run", "--before", "false"]) == 0
    assert main(["export", "--run", "logs/run", "--formats", "[merged]"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("lightning_lora").experiment_id])
    assert run.info.run_id == record()["tracker"]["id"] and run.info.status == "FINISHED"
    assert run.info.run_name == "run" and run.data.params["model.adapter.rank"] == "8"
    curve = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "val/loss")}
    assert curve == pytest.approx(logged_losses(), abs=1e-6)
    for name, value in record()["evaluations"]["test"]["after"].items():
        assert run.data.metrics[f"test/{name}"] == pytest.approx(value)
    assert {each.path for each in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "test.md"}
    model = mlflow.pyfunc.load_model("models:/run/latest")
    texts = [text for text, _ in make_rows(40, seed=5)]
    said, truth = model.predict(texts), load_run("logs/run").predict(texts)
    assert said["label"].tolist() == list(truth.names)
    assert said["score"].tolist() == pytest.approx(truth.probabilities.max(axis=1).tolist(), abs=1e-5)
    assert model.metadata.signature.outputs.input_names() == ["label", "score"]
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("tracked.db*"))
    assert not any(text.encode() in stored for text, _ in make_rows(80))


@pytest.mark.parametrize("task", ["multi_label", "regression", "pair"])
def test_mlflow_predicts_what_the_run_predicts(tiny_base: Path, tmp_path: Path, monkeypatch, task: str) -> None:
    mlflow = importorskip("mlflow")
    from lightning_lora import load_run

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracked.db")
    config, texts = write_config(tmp_path, tiny_base, "multi_label"), [text for text, _ in make_rows(40, seed=5)]
    if task == "regression":
        config = write_config(tmp_path, tiny_base, task)
    if task == "pair":
        write_csv(tmp_path / "rows.csv", make_pairs(80), PAIR_HEADER)
        settings = yaml.safe_load(config.read_text())
        del settings["data"]["label_separator"]
        settings["data"]["text_column"] = ["premise", "hypothesis"]
        config.write_text(yaml.safe_dump(settings))
        texts = list(zip(texts[:20], texts[20:], strict=True))
    assert main(["fit", "--config", str(config), "--name", "run", "--track", "mlflow"]) == 0
    assert main(["export", "--run", "logs/run", "--formats", "[merged]"]) == 0
    given = pd.DataFrame(texts, columns=["text", "text_pair"]) if task == "pair" else texts
    said, truth = mlflow.pyfunc.load_model("models:/run/latest").predict(given), load_run("logs/run").predict(texts)
    if task == "regression":
        assert said["score"].tolist() == pytest.approx(truth.logits[:, 0].tolist(), rel=1e-5)
    else:
        assert [list(each) if task == "multi_label" else each for each in said["label"]] == list(truth.names)


def test_mlflow_keeps_an_ablation_in_one_experiment(words: list[str], tmp_path: Path, monkeypatch) -> None:
    mlflow = importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracked.db")
    # A cell's command, as `ablate --track mlflow` gives it to fit.
    assert main([*words[:-1], "rank-8__seed-3", "--track", "mlflow", "--track_group", "ablation-rank"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ablation-rank").experiment_id])
    assert (run.data.tags["arm"], run.data.tags["seed"]) == ("rank-8", "3")


def stored_records(data: bytes) -> Iterator[bytes]:
    """What W&B stores: after 7 bytes blocks of 32 KiB in LevelDB's log format, with records in parts."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_offline_holds_the_run(words: list[str], tmp_path: Path, monkeypatch) -> None:
    """By the file that `wandb sync` sends."""
    importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main([*words, "--track", "wandb", "--track_group", "ablation-rank"]) == 0
    assert main(["test", "--run", "logs/run", "--before", "false"]) == 0
    found: dict[str, list[Any]] = {"history": [], "run": [], "config": []}
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        for data in stored_records(path.read_bytes()):
            entry = wandb_internal_pb2.Record.FromString(data)
            if (kind := entry.WhichOneof("record_type")) in found:
                found[kind].append(getattr(entry, kind))
        assert not any(text.encode() in path.read_bytes() for text, _ in make_rows(80))
    assert {each.run_id for each in found["run"]} == {record()["tracker"]["id"]} and len(found["run"]) >= 2
    assert found["run"][0].run_group == "ablation-rank" and found["run"][0].project == "lightning_lora"
    items = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in each.item} for each in found["history"]]
    losses = {row["trainer/global_step"]: row["val/loss"] for row in items if "val/loss" in row}
    assert losses == pytest.approx(logged_losses(), abs=1e-6)
    tested = record()["evaluations"]["test"]["after"]
    assert [row["test/accuracy"] for row in items if "test/accuracy" in row] == [pytest.approx(tested["accuracy"])]


def test_trackio_holds_the_run(words: list[str], tmp_path: Path, monkeypatch) -> None:
    """By the database that its dashboard reads."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    assert main([*words, "--track", "trackio"]) == 0
    assert main(["test", "--run", "logs/run", "--before", "false"]) == 0
    (known,) = SQLiteStorage.get_run_records("lightning_lora")
    assert (known["name"], known["id"]) == ("run", record()["tracker"]["id"])
    logs = SQLiteStorage.get_logs("lightning_lora", "run", run_id=known["id"])
    losses = {row["step"]: row["val/loss"] for row in logs if "val/loss" in row}
    assert losses == pytest.approx(logged_losses(), abs=1e-6)
    assert sum("test/accuracy" in row for row in logs) == 1
    (place,) = (tmp_path / "trackio").glob("lightning_lora*.db")
    with sqlite3.connect(place) as base:
        assert "model.adapter.rank" in "".join(map(str, base.execute("select * from configs")))
