import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_lora import cli
from lightning_lora.cli import COMMANDS, PLUGINS, main, plugin_commands
from lightning_lora.config.options import COMMAND_OPTIONS, EXAMPLES

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command_without_importing_anything_heavy() -> None:
    code = "import sys; from lightning_lora.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    own = {
        "fit": "--model.adapter.rank",
        "validate": "--int8",
        "test": "--before",
        "export": "--formats",
        "predict": "--text_column",
        "compare": "--arms",
        "sample": "--only",
        "explain": "--html",
        "ablate": "--no_test",
        "report": "folders",
        "recipes": "name",
        "data": "--output",
    }
    assert own[command] in told and f"main.py {command}" in told


@pytest.mark.parametrize("command", COMMAND_OPTIONS)
def test_help_shows_the_commands_own_options_and_help_all_every_setting(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    pages = []
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stopped:
            main([command, option])
        assert stopped.value.code == 0
        pages.append(capsys.readouterr().out)
    short, whole = pages
    assert len(short.splitlines()) < {"fit": 170, "data": 80}.get(command, 60) < len(whole.splitlines())
    assert short.index("python main.py") < short.index("--help_all") and "--model.speedups" not in short
    for setting in ("--model.adapter.rank", "--data.source", "--trainer.max_epochs"):
        first = command == "fit" or (command == "data" and setting.startswith("--data"))
        assert setting in whole and (setting in short) == first
    own = re.findall(r"^  (?:-\w \S+, )?(--\w+)", whole, flags=re.MULTILINE)
    others = {"--seed_everything", "--trainer", "--model", "--data"} if command != "fit" else set()
    assert set(own) - others - {"--trainer", "--model", "--data"} <= set(re.findall(r"--\w+", short))


def test_the_examples_of_the_help_are_parsed(tmp_path: Path, reviews: Path, tiny_base: Path, capsys) -> None:
    (tmp_path / "logs" / "reviews").mkdir(parents=True)
    config = f"model: {{base_model: {tiny_base}}}\ndata: {{source: {reviews}}}\n"
    (tmp_path / "logs" / "reviews" / "config.yaml").write_text(config)
    for command, examples in EXAMPLES.items():
        for example in examples:
            words = shlex.split(example.partition(" < ")[0].removeprefix(f"{command} "))
            with pytest.raises(SystemExit) as stopped:
                main([command, *words, *(["--print_config"] if "--resume" not in words else ["--help"])])
            assert stopped.value.code == 0, example


class Plugin(EntryPoint):
    """An installed plugin that brings a command."""

    def load(self) -> Callable[[list[str]], int]:
        return len

    @property
    def dist(self) -> Any:
        return SimpleNamespace(metadata={"Summary": "count the words"})


def test_a_plugin_brings_a_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    point = Plugin("count", "own.module:count", "lightning_lora.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [point] if group == point.group else [])
    assert main(["count", "one", "two"]) == 2
    assert main(["--help"]) == 0
    assert "  count     count the words\n" in capsys.readouterr().out
    assert main(["coun"]) == 2
    assert "no command 'coun'; did you mean count?" in capsys.readouterr().err


@pytest.mark.parametrize("command", PLUGINS)
def test_without_its_plugin_a_command_says_what_to_install(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert main([command, "--run", "logs/x"]) == 2
    folder = f"plugins/{command}"
    said = f"error: the command '{command}' is a plugin: pip install -c constraints.txt -e {folder}\n"
    assert capsys.readouterr().err == said and (ROOT / folder / "pyproject.toml").is_file()


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture) -> None:
    known = ", ".join([*COMMANDS, *plugin_commands()])
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == f"error: no command 'fitt'; did you mean fit?; there are {known}\n"
    assert main(["xyzzy"]) == 2
    assert capsys.readouterr().err == f"error: no command 'xyzzy'; there are {known}\n"


@pytest.mark.parametrize(
    ("command", "word", "meant"),
    [
        ("fit", "--model.methd", "--model.method"),
        ("fit", "--data.label_colum", "--data.label_column"),
        ("fit", "--data.columns", "--data.text_column or --data.label_column"),
        ("fit", "--learning_rate", "--model.learning_rate"),
        ("fit", "--data.rank", "--model.adapter.rank"),
        ("fit", "--epochs", "--trainer.min_epochs or --trainer.max_epochs"),
        ("predict", "--ouput", "--output"),
        ("export", "--format", "--formats"),
        ("compare", "--arm", "--arms"),
        ("compare", "--model.methd", "--model.method"),
        ("ablate", "--execitor", "--executor"),
        ("report", "--basline", "--baseline"),
    ],
)
def test_a_misspelt_option_is_answered_with_what_was_meant(
    command: str, word: str, meant: str, capsys, reviews
) -> None:
    Path("config.yaml").write_text(f"model: {{base_model: x}}\ndata: {{source: {reviews}}}\n")
    first = {"predict": ["--run", "."], "export": ["--run", "."], "report": ["."]}
    first["ablate"] = ["--config", str(ROOT / "configs" / "ablation" / "rank.yaml")]
    assert main([command, *first.get(command, []), word, "1"]) == 2
    said = capsys.readouterr().err
    assert f"no option {word}; did you mean {meant}?" in said and said.count("\n") == 1
    for name in meant.split(" or "):
        assert main([command, *first.get(command, []), name]) == 2  # it is known: only its value is missing
        assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("model: {base_model: x, adapter: {rnk: 8}}", "no setting model.adapter.rnk; did you mean model.adapter.rank?"),
        ("model: {base_model: x, rank: 8}", "no setting model.rank; did you mean model.adapter.rank?"),
        ("adapter: {rank: 8}", "no setting adapter.rank; did you mean model.adapter.rank?"),
        ("data: {source: y, max_lenght: 3}", "no setting data.max_lenght; did you mean data.max_length?"),
        ("data: {source: [a, b]}", "data.source: expected str | dict[str, str], got '['a', 'b']'"),
        (
            "data: {source: y, label_column: on}",
            "data.label_column: expected str | list[str] | null, got 'True' (YAML reads on",
        ),
        ("trainer: {callbacks: [{class_path: EarlyStoping}]}", "no class 'EarlyStoping'; did you mean EarlyStopping?"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: x}}]}",
            "trainer.callbacks: EarlyStopping: Option 'monitr' is not accepted",
        ),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: x, patience: ten}}]}",
            "trainer.callbacks: EarlyStopping: patience: expected int, got ten",
        ),
    ],
)
def test_a_fault_in_a_config_is_one_line_that_helps(config: str, said: str, capsys) -> None:
    Path("a.yaml").write_text("model: {base_model: x}\ndata: {source: y}\n")
    Path("b.yaml").write_text(config)
    assert main(["fit", "--config", "a.yaml", "--config", "b.yaml"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Union" not in error and "<class" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.adapter.rank", "eight"], "model.adapter.rank: expected int | null, got 'eight'"),
        (["--model.adapter.rank", "8.5"], "model.adapter.rank: expected int | null, got '8.5'"),
        (["--model.learning_rate", "fast"], "model.learning_rate: expected float | null, got 'fast'"),
        (["--model.frozen_dropout", "2"], "model.frozen_dropout: expected bool, got '2'"),
        (["--data.padding", "both"], "data.padding: expected one of 'longest', 'max_length', got 'both'"),
        (["--data.train_rows", "[1, 2]"], " | null, got '[1, 2]'"),
        (
            ["--data.label_names", "yes"],
            "data.label_names: expected list[str | int | float | bool | null] | dict[",
        ),
        (["--model.quantization", "foo"], "model.quantization: Unable to load config 'foo'"),
        (["--trainer.callbacks", "EarlyStoping"], "did you mean EarlyStopping?"),
        (["--model.base_model"], "argument --model.base_model: expected one argument"),
        (["a", "text"], "'a' belongs to no option"),
    ],
)
def test_a_value_of_another_type_is_one_line_with_what_is_allowed(words: list[str], said: str, capsys) -> None:
    assert main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Union" not in error and "<class" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.rnk", "8"], "model.rnk"),
        (["--model.adapter.rank", "eight"], "eight"),
        (["--data.padding", "both"], "both"),
        (["--trainer.max_epoch", "2"], "max_epoch"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.base_model", "x"], "data.base_model"),
        (["--seed_everything", "-1"], "seed_everything: a number from 0"),
        (["--trainer.devices", "0"], "trainer.devices"),
        (["--trainer.num_nodes", "0"], "trainer.devices"),
        (["--trainer.default_root_dir", "x"], "trainer.default_root_dir"),
        (
            [
                "--data.max_length",
                "64",
                "--model.method",
                "full",
                "--model.frozen_dropout",
                "true",
                "--data.source",
                "REVIEWS",
            ],
            "model.frozen_dropout",
        ),
        (["--model.adapter.target_modules", "[]", "--data.source", "REVIEWS"], "no layer is named"),
        (["--model.adapter.alpha", ".nan", "--data.source", "REVIEWS"], "model.adapter.alpha"),
        (["--trainer.accelerator", "gpu", "--data.source", "REVIEWS"], "No supported gpu backend found"),
        (["--model.method", "full", "--model.adapter.rank", "4", "--data.source", "REVIEWS"], "does not use it"),
    ],
)
def test_an_unknown_or_useless_key_or_value_is_one_line(words, said, capsys, reviews: Path, tiny_base: Path) -> None:
    words = [str(reviews) if word == "REVIEWS" else word for word in words]
    sizes = ["--data.train_rows", "50", "--data.val_size", "10", "--data.test_rows", "10", "--data.max_length", "32"]
    assert main(["fit", "--model.base_model", str(tiny_base), *sizes, *words]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and said in error[0]


def test_an_unknown_key_in_a_config_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.yaml").write_text("model: {base_model: x, learning_rat: 1.0}\ndata: {source: y}\n")
    assert main(["fit", "--config", str(tmp_path / "a.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert "learning_rat" in error and "\n" not in error
    assert not Path("logs").exists()


def test_a_traceback_on_request(capsys) -> None:
    assert main(["--traceback", "test"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_null_as_a_label_stays_null_and_is_refused_later(capsys) -> None:
    words = ["--data.source", "y", "--model.base_model", "x", "--data.label_names", "[null, x]"]
    with pytest.raises(SystemExit):
        main(["fit", *words, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["label_names"] == [None, "x"]


def test_numbers_in_yaml_stay_numbers(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.yaml").write_text("model: {base_model: x, learning_rate: 1e-4}\ndata: {source: y, val_size: 0.2}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "a.yaml"), "--print_config"])
    printed = capsys.readouterr().out
    assert "learning_rate: 0.0001" in printed and "val_size: 0.2" in printed
