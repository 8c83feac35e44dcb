"""Metrics of several labels a text and of numbers, against scikit-learn and scipy."""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from lightning_lora.evaluation.documents import pooled
from lightning_lora.evaluation.intervals import (
    difference_interval,
    intervals,
    metric_of,
    metrics_of,
    pseudo_values,
    row_values,
)
from lightning_lora.evaluation.metric_table import CALIBRATION_BINS, compared_metrics, metrics_for, row_metrics
from lightning_lora.evaluation.metrics import EvaluationCounter, TrainCounter, metric_names
from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.evaluation.significance import estimate
from lightning_lora.evaluation.thresholds import GRID, choose_thresholds

NAMES = ["a", "b", "c", "d"]


def several(seed: int, rows: int = 211) -> Outputs:
    """Rows with none to four labels of unlike frequency, and thresholds other than 0.5."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((rows, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(np.uint8)
    logits = (rng.normal(size=(rows, 4)) + 2 * labels - 1.5).astype(np.float32)
    return Outputs(logits, labels, task="multi_label", thresholds=np.array([0.4, 0.3, 0.55, 0.2], np.float32))


def numbers(seed: int, rows: int = 211) -> Outputs:
    rng = np.random.default_rng(seed)
    truth = rng.normal(900, 50, rows).round()
    return Outputs((truth + rng.normal(0, 40, rows)).astype(np.float32)[:, None], truth, task="regression")


def counted(given: Outputs) -> dict[str, float]:
    """What validation logs of the rows, in batches of unequal size."""
    counter = EvaluationCounter(given.logits.shape[1], given.task)
    for part in np.array_split(np.arange(len(given.logits)), 5):
        logits, labels = torch.from_numpy(given.logits[part]), torch.from_numpy(given.truth[part]).float()
        counter.count(logits, labels, torch.tensor(0.25))
    thresholds = None if given.thresholds is None else torch.from_numpy(given.thresholds)
    return counter.take_values(NAMES if given.task == "multi_label" else ["score"], thresholds)


def calibration_error(truth: np.ndarray, scores: np.ndarray) -> float:
    """That of all labels of all rows, by scikit-learn's curve."""
    shares, means = calibration_curve(truth, scores, n_bins=CALIBRATION_BINS)
    counts = np.histogram(scores, CALIBRATION_BINS, (0, 1))[0]
    return float((np.abs(shares - means) * counts[counts > 0]).sum() / len(scores))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_labels_are_scikit_learns(seed: int) -> None:
    given = several(seed)
    truth, predicted, scores = given.truth, given.predicted.astype(int), given.probabilities
    assert predicted.tolist() == (expit(given.logits.astype(float)) >= given.thresholds).astype(int).tolist()
    found = counted(given)
    expected = {
        "f1_micro": sk.f1_score(truth, predicted, average="micro"),
        "f1_macro": sk.f1_score(truth, predicted, average="macro"),
        "f1_samples": sk.f1_score(truth, predicted, average="samples", zero_division=1),
        "precision_macro": sk.precision_score(truth, predicted, average="macro", zero_division=0),
        "recall_macro": sk.recall_score(truth, predicted, average="macro"),
        "subset_accuracy": sk.accuracy_score(truth, predicted),
        "hamming_loss": sk.hamming_loss(truth, predicted),
        "average_precision": sk.average_precision_score(truth, scores, average="macro"),
        "calibration_error": calibration_error(truth.ravel(), scores.ravel()),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    for i, f1 in enumerate(sk.f1_score(truth, predicted, average=None)):
        assert found[f"f1/{NAMES[i]}"] == pytest.approx(f1, abs=1e-6)
    assert set(found) == set(metric_names(NAMES, "multi_label"))
    # The same without torch, where it is a mean or of means.
    own = metrics_of(given)
    assert {name: own[name] for name in own if name != "loss"} == pytest.approx(
        {name: found[name] for name in own if name != "loss"}, abs=1e-6
    )
    logits, labels = torch.from_numpy(given.logits), torch.from_numpy(truth).float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert own["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_a_label_that_no_row_has_counts_as_in_scikit_learn() -> None:
    given = several(0)
    given.truth[:, 3], given.logits[:, 3] = 0, -9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sk.f1_score(given.truth, given.predicted, average="macro", zero_division=0)
    assert metrics_of(given)["f1_macro"] == pytest.approx(expected)
    assert counted(given)["f1_macro"] == pytest.approx(expected, abs=1e-6)


def test_training_rows_of_several_labels_are_counted_as_by_scikit_learn() -> None:
    given, counter = several(3), TrainCounter(4, "multi_label")
    logits, labels = torch.from_numpy(given.logits), torch.from_numpy(given.truth).float()
    counter.count(logits[:100], labels[:100], torch.tensor(2.0))
    counter.count(logits[100:], labels[100:], torch.tensor(1.0), torch.tensor(50))  # only fifty of them are there
    state, found = counter.counted(), counter.take_values(NAMES)
    truth, predicted = given.truth[:150], (given.logits[:150] >= 0).astype(int)
    assert found["f1_macro"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert found["hamming_loss"] == pytest.approx(sk.hamming_loss(truth, predicted), abs=1e-6)
    assert found["precision/c"] == pytest.approx(sk.precision_score(truth, predicted, average=None)[2], abs=1e-6)
    assert found["loss"] == pytest.approx((100 * 2 + 50 * 1) / 150)
    counter.restore(state)
    assert counter.take_values(NAMES) == found


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_numbers_are_scipys(seed: int) -> None:
    given = numbers(seed)
    found, own = counted(given), metrics_of(given)
    predicted = given.logits[:, 0].astype(float)
    expected = {
        "mse": sk.mean_squared_error(given.truth, predicted),
        "mae": sk.mean_absolute_error(given.truth, predicted),
        "pearson": pearsonr(given.truth, predicted).statistic,
        "spearman": spearmanr(given.truth, predicted).statistic,  # with ties
    }
    assert own == pytest.approx(expected)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert set(found) == {"loss", *expected} == set(metric_names(["score"], "regression"))
    counter = TrainCounter(1, "regression")
    counter.count(torch.zeros(3, 1), torch.ones(3), torch.tensor(1.0))
    assert counter.take_values(["score"]) == {"loss": 1.0}


def test_correlations_of_constant_predictions_are_not_defined() -> None:
    counter = EvaluationCounter(1, "regression")
    counter.count(torch.ones(9, 1), torch.arange(9.0), torch.tensor(0.0))
    found = counter.take_values(["score"])
    assert np.isnan(found["spearman"]) and np.isnan(found["pearson"])  # as SciPy's, and not 0


def test_matthews_correlation_of_single_labels_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=200, p=[0.6, 0.3, 0.1])
    given = Outputs(rng.normal(size=(200, 3)) + np.eye(3)[labels], labels)
    expected = sk.matthews_corrcoef(labels, given.predicted)
    counter = EvaluationCounter(3)
    counter.count(torch.from_numpy(given.logits), torch.from_numpy(labels), torch.tensor(0.0))
    assert counter.take_values(NAMES[:3])["matthews_correlation"] == pytest.approx(expected, abs=1e-6)
    assert metrics_of(given)["matthews_correlation"] == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("truth", "said"), [([0, 0], [0, 0]), ([0, 1], [1, 1]), ([1, 1], [0, 1]), ([0, 0], [1, 1])])
def test_matthews_correlation_of_one_class_is_0_as_scikit_learns(classes: int, truth: list, said: list) -> None:
    labels, logits = np.array(truth * 20), np.eye(classes, dtype=np.float32)[said * 20]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sk.matthews_corrcoef(labels, said * 20) == 0
    counter = EvaluationCounter(classes)
    counter.count(torch.from_numpy(logits), torch.from_numpy(labels), torch.tensor(0.0))
    found = counter.take_values(NAMES[:classes])["matthews_correlation"]
    assert found == 0 == metrics_of(Outputs(logits, labels))["matthews_correlation"]


def simulated(rng: np.random.Generator, metric: str, seeds: int = 3, rows: int = 300) -> list[list[Outputs]]:
    """Two arms, equally good in the population, with some seeds each on the same rows."""
    truth, hard = rng.normal(size=rows), rng.normal(0, 0.8, rows)
    scores = truth + hard + rng.normal(0, 0.3, (2, 1, rows)) + rng.normal(0, 0.1, (2, seeds, 1))
    scores = scores + rng.normal(0, 0.3, (2, seeds, rows))
    if metric == "pearson":
        return [[Outputs(each[:, None], truth, task="regression") for each in arm] for arm in scores]
    labels = (truth > 0.6).astype(int)
    return [[Outputs(np.stack([0 * each, each - 0.6], axis=1), labels) for each in arm] for arm in scores]


ORACLES = {
    "matthews_correlation": lambda outputs: sk.matthews_corrcoef(outputs.truth, outputs.predicted),
    "f1_macro": lambda outputs: sk.f1_score(outputs.truth, outputs.predicted, average="macro"),
    "pearson": lambda outputs: pearsonr(outputs.truth, outputs.predicted).statistic,
}


@pytest.mark.parametrize("metric", ORACLES)
def test_pseudo_values_are_those_of_the_jackknife(metric: str) -> None:
    given = simulated(np.random.default_rng(0), metric, rows=50)[0][0]
    assert metric in compared_metrics(given.task) and metric not in row_metrics(given.task)
    found, whole = pseudo_values(given, metric), ORACLES[metric](given)
    assert found.mean() == pytest.approx(whole)
    left = [Outputs(np.delete(given.logits, i, 0), np.delete(given.truth, i), task=given.task) for i in range(50)]
    expected = np.array([50 * whole - 49 * ORACLES[metric](each) for each in left])
    assert found - found.mean() == pytest.approx(expected - expected.mean(), abs=1e-9)


@pytest.mark.parametrize("metric", ORACLES)
def test_equally_good_arms_are_called_different_by_a_correlation_in_no_more_than_the_nominal_share(metric: str) -> None:
    rng, wrong, padded_lengths, gaps = np.random.default_rng(1), 0, [], []
    for _ in range(200):
        one, other = (np.stack([pseudo_values(each, metric) for each in arm]) for arm in simulated(rng, metric))
        found = estimate(one - other)
        wrong += not found.low <= 0 <= found.high
        padded_lengths.append(found.se)
        gaps.append(found.mean)
    assert wrong <= 0.05 * 200
    assert np.mean(padded_lengths) == pytest.approx(np.std(gaps), rel=0.35)  # neither far too careful nor too bold


@pytest.mark.parametrize("given", [several(1), numbers(1)], ids=lambda given: given.task)
def test_every_metric_has_an_interval_around_its_value(given: Outputs) -> None:
    found, values = intervals(given), metrics_of(given)
    wanted = {name for name, spec in metrics_for(given.task).items() if spec.heading and spec.rows}
    assert found.keys() == values.keys() == wanted
    assert all(low < values[name] < high for name, (low, high) in found.items())
    drawn = np.random.default_rng(0).integers(len(given.logits), size=len(given.logits))
    rows = Outputs(given.logits[drawn], given.truth[drawn], task=given.task, thresholds=given.thresholds)
    counts, again = np.bincount(drawn, minlength=len(drawn)), metrics_of(rows)
    for name, each in row_values(given).items():
        if name != "spearman":  # whose ranks are those of all rows
            assert metric_of(name, counts @ each / len(drawn), given.task) == pytest.approx(again[name]), name
    metric = row_metrics(given.task)[0]
    assert metric == {"multi_label": "f1_samples", "regression": "mse"}[given.task]
    assert difference_interval(given, given, metric) == [0, 0]


@pytest.mark.parametrize("kind", ["one", "per_label"])
def test_thresholds_are_the_best_of_the_grid(kind: str) -> None:
    given = several(5)
    chosen = choose_thresholds(torch.from_numpy(given.logits), torch.from_numpy(given.truth), kind).numpy()
    scores = expit(given.logits.astype(float))
    table = np.array([sk.f1_score(given.truth, scores >= each, average=None, zero_division=0) for each in GRID])
    table = table.mean(axis=1, keepdims=True).repeat(4, axis=1) if kind == "one" else table
    at = [table[np.flatnonzero(each == GRID)[0], i] for i, each in enumerate(chosen)]
    assert at == pytest.approx(table.max(axis=0)) and (len(set(chosen)) == 1) == (kind == "one")
    # Of equally good ones that nearest to 0.5, so that of a label without rows too.
    nothing = choose_thresholds(torch.from_numpy(given.logits), torch.zeros(211, 4), kind)
    assert nothing.tolist() == [0.5] * 4
    assert choose_thresholds(torch.zeros(1, 4), torch.zeros(1, 4), 0.25).tolist() == [0.25] * 4


def test_windows_are_averaged_in_probabilities_or_numbers() -> None:
    logits, documents = torch.tensor([[3.0, -2.0], [-1.0, 0.5], [0.2, 0.1]]), torch.tensor([0, 0, 1])
    found = pooled(logits, documents, 2, "multi_label").sigmoid()
    wanted = torch.stack([logits[:2].sigmoid().mean(0), logits[2].sigmoid()])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert pooled(logits[:, :1], documents, 3, "regression").tolist()[:2] == [[1.0], [pytest.approx(0.2)]]
