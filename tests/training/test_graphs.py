"""Captured steps: what they do is tested with a capture that runs the function again, on any machine."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback, StochasticWeightAveraging, Timer

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.evaluation.metrics import TrainCounter
from lightning_lora.models.methods import METHODS
from lightning_lora.models.quantization import Quantization
from lightning_lora.models.speedups import Speedups
from lightning_lora.training import steps as steps_file
from lightning_lora.training.graphs import GraphedSteps, what_python_does, why_not_captured
from lightning_lora.training.guard import DeferredGuard, NotFiniteError
from lightning_lora.training.module import TextClassifier
from lightning_lora.training.optim import make_optimizer
from lightning_lora.training.packed_batches import PackedBatches
from tests.conftest import QUIET, make_rows, write_csv


def run_again(steps: GraphedSteps, function: Callable[[], None]) -> Callable[[], None]:
    """Stand in for a capture: record by running once, which leaves no trace, and replay by running again."""
    state = [*steps.gradients, *steps.module.parameters(), *steps.module.buffers()]
    state += [v for entry in steps.optimizer.state.values() for v in entry.values()]
    state += [v for v in vars(steps.guard).values() if isinstance(v, torch.Tensor)]
    before = [tensor.detach().clone() for tensor in state]
    generator = torch.get_rng_state()
    function()
    with torch.no_grad():
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
    torch.set_rng_state(generator)
    return function


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let steps be captured on a CPU."""
    monkeypatch.setattr(GraphedSteps, "capture", run_again)
    monkeypatch.setattr(steps_file, "why_not_captured", lambda module, optimizers: None)
    yield


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", make_rows(150))


def fit(
    base: Path,
    rows: Path,
    graphs: Any,
    trainer: dict[str, Any] | None = None,
    kind: Any = TextClassifier,
    packing: bool = True,
    data: dict[str, Any] | None = None,
    labels: tuple[str, ...] = ("neg", "pos"),
    **model: Any,
) -> TextClassifier:
    common = {"max_length": 24, "cache_dir": str(rows.parent / "cache"), "batch_size": 8}
    data = TextDataModule(**{"source": str(rows), "base_model": str(base)} | common | (data or {}))  # type: ignore[assignment]
    speedups = Speedups(packing=packing, cuda_graphs=graphs, kernels=False)
    module = kind(str(base), list(labels), speedups=speedups, **{"learning_rate": 1e-2} | model)
    Trainer(**{"max_epochs": 2, "gradient_clip_val": 0.5, **QUIET} | (trainer or {})).fit(module, data)
    return module


def trained(module: TextClassifier) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("data", "trainer", "model"),
    [
        ({}, {}, {}),
        ({"truncation": "windows", "max_length": 12}, {"accumulate_grad_batches": 2}, {"class_weights": "balanced"}),
        ({"batch_by": "tokens"}, {"accumulate_grad_batches": 2}, {"label_smoothing": 0.1}),
        ({"train_rows": 0.8}, {}, {"method": "rslora"}),
    ],
)
def test_packed_batches_learn_what_padded_ones_learn(
    make_base: Callable[..., Path], reviews: Path, data: dict[str, Any], trainer: dict[str, Any], model: dict[str, Any]
) -> None:
    base = make_base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    padded, packed = (fit(base, reviews, False, trainer, packing=p, data=data, **model) for p in (False, True))
    assert packed.packed_batches.rejected is None
    for name, value in trained(padded).items():
        torch.testing.assert_close(trained(packed)[name], value, rtol=1e-3, atol=1e-4, msg=name)
    for name, value in padded.trainer.callback_metrics.items():
        assert float(packed.trainer.callback_metrics[name]) == pytest.approx(float(value), abs=1e-4), name


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_packed_batches_are_trained_on_in_every_precision(tiny_base: Path, reviews: Path, precision: str) -> None:
    """Lightning casts what is in a batch."""
    module = fit(tiny_base, reviews, False, {"precision": precision, "max_epochs": 1})
    assert module.packed_batches.not_used == {}
    data = TextDataModule(str(reviews), str(tiny_base), max_length=24, cache_dir=str(reviews.parent / "cache"))
    assert Trainer(**QUIET, precision=precision).test(module, data, verbose=False)


def test_a_clip_below_0_clips_nothing(captured: None, tiny_base: Path, reviews: Path) -> None:
    plain, found = (
        fit(tiny_base, reviews, graphs, {"gradient_clip_val": -1.0, "max_epochs": 1}) for graphs in (False, True)
    )
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(found)[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("task", "model"), [("multi_label", {"class_weights": "balanced", "label_smoothing": 0.1}), ("regression", {})]
)
@pytest.mark.parametrize("truncation", ["head", "windows"])
def test_labels_and_numbers_are_learnt_alike_padded_packed_and_captured(
    task: str, model: dict, truncation: str, make_base: Callable[..., Path], tmp_path: Path, captured: None
) -> None:
    base = make_base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    cells = {"neg": "neg", "pos": "neg|pos"} if task == "multi_label" else {"neg": "120", "pos": "90"}
    rows = write_csv(tmp_path / "rows.csv", [(text, cells[label]) for text, label in make_rows(150)])
    data = {"label_separator": "|"} if task == "multi_label" else {"task": task}
    data |= {"truncation": truncation, "max_length": 12}
    labels = ("neg", "pos") if task == "multi_label" else ("label",)
    padded, packed, graphed = (
        fit(base, rows, graphs, packing=packing, data=data, labels=labels, task=task, **model)
        for packing, graphs in ((False, False), (True, False), (True, True))
    )
    assert packed.packed_batches.rejected is None and graphed.how_steps_ran()["steps"].startswith("captured")
    for other in (packed, graphed):
        for name, value in trained(padded).items():
            torch.testing.assert_close(trained(other)[name], value, rtol=1e-3, atol=2e-4, msg=name)
        for name, value in padded.trainer.callback_metrics.items():
            assert float(other.trainer.callback_metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), name


class Weighted(TextClassifier):
    """A loss of its own, of which only whole batches are known."""

    def configure_losses(self) -> None:
        self.criterion = lambda logits, labels: torch.nn.functional.multi_margin_loss(logits, labels) * 3


@pytest.mark.parametrize(
    ("trainer", "model"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 3}, {}),
        ({"gradient_clip_algorithm": "value"}, {"method": "lora_plus"}),
        ({"gradient_clip_val": None}, {"class_weights": [1.0, 3.0], "label_smoothing": 0.1}),
        ({"precision": "bf16-mixed"}, {"method": "full"}),
        ({}, {"kind": Weighted}),
    ],
)
def test_captured_steps_learn_what_plain_ones_learn(
    captured: None, tiny_base: Path, reviews: Path, trainer: dict[str, Any], model: dict[str, Any]
) -> None:
    plain = fit(tiny_base, reviews, False, trainer, **model)
    found = fit(tiny_base, reviews, True, trainer, **model)
    assert found.not_captured is None and plain.not_captured is not None
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if trainer.get("precision") != "bf16-mixed" else {"rtol": 0.05, "atol": 0.02}
    )
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(found)[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    for name in ("train/loss", "train/accuracy", "val/loss"):
        assert float(found.trainer.callback_metrics[name]) == pytest.approx(
            float(plain.trainer.callback_metrics[name]), rel=0.05 if "precision" in trainer else 1e-4
        )
    assert found.trainer.global_step == plain.trainer.global_step


def stopped_by_a_rate(
    base: Path, rows: Path, graphs: bool, trainer: dict[str, Any]
) -> tuple[TextClassifier, NotFiniteError]:
    """Train at a rate with which the first step corrupts the weights; the model as it was left, and the error."""
    made: list[TextClassifier] = []

    def kind(*args: Any, **kwargs: Any) -> TextClassifier:
        made.append(TextClassifier(*args, **kwargs))
        return made[0]

    with pytest.raises(NotFiniteError) as error:
        fit(base, rows, graphs, trainer, kind, learning_rate=1e30, schedule="constant", warmup_ratio=0)
    return made[0], error.value


def test_a_step_that_is_not_finite_stops_the_run_with_the_weights_before_it(
    captured: None, tiny_base: Path, reviews: Path
) -> None:
    """Plain steps are checked one by one, captured ones some later: neither applies it, nor one after it."""
    plain, found = (stopped_by_a_rate(tiny_base, reviews, graphs, {}) for graphs in (False, True))
    assert found[1].step == plain[1].step and found[1].rows == plain[1].rows and str(found[1]) == str(plain[1])
    for name, value in trained(plain[0]).items():
        assert torch.equal(trained(found[0])[name], value), name


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_steps_that_cannot_be_captured_are_done_plainly(
    captured: None, tiny_base: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, fault: str
) -> None:
    plain = fit(tiny_base, reviews, False)

    def capture(steps: GraphedSteps, function: Callable[[], None]) -> Callable[[], None]:
        if fault == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        again = run_again(steps, function)

        def wrong() -> None:
            again()
            steps.gradients[0] += 1

        return wrong

    monkeypatch.setattr(GraphedSteps, "capture", capture)
    found = fit(tiny_base, reviews, True)
    said = capsys.readouterr().err
    assert said.count("warning: training steps are not captured as CUDA graphs") == 1 and found.not_captured in said
    assert {"fails": "not permitted", "differs": "differs from a plain one by"}[fault] in str(found.not_captured)
    for name, value in trained(plain).items():
        assert torch.equal(trained(found)[name], value), name
    assert float(found.trainer.callback_metrics["train/accuracy"]) == float(
        plain.trainer.callback_metrics["train/accuracy"]
    )


def test_on_a_cpu_steps_are_plain_and_asking_for_graphs_says_so(tiny_base: Path, reviews: Path) -> None:
    from lightning_lora.errors import UserError

    assert fit(tiny_base, reviews, "auto").not_captured == "the device is cpu"
    data = TextDataModule(str(reviews), str(tiny_base), max_length=24, cache_dir=str(reviews.parent / "cache"))
    module = TextClassifier(str(tiny_base), ["neg", "pos"], speedups=Speedups(cuda_graphs=True))
    with pytest.raises(UserError, match="cuda_graphs: batches are padded"):
        Trainer(max_epochs=1, **QUIET).fit(module, data)
    assert why_not_captured(module, []) is not None


class Watch(Callback):
    """A callback of one's own."""


class ByHand(TextClassifier):
    """Scales the loss by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * 2


class Freezes(TextClassifier):
    """Freezes a layer in an epoch."""

    def on_train_epoch_start(self) -> None:
        next(p for p in self.parameters() if p.requires_grad).requires_grad_(False)


class Cycles(TextClassifier):
    """A schedule of its own, which may move what a capture freezes, such as betas."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()


@pytest.mark.parametrize(
    ("kind", "callbacks", "said"),
    [
        (TextClassifier, [], None),
        (TextClassifier, [Timer(duration="00:01:00:00")], None),
        (TextClassifier, [LambdaCallback(on_train_start=lambda *_: None)], r"a callback of your own \(Lambda"),
        (TextClassifier, [Watch()], r"a callback of your own \(Watch\) may change"),
        (Weighted, [], "a loss of your own may change"),
        (ByHand, [], "training_step is overridden"),
        (Freezes, [], "on_train_epoch_start of your own may change"),
        (Cycles, [], "configure_optimizers of your own may change"),
    ],
)
def test_what_a_capture_would_leave_out_or_freeze_keeps_steps_plain(
    tiny_base: Path, reviews: Path, kind: Any, callbacks: list[Any], said: str | None
) -> None:
    """Captured, the step of ``ByHand`` would silently train on the loss as it was."""
    module = fit(tiny_base, reviews, "auto", {"callbacks": callbacks, "max_epochs": 1}, kind, packing=False)
    found = what_python_does(module)
    assert found is None if said is None else re.match(said, str(found))


@pytest.mark.parametrize("bad", [1, 10, 63, 64, 65, 66, 128, 130, 200])
def test_the_step_that_was_not_finite_is_named_however_late_it_is_found(bad: int) -> None:
    """In the order of a run: what is due is settled, the step is noted, and the device looks when it is done."""
    guard, done = DeferredGuard(torch.device("cpu")), 0
    with pytest.raises(NotFiniteError) as error:
        for step in range(1, 201):
            if guard.due:
                guard.check()
            guard.add(torch.tensor([step, -step]))
            guard.end_step(step)
            guard.update(torch.tensor(torch.nan if step == bad else 1.0))
            done += not guard.found_inf
        guard.check()
    assert error.value.step == bad and error.value.rows == [bad, -bad] and done == bad - 1


@pytest.mark.parametrize(("bits", "captured"), [(None, True), (4, True), (8, False)])
def test_passes_on_a_base_of_8_bits_are_not_captured(bits: int | None, captured: bool) -> None:
    module = SimpleNamespace(speedups=Speedups(), quantization=Quantization(bits), training=False)
    module.trainer = SimpleNamespace(callbacks=[])
    assert PackedBatches(module)._captures(SimpleNamespace(is_cuda=True)) is captured


def test_metrics_of_a_state_of_another_version_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    counter = TrainCounter(2)
    counter.restore({"accuracy": torch.ones(2)})
    assert "begin with the resumed step" in capsys.readouterr().err and not counter.counted()["rows"]


class OnGPU(TextClassifier):
    """Says that it is on a GPU, and in a run that packs."""

    device = torch.device("cuda")  # type: ignore[assignment]
    trainer: Any = None


def ready(base: Path, **changes: Any) -> tuple[OnGPU, list[Any]]:
    module = OnGPU(str(base), ["neg", "pos"], **changes)
    loader = SimpleNamespace(dataset=SimpleNamespace(packing=object()))
    module.trainer = SimpleNamespace(train_dataloader=loader, world_size=1, callbacks=[], precision="bf16-mixed")
    return module, [make_optimizer(module.model, 1e-3, 0.0, fused=True)]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains])
def test_every_method_is_captured_but_for_adalora(tiny_base: Path, method: str) -> None:
    module, optimizers = ready(tiny_base, method=method)
    expected = "adalora changes ranks between steps" if method == "adalora" else None
    assert why_not_captured(module, optimizers) == expected


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("trainer", {"world_size": 2}, "several devices"),
        ("trainer", {"precision": "16-mixed"}, "float16 scales the loss"),
        ("trainer", {"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging replaces"),
        ("trainer", {"train_dataloader": None}, "batches are padded"),
        ("module", {"quantization": Quantization(bits=8)}, "bitsandbytes"),
        ("module", {"device": torch.device("cpu")}, "the device is cpu"),
    ],
)
def test_a_run_that_cannot_be_captured_says_why(tiny_base: Path, where: str, change: dict[str, Any], said: str) -> None:
    module, optimizers = ready(tiny_base)
    vars(module.trainer if where == "trainer" else module).update(change)
    assert str(why_not_captured(module, optimizers)).startswith(said)
    module, _ = ready(tiny_base)
    assert "AdamW" in str(why_not_captured(module, [torch.optim.SGD(module.parameters(), 0.1)]))
