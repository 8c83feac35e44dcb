"""Progress where there is no terminal."""

from pathlib import Path

import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_lora.cli import main
from lightning_lora.config.progress import Progress, ProgressLines
from tests.conftest import make_rows, write_csv


@pytest.mark.parametrize("bar", [True, False])
def test_steps_and_batches_are_told_with_the_time_left(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, bar: bool
) -> None:
    monkeypatch.setattr(ProgressLines, "EVERY_S", 0.0)
    settings = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": str(write_csv(tmp_path / "rows.csv", make_rows(80))), "max_length": 24, "batch_size": 8},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "accumulate_grad_batches": 2, "enable_progress_bar": bar},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "a.yaml", "--name", "run"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("step", "batch"))]
    assert bool(told) == bar and all("of 8, about " in line and line.endswith(" left") for line in told)
    assert main(["test", "--run", "logs/run", "--data.eval_batch_size", "4"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("step", "batch"))]
    assert bool(told) == bar and (not bar or told[0].startswith("batch 1 of 4, about "))


def test_a_line_comes_only_so_often(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [100.0], ProgressLines()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines._start(10)
    for step, seconds in ((11, 10), (12, 29), (13, 31), (14, 60), (15, 62)):
        now[0] = 100.0 + seconds
        lines._tell(step, "step", lambda: 20)
    assert capsys.readouterr().err.splitlines() == [
        "step 13 of 20, about 1 min 12 s left",
        "step 15 of 20, about 1 min 2 s left",
    ]


@pytest.mark.parametrize(("options", "told"), [({"max_epochs": 3}, "Epoch 3 of 3"), ({"max_steps": 2}, "Epoch 1 ")])
def test_the_bar_counts_epochs_from_one(options: dict, told: str, capsys: pytest.CaptureFixture) -> None:
    trainer = Trainer(**options, accelerator="cpu", callbacks=Progress(), logger=False, enable_checkpointing=False)
    trainer.fit(BoringModel())
    assert told in capsys.readouterr().err
