"""Lightning's callbacks in a config do what they say, also when the run is resumed."""

import contextlib
import csv
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch.callbacks
import pytest

from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.optim import AdamW
from lightning_lora.training.refused import CALLBACKS
from tests.training.test_refused import named, trained


def several(**callbacks: dict) -> dict:
    """Trainer settings with one callback each; what follows a "__" in a name tells two of a class apart."""
    return {"callbacks": [named(name.partition("__")[0], **init)["callbacks"][0] for name, init in callbacks.items()]}


@pytest.fixture(scope="module")
def busy(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A run with many callbacks at once: its folder and what it said."""
    place, said = tmp_path_factory.mktemp("busy"), io.StringIO()
    callbacks = several(
        DeviceStatsMonitor={"cpu_stats": True},
        EarlyStopping={"monitor": "val/loss", "patience": 9, "verbose": True},
        LearningRateMonitor={"logging_interval": "step", "log_weight_decay": True},
        ModelCheckpoint__every={"every_n_train_steps": 5, "save_top_k": -1, "filename": "every-{step}"},
        ModelCheckpoint__best={"monitor": "val/loss", "save_last": True, "filename": "best", "verbose": True},
        ModelSummary={"max_depth": 2},
        RichModelSummary={},
        Timer={"duration": "00:01:00:00"},
    )
    logger, handler = logging.getLogger("lightning.pytorch"), logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.chdir(place)
            patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
            assert trained(place, tiny_base, callbacks) == 0
        yield SimpleNamespace(place=place, run=place / "logs" / "run", said=said.getvalue())
    finally:
        logger.removeHandler(handler)


def columns(run: Path) -> dict[str, list[str]]:
    """What ``metrics.csv`` holds by name, without empty cells."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


def test_each_says_and_writes_what_it_is_there_for(busy: SimpleNamespace) -> None:
    found = columns(busy.run)
    assert all(float(value) >= 0 for value in found["DeviceStatsMonitor.on_train_batch_end/cpu_percent"])
    assert len(found["learning_rate/pg1"]) == len(found["learning_rate/pg1-weight_decay"]) == 24  # and not twice
    assert "Metric val/loss improved. New best score" in busy.said
    assert "'val/loss' reached" in busy.said and "Trainable params" in busy.said
    assert "PeftModelForSequenceClassification" in busy.said and "model.base_model" in busy.said
    kept = {path.stem for path in (busy.run / "model_checkpoints").iterdir()}
    assert kept == {"best", "last", *(f"every-step={step}" for step in (5, 10, 15, 20))}
    assert not any(word in busy.said for word in ("GPU available", "Tip:", "stopped: `max_epochs"))


def test_all_of_them_go_on_when_the_run_is_resumed(busy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(busy.place)
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "4"]) == 0
    assert len(columns(busy.run)["learning_rate/pg1-weight_decay"]) == 32
    kept = {path.stem for path in (busy.run / "model_checkpoints").iterdir()}
    assert kept == {"best", "last", *(f"every-step={step}" for step in (5, 10, 15, 20, 25, 30))}


def test_a_timer_ends_training_and_counts_the_time_before_a_resume(tiny_base: Path, tmp_path: Path, capsys) -> None:
    timer = named("Timer", duration="00:00:00:01") | {"max_epochs": 500}
    assert trained(tmp_path, tiny_base, timer) == 0
    record = RunFolder(Path("logs/run")).read()
    assert record["stopped_by"].startswith("the time limit of 1") and 0 < record["steps"] < 4000
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "600"]) == 0
    assert RunFolder(Path("logs/run")).read()["steps"] == record["steps"]
    assert "stopped by the time limit of 1" in capsys.readouterr().out.split("continued")[1]


@pytest.mark.parametrize(
    ("monitor", "trainer"),
    [
        ({"EarlyStopping": {"check_on_train_epoch_end": True, "min_delta": 9.0, "patience": 1}}, {"max_epochs": 6}),
        ({"ModelCheckpoint": {"save_on_train_epoch_end": True}}, {"max_epochs": 4}),
    ],
)
def test_a_metric_of_training_is_monitored_at_the_end_of_each_epoch(
    tiny_base: Path, tmp_path: Path, monitor: dict, trainer: dict
) -> None:
    """The remedy that the refusal names, where not every epoch is validated."""
    ((name, init),) = monitor.items()
    settings = named(name, monitor="train/loss", **init) | trainer | {"check_val_every_n_epoch": 2}
    assert trained(tmp_path, tiny_base, settings) == 0
    record, losses = RunFolder(Path("logs/run")).read(), list(map(float, columns(Path("logs/run"))["train/loss"]))
    if name == "EarlyStopping":
        assert record["epochs"] == 2 and record["stopped_by"].startswith("EarlyStopping: train/loss did not")
    else:
        (kept,) = Path("logs/run/model_checkpoints").iterdir()
        assert kept.stem.startswith(f"epoch={losses.index(min(losses))}-")


def test_a_search_keeps_the_ratio_of_rates_and_leaves_no_trace(tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    """LoRA+ has two rates; the search validates, and this run does not."""
    rates: list[list[float]] = []
    step = AdamW.step

    def watched(self: AdamW, closure: object = None) -> object:
        rates.append(sorted({group["lr"] for group in self.param_groups}))
        return step(self, closure)

    monkeypatch.setattr(AdamW, "step", watched)
    words = ["--model.method", "lora_plus"]
    finder = named("LearningRateFinder", num_training_steps=20, max_lr=0.02)
    assert trained(tmp_path, tiny_base, finder | {"limit_val_batches": 0}, *words) == 0
    assert len(rates) == 20 + 24 and rates[10][0] > rates[0][0]
    assert all(b == pytest.approx(16 * a) for a, b in filter(any, rates))
    record = RunFolder(Path("logs/run")).read()
    peak = record["model"]["learning_rate"]
    assert max(rates[20:])[0] == pytest.approx(peak) and not list(Path("logs/run").glob(".lr_find*"))
    given = [*words, "--name", "given", "--model.learning_rate", repr(peak)]
    assert trained(tmp_path, tiny_base, {"limit_val_batches": 0}, *given) == 0
    assert RunFolder(Path("logs/given")).read()["metrics"] == record["metrics"]
    assert not any(name.startswith("val/") for name in record["metrics"])


def test_the_docs_list_every_callback_where_it_belongs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    tables = page.split("## Callbacks")[1].split("\n## ")[0].split("| Refused")
    works, refused = (
        {
            name
            for line in table.splitlines()
            if line.startswith("| `")
            for name in re.findall("`(.+?)`", line[: line.index(" | ")])
        }
        for table in tables
    )
    assert refused == set(CALLBACKS) and works == set(lightning.pytorch.callbacks.__all__) - refused
