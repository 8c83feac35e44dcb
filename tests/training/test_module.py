import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from torch.nn import functional as F

from lightning_lora.cli import main
from lightning_lora.commands.evaluate import _run_pass
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError
from lightning_lora.evaluation.costs import CostMeter
from lightning_lora.evaluation.documents import pooled
from lightning_lora.evaluation.predictions import PredictionCollector
from lightning_lora.models.methods import AdapterOptions
from lightning_lora.training.module import TextClassifier
from lightning_lora.training.optim import make_optimizer, make_schedule

SETTINGS = {"learning_rate": 5e-3, "adapter": AdapterOptions(dropout=0.1)}


def make(base: Path, reviews: Path, batch_size: int = 16, **settings) -> tuple[TextClassifier, TextDataModule]:
    data = TextDataModule(str(reviews), str(base), max_length=32, batch_size=batch_size)
    return TextClassifier(str(base), data.label_names, **{**SETTINGS, **settings}), data


def trainer(*callbacks: Callback, **settings) -> Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **{**options, **settings})


def test_training_learns_the_rows(tiny_base: Path, reviews: Path) -> None:
    model, data = make(tiny_base, reviews)
    fit = trainer(max_epochs=10)
    before = fit.validate(model, data, verbose=False)[0]
    fit.fit(model, data)
    after = fit.validate(model, data, verbose=False)[0]
    assert after["val/loss"] < before["val/loss"] - 0.2
    assert after["val/accuracy"] > 0.9


def test_the_same_seed_gives_the_same_run_and_another_another(tiny_base: Path, reviews: Path) -> None:
    def weights(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)  # the state before must not matter
        data = TextDataModule(str(reviews), str(tiny_base), max_length=32, seed=seed)
        model = TextClassifier(str(tiny_base), data.label_names, seed=seed, **SETTINGS)
        trainer().fit(model, data)
        return model.state_dict()

    first, again, other = weights(1, 10), weights(1, 11), weights(2, 10)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_dropout_is_on_in_training_and_off_in_validation_and_testing(tiny_base: Path, reviews: Path) -> None:
    seen: dict[str, set[bool]] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            seen.setdefault("train", set()).update(m.training for m in pl_module.model.modules())

        def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
            seen.setdefault("val", set()).update(m.training for m in pl_module.model.modules())

        def on_test_batch_start(self, trainer, pl_module, *args) -> None:
            seen.setdefault("test", set()).update(m.training for m in pl_module.model.modules())

    model, data = make(tiny_base, reviews)
    model.eval()  # as Hugging Face models load
    fit = trainer(Watch())
    fit.fit(model, data)
    fit.test(model, data, verbose=False)
    assert seen == {"train": {True}, "val": {False}, "test": {False}}


def test_logged_metrics_are_those_of_all_rows(tiny_base: Path, reviews: Path) -> None:
    model, data = make(tiny_base, reviews)
    collector = PredictionCollector()
    data.eval_batch_size = 7  # the last batch is smaller: a mean of batch means would differ
    logged = trainer(collector).test(model, data, verbose=False)[0]
    logits = torch.from_numpy(collector.last["test"].logits)
    labels = torch.from_numpy(data.rows("test").labels).long()
    assert logged["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert logged["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
    np.testing.assert_array_equal(collector.last["test"].labels, labels)


def test_padding_and_batching_do_not_change_a_prediction(tiny_base: Path, reviews: Path) -> None:
    def logits(**settings) -> np.ndarray:
        collector = PredictionCollector()
        data = TextDataModule(str(reviews), str(tiny_base), max_length=32, test_rows=30, **settings)
        model = TextClassifier(str(tiny_base), data.label_names)
        trainer(collector).test(model, data, verbose=False)
        return collector.last["test"].logits

    expected = logits(eval_batch_size=1)
    np.testing.assert_allclose(logits(eval_batch_size=8), expected, atol=1e-5)
    np.testing.assert_allclose(logits(padding="max_length"), expected, atol=1e-5)


def test_the_training_loss_has_smoothing_and_weights_and_the_validation_loss_has_neither(tiny_base, reviews) -> None:
    model, data = make(tiny_base, reviews, label_smoothing=0.1, class_weights=[1.0, 3.0])
    fit = trainer(max_steps=1)
    fit.fit(model, data)
    model.eval()
    batch = next(iter(data.val_dataloader()))
    logits = model(batch["input_ids"], batch["attention_mask"])
    weighted = F.cross_entropy(logits, batch["labels"], torch.tensor([1.0, 3.0]), label_smoothing=0.1)
    torch.testing.assert_close(model.shared_step(batch, "train")["loss"], weighted)
    torch.testing.assert_close(model.shared_step(batch, "val")["loss"], F.cross_entropy(logits, batch["labels"]))


def test_balanced_weights_are_scikit_learns(tiny_base: Path, tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    from tests.conftest import make_rows, write_csv

    rows = make_rows(200)
    path = write_csv(
        tmp_path / "skewed.csv", [r for r in rows if r[1] == "neg"] + [r for r in rows if r[1] == "pos"][:25]
    )
    model, data = make(tiny_base, path, class_weights="balanced")
    trainer(max_steps=1).fit(model, data)
    labels = data.rows("train").labels
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    np.testing.assert_allclose(model.loss_weights, expected, rtol=1e-6)


def test_weights_of_another_number_of_classes_are_refused(tiny_base: Path, reviews: Path) -> None:
    model, data = make(tiny_base, reviews, class_weights=[1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="3 weights for 2 classes"):
        trainer().fit(model, data)


@pytest.mark.parametrize("option", ["plain", "weights"])
def test_accumulated_steps_teach_what_whole_ones_do(tiny_base: Path, reviews: Path, option: str) -> None:
    """Also when the last step of an epoch is a smaller one, and with class weights."""

    def weights(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        extra = {"class_weights": [1.0, 3.0]} if option == "weights" else {}
        model, data = make(
            tiny_base, reviews, batch_size, adapter=AdapterOptions(), method="lora", learning_rate=1e-3, **extra
        )
        no_dropout(model)
        data.options = dataclasses.replace(data.options, val_size=23)
        del data.prepared
        assert sum(data.class_counts) % 16 == 9  # the last step has two parts of 4 rows and one of 1
        trainer(accumulate_grad_batches=accumulate, max_epochs=2).fit(model, data)
        return model.state_dict()

    whole, parts = weights(16, 1), weights(4, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=3e-5)


def test_the_number_of_threads_changes_metrics_by_rounding_alone(make_base, reviews: Path) -> None:
    """On matrices large enough to be shared out."""
    base = make_base("bert", hidden_size=256, intermediate_size=1024, num_attention_heads=4)

    def metrics(threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        model, data = make(base, reviews, 16, adapter=AdapterOptions(), method="lora", learning_rate=1e-3)
        fitted = trainer(max_epochs=2)
        fitted.fit(model, data)
        return {name: float(value) for name, value in fitted.callback_metrics.items()}

    before = torch.get_num_threads()
    try:
        one, four = metrics(1), metrics(4)
    finally:
        torch.set_num_threads(before)
    assert one["val/loss"] < 0.69  # it has learnt something
    for name, value in one.items():
        assert four[name] == pytest.approx(value, abs=2e-3), name


def no_dropout(model: TextClassifier) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_gradient_checkpointing_changes_no_gradient(tiny_base: Path, reviews: Path, method: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model, data = make(
            tiny_base, reviews, adapter=AdapterOptions(), method=method, gradient_checkpointing=checkpointing
        )
        data.setup("fit")
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        layer: Any = next(m for n, m in model.train().named_modules() if n.endswith("encoder.layer.0"))
        layer.intermediate.register_forward_hook(count)
        torch.manual_seed(0)  # dropout included: the same random numbers are drawn again
        model.shared_step(next(iter(data.train_dataloader())), "train")["loss"].backward()
        # A frozen layer below everything that learns is not gone through backwards.
        assert calls == (2 if checkpointing and method != "head" else 1)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and plain
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value)


def test_bf16_teaches_what_float32_does_beyond_rounding(tiny_base: Path, reviews: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        model, data = make(tiny_base, reviews, adapter=AdapterOptions())
        fit = trainer(precision=precision, max_epochs=4)
        fit.fit(model, data)
        losses[precision] = fit.validate(model, data, verbose=False)[0]["val/loss"]
        kept = {p.dtype for p in model.parameters() if p.requires_grad}
        assert kept == {torch.float32}  # what is trained keeps full precision
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.ndim == 2}
        assert (torch.bfloat16 in frozen) == (precision == "bf16-mixed")
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
    assert losses["bf16-mixed"] != losses["32-true"]


def test_windows_are_pooled_to_the_mean_probability_of_their_document() -> None:
    logits, documents = torch.randn(5, 3), torch.tensor([0, 0, 1, 2, 2])
    got = pooled(logits, documents, 3).softmax(-1)
    means = [logits[documents == i].softmax(-1).mean(0) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(means))
    assert pooled(torch.tensor([[900.0, 0.0], [900.0, 0.0]]), torch.tensor([0, 0]), 1).isfinite().all()


def test_long_documents_are_read_whole_and_counted_once(tiny_base: Path, reviews: Path) -> None:
    """The logits of each document are those of its windows, one at a time, pooled by hand."""
    data = TextDataModule(str(reviews), str(tiny_base), max_length=10, truncation="windows", window_overlap=2)
    model = TextClassifier(str(tiny_base), data.label_names, **SETTINGS)
    collector = PredictionCollector()
    fit = trainer(collector, max_epochs=1)
    fit.fit(model, data)
    values = fit.validate(model, data, verbose=False)[0]
    predictions, rows = collector.last["val"], data.rows("val")
    assert len(predictions) == len(rows)
    assert values["val/accuracy"] == pytest.approx((predictions.predicted == rows.labels).mean())
    dataset = data._datasets["val"]
    model.eval()
    some_long = 0
    for i in range(len(rows)):
        windows = dataset.input_format.inputs(dataset.tokens[i])
        some_long += len(windows) > 1
        with torch.no_grad():
            each = [model(torch.tensor(w)[None], torch.ones(1, len(w), dtype=torch.long)) for w in windows]
        mean = torch.cat(each).softmax(-1).mean(0).numpy()
        np.testing.assert_allclose(predictions.probabilities[i], mean, atol=1e-5)
    assert some_long > 5


def test_adalora_moves_ranks_and_keeps_to_its_budget(tiny_base: Path, reviews: Path) -> None:
    options = AdapterOptions(rank=4)
    model, data = make(tiny_base, reviews, method="adalora", adapter=options, learning_rate=1e-2)
    penalties: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            penalties.append(pl_module.tuned.steps.penalty().item())

    trainer(Watch(), max_epochs=5).fit(model, data)
    kept = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(kept) <= 4 * len(kept)  # the mean rank is at most the one asked for
    assert len(set(kept)) > 1  # and not all layers have the same
    assert penalties[-1] < penalties[0]


def test_adalora_keeps_weights_whose_ranks_have_settled(tiny_base: Path, reviews: Path, tmp_path: Path) -> None:
    """On validation rows the first passes are often as good, and then of more ranks than were asked for."""
    settings = ["--model.method", "adalora", "--model.base_model", str(tiny_base), "--data.source", str(reviews)]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.max_length", "32"]
    length = ["--model.learning_rate", "1e-2", "--data.val_size", "100", "--data.test_size", "20"]
    assert main(["fit", *settings, *trainer, *length, "--name", "run"]) == 0
    record = json.loads(Path("logs/run/run.json").read_text())
    assert record["stopped_by"] is None and record["length"]["patience"] is None
    assert record["best"]["step"] >= 0.7 * record["steps"]
    weights = torch.load("logs/run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    singular = [value for name, value in weights.items() if "lora_E" in name]
    assert sum(int((each != 0).sum()) for each in singular) == 8 * len(singular)


def test_adalora_refuses_a_run_too_short_to_move_ranks_in(tiny_base: Path, reviews: Path) -> None:
    model, data = make(tiny_base, reviews, method="adalora", adapter=AdapterOptions())
    with pytest.raises(UserError, match="too few"):
        trainer(max_steps=5).fit(model, data)


def test_an_untouched_model_has_nothing_to_train(tiny_base: Path, reviews: Path) -> None:
    model, _ = make(tiny_base, reviews, method="none", adapter=AdapterOptions())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_warm_up_and_decay_count_optimizer_steps(tiny_base: Path, reviews: Path, accumulate: int) -> None:
    rates: dict[int, float] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            rates.setdefault(trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"])

    model, data = make(tiny_base, reviews, batch_size=4, warmup_ratio=0.25, learning_rate=0.8)
    fit = trainer(Watch(), accumulate_grad_batches=accumulate, max_epochs=1)
    fit.fit(model, data)
    total = fit.global_step
    assert total == -(-144 // (4 * accumulate))
    warmup = round(0.25 * total)
    for step, rate in rates.items():
        expected = step / warmup if step < warmup else (total - step) / (total - warmup)
        assert rate == pytest.approx(0.8 * expected, abs=1e-9), step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_warms_up_and_stays_within_its_peak(schedule: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = make_schedule(optimizer, schedule, 0.1, 100)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10)
    assert max(rates) == 1.0 and (rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.02)


def test_weight_decay_spares_biases_and_norms_and_covers_the_rest_once(tiny_base: Path) -> None:
    model = TextClassifier(str(tiny_base), ["a", "b"], method="full").model
    decayed, spared = make_optimizer(model, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {
        n for n in names.values() if n.endswith("bias") or "LayerNorm" in n
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_an_evaluation_is_timed_to_its_metrics_and_not_what_is_made_of_them(tiny_base: Path, reviews: Path) -> None:
    class Slow(Callback):
        def on_validation_batch_end(self, *args) -> None:
            time.sleep(0.05)

        def on_validation_end(self, *args) -> None:
            time.sleep(1)

    model, data = make(tiny_base, reviews)
    evaluation = trainer(Slow())
    run: Any = SimpleNamespace(model=model, datamodule=data)
    started = time.monotonic()
    _, seconds = _run_pass(run, "validate", "val", evaluation)
    assert 0.05 * sum(evaluation.num_val_batches) <= seconds <= time.monotonic() - started - 1


def test_costs_count_each_token_once(tiny_base: Path, reviews: Path) -> None:
    model, data = make(tiny_base, reviews)
    meter = CostMeter()
    trainer(meter).fit(model, data)
    costs = meter.costs()
    assert costs["train_rows"] == 2 * len(data.rows("train"))
    assert costs["train_tokens"] == 2 * sum(min(len(text.split()), 30) + 2 for text in data.rows("train").texts)
    assert 0 < costs["train_s"] < 60


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("warmup_ratio", 1.0),
        ("label_smoothing", -0.1),
        ("weight_decay", -1.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused_by_name(tiny_base: Path, setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"model\.{setting}"):
        TextClassifier(str(tiny_base), ["a", "b"], **{setting: value})


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_as_torch_does(tiny_base: Path, reviews: Path, algorithm: str) -> None:
    class Gradients(Callback):
        before: torch.Tensor

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.before = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            after = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None])
            if algorithm == "norm":
                expected = self.before * min(1.0, 1e-3 / (float(self.before.norm()) + 1e-6))
            else:
                expected = self.before.clamp(-1e-3, 1e-3)
            torch.testing.assert_close(after, expected)
            assert float(self.before.abs().max()) > 1e-3  # there is something to clip

    model, data = make(tiny_base, reviews)
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm, "precision": "bf16-mixed"}
    trainer(Gradients(), max_epochs=1, **options).fit(model, data)


def test_a_step_in_one_pass_is_adamws() -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(7, 5)
        optimizer = make_optimizer(layer, 1e-2, 0.1, fused=fused)
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.ones(3, 7)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_meeting_the_largest_batch_leaves_nothing_behind(tiny_base: Path, reviews: Path) -> None:
    class Left(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0 and trainer.current_epoch == 0:
                assert all(p.grad is None for p in pl_module.parameters())
                self.losses = list(pl_module.step_guard.losses)

    model, data = make(tiny_base, reviews)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = Left()
    trainer(left, max_epochs=1, limit_train_batches=1).fit(model, data)
    assert left.losses == []
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all("lora_" in name or "classifier" in name or "metrics" in name or "loss" in name for name in changed)
