"""A researcher's own Trainer, callbacks, steps, heads and losses do what plain Lightning and torch would."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError
from lightning_lora.models.speedups import Speedups
from lightning_lora.training.module import TextClassifier
from tests.conftest import QUIET, make_rows, write_csv


@pytest.fixture
def data(tiny_base: Path, tmp_path: Path) -> TextDataModule:
    rows = write_csv(tmp_path / "rows.csv", make_rows(120))
    return TextDataModule(str(rows), str(tiny_base), max_length=24, batch_size=8, cache_dir=str(tmp_path / "cache"))


def fit(data: TextDataModule, kind: Any = TextClassifier, trainer: dict[str, Any] | None = None, **model: Any) -> Any:
    module = kind(data.base_model, data.label_names, **{"learning_rate": 5e-3} | model)
    Trainer(**{"max_epochs": 1, **QUIET} | (trainer or {})).fit(module, data)
    return module


class OwnStep(TextClassifier):
    """A step without this project's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])


class OwnStepCounted(TextClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.shared_step(batch, "train")["loss"]


class Manual(TextClassifier):
    """Optimizes by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer, loss = self.optimizers(), self.shared_step(batch, "train")["loss"]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return loss


@pytest.mark.parametrize("kind", [OwnStep, OwnStepCounted, Manual])
def test_a_step_of_ones_own_trains(data: TextDataModule, kind: Any) -> None:
    module = fit(data, kind, {"max_epochs": 6, "gradient_clip_val": None if kind is Manual else 1.0})
    metrics = module.trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.7
    assert ("train/loss" in metrics) is (kind is not OwnStep)  # nothing was counted: no number, and no NaN


def test_a_step_of_ones_own_stops_where_its_gradient_is_not_finite(data: TextDataModule) -> None:
    class Infinite(OwnStep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * torch.inf

    with pytest.raises(UserError, match="gradient"):
        fit(data, Infinite)


class Extra(TextClassifier):
    """A layer behind the model, and a loss with a parameter."""

    def configure_models(self) -> None:
        super().configure_models()
        self.extra = nn.Linear(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.extra(super().forward(*args, **kwargs))

    def configure_losses(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
                return nn.functional.cross_entropy(logits * self.scale, labels)

        self.criterion = Scaled()


def test_weights_of_ones_own_are_trained(data: TextDataModule) -> None:
    module = fit(data, Extra)
    [optimizer] = module.trainer.optimizers
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in module.parameters() if p.requires_grad}
    assert module.criterion.scale != 1


@pytest.mark.parametrize("merged", [True, False])
def test_averaged_weights_are_those_that_are_validated(data: TextDataModule, merged: bool) -> None:
    """Lightning puts them in place after a validation pass has started."""
    module = fit(
        data,
        trainer={"max_epochs": 3, "callbacks": [EMAWeightAveraging(decay=0.9)]},
        speedups=Speedups(merged_evaluation=merged),
    )
    within = float(module.trainer.callback_metrics["val/loss"])
    after = Trainer(**QUIET).validate(module, data, verbose=False)[0]["val/loss"]  # the average stays at the end
    assert within == pytest.approx(after, abs=1e-5)


class MeanOfAll(nn.Module):
    """A head that reads all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, states: Tensor) -> Tensor:
        self.seen.append(tuple(states.shape))
        return self.out(states.mean(1))


class OwnHead(TextClassifier):
    def load_base_model(self) -> Any:
        base = super().load_base_model()
        base.model.classifier = MeanOfAll(base.model.config.hidden_size)
        return base


def test_a_head_of_ones_own_sees_all_tokens(make_base: Callable[..., Path]) -> None:
    module = OwnHead(str(make_base("roberta")), ["neg", "pos"], "head").eval()
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        module(ids, torch.ones_like(ids))
    [head] = [m for name, m in module.named_modules() if isinstance(m, MeanOfAll) and "original" not in name]
    assert head.seen[-1][:2] == (1, 5)
    assert "of your own" in str(module.packed_batches.cannot)


@pytest.mark.parametrize("settings", [{"class_weights": "balanced"}, {"task": "regression"}])
def test_what_needs_the_training_rows_asks_for_the_data_module(
    tiny_base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    cells = {"neg": "3", "pos": "7"} if "task" in settings else {"neg": "neg", "pos": "pos"}
    rows = write_csv(tmp_path / "rows.csv", [(text, cells[label]) for text, label in make_rows(60)])
    task = {"task": "regression"} if "task" in settings else {}
    data = TextDataModule(str(rows), str(tiny_base), max_length=24, cache_dir=str(tmp_path / "cache"), **task)
    data.setup("fit")
    module = TextClassifier(str(tiny_base), data.label_names, **settings)
    with pytest.raises(UserError, match="datamodule="):
        Trainer(max_epochs=1, **QUIET).fit(module, data.train_dataloader(), data.val_dataloader())


def test_a_trainer_of_several_devices_that_replaces_samplers_is_refused(data: TextDataModule) -> None:
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector)  # type: ignore[assignment]
    with pytest.raises(UserError, match="use_distributed_sampler=False"):
        data.setup("fit")
    assert hasattr(Trainer(**QUIET)._accelerator_connector, "use_distributed_sampler")


def test_probabilities_are_calibrated_where_there_are_rows_enough(tiny_base: Path, tmp_path: Path) -> None:
    """Of noisy labels probabilities get too sure; no label changes."""
    texts = make_rows(300, seed=1)
    flipped = [(text, label if i % 4 else {"neg": "pos", "pos": "neg"}[label]) for i, (text, label) in enumerate(texts)]
    rows = write_csv(tmp_path / "rows.csv", flipped)
    found = {}
    for size in (99, 100):
        data = TextDataModule(
            str(rows), str(tiny_base), max_length=24, batch_size=8, val_size=size, cache_dir=str(tmp_path / "cache")
        )
        found[size] = fit(data, trainer={"max_epochs": 8}, method="full")
    assert found[99].temperature == 1 and found[100].temperature > 1
    for off in ({"calibrate": False}, {"task": "regression", "labels": ["label"]}, {"method": "none"}):
        names = off.pop("labels", ["neg", "pos"])
        assert TextClassifier(str(tiny_base), names, **off).temperature is None  # type: ignore[arg-type]
