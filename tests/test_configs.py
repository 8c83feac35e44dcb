"""Every shipped config parses and builds; only what the Hub holds is replaced, by overriding two keys."""

from pathlib import Path

import pytest
import yaml

from lightning_lora.artifacts.runs import RunFolder
from lightning_lora.commands.configured import ConfiguredRun
from tests.conftest import make_rows, write_csv

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = ["--data.train_rows", "60", "--data.test_rows", "10", "--data.max_length", "32"]


def test_there_are_configs() -> None:
    assert ROOT / "configs" / "default.yaml" in CONFIGS and len(CONFIGS) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_parses_builds_and_trains_a_step(path: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    header = (config["data"].get("text_column", "text"), config["data"].get("label_column", "label"))
    (tmp_path / "rows").mkdir()
    rows = make_rows(300)
    for name, part in (("train", rows[:250]), ("test", rows[250:])):
        write_csv(tmp_path / "rows" / f"{name}.csv", part, header)
    size = ["--data.val_size", "20"] if "val_size" in config["data"] else []
    words = ["--model.base_model", str(tiny_base), "--data.source", str(tmp_path / "rows"), *SMALL, *size]
    run = ConfiguredRun("fit", ["--config", str(path), *words, "--trainer.max_steps", "1"])
    run.build(RunFolder.create(tmp_path / "logs", None, path.stem))
    run.trainer.fit(run.model, datamodule=run.datamodule)
    assert run.trainer.global_step == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_says_its_question_and_command_and_holds_only_differences(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0].startswith("# Question:") and any("python main.py fit" in line for line in head)
    run = ConfiguredRun("fit", ["--config", str(path)])
    defaults = ConfiguredRun("fit", ["--config", str(_bare(path)), "--data.source", "x"]).settings()
    settings = run.settings()
    for group, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if key not in ("base_model", "source"):
                assert settings[group][key] != defaults[group][key], f"{group}.{key}: {value} is the default"


def _bare(path: Path) -> Path:
    bare = Path("bare.yaml")
    bare.write_text("model: {base_model: x}\n")
    return bare


def test_the_default_config_is_what_fit_does_without_a_word() -> None:
    assert (
        ConfiguredRun("fit", []).settings()
        == ConfiguredRun("fit", ["--config", str(ROOT / "configs/default.yaml")]).settings()
    )
