"""A new metric is one entry of ``METRICS``: whatever shows metrics reads it there."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import top_k_accuracy_score

from lightning_lora.cli import main
from lightning_lora.evaluation.metric_table import METRICS, MetricSpec
from lightning_lora.evaluation.metrics import make_metrics
from lightning_lora.experiments.plan import make_plan
from lightning_lora.experiments.results import read_cell_predictions
from lightning_lora.export.card import card_metrics
from lightning_lora.training.refused import check_monitors
from tests.conftest import fit_tiny

LABELS = ["mixed", "neg", "pos"]
TOP_2 = MetricSpec(
    lambda t, size: t.Accuracy(**size, average="micro", top_k=2),
    "top-2 accuracy",
    lambda given: (np.argsort(given.log_p, axis=1)[:, -2:] == given.truth[:, None]).any(axis=1, keepdims=True),
    of_training=False,
    hub_type="top_2_accuracy",
)


def test_a_new_metric_is_one_entry(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "top_2", TOP_2)
    run = fit_tiny(tmp_path, tiny_base, epochs=1, labels=tuple(LABELS))
    assert main(["test", "--run", str(run)]) == 0
    record = json.loads((run / "run.json").read_text())
    test = record["evaluations"]["test"]
    table = pq.read_table(run / "predictions" / "test.parquet").to_pydict()
    logits = np.column_stack([table[f"logit({name})"] for name in LABELS])
    expected = top_k_accuracy_score(table["label"], logits, k=2, labels=LABELS)
    assert 0 < expected < 1
    # Evaluation and its interval, before and after.
    assert test["after"]["top_2"] == pytest.approx(expected) and "top_2" in test["before"]
    low, high = test["after_interval"]["top_2"]
    assert low < expected < high
    assert "top_2" in make_metrics(3) and "top_2" not in make_metrics(3, training=True)
    # What callbacks may monitor.
    from lightning.pytorch.callbacks import EarlyStopping

    check_monitors([EarlyStopping("val/top_2", mode="max")], LABELS, {})
    # The tables of a run and of a report.
    assert "| top-2 accuracy |" in (run / "test.md").read_text()
    assert main(["report", str(run)]) == 0
    assert "top-2 accuracy" in (tmp_path / "report-run" / "report.csv").read_text()
    assert (
        json.loads((tmp_path / "report-run" / "report.json").read_text())["arms"][0]["values"]["top_2"]
        == test["after"]["top_2"]
    )
    # Arms can be chosen and compared by it.
    axes = {"rank": {"model.adapter.rank": [2, 8]}}
    assert make_plan({"question": "?", "axes": axes, "metric": "top_2"}, Path("a.yaml")).higher_is_better
    answers = read_cell_predictions(run / "predictions" / "test.parquet")
    assert answers is not None and answers.values("top_2").mean() == pytest.approx(expected)
    # The model card.
    assert ("top_2_accuracy", "top-2 accuracy", test["after"]["top_2"]) in card_metrics(test["after"])
