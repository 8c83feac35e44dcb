"""Plain runs as an ablation: folders that are written here, with answers that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main

ROWS = 90
LABELS = np.arange(ROWS) % 2


def make_run(place: Path, seed: int, right: dict[str, int], **change: Any) -> Path:
    """A run folder whose model has the first so-and-so-many rows of each split right; ``change`` is of its record."""
    config = {"seed_everything": seed, "data": {"source": "rows.csv", "cache_dir": f"cache{seed}"}}
    config["model"] = {"method": "lora", "learning_rate": None, "adapter": {"rank": 8, "alpha": 16.0}}
    for key, value in change.pop("settings", {}).items():
        room: Any = config
        *path, last = key.split(".")
        for part in path:
            room = room[part]
        room[last] = value
    status, lengths = change.pop("status", "finished"), change.pop("lengths", True)
    prints = {"train": "t", "val": "v", "test": "x"} | change.pop("fingerprints", {})
    (place / "predictions").mkdir(parents=True)
    (place / "config.yaml").write_text("{}")
    record = {
        "format": 1, "name": place.name, "status": status, "seed": seed, "config": config, "wall_s": 1.0,
        "versions": {"torch": "2"}, "code": {"commit": "c", "fingerprint": "f"},
        "machine": {"cores": 2, "processor": "p"},
        "costs": {"trainable_params": 10, "train_s": 1.0, "peak_memory_mb": 100.0},
        "model": {"learning_rate": 5e-4},
        "data": {"splits": {split: {"fingerprint": prints[split], "rows": ROWS} for split in prints}},
        "evaluations": {
            split: {"checkpoint": "best.ckpt", "fingerprint": prints[split]}
            for split, name in (("val", "val-best"), ("test", "test")) if name in right
        },
        **change,
    }  # fmt: skip
    (place / "run.json").write_text(json.dumps(record))
    for name, count in right.items():
        said = np.where(np.arange(ROWS) < count, LABELS, 1 - LABELS)
        columns: dict[str, Any] = {
            "row": np.arange(ROWS),
            "origin": ["o"] * ROWS,
            "label": np.array(["a", "b"])[LABELS],
        }
        columns["key"] = [f"{name[:3]}{i:03}" for i in range(ROWS)]
        if lengths:
            columns["characters"] = np.arange(ROWS) + 1
        columns |= {f"logit({word})": (said == i).astype(np.float32) for i, word in enumerate("ab")}
        pq.write_table(pa.table(columns), place / "predictions" / f"{name}.parquet")
    return place


def table(folder: Path) -> list[list[str]]:
    return [line.split(",") for line in (folder / "report.csv").read_text().splitlines()]


BOTH = {"val-best": 50, "test": 60}


def test_runs_that_differ_by_their_seed_only_are_one_arm(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for seed in (1, 2, 3):
        make_run(logs / f"a{seed}", seed, {"val": 45, "val-best": 50, "test": 60 + seed})
        rank = {"model.adapter.rank": 2, "model.adapter.alpha": 4.0, "model.learning_rate": 1e-3}
        make_run(logs / f"b{seed}", seed, {"val": 45, "val-best": 50, "test": 30 + seed}, settings=rank)
    make_run(logs / "interrupted", 4, {}, status="interrupted")
    assert main(["report", str(logs)]) == 0
    report = (logs / "report-a1" / "report.md").read_text()
    import csv

    with (logs / "report-a1" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # The label of a value that stands at its default says so.
    assert [row["arm"] for row in rows] == [
        "rank 8, alpha 16, learning_rate default (baseline)",
        "rank 2, alpha 4, learning_rate 0.001",
    ]
    assert [row["seeds"] for row in rows] == ["3", "3"]
    assert [float(row["test accuracy"]) for row in rows] == [
        pytest.approx(62 / 90, abs=1e-4),
        pytest.approx(32 / 90, abs=1e-4),
    ]
    assert float(rows[1]["better than baseline by"]) == pytest.approx(-30 / 90, abs=1e-4)
    assert rows[1]["verdict"] == "worse"
    assert "Nothing was chosen by this report" in report and "evaluated 6 times, for 6 cells" in report
    # Broken are the rows of lengths 31 + seed to 60 + seed: 30 - seed of the middle third, seed of the last.
    assert "| up to 30 characters: fixed / broken | 31 to 60: fixed / broken | 61 to 90: fixed / broken |" in report
    assert "| rank 2, alpha 4, learning_rate 0.001 | 0.0 / 0.0 | 0.0 / 28.0 | 0.0 / 2.0 |" in report
    for ending in ("html", "tex"):
        assert (logs / "report-a1" / f"report.{ending}").is_file()


def test_the_baseline_can_be_named_and_stand_elsewhere(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", 1, BOTH)
    two = make_run(tmp_path / "two", 1, BOTH, settings={"model.method": "head"})
    assert main(["report", str(one), "--baseline", str(two), "--output", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out")
    assert [row[0] for row in rows[1:]] == ["method lora", "method head (baseline)"]


def test_without_all_test_predictions_validation_rows_are_compared_and_it_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "logs" / "a", 1, BOTH)
    make_run(tmp_path / "logs" / "b", 1, {"val": 40}, settings={"model.adapter.rank": 2}, code={"fingerprint": "g"})
    assert main(["report", str(tmp_path / "logs"), "--output", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| validation accuracy |" in report and "0.5556" in report and "0.4444" in report and "0.6667" not in report
    assert "Validation predictions are of the last weights, not of the best ones, in b." in report
    assert "not all runs were tested (b not)" in report and "a and b were made by different code" in report


def test_runs_without_lengths_have_no_table_of_them(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 1, BOTH, lengths=False)
    make_run(tmp_path / "b", 1, BOTH, settings={"model.adapter.rank": 2}, lengths=False)
    assert main(["report", "a", "b", "--output", "out"]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "by class" in report and "by length" not in report


def test_long_labels_give_way_to_names_and_a_table_says_what_differs(tmp_path: Path) -> None:
    settings = {"model.method": "a_method_of_a_long_name", "data.source": "x/" + "y" * 40}
    make_run(tmp_path / "a", 1, BOTH)
    make_run(tmp_path / "b", 1, BOTH, settings=settings, model={"learning_rate": 1e-2})
    assert main(["report", "a", "b"]) == 0
    report = (tmp_path / "report-a" / "report.md").read_text()
    assert "| b | model.method | lora | a_method_of_a_long_name |" in report
    assert "| b | learning rate of the method | 0.0005 | 0.01 |" in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprints": {"test": "other"}}, "a and b have different test rows"),
        ({"settings": {}}, "a and b have the same settings and seed"),
        ({"status": "interrupted"}, "b has not finished (interrupted)"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path: Path, capsys, change, message) -> None:
    make_run(tmp_path / "a", 1, BOTH)
    make_run(tmp_path / "b", 1, BOTH, **{"settings": {"model.adapter.rank": 2}, **change})
    assert main(["report", "a", "b"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "report-a").exists()


def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "a", 1, BOTH)
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["empty"], "empty is no run, no ablation, and no folder with finished runs"),
        (["nowhere"], "nowhere is no run"),
        (["a", "--baseline", "nowhere"], "nowhere is no run; there are a"),
        (["a", "--output", "a"], "a is the folder of a run or ablation"),
    ):
        assert main(["report", *words]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert main(["report", "a", "a"]) == 0  # the same run twice is one


def test_arms_without_a_common_seed_are_said_to_be_so(tmp_path: Path) -> None:
    for name, seed, rank in (("a1", 1, 8), ("a2", 2, 8), ("b", 3, 2)):
        make_run(tmp_path / name, seed, {**BOTH, "test": 60 + seed}, settings={"model.adapter.rank": rank})
    make_run(tmp_path / "c", 1, BOTH, settings={"model.adapter.rank": 4})
    assert main(["report", "a1", "a2", "b", "c", "--output", "out"]) == 0
    assert "Without a seed in common with it: rank 2" in (tmp_path / "out" / "report.md").read_text()


def test_runs_of_a_folder_are_grouped_by_their_data(tmp_path: Path, capsys) -> None:
    logs = tmp_path / "logs"
    other = {"val": "v2", "test": "x2"}
    make_run(logs / "a", 1, BOTH)
    make_run(logs / "b", 1, BOTH, settings={"model.adapter.rank": 2})
    make_run(logs / "c", 1, BOTH, settings={"data.source": "more.csv"}, fingerprints=other)
    make_run(logs / "d", 2, BOTH, settings={"data.source": "more.csv"}, fingerprints=other)
    make_run(logs / "again", 1, BOTH)  # the settings and the seed of a
    make_run(logs / "interrupted", 4, {}, status="interrupted")
    make_run(logs / "damaged", 5, BOTH)
    (logs / "damaged" / "run.json").write_text("{")
    make_run(logs / "half", 6, BOTH)
    (logs / "half" / "predictions" / "test.parquet").write_text("PAR1")
    (logs / "notes").mkdir()
    for _ in range(2):  # its own reports are no runs
        assert main(["report", str(logs)]) == 0
        said = capsys.readouterr()
        assert said.out.count("== ") == 2 and "== rows.csv: 2 runs (a, b)" in said.out
        assert "== more.csv: 2 runs (c, d)" in said.out
        left_out = [line.split(" is left out: ") for line in said.err.splitlines()]
        assert [Path(place.removeprefix("warning: ")).name for place, _ in left_out] == [
            *("damaged", "half", "interrupted", "notes", "again")
        ]
        assert [row[0] for row in table(logs / "report-a")[1:]] == ["rank 8 (baseline)", "rank 2"]
        assert [row[0] for row in table(logs / "report-c")[1:]] == ["all runs"]
    assert main(["report", str(logs), "--baseline", str(logs / "d"), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report-a", "report-c"]


def test_an_ablation_in_a_folder_of_runs_is_named_with_its_own_report(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "logs" / "a", 1, BOTH)
    (tmp_path / "logs" / "ablation").mkdir()
    (tmp_path / "logs" / "ablation" / "ablation.json").write_text("{}")
    assert main(["report", str(tmp_path / "logs")]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"a report of its own: report {tmp_path / 'logs' / 'ablation'}" in said
