import numpy as np
import pytest
import torch

from lightning_lora.evaluation.intervals import difference_interval, intervals, metric_of, metrics_of, row_values
from lightning_lora.evaluation.metric_table import metrics_for
from lightning_lora.evaluation.metrics import make_metrics, metric_values
from lightning_lora.evaluation.outputs import Outputs


def sample(seed: int, rows: int = 400, classes: int = 3, skill: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=rows, p=[0.6, 0.3, 0.1][:classes] if classes == 3 else None)
    return rng.normal(size=(rows, classes)) + skill * np.eye(classes)[labels], labels


@pytest.mark.parametrize("seed", range(4))
def test_the_values_are_those_of_torchmetrics(seed: int) -> None:
    logits, labels = sample(seed, rows=37 if seed == 0 else 400)
    metrics = make_metrics(3)
    metrics.update(torch.from_numpy(logits).softmax(-1), torch.from_numpy(labels))
    expected = metric_values(metrics.compute(), ["a", "b", "c"])
    expected["loss"] = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    found = metrics_of(Outputs(logits, labels))
    assert found.keys() == {name for name, spec in metrics_for("single_label").items() if spec.heading}
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=1e-5), name


def test_a_class_that_is_not_there_is_not_averaged() -> None:
    logits, labels = sample(0)
    logits[:, 2] = -50
    keep = labels != 2
    metrics = make_metrics(3)
    metrics.update(torch.from_numpy(logits[keep]).softmax(-1), torch.from_numpy(labels[keep]))
    value = metric_values(metrics.compute(), ["a", "b", "c"])["f1_macro"]
    assert metrics_of(Outputs(logits[keep], labels[keep]))["f1_macro"] == pytest.approx(value, abs=1e-6)


def test_a_resample_is_the_metric_of_the_rows_drawn() -> None:
    logits, labels = sample(1)
    drawn = np.random.default_rng(0).integers(len(labels), size=len(labels))
    counts = np.bincount(drawn, minlength=len(labels))
    expected = metrics_of(Outputs(logits[drawn], labels[drawn]))
    for name, rows in row_values(Outputs(logits, labels)).items():
        assert metric_of(name, counts @ rows / len(labels)) == pytest.approx(expected[name]), name


def test_the_interval_of_accuracy_is_that_of_the_binomial() -> None:
    """Against the exact (Clopper-Pearson) interval of scipy, up to the noise of 1,000 resamples."""
    from scipy.stats import binomtest

    logits, labels = sample(2, rows=1000)
    hits = int((logits.argmax(1) == labels).sum())
    exact = binomtest(hits, 1000).proportion_ci(0.95)
    low, high = intervals(Outputs(logits, labels))["accuracy"]
    assert low == pytest.approx(exact.low, abs=0.005) and high == pytest.approx(exact.high, abs=0.005)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """On 100 samples of a population whose values are known from 400,000 rows."""
    population = metrics_of(Outputs(*sample(99, rows=400_000)))
    found = [intervals(Outputs(*sample(seed, rows=300))) for seed in range(100)]
    for name in ("accuracy", "loss", "f1_macro"):
        held = sum(each[name][0] <= population[name] <= each[name][1] for each in found)
        assert held >= 100 * 0.95 - 3 * np.sqrt(100 * 0.95 * 0.05), name  # three standard errors below nominal


def scaled(seed: int, rows: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated at a scale of 1: those of the true posterior of normal classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=rows)
    return scale * (rng.normal(size=(rows, 3)) + np.eye(3)[labels]), labels


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_the_interval_of_the_calibration_error_holds_it_whether_there_is_one_or_not(scale: float) -> None:
    truth = metrics_of(Outputs(*scaled(9999, 1_000_000, scale)))["calibration_error"]
    assert truth < 0.002 if scale == 1 else truth > 0.05
    held = 0
    for seed in range(60):
        low, high = intervals(Outputs(*scaled(seed, 400, scale)))["calibration_error"]
        held += low <= truth <= high
    assert held >= 60 * 0.95 - 3 * np.sqrt(60 * 0.95 * 0.05)


def test_a_paired_difference_is_told_apart_where_two_intervals_overlap() -> None:
    logits, labels = sample(3, rows=1000)
    worse = logits.copy()
    worse[:40] = -worse[:40]  # the same model but for 40 rows
    low, high = difference_interval(Outputs(logits, labels), Outputs(worse, labels), "accuracy")
    assert (
        0
        < low
        < metrics_of(Outputs(logits, labels))["accuracy"] - metrics_of(Outputs(worse, labels))["accuracy"]
        < high
    )
    assert intervals(Outputs(logits, labels))["accuracy"][0] < intervals(Outputs(worse, labels))["accuracy"][1]
    assert difference_interval(*[Outputs(logits, labels)] * 2, "accuracy") == [0, 0]


def test_every_metric_has_an_interval_around_its_value() -> None:
    logits, labels = sample(4)
    found, values = intervals(Outputs(logits, labels)), metrics_of(Outputs(logits, labels))
    assert found.keys() == values.keys()
    for name, (low, high) in found.items():
        assert low < high and (low <= values[name] <= high or name == "calibration_error"), name
    assert intervals(Outputs(logits[:1], labels[:1])) == {}
