"""Cross-validation as an axis of an ablation: of cells that are written down here, and of a tiny model's."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score

from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.evaluation.significance import difference
from lightning_lora.experiments.plan import make_plan
from lightning_lora.experiments.results import CellPredictions, CellResult, compare_arms
from tests.conftest import cells_in_process, make_rows, write_csv

CONTENT = {
    "question": "?",
    "axes": {
        "rank": {"model.adapter.rank": [2, 8]},
        "rate": {"model.learning_rate": [1e-4, 1e-3], "chosen": True},
    },
    "baseline": {"rank": 8},
    "seeds": [1, 2],
    "folds": 3,
}
PLAN = make_plan(CONTENT, Path("a.yaml"))
FOLDS = np.random.default_rng(0).permutation(np.arange(90) % 3)


def answers(rng: np.random.Generator, fold: int, right: float) -> CellPredictions:
    keys = np.flatnonzero(fold - 1 == FOLDS)
    labels = keys % 2
    logits = np.eye(2)[np.where(rng.random(len(keys)) < right, labels, 1 - labels)].astype(np.float32) * 3
    return CellPredictions(logits, labels, np.array([f"k{i:03}" for i in keys]), ["a", "b"])


def cells() -> list[CellResult]:
    """Rate 0.0001 is best on validation in fold 1 only."""
    rng, found = np.random.default_rng(1), []
    for cell in PLAN.cells:
        val = 1.0 if (cell.variant == "rate 0.0001") == (cell.fold == 1) else 0.5
        test = answers(rng, cell.fold, 0.9 if cell.arm == "rank 8" else 0.6)
        found.append(CellResult(cell, "finished", "", {}, {"val": answers(rng, cell.fold, val), "test": test}))
    return found


def test_each_fold_takes_its_own_variant_and_rows_are_paired_over_the_folds() -> None:
    found = cells()
    two, eight = compare_arms(PLAN, found)
    for arm in (two, eight):
        assert {(c.cell.fold, c.cell.variant) for c in arm.cells} == {
            (1, "rate 0.0001"), (2, "rate 0.001"), (3, "rate 0.001")
        }  # fmt: skip
        assert [c.cell.seed for c in arm.by_seed] == [1, 2] and arm.variant == "rate 0.0001 / rate 0.001"
    stacks = []
    for arm in (two, eight):
        rows = np.full((2, 90), np.nan)
        for c in arm.cells:
            rows[c.cell.seed - 1, c.cell.fold - 1 == FOLDS] = c.answers["test"].right
        stacks.append(rows)
    assert two.against == difference(*stacks, 0.01, folds=FOLDS) and two.own is not None
    assert two.own.mean == pytest.approx(stacks[0].mean()) and two.own.rows == 90
    mixed = compare_arms(PLAN, found[::-1])
    assert mixed[0].against == two.against


def test_a_lost_fold_leaves_the_seed_out_and_other_folds_are_never_paired() -> None:
    found = cells()
    lost = [replace(c, status="failed", answers={}) if (c.cell.seed, c.cell.fold) == (1, 2) else c for c in found]
    two, _ = compare_arms(PLAN, lost)
    assert two.seeds == [2] and not two.complete and two.own is not None and two.own.seeds == 1
    moved = {1: 2, 2: 1, 3: 3}  # the same rows, divided otherwise
    other = {(c.cell.arm, c.cell.variant, c.cell.seed, c.cell.fold): c.answers for c in found}
    odd = [
        replace(c, answers=other[c.cell.arm, c.cell.variant, c.cell.seed, moved[c.cell.fold]])
        if c.cell.arm == "rank 2"
        else c
        for c in found
    ]
    with pytest.raises(UserError, match="rows are not those of"):
        compare_arms(PLAN, odd)


@pytest.fixture(scope="module")
def done(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    write_csv(folder / "rows.csv", make_rows(90))
    data = {"source": str(folder / "rows.csv"), "max_length": 24, "val_size": 10, "cache_dir": str(folder / "cache")}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    model = {"base_model": str(make_base("bert")), "learning_rate": 1e-2}
    (folder / "base.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    content = {"question": "?", "base": "base.yaml", "folds": 3, "seeds": [1]}
    content |= {"arms": {"majority": {"model.method": "majority"}, "lora": {}}}
    (folder / "folds.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        cells_in_process(patch)
        assert main(["ablate", "--config", str(folder / "folds.yaml"), "--logs_dir", str(folder)]) == 0
    return folder / "ablation-folds"


def test_each_row_is_tested_once_and_the_metrics_are_those_of_all_predictions(done: Path) -> None:
    written = {arm["name"]: arm for arm in json.loads((done / "report.json").read_text())["arms"]}
    for arm in ("majority", "lora"):
        parts = [done / "cells" / f"arm-{arm}__seed-1__fold-{k}" / "predictions" / "test.parquet" for k in (1, 2, 3)]
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
        assert sorted(row["row"] for row in rows) == list(range(2, 92))
        truth, predicted = zip(*((row["label"], row["prediction"]) for row in rows), strict=True)
        values, interval = written[arm]["values"], written[arm]["intervals"]["f1_macro"]
        assert values["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
        assert values["f1_macro"] == pytest.approx(f1_score(truth, predicted, average="macro"))
        assert interval[0] <= values["f1_macro"] <= interval[1] and written[arm]["seeds"] == [1]
        assert "data.fold" not in written[arm]["settings"]
    with (done / "report.csv").open(newline="") as file:
        table = {row["arm"].split()[0]: row for row in csv.DictReader(file)}
    assert float(table["lora"]["test accuracy"]) == pytest.approx(written["lora"]["values"]["accuracy"], abs=5e-5)
    text = (done / "report.md").read_text()
    assert (
        "Nadeau and Bengio 2003" in text and "data.split_seed" not in text and "| arm | variant | seed | fold |" in text
    )


def test_a_fold_is_fitted_by_hand_and_a_second_call_of_the_ablation_trains_nothing(done, tmp_path, capsys) -> None:
    place = done.parent
    assert main(["ablate", "--config", str(place / "folds.yaml"), "--logs_dir", str(place), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "2 arms x 1 seeds x 3 folds = 6; 6 are finished" in said and "confounder: data.fold" not in said
    words = ["--model.method", "majority", "--data.fold", "[2, 3]", "--logs_dir", str(tmp_path), "--name", "one"]
    assert main(["fit", "--config", str(place / "base.yaml"), *words]) == 0
    splits = [
        pq.read_table(run / "splits.parquet") for run in (tmp_path / "one", done / "cells/arm-lora__seed-1__fold-2")
    ]
    assert splits[0].equals(splits[1])
    given = ["ablate", "--config", str(place / "folds.yaml"), "--logs_dir", str(place), "--data.fold", "[1, 3]"]
    assert main(given) == 2 and "data.fold: an option gives [1, 3] to every cell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [({"folds": 999}, "folds: data.fold: [1, 999] is no fold"), ({"metric": "pearson"}, "metric: 'pearson' is none")],
)
@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_what_the_data_cannot_have_is_refused_before_any_cell(
    done, tmp_path, capsys, change: dict, said: str, more: list[str]
) -> None:
    content = yaml.safe_load((done.parent / "folds.yaml").read_text()) | {"base": str(done.parent / "base.yaml")}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content | change))
    assert main(["ablate", "--config", str(tmp_path / "other.yaml"), "--logs_dir", str(tmp_path / "logs"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "logs").exists()


def test_labels_of_each_row_are_predicted_from_the_thresholds_of_its_fold_on() -> None:
    axes = {"rank": CONTENT["axes"]["rank"]}  # type: ignore[index]
    plan, found = make_plan({**CONTENT, "metric": "f1_samples", "axes": axes}, Path("a.yaml")), []
    for cell in plan.cells:
        keys = np.arange(3 * cell.fold, 3 * cell.fold + 3)
        logits, labels = np.zeros((3, 2), np.float32), np.array([[1, 0]] * 3)
        thresholds = np.array([0.1 * cell.fold, 0.9])
        own = CellPredictions(logits, labels, keys, ["a", "b"], task="multi_label", thresholds=thresholds)
        found.append(CellResult(cell, "finished", "", {}, {"val": own, "test": own}))
    pooled = compare_arms(plan, found)[0].by_seed[0].answers["test"]
    assert pooled.predicted[:, 0].all() and not pooled.predicted[:, 1].any()
    assert pooled.thresholds is not None
    assert pooled.thresholds[:, 0] == pytest.approx(np.repeat([0.1, 0.2, 0.3], 3))
