"""The Python API, as the README and docs/python.md show it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from sklearn.metrics import matthews_corrcoef
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassMatthewsCorrCoef

from lightning_lora import TextClassifier, TextDataModule, load_run, predict
from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.models.base import Base

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0}


@pytest.fixture
def run(tiny_base: Path, reviews: Path) -> Path:
    words = ["--model.base_model", str(tiny_base), "--data.source", str(reviews), "--data.max_length", "24"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.learning_rate", "5e-3"]
    Path("empty.yaml").write_text("{}\n")
    assert main(["fit", "--config", "empty.yaml", *words, "--name", "run", "--trainer.max_epochs", "2"]) == 0
    return Path("logs/run")


def trained(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "lora_" in name or "classifier" in name}


def test_own_trainer_gives_the_weights_of_the_command_line(run: Path, tiny_base: Path, reviews: Path) -> None:
    data = TextDataModule(str(reviews), str(tiny_base), max_length=24)
    model = TextClassifier(str(tiny_base), data.label_names, learning_rate=5e-3)
    trainer = Trainer(max_epochs=2, gradient_clip_val=1.0, enable_checkpointing=False, **QUIET)
    trainer.fit(model, data)
    theirs = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    ours = {name: value for name, value in model.state_dict().items() if name in theirs}
    assert trained(theirs).keys() <= ours.keys() and trained(theirs)
    for name, value in trained(theirs).items():
        assert torch.equal(ours[name], value), name


def test_load_run_predicts_as_the_command_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["the film was brilliant and charming", "a dull and boring story of two people", "x"]
    capsys.readouterr()
    assert main(["predict", "--run", str(run), *texts, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = load_run(run).predict(texts)
    assert found.names == [row["prediction"] for row in rows]
    np.testing.assert_allclose(found.probabilities, [[row["p(neg)"], row["p(pos)"]] for row in rows], atol=1e-12)
    assert predict(run, texts).names == found.names
    assert predict(run, "one text").logits.shape == (1, 2)


@pytest.mark.parametrize("texts", [["fine", " "], ["fine", None]])
def test_texts_that_are_none_are_refused(run: Path, texts: list) -> None:
    with pytest.raises(UserError, match="text 1: a text is needed"):
        predict(run, texts)
    with pytest.raises(UserError, match="load_run: nowhere is no run folder"):
        load_run("nowhere")


def test_own_loss_metric_head_and_callback(tiny_base: Path, reviews: Path) -> None:
    calls: list[str] = []

    class Head(nn.Module):
        def __init__(self, width: int, classes: int) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(width, 8), nn.Linear(8, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner(x).relu())

    class MyClassifier(TextClassifier):
        def load_base_model(self) -> Base:
            base = super().load_base_model()
            base.model.classifier = Head(base.model.config.hidden_size, len(self.label_names))
            return base

        def configure_losses(self) -> None:
            def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                calls.append("loss")
                loss = F.cross_entropy(logits, labels, reduction="none")
                return ((1 - (-loss).exp()) ** 2 * loss).mean()

            self.criterion = focal

        def configure_metrics(self) -> None:
            super().configure_metrics()
            self.add_metric("mcc", MulticlassMatthewsCorrCoef(len(self.label_names)))

    class MyCallback(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: object) -> None:
            calls.append("callback")

    data = TextDataModule(str(reviews), str(tiny_base), max_length=24)
    model = MyClassifier(str(tiny_base), data.label_names, learning_rate=1e-2)
    trainer = Trainer(max_epochs=3, callbacks=[MyCallback()], **QUIET)
    trainer.fit(model, data)
    assert calls.count("loss") == trainer.global_step and calls.count("callback") == 3
    assert any("classifier" in name and "inner" in name for name, p in model.named_parameters() if p.requires_grad)
    results = trainer.test(model, data, verbose=False)[0]
    loader = data.test_dataloader()
    with torch.no_grad():
        said = [(model.eval().document_logits(batch).argmax(1), batch["labels"]) for batch in loader]
    preds, target = (torch.cat(each) for each in zip(*said, strict=True))
    assert results["test/mcc"] == pytest.approx(matthews_corrcoef(target, preds), abs=1e-6)
    path = Path("own.ckpt")
    trainer.save_checkpoint(path)
    again = MyClassifier.load_from_checkpoint(path)
    for name in model.checkpoint_keys():
        torch.testing.assert_close(again.state_dict()[name], model.state_dict()[name])
