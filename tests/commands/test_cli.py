import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lora.cli import COMMANDS, main

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
        "compare": "--arms",
        "sample": "--only",
        "ablate": "--retry_failed",
        "report": "folders",
    }  # commands that are not configured like a run
    assert own.get(command, "--model.adapter.rank") in told and f"main.py {command}" in told


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == f"error: no command 'fitt'; there are {', '.join(COMMANDS)}\n"


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
        (["--trainer.accelerator", "gpu", "--data.source", "REVIEWS"], "--traceback shows where"),
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


def test_numbers_in_yaml_stay_numbers(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.yaml").write_text("model: {base_model: x, learning_rate: 1e-4}\ndata: {source: y, val_size: 0.2}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "a.yaml"), "--print_config"])
    printed = capsys.readouterr().out
    assert "learning_rate: 0.0001" in printed and "val_size: 0.2" in printed
