"""Comparisons of tiny arms, each command in this process."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score

from lightning_lora.artifacts.checkpoints import read_checkpoint
from lightning_lora.artifacts.runs import RunFolder
from lightning_lora.cli import main
from lightning_lora.commands import compare
from lightning_lora.errors import UserError
from tests.conftest import make_rows, write_csv

ARMS = ["none", "head", "lora", "full"]


RUN_COMMANDS = compare.run_commands


def test_commands_run_in_a_process_of_their_own_until_one_fails(monkeypatch, tmp_path: Path, capfd) -> None:
    monkeypatch.chdir(tmp_path)  # where the package could not be found by chance
    assert RUN_COMMANDS(["--version"], ["--help"]) == 0
    assert "usage: python main.py" in capfd.readouterr().out
    assert RUN_COMMANDS(["nonsense"], ["--help"]) == 2
    captured = capfd.readouterr()
    assert "no command 'nonsense'" in captured.err and not captured.out


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run, each in this process instead of one of its own."""
    commands: list[list[str]] = []

    def run_here(*words: list[str], lock: int | None = None) -> int:
        for each in words:
            commands.append(each)
            if status := main(each):
                return status
        return 0

    monkeypatch.setattr(compare, "run_commands", run_here)
    return commands


def write_config(place: Path, base: Path, **more: object) -> Path:
    write_csv(place / "rows.csv", make_rows(240, ("neg", "pos", "mixed")))
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3},
        "data": {"source": str(place / "rows.csv"), "max_length": 24, "cache_dir": str(place / "cache")},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
        **more,
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def compared(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_commands", lambda *words, lock: next((s for s in map(main, words) if s), 0))
        config = write_config(place, make_base("bert"))
        words = ["--config", str(config), "--logs_dir", str(place / "logs"), "--name", "four", "--arms", *ARMS]
        assert main(["compare", *words, "--data.batch_size", "8"]) == 0
    return place / "logs" / "four"


def predictions(folder: Path, arm: str) -> dict:
    return pq.read_table(folder / arm / "predictions" / "test.parquet").to_pydict()


def test_arms_see_the_same_rows_in_the_same_order_from_the_same_head(compared: Path) -> None:
    records = {arm: RunFolder(compared / arm).read() for arm in ARMS}
    for split in ("train", "val", "test"):
        assert len({r["data"]["splits"][split]["fingerprint"] for r in records.values()}) == 1
    assert len({json.dumps(predictions(compared, arm)["row"]) for arm in ARMS}) == 1
    from lightning_lora.commands.configured import ConfiguredRun

    heads, orders = [], []
    for arm in ARMS:
        run = ConfiguredRun("fit", ["--config", str(compared / arm / "config.yaml")])
        run.build(RunFolder(compared / arm))
        run.datamodule.setup("fit")
        orders.append([batch["rows"].tolist() for batch in run.datamodule.train_dataloader()])
        state = run.model.state_dict()
        name = next(n for n in state if n.endswith("classifier.weight") or "classifier.modules_to_save" in n)
        heads.append(state[name])
    assert all(order == orders[0] for order in orders)
    assert all((head == heads[0]).all() for head in heads)


def test_the_table_is_scikit_learns_with_intervals_and_costs(compared: Path) -> None:
    rows = {row["arm"]: row for row in csv.DictReader((compared / "comparison.csv").open())}
    assert list(rows) == ARMS
    for arm, row in rows.items():
        said = predictions(compared, arm)
        assert float(row["accuracy"]) == pytest.approx(accuracy_score(said["label"], said["prediction"]), abs=1e-6)
        expected = f1_score(said["label"], said["prediction"], average="macro", zero_division=0)
        if set(said["prediction"]) | set(said["label"]) == {"neg", "pos", "mixed"}:
            assert float(row["f1_macro"]) == pytest.approx(expected, abs=1e-6)
        assert float(row["accuracy_low"]) <= float(row["accuracy"]) <= float(row["accuracy_high"])
        assert float(row["checkpoint_bytes"]) == (compared / arm / "checkpoints" / "best.ckpt").stat().st_size
        assert float(row["peak_memory_mb"]) > 0
    assert rows["none"]["trainable_params"] == "0" and rows["none"]["train_tokens_per_s"] == ""
    assert int(rows["full"]["trainable_params"]) == int(rows["full"]["total_params"])
    text = (compared / "comparison.md").read_text()
    assert "| full |" in text and "≈" in text and "python main.py compare" in text
    assert (compared / "comparison.png").stat().st_size > 10_000


def test_what_is_not_told_apart_is_marked_and_what_is_told_apart_is_not(compared: Path) -> None:
    arms = {arm["name"]: arm for arm in json.loads((compared / "comparison.json").read_text())["arms"]}
    best = max(arms.values(), key=lambda arm: arm["metrics"]["accuracy"])
    hits = {
        name: np.array(predictions(compared, name)["label"]) == predictions(compared, name)["prediction"]
        for name in arms
    }
    for name, arm in arms.items():
        if arm is best:
            assert "accuracy" not in arm["ties"]
            continue
        difference = hits[name].astype(float) - hits[best["name"]]
        z = abs(difference.mean()) / (difference.std(ddof=1) / np.sqrt(len(difference)) + 1e-12)
        if z > 2.6 or z < 1.4:  # clear of the border by the normal approximation
            assert arm["ties"]["accuracy"] == (z < 1.96), name


def test_an_untouched_arm_keeps_the_head_it_would_start_from(compared: Path) -> None:
    state = read_checkpoint(compared / "none" / "checkpoints" / "best.ckpt")["state_dict"]
    assert any(name.endswith("classifier.weight") for name in state)
    assert RunFolder(compared / "none").read()["costs"]["train_s"] == 0


def again(compared: Path, tmp_path: Path, *words: str) -> tuple[int, Path]:
    folder = tmp_path / "logs" / "four"
    if not folder.exists():
        shutil.copytree(compared, folder)
    config = compared.parents[1] / "tiny.yaml"
    common = [
        "compare",
        "--config",
        str(config),
        "--logs_dir",
        str(tmp_path / "logs"),
        "--name",
        "four",
        "--arms",
        *ARMS,
    ]
    return main([*common, *(words or ("--data.batch_size", "8"))]), folder


def test_a_second_call_trains_nothing_again(compared: Path, tmp_path: Path, ran: list) -> None:
    before = json.loads((compared / "comparison.json").read_text())["arms"]
    status, folder = again(compared, tmp_path)
    assert status == 0 and ran == []
    assert json.loads((folder / "comparison.json").read_text())["arms"] == before


@pytest.mark.parametrize("lost", ["folder", "test", "interrupted"])
def test_a_second_call_finishes_what_is_missing(compared: Path, tmp_path: Path, ran: list, lost: str) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "logs" / "four"))
    run = RunFolder(folder / "lora")
    if lost == "folder":
        shutil.rmtree(run.path)
    else:
        record = run.read()
        if lost == "test":
            del record["evaluations"]["test"]
            for file in (run.path / "test.md", run.path / "predictions" / "test.parquet"):
                file.unlink()
        else:
            record["status"] = "interrupted"
        run.write(record)
    assert again(compared, tmp_path)[0] == 0
    assert [words[0] for words in ran] == (["test"] if lost == "test" else ["fit", "test"])
    assert not (folder / "lora.unfinished-1").exists()
    assert any("--resume" in words for words in ran) == (lost == "interrupted")
    first, second = (json.loads((f / "comparison.json").read_text())["arms"] for f in (compared, folder))
    for one, other in zip(first, second, strict=True):
        assert one["metrics"] == other["metrics"]


def test_other_settings_under_the_same_name_are_refused(compared: Path, tmp_path: Path, ran: list, capsys) -> None:
    status, _ = again(compared, tmp_path, "--data.batch_size", "4")
    assert status == 2 and ran == []
    assert "was made with other settings (data.batch_size); choose another --name" in capsys.readouterr().err


def test_without_a_name_the_settings_make_it(make_base, tmp_path: Path, ran: list) -> None:
    config = write_config(tmp_path, make_base("bert"))
    for _ in range(2):
        assert main(["compare", "--config", str(config), "--arms", "none", "head"]) == 0
    assert len(ran) == 4 and len(list(Path("logs").iterdir())) == 1
    assert main(["compare", "--config", str(config), "--arms", "none", "head", "--data.batch_size", "8"]) == 0
    assert len(list(Path("logs").iterdir())) == 2


def test_arms_of_the_config_and_a_failing_one(make_base, tmp_path: Path, capsys) -> None:
    arms = {
        "small": {"model": {"adapter": {"rank": 2}}},
        "broken": {"data": {"source": "nowhere.csv"}},
        "quantized": {"model": {"quantization": {"bits": 8}}},
    }
    config = write_config(tmp_path, make_base("bert"), arms=arms)
    assert main(["compare", "--config", str(config), "--name", "mine"]) == 1
    assert "arm broken failed" in capsys.readouterr().err
    document = json.loads(Path("logs/mine/comparison.json").read_text())
    assert [arm["name"] for arm in document["arms"]] == ["small", "broken", "quantized"]
    assert [arm["status"] for arm in document["arms"]][::2] == ["finished", "finished"]
    assert "nowhere.csv" in document["arms"][1]["status"]
    assert "broken: " in Path("logs/mine/comparison.md").read_text()
    ranks = read_checkpoint(Path("logs/mine/small/checkpoints/best.ckpt"))["state_dict"]
    assert all(value.shape[0] == 2 for name, value in ranks.items() if "lora_A" in name)
    assert RunFolder(Path("logs/mine/quantized")).read()["model"]["quantization"] == "int8"


def test_arms_tested_on_different_rows_are_not_put_into_one_table(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "copy"))
    run = RunFolder(folder / "head")
    record = run.read()
    record["evaluations"]["test"]["fingerprint"] = "0" * 64
    run.write(record)
    with pytest.raises(UserError, match="arms none and head have different test rows"):
        compare.gather(folder, ARMS, {})


@pytest.mark.parametrize(
    ("names", "described", "said"),
    [
        (["loora"], None, "no arm 'loora'"),
        (["lora-int7"], None, "no arm 'lora-int7'"),
        (["lora", "lora"], None, "stands there twice"),
        (["../x"], {"../x": {}}, "is no folder name"),
        (None, ["lora"], "a mapping of each arm's name"),
    ],
)
def test_names_that_are_no_arms_are_refused(names, described, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compare.choose_arms(names, described)


def test_a_method_and_how_its_base_is_stored_is_an_arm() -> None:
    arms = compare.choose_arms(["dora-nf4", "full"], None)
    assert arms["dora-nf4"]["model"]["method"] == "dora" and arms["dora-nf4"]["model"]["quantization"]["bits"] == 4
    assert arms["full"]["model"]["method"] == "full" and arms["full"]["model"]["quantization"]["bits"] is None
    assert list(compare.choose_arms(None, None)) == ARMS
    assert list(compare.choose_arms(None, {8: {}, 16: {"model": {"adapter": {"rank": 16}}}})) == ["8", "16"]


def test_method_arms_take_over_only_what_they_can_use(make_base, tmp_path: Path) -> None:
    """A recipe for LoRA on 8 bits is compared with methods that know neither."""
    model = {"base_model": str(make_base("bert")), "adapter": {"alpha": 32, "target_modules": "query_value"}}
    config = {"model": {**model, "quantization": {"bits": 8}, "frozen_dropout": True}, "data": {"source": "x.csv"}}
    settings = compare.resolve_arms([config], [], compare.choose_arms(["none", "lora", "vera", "full"], None))
    assert settings["lora"]["model"]["adapter"]["alpha"] == 32
    assert settings["vera"]["model"]["adapter"]["target_modules"] == "query_value"
    assert all(each["model"]["quantization"]["bits"] is None for each in settings.values())
    assert settings["lora"]["model"]["frozen_dropout"] and not settings["full"]["model"]["frozen_dropout"]


@pytest.mark.parametrize(
    ("arms", "flags", "said"),
    [
        ({"a": {}, "b": {"model": {"adapter": {"rnk": 2}}}}, [], "rnk"),
        ({"a": {}, "b": {"model": {"method": "full", "adapter": {"rank": 2}}}}, [], "arm b: model.adapter.rank"),
        ({"a": {}, "b": {"model": {"method": "pissa", "quantization": {"bits": 4}}}}, [], "arm b: model.quantization"),
        ({"a": {}, "b": {"model": {"method": "loora"}}}, [], "no method 'loora'"),
        ({"a": {}, "b": {"model": {"method": "head"}}}, ["--model.method", "full"], "arms a and b have the same"),
    ],
)
def test_arms_that_cannot_be_are_refused_before_any_is_trained(
    make_base, tmp_path, ran, capsys, arms, flags, said
) -> None:
    config = write_config(tmp_path, make_base("bert"), arms=arms)
    assert main(["compare", "--config", str(config), *flags]) == 2
    assert said in capsys.readouterr().err and ran == []


def test_a_flag_wins_over_an_arm_and_configs_add_up(make_base, tmp_path: Path) -> None:
    config = {"model": {"base_model": str(make_base("bert"))}, "data": {"source": "x.csv"}}
    arms = {"a": {"model": {"learning_rate": 1e-3}}, "b": {"model": {"method": "full"}}}
    settings = compare.resolve_arms([config, {"data": {"batch_size": 4}}], ["--model.learning_rate", "2e-4"], arms)
    assert [each["model"]["learning_rate"] for each in settings.values()] == [2e-4, 2e-4]
    assert all(each["data"]["batch_size"] == 4 for each in settings.values())


def test_one_arm_more_trains_one_arm_and_keeps_the_others_in_the_table(
    compared: Path, tmp_path: Path, ran: list
) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "logs" / "four"))
    config = str(compared.parents[1] / "tiny.yaml")
    words = ["compare", "--config", config, "--logs_dir", str(tmp_path / "logs"), "--name", "four"]
    assert main([*words, "--arms", "bitfit", "--data.batch_size", "8"]) == 0
    assert [each[0] for each in ran] == ["fit", "test"]
    names = [arm["name"] for arm in json.loads((folder / "comparison.json").read_text())["arms"]]
    assert names == [*ARMS, "bitfit"]


def test_the_folder_s_name_is_that_of_what_the_arms_share() -> None:
    assert compare._key([{"a": 1}], ["--x", "1"]) == compare._key([{"a": 1}], ["--x", "1"])
    assert compare._key([{"a": 1}], ["--x", "1"]) != compare._key([{"a": 1}], ["--x", "2"])


def test_two_comparisons_do_not_work_in_one_folder(compared: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "logs" / "four"))
    with compare._only_here(folder):
        assert again(compared, tmp_path)[0] == 2
    assert "another process works in" in capsys.readouterr().err
    assert again(compared, tmp_path)[0] == 0


def test_ctrl_c_waits_for_the_arm_to_leave_its_record(make_base, tmp_path: Path) -> None:
    """The whole program in a process group of its own, interrupted while an arm is training."""
    config = write_config(tmp_path, make_base("bert"))
    code = "import sys; from lightning_lora.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [
        "compare",
        "--config",
        str(config),
        "--arms",
        "lora",
        "full",
        "--name",
        "cut",
        "--trainer.max_epochs",
        "5000",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, start_new_session=True)
    metrics = Path("logs/cut/lora/metrics.csv")
    deadline = time.monotonic() + 120
    while not metrics.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert RunFolder(Path("logs/cut/lora")).read()["status"] == "interrupted"
    assert not Path("logs/cut/full").exists() and not Path("logs/cut/.lora.yaml").exists()
