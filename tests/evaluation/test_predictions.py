from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.special import softmax

from lightning_lora.evaluation.predictions import Predictions, in_row_order

LOGITS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32) * 30
LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_rows_come_back_in_their_order() -> None:
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    batches = [{"rows": part, "logits": logits[part], "labels": labels[part]} for part in order.split(4)]
    found = in_row_order(batches, ["a", "b", "c"])
    np.testing.assert_array_equal(found.logits, LOGITS)
    np.testing.assert_array_equal(found.labels, LABELS)
    np.testing.assert_array_equal(found.rows, np.arange(6))


def test_thresholds_of_a_model_in_bfloat16_are_numbers_like_others() -> None:
    batch = {"rows": torch.tensor([0]), "logits": torch.tensor([[0.1, -0.1]], dtype=torch.bfloat16)}
    found = in_row_order([batch], ["a", "b"], "multi_label", torch.full((2,), 0.5, dtype=torch.bfloat16))
    assert found.thresholds is not None and found.thresholds.tolist() == [0.5, 0.5] and found.names == [["a"]]


def test_probabilities_are_the_softmax_also_of_large_logits() -> None:
    predictions = Predictions(LOGITS * 100, None, ["a", "b", "c"], np.arange(6))
    np.testing.assert_allclose(predictions.probabilities, softmax(LOGITS.astype(float) * 100, axis=1), atol=1e-12)


def test_the_file_holds_names_probabilities_and_logits(tmp_path: Path) -> None:
    positions = np.array([0, 2, 3, 5, 6, 7])  # of a pass that did not see all of 8 rows
    numbers = np.arange(100, 108)
    Predictions(LOGITS, LABELS, ["a", "b", "c"], positions).write_parquet(tmp_path / "p.parquet", row=numbers)
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["label"] for row in rows] == ["a", "b", "c"] * 2
    assert [row["prediction"] for row in rows] == ["abc"[i] for i in LOGITS.argmax(1)]
    for i, row in enumerate(rows):
        assert row["row"] == numbers[positions[i]]
        assert row["probability"] == row[f"p({row['prediction']})"]
        assert abs(sum(row[f"p({name})"] for name in "abc") - 1) < 1e-12
        assert [row[f"logit({name})"] for name in "abc"] == LOGITS[i].tolist()
