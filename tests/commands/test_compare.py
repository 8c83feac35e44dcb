"""Comparisons of tiny arms, each command in this process."""

import csv
import json
import shutil
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
    assert (folder / "lora.unfinished-1").exists() == (lost == "interrupted")
    first, second = (json.loads((f / "comparison.json").read_text())["arms"] for f in (compared, folder))
    for one, other in zip(first, second, strict=True):
        assert one["metrics"] == other["metrics"]


def test_other_settings_under_the_same_name_are_refused(compared: Path, tmp_path: Path, ran: list, capsys) -> None:
    status, _ = again(compared, tmp_path, "--data.batch_size", "4")
    assert status == 2 and ran == []
    assert "was made with other settings (data); choose another --name" in capsys.readouterr().err


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
    with pytest.raises(UserError, match="tested on different rows"):
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
    assert compare.choose_arms(["dora-nf4", "full"], None) == {
        "dora-nf4": {"model": {"method": "dora", "quantization": {"bits": 4}}},
        "full": {"model": {"method": "full"}},
    }
    assert list(compare.choose_arms(None, None)) == ARMS


def test_an_arm_that_cannot_be_is_refused_before_any_is_trained(make_base, tmp_path: Path, ran: list, capsys) -> None:
    config = write_config(tmp_path, make_base("bert"), arms={"a": {}, "b": {"model": {"adapter": {"rnk": 2}}}})
    assert main(["compare", "--config", str(config)]) == 2
    assert "rnk" in capsys.readouterr().err and ran == []
