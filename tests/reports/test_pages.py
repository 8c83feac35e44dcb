"""What an ablation's page shows: the forest plot's places, facts of the runs, and a picture for each panel."""

import csv
import re
from pathlib import Path

import pytest

from lightning_lora.experiments.plan import make_plan
from lightning_lora.experiments.results import CellResult, compare_arms
from lightning_lora.reports.ablation import Report, facts
from lightning_lora.reports.ablation_figures import pictures
from lightning_lora.reports.ablation_pages import as_html, forest
from tests.experiments.test_results import CONTENT, answers

AXES = {"rank": {"model.adapter.rank": [2, 8]}, "rate": {"model.learning_rate": [1e-4, 1e-3]}}
RIGHT = {("2", "0.0001"): 0.5, ("2", "0.001"): 0.6, ("8", "0.0001"): 0.7, ("8", "0.001"): 0.8}


@pytest.fixture
def crossed(tmp_path: Path) -> Report:
    """Two axes that cross, with a run folder's curve for each cell."""
    plan = make_plan({**CONTENT, "axes": AXES, "baseline": {"rank": 8, "rate": "0.001"}}, Path("a.yaml"))
    found = []
    for cell in plan.cells:
        right, place = RIGHT[cell.values["rank"], cell.values["rate"]], tmp_path / cell.name
        place.mkdir()
        rows = [["epoch", "step", "val/accuracy"], [0, 9, right - 0.1], [0, 14, ""], [1, 19, right + cell.seed / 100]]
        with (place / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        record = {"config": {"data": {"source": "rows.csv"}}, "base_model": "./base", "costs": {"train_s": 2.0}}
        record["data"] = {"label_names": ["a", "b"], "splits": {"train": {"rows": 1000}, "test": {"rows": 200}}}
        found.append(
            CellResult(
                cell, "finished", "", record, {"val": answers(right, 0), "test": answers(right, cell.seed)}, place
            )
        )
    return Report("r", plan, "ablate", compare_arms(plan, found), found, (12, 12), {})


def test_the_forest_plot_has_nought_the_margin_and_the_intervals_in_their_places(crossed: Report) -> None:
    plot = forest(crossed)
    rows = {row["label"]: row for row in plot["rows"]}
    two = rows["rank 2, rate 0.001"]
    assert two["difference"] == "-0.2000" and two["verdict"] == "worse"
    scale = (plot["zero"] - two["point"]) / 0.2  # percent of the axis for a difference of 1
    assert plot["band"]["width"] == pytest.approx(2 * 0.01 * scale, abs=0.05)
    (arm,) = (arm for arm in crossed.arms if arm.label == "rank 2, rate 0.001")
    assert two["width"] == pytest.approx((arm.against.estimate.high - arm.against.estimate.low) * scale, abs=0.05)
    assert all(row["left"] >= 0 and row["left"] + row["width"] <= 100 for row in rows.values() if "left" in row)
    assert rows["rank 8, rate 0.001"]["verdict"] == "baseline" and "left" not in rows["rank 8, rate 0.001"]


def test_crossed_axes_are_a_heat_map_and_curves_have_a_panel_for_each_arm(crossed: Report) -> None:
    sections = {title: drawn for title, _, drawn in pictures(crossed)}
    assert len(sections["What each axis does"]) == 3 and len(sections["While training"]) == 4
    heat = sections["What each axis does"][0]
    said = re.findall(r"<title>(.*?)</title>", heat)
    assert len(said) == 4 and said[0].startswith("rank 2, rate 0.0001: 0.5100 [0.4")
    (curve,) = (each for each in sections["While training"] if "of rank 8, rate 0.001 " in each)
    # Steps count from 1; mean of the seeds 1, 2 and 3.
    assert re.findall(r"<title>(.*?)</title>", curve)[:2] == [
        "rank 8, rate 0.001: 0.7000 at step 10", "rank 8, rate 0.001: 0.8200 at step 20"
    ]  # fmt: skip
    assert "#000000" not in curve and "currentColor" in curve  # readable on dark pages


def test_the_page_says_what_was_trained_on_what(crossed: Report) -> None:
    assert dict(facts(crossed)) == {
        "data": "rows.csv",
        "rows": "trained on 1,000, tested on 200",
        "labels": "2 (a, b)",
        "base model": "./base",
        "seeds": "1, 2, 3",
        "compared by": "test accuracy, paired by seed and row; margin 0.01",
    }
    assert "trained on 1,000" in as_html(crossed)
