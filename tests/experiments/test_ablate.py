"""Small ablations of a tiny model, run for real."""

import csv
import json
import os
import re
import shutil
import signal
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.data.augment import Augmentation
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.experiments.plan import make_plan
from lightning_lora.experiments.resolving import find_changes, resolve_cells
from lightning_lora.experiments.results import count_tests, read_cells
from lightning_lora.experiments.runner import Worker
from lightning_lora.runs.folder import best_evaluation
from lightning_lora.training.module import TextClassifier
from tests.conftest import make_rows, write_csv
from tests.experiments.test_search import TIMES, main_table
from tests.faults.processes import Run


@pytest.fixture(scope="module")
def place(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base recipe, its data, and an ablation's config."""
    folder = tmp_path_factory.mktemp("ablation")
    write_csv(folder / "rows.csv", make_rows(240))
    base = {
        "model": {"base_model": str(make_base("bert")), "learning_rate": 1e-2},
        "data": {"source": str(folder / "rows.csv"), "max_length": 24, "cache_dir": str(folder / "cache")},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    ablation = {
        "question": "Does rank matter here?",
        "base": "base.yaml",
        "axes": {"rank": {"model.adapter.rank": [2, 8]}},
        "baseline": {"rank": 8},
        "seeds": [1, 2],
    }
    (folder / "rank.yaml").write_text(yaml.safe_dump(ablation))
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    assert main(["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(place / "logs")]) == 0
    return place / "logs" / "ablation-rank"


def again(done: Path, place: Path, tmp_path: Path, *words: str) -> int:
    if not (tmp_path / "ablation-rank").exists():
        shutil.copytree(done, tmp_path / "ablation-rank")
    return main(["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(tmp_path), *words])


def test_each_cell_is_a_run_and_the_report_has_every_form(done: Path) -> None:
    names = {f"rank-{rank}__seed-{seed}" for rank in (2, 8) for seed in (1, 2)}
    assert {p.name for p in (done / "cells").iterdir() if p.is_dir()} == names
    for name in names:
        record = json.loads((done / "cells" / name / "run.json").read_text())
        assert record["status"] == "finished" and set(record["evaluations"]) == {"val", "test"}
    page = (done / "report.html").read_text()
    assert page.count("<svg") == 6 and "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.split("<svg")[0])
    with (done / "report.csv").open(newline="") as file:
        accuracies = [row["test accuracy"] for row in csv.DictReader(file)]
    assert len(accuracies) == 2
    for ending in ("md", "tex", "html"):
        assert all(accuracy in (done / f"report.{ending}").read_text() for accuracy in accuracies)
    assert "evaluated 4 times, for 4 cells" in (done / "report.md").read_text()


def test_the_second_difference_of_the_axis_is_told(done: Path, place: Path, tmp_path: Path, capsys) -> None:
    assert again(done, place, tmp_path, "--plan") == 0
    said = capsys.readouterr().out
    assert "confounder: alpha / rank" in said and "4 are finished" in said
    assert "also differs from the baseline in alpha / rank" in (done / "report.md").read_text()


def test_arms_of_a_seed_see_the_same_rows_in_the_same_order_from_the_same_head(done: Path) -> None:
    """By the splits that are stored, and by what the settings of each cell make."""
    for seed in (1, 2):
        runs = [done / "cells" / f"rank-{rank}__seed-{seed}" for rank in (2, 8)]
        splits = [pq.read_table(run / "splits.parquet") for run in runs]
        assert splits[0].equals(splits[1])
        models, orders = [], []
        for run in runs:
            settings = yaml.safe_load((run / "config.yaml").read_text())
            data = TextDataModule(**{**settings["data"], "augmentation": Augmentation()}, **linked(settings))
            data.setup("fit")
            models.append(TextClassifier(**settings["model"], label_names=data.label_names, seed=seed).state_dict())
            orders.append([batch["rows"].tolist() for batch in data.train_dataloader()])
        assert orders[0] == orders[1] and orders[0] != sorted(orders[0])
        heads = [{k: v for k, v in model.items() if "classifier" in k} for model in models]
        assert heads[0].keys() == heads[1].keys() and heads[0]
        for name, value in heads[0].items():
            torch.testing.assert_close(heads[1][name], value, rtol=0, atol=0)


def linked(settings: dict) -> dict:
    """What the command line copies to the data."""
    return {"base_model": settings["model"]["base_model"], "seed": settings["seed_everything"]}


def test_a_second_call_does_nothing_and_looks_at_nothing(done: Path, place: Path, tmp_path: Path, capsys) -> None:
    assert again(done, place, tmp_path) == 0
    here = tmp_path / "ablation-rank"
    assert count_tests(here) == (4, 4)
    assert not (here / "stale").exists()
    assert (here / "report.csv").read_text() == (done / "report.csv").read_text()


def test_a_lost_cell_is_trained_again_and_comes_to_the_same(done: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "ablation-rank")
    shutil.rmtree(tmp_path / "ablation-rank" / "cells" / "rank-2__seed-1")
    assert again(done, place, tmp_path) == 0
    one, two = (
        pq.read_table(f / "cells/rank-2__seed-1/predictions/test.parquet") for f in (done, tmp_path / "ablation-rank")
    )
    assert one.equals(two)


@pytest.mark.parametrize("changed", ["code", "versions", "data", "settings"])
def test_a_cell_of_something_else_is_set_aside_and_not_mixed_in(done, place, tmp_path, changed, capsys) -> None:
    shutil.copytree(done, tmp_path / "ablation-rank")
    cell = tmp_path / "ablation-rank" / "cells" / "rank-2__seed-1"
    record = json.loads((cell / "run.json").read_text())
    if changed == "code":
        record["code"]["fingerprint"] = "other"
    elif changed == "versions":
        record["versions"]["torch"] = "0.4"
    elif changed == "data":
        record["data"]["splits"]["train"]["fingerprint"] = "other"
    else:
        config = yaml.safe_load((cell / "config.yaml").read_text())
        config["model"]["learning_rate"] = 1.0
        (cell / "config.yaml").write_text(yaml.safe_dump(config))
    (cell / "run.json").write_text(json.dumps(record))
    content = yaml.safe_load((place / "rank.yaml").read_text())
    plan = make_plan(content, place / "rank.yaml")
    settings = resolve_cells(plan, [yaml.safe_load(plan.base.read_text())], [])
    words = ["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(tmp_path), "--plan"]
    assert main(words) == 0
    assert "3 are finished" in (said := capsys.readouterr().out) and "; 1 are of other code, settings or data" in said
    Worker(plan, tmp_path / "ablation-rank", lambda plan: settings).move_stale()
    aside = tmp_path / "ablation-rank" / "stale" / "rank-2__seed-1.1"
    reason = {"code": "the code has changed", "versions": "version of torch", "data": "the data has changed"}
    assert reason.get(changed, "other settings: model.learning_rate") in (aside / "why.txt").read_text()
    states = {c.cell.name: c.status for c in read_cells(plan, tmp_path / "ablation-rank")}
    assert states.pop("rank-2__seed-1") == "missing" and set(states.values()) == {"finished"}


def test_a_report_mixes_no_cell_of_other_settings_in(done: Path, place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(done, tmp_path / "ablation-rank"))
    asked = json.loads((copy / "ablation.json").read_text())
    asked["config"]["settings"] = {"data.max_length": 16}
    (copy / "ablation.json").write_text(json.dumps(asked))
    assert main(["report", str(copy)]) == 0
    assert "trained with other settings: data.max_length 24 instead of 16" in (copy / "report.md").read_text()


def test_an_option_that_overrides_an_axis_is_refused(place: Path, tmp_path: Path, capsys) -> None:
    words = ["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(tmp_path)]
    assert main([*words, "--model.adapter.rank", "4"]) == 2
    assert "an option gives 4 to every cell" in capsys.readouterr().err
    assert main([*words, "--seed_everything", "4"]) == 2


def test_a_test_by_hand_counts_as_a_look_and_another_checkpoint_is_no_answer(done: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(done, tmp_path / "ablation-rank"))
    record = json.loads((copy / "cells" / "rank-2__seed-1" / "run.json").read_text())
    record["evaluations"]["test-2"] = record["evaluations"]["test"]
    record["evaluations"]["test"] = {**record["evaluations"]["test"], "checkpoint": "x/last.ckpt"}
    (copy / "cells" / "rank-2__seed-1" / "run.json").write_text(json.dumps(record))
    assert main(["report", str(copy)]) == 0
    report = (copy / "report.md").read_text()
    assert "evaluated 5 times, for 4 cells" in report and "warning: compared on the validation rows" in report
    # It is moved to stale/, with both tests, and another is trained in its place.
    (copy / "stale").mkdir()
    shutil.copytree(copy / "cells" / "rank-2__seed-1", copy / "stale" / "rank-2__seed-1.1")
    del record["evaluations"]["test"], record["evaluations"]["test-2"]
    (copy / "cells" / "rank-2__seed-1" / "run.json").write_text(json.dumps(record))
    assert count_tests(copy) == (5, 4)


@pytest.mark.parametrize("change", [{"config": ["rank"]}, {"command": None}, {"path": 3}])
def test_a_damaged_plan_is_one_line(done: Path, tmp_path: Path, change: dict, capsys) -> None:
    copy = Path(shutil.copytree(done, tmp_path / "ablation-rank"))
    asked = json.loads((copy / "ablation.json").read_text())
    (copy / "ablation.json").write_text(json.dumps({**asked, **change}))
    assert main(["report", str(copy)]) == 2
    assert f"error: {copy / 'ablation.json'}: cannot be read" in capsys.readouterr().err


def test_a_quantized_arm_is_told_to_multiply_in_another_format(place: Path) -> None:
    content = yaml.safe_load((place / "rank.yaml").read_text())
    content["axes"] = {"bits": {"names": ["none", "8", "4"], "model.quantization.bits": [None, 8, 4]}}
    content["baseline"] = {"bits": "none"}
    found = find_changes(
        plan := make_plan(content, place / "rank.yaml"),
        resolve_cells(plan, [yaml.safe_load(plan.base.read_text())], []),
    )
    told = {arm: [str(change) for change in changes if not change.named] for arm, changes in found.items()}
    assert "the encoder multiplies in: float32 -> int8" in told["bits 8"]
    assert not any("multiplies" in change for change in told["bits 4"])
    assert not any("weights of the encoder" in change for each in told.values() for change in each)


def test_values_of_an_axis_may_be_trees_of_settings(place: Path) -> None:
    content = yaml.safe_load((place / "rank.yaml").read_text()) | {"baseline": {"size": "small"}}
    trees = [{"rank": 2, "alpha": 4}, {"rank": 8, "alpha": 16}]
    content["axes"] = {"size": {"names": ["small", "large"], "model.adapter": trees}}
    plan = make_plan(content, place / "rank.yaml")
    settings = resolve_cells(plan, [yaml.safe_load(plan.base.read_text())], [])
    assert [settings[cell.name]["model"]["adapter"]["rank"] for cell in plan.arms.values()] == [2, 8]
    assert [str(change) for change in find_changes(plan, settings)["large"] if change.named] == [
        "model.adapter.rank: 2 -> 8", "model.adapter.alpha: 4 -> 16"
    ]  # fmt: skip


def test_a_cell_that_fails_is_a_row_with_its_reason(place: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((place / "rank.yaml").read_text())
    content["axes"] = {"rate": {"model.learning_rate": [5e-3, 1e30]}}
    content["baseline"] = {"rate": 0.005}
    content["settings"] = {"trainer.gradient_clip_val": None, "model.warmup_ratio": 0.0, "model.adapter.rank": 4}
    (place / "fails.yaml").write_text(yaml.safe_dump(content))
    assert main(["ablate", "--config", str(place / "fails.yaml"), "--logs_dir", str(tmp_path)]) == 1
    report = (tmp_path / "ablation-fails" / "report.md").read_text()
    assert "is not finite" in report and "2 of 4 cells have not finished" in report


def test_the_report_needs_no_torch(done: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    copy = Path(shutil.copytree(done, tmp_path / "copy"))
    for file in copy.glob("report.*"):
        file.unlink()
    code = (
        "import sys, lightning_lora.cli as c; s = c.main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'transformers', 'peft'} & set(sys.modules); sys.exit(s)"
    )
    subprocess.run([sys.executable, "-c", code, "report", str(copy)], check=True, capture_output=True)
    assert (copy / "report.csv").read_text() == (done / "report.csv").read_text()


def test_tensorboard_has_each_cell_as_a_session(done: Path, tmp_path: Path) -> None:
    """Asked over TensorBoard's own HTTP interface; the metrics are those of the cells' records."""
    copy = Path(shutil.copytree(done, tmp_path / "ablation-rank"))
    one = str(copy / "cells" / "rank-2__seed-1" / "config.yaml")
    again = ["fit", "--config", one, "--logs_dir", str(copy / "cells")]
    fails = ["--name", "fails", "--model.learning_rate", "1e30", "--trainer.gradient_clip_val", "null"]
    assert main([*again, *fails, "--model.warmup_ratio", "0"]) == 2
    untrained = ["--name", "untrained", "--model.method", "none", "--model.adapter.rank", "null"]
    assert main([*again, *untrained]) == 0
    found = ask_tensorboard(copy)
    # TensorBoard sees by itself in what the sessions differ.
    differing = {info["name"] for info in found["experiment"]["hparamInfos"] if info["differs"]}
    assert {"model.adapter.rank", "seed_everything"} <= differing and "data.max_length" not in differing
    sessions = {group["name"].split("/")[1]: group for group in found["groups"]}
    cells = {path.parent.name for path in (copy / "cells").glob("*/run.json")}
    assert set(sessions) == cells and {"fails", "untrained", "rank-8__seed-2"} <= cells
    assert sessions["untrained"]["hparams"]["model.method"] == "none"
    for rank, seed in ((2, 1), (2, 2), (8, 1), (8, 2)):
        name = f"rank-{rank}__seed-{seed}"
        settings = sessions[name]["hparams"]
        assert (settings["model.adapter.rank"], settings["seed_everything"]) == (rank, seed)
        shown = {value["name"]["tag"]: value["value"] for value in sessions[name]["metricValues"]}
        record = json.loads((copy / "cells" / name / "run.json").read_text())
        for split in ("val", "test"):
            for metric, value in record["evaluations"][split]["after"].items():
                assert shown[f"{split}/{metric}"] == pytest.approx(value, abs=1e-6), (name, split, metric)
        # Each value stands at the step of the weights that it was measured on, none at the beginning.
        steps = [step for _, step, _ in found["curves"][name]]
        last = record["steps"] - 1
        assert steps[:2] == [last // 2, last] and len(steps) == 3 and steps[2] in steps[:2]


def ask_tensorboard(folder: Path) -> dict[str, Any]:
    """What a TensorBoard of the folder answers: the experiment, the sessions, and val/accuracy of each cell."""
    from tensorboard import default, program

    board = program.TensorBoard(plugins=default.get_plugins())
    options = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    board.configure(argv=["tensorboard", *options])
    address = board.launch() + "data/"

    def ask(path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    cells = [p.name for p in (folder / "cells").iterdir() if any(p.glob("events.out.*"))]
    statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    for _ in range(100):  # it reads the files in a thread of its own
        experiment = ask("plugin/hparams/experiment", {})
        metrics = [info["name"] for info in experiment.get("metricInfos", [])]
        asked = {"startIndex": 0, "sliceSize": 50, "allowedStatuses": statuses}
        groups = ask("plugin/hparams/session_groups", {**asked, "colParams": [{"metric": m} for m in metrics]})
        found = groups.get("sessionGroups", [])
        tested = sum(any(v["name"]["tag"] == "test/loss" for v in group["metricValues"]) for group in found)
        if len(found) == len(cells) and tested == 4:
            break
        time.sleep(0.1)
    query = "plugin/scalars/scalars?tag=val/accuracy&run=cells/{}"
    curves = {name: ask(query.format(name)) for name in cells if name.startswith("rank-")}
    return {"experiment": experiment, "groups": found, "curves": curves}


def test_cells_given_as_plain_runs_come_to_what_the_ablation_came_to(done: Path, tmp_path: Path) -> None:
    words = ["report", str(done / "cells"), "--baseline", "rank-8__seed-1", "--output", str(tmp_path / "runs")]
    assert main(words) == 0
    one, two = ((folder / "report.csv").read_text() for folder in (done, tmp_path / "runs"))
    assert two == one
    assert "up to" in (done / "report.md").read_text()  # fit and test keep the lengths


def begin(place: Path, logs: Path, number: int) -> Run:
    words = ["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(logs)]
    return Run(words, logs / f"worker-{number}.txt")


def kills(place: Path, done: Path, logs: Path, count: int, seconds: float) -> None:
    """Two workers, one of which is killed again and again; in the end every cell is there once, as undisturbed."""
    rng = np.random.default_rng(count)
    other = begin(place, logs, 0)
    for number in range(1, count + 1):
        worker = begin(place, logs, number)
        worker.process.join(float(rng.uniform(0, seconds)))
        worker.signal(signal.SIGKILL)
        worker.wait()
        if number % 5 == 0 and other.process.is_alive():
            other.signal(signal.SIGKILL)
            other.wait()
            other = begin(place, logs, number + 1000)
    assert other.wait(300) in (0, -signal.SIGKILL), other.text()
    last = begin(place, logs, 5000)
    assert last.wait(300) == 0, last.text()
    here = logs / "ablation-rank"
    assert {p.name for p in (here / "cells").iterdir() if p.is_dir()} == {
        p.name for p in (done / "cells").iterdir() if p.is_dir()
    }
    for cell in (p for p in (done / "cells").iterdir() if p.is_dir()):
        for file in ("val-best", "test"):
            one, two = (
                pq.read_table(f / "cells" / cell.name / "predictions" / f"{file}.parquet") for f in (done, here)
            )
            assert one.equals(two), (cell.name, file)
    assert main_table(here, TIMES) == main_table(done, TIMES)


def test_workers_share_the_cells(place: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(tmp_path), "--workers", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    here = tmp_path / "ablation-rank"
    for cell in (p.name for p in (done / "cells").iterdir() if p.is_dir()):
        assert said.count(f"{cell}  validation accuracy") == said.count(f"{cell}: tested") == 1
        record = json.loads((here / "cells" / cell / "run.json").read_text())
        assert record["status"] == "finished" and set(record["evaluations"]) == {"val", "test"}
        assert (here / "cells" / f"{cell}.txt").read_text().count("main.py fit") == 1
    assert not (here / ".claims").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_test_that_fails_is_told_and_the_others_are_done(
    place: Path, done: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture
) -> None:
    copy = Path(shutil.copytree(done, tmp_path / "ablation-rank"))
    for run in sorted(copy.glob("cells/*/run.json")):
        record = json.loads(run.read_text())
        del record["evaluations"]["test"]
        run.write_text(json.dumps(record))
    broken = run.parent
    for path in broken.glob("checkpoints/*.ckpt"):
        path.write_bytes(b"no checkpoint")
    words = ["ablate", "--config", str(place / "rank.yaml"), "--logs_dir", str(tmp_path), "--workers", workers]
    assert main(words) == 1
    said = capsys.readouterr()
    assert f"{broken.name}: its test failed: " in said.err and "Traceback" not in said.err
    for run in copy.glob("cells/*/run.json"):
        tested = best_evaluation(json.loads(run.read_text()), "test") is not None
        assert tested == (run.parent != broken), said.err


@pytest.mark.parametrize("failed_before", [True, False])
def test_a_failed_cell_is_trained_again_once(
    place: Path, done: Path, tmp_path: Path, failed_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several workers are asked to: the one that comes later leaves what has failed in the meantime."""
    content = yaml.safe_load((place / "rank.yaml").read_text())
    plan = make_plan(content, place / "rank.yaml")
    resolve = partial(resolve_cells, base=[yaml.safe_load(plan.base.read_text())], overrides=[])
    copy = Path(shutil.copytree(done, tmp_path / "ablation-rank"))
    worker = Worker(plan, copy, resolve)
    run = copy / "cells" / plan.cells[0].name / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "status": "failed"}))
    os.utime(run, (time.time(), worker.started + (-1 if failed_before else 1)))
    started: list[list[list[str]]] = []
    monkeypatch.setattr(
        "lightning_lora.experiments.runner.run_child", lambda each, output: started.append(each) or output.touch()
    )
    assert worker.train(plan.cells[0]) == bool(started) == failed_before


@pytest.mark.faults
def test_two_workers_killed_twenty_times(place: Path, done: Path, tmp_path: Path) -> None:
    kills(place, done, tmp_path, 20, 12.0)


@pytest.mark.parametrize("base", ["./nowhere", "nobody/nothing"])
def test_a_base_of_an_axis_that_is_not_there_is_refused_before_any_cell_is_trained(
    place: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = yaml.safe_load((place / "base.yaml").read_text())["model"]["base_model"]
    ablation = yaml.safe_load((place / "rank.yaml").read_text())
    ablation |= {"base": str(place / "base.yaml"), "baseline": {"base": good}}
    ablation["axes"] = {"base": {"model.base_model": [good, base]}}
    (tmp_path / "bases.yaml").write_text(yaml.safe_dump(ablation))
    assert main(["ablate", "--config", str(tmp_path / "bases.yaml"), "--logs_dir", str(tmp_path / "logs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {base}: model.base_model: ") and base in error and error.count("\n") == 1
    assert not (tmp_path / "logs").exists()
