import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report, precision_recall_fscore_support

from lightning_lora.evaluation.metrics import TrainCounter, label_tags, make_metrics, metric_values


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_every_metric_is_scikit_learns(num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, size=203, p=rng.dirichlet(np.ones(num_classes)))
    logits = rng.normal(size=(203, num_classes)) + np.eye(num_classes)[labels]
    metrics = make_metrics(num_classes)
    for part in np.array_split(np.arange(203), 5):  # batches of unequal size
        metrics.update(torch.from_numpy(logits[part]).softmax(-1), torch.from_numpy(labels[part]))
    names = [f"class{i}" for i in range(num_classes)]
    ours = metric_values(metrics.compute(), names)

    preds = logits.argmax(1)
    present = sorted(set(labels) | set(preds))
    report = classification_report(labels, preds, labels=present, output_dict=True, zero_division=0)
    assert ours["accuracy"] == pytest.approx((labels == preds).mean(), abs=1e-6)
    for kind, theirs in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
        assert ours[f"{kind}_macro"] == pytest.approx(report["macro avg"][theirs], abs=1e-6)
        for i in present:
            assert ours[f"{kind}/class{i}"] == pytest.approx(report[str(i)][theirs], abs=1e-6)
    if num_classes == 2:
        precision, recall, f1, _ = precision_recall_fscore_support(labels, preds, average="binary", zero_division=0)
        assert [ours["precision_binary"], ours["recall_binary"], ours["f1_binary"]] == pytest.approx(
            [precision, recall, f1], abs=1e-6
        )
    else:
        assert "f1_binary" not in ours


def test_the_calibration_error_is_that_of_a_hand_computation() -> None:
    """Mean distance between confidence and accuracy over 15 equal bins, weighted by the rows in them."""
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet(np.ones(3), size=500)
    labels = rng.integers(3, size=500)
    metrics = make_metrics(3)
    for part in np.array_split(np.arange(500), 7):
        metrics.update(torch.from_numpy(probabilities[part]), torch.from_numpy(labels[part]))
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    assert metric_values(metrics.compute(), ["a", "b", "c"])["calibration_error"] == pytest.approx(error, abs=1e-5)


def test_averages_differ_on_unbalanced_classes() -> None:
    """Micro averages everywhere would make accuracy, precision, recall and F1 the same number."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    preds = torch.tensor([0] * 88 + [1] * 2 + [0] * 6 + [1] * 4)
    metrics = make_metrics(2)
    metrics.update(torch.nn.functional.one_hot(preds, 2).float(), labels)
    values = metric_values(metrics.compute(), ["a", "b"])
    assert len({round(values[n], 6) for n in ("accuracy", "f1_macro", "precision_macro", "recall_macro")}) == 4


def test_label_names_become_different_parts_of_a_name() -> None:
    assert label_tags(["Sci/Tech", "Sci Tech", "!!", "World"]) == ["Sci_Tech", "Sci_Tech_1", "class_2", "World"]


def test_the_metrics_of_training_rows_are_those_of_scikit_learn_also_of_partly_filled_batches() -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_score

    torch.manual_seed(0)
    counter, logits, labels = TrainCounter(3), torch.randn(25, 3), torch.randint(0, 3, (25,))
    counter.count(logits[:10], labels[:10], torch.tensor(2.0))
    counter.count(logits[10:], labels[10:], torch.tensor(1.0), torch.tensor(5))  # only five of them are there
    state = counter.counted()
    found = counter.take_values(["a", "b", "c"])
    there, predicted = labels[:15], logits[:15].argmax(-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(there, predicted))
    assert found["f1_macro"] == pytest.approx(f1_score(there, predicted, average="macro"))
    assert found["precision/b"] == pytest.approx(precision_score(there, predicted, average=None)[1])
    assert found["loss"] == pytest.approx((10 * 2.0 + 5 * 1.0) / 15)
    counter.restore(state)
    assert counter.take_values(["a", "b", "c"]) == found and not counter.counted()["rows"]


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_training_metrics_do_not_add_up_what_other_processes_have_counted(task: str) -> None:
    """``TrainCounter`` has the rows of all processes; each metric of torchmetrics would gather them once more."""
    metrics = make_metrics(3, training=True, task=task).values()  # type: ignore[arg-type]
    assert metrics and not any(metric.sync_on_compute for metric in metrics)
