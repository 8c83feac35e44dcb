"""Spaces: what their page says is what the run predicts. Needs Gradio, not a browser."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.data.pairs import Text
from lightning_lora_demo.page import bars
from tests.commands.test_tasks import run as task_run  # noqa: F401  # of several labels, and of a number
from tests.conftest import fit_tiny
from tests.inference.test_predict_pairs import run as pair_run  # noqa: F401

TEXTS = ["the awful film was brilliant and long", "a fine film", "the story of two people " * 20]
PAIRS = [("a fine film", "an awful story"), ("dull", "boring and dull")]


@pytest.fixture
def gradio() -> None:
    pytest.importorskip("gradio", reason="the plugin 'demo' is not installed")


def export(run: Path, *more: str) -> Path:
    words = ["export", "--run", str(run), "--formats", "merged", "--rows", "20", "--space", "true", *more]
    assert main([*words, "--output", "out"]) == 0
    return Path("out/space")


def same(space: Path, run: Path, texts: Sequence[Text]) -> None:
    """The page's function gives what the run predicts."""
    predict = runpy.run_path(str(space / "app.py"))["predict"]
    loaded = load_run(run, accelerator="cpu")
    for text in texts:
        found, expected = predict(*([text] if isinstance(text, str) else text)), bars(loaded.predict([text]))
        assert found == pytest.approx(expected, abs=1e-4) if isinstance(found, dict) else found == expected


@pytest.mark.usefixtures("gradio")
def test_of_several_labels_and_numbers(task_run: Path) -> None:  # noqa: F811
    same(export(task_run), task_run, TEXTS)


@pytest.mark.usefixtures("gradio")
def test_of_pairs(pair_run: str) -> None:  # noqa: F811
    same(export(Path(pair_run)), Path(pair_run), PAIRS)


@pytest.mark.usefixtures("gradio")
def test_of_texts_that_no_tokenizer_truncates(tiny_base: Path, tmp_path: Path) -> None:
    fit_tiny(tmp_path, tiny_base, epochs=1)
    words = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--logs_dir", str(tmp_path), "--name", "both"]
    assert main([*words, "--data.truncation", "both", "--trainer.max_epochs", "12"]) == 0
    same(export(tmp_path / "both"), tmp_path / "both", TEXTS)


def test_the_folder_is_a_space_and_runs_by_itself(tiny_base: Path, tmp_path: Path) -> None:
    run = fit_tiny(tmp_path, tiny_base)
    space = export(run)
    header = next(yaml.safe_load_all((space / "README.md").read_text()))
    assert (header["sdk"], header["app_file"], header["title"]) == ("gradio", "app.py", "run")
    packages = dict(line.split("==") for line in (space / "requirements.txt").read_text().split())
    assert {"gradio", "torch", "transformers"} <= {*packages} and header["sdk_version"] == packages["gradio"]
    assert "lightning_lora" not in (space / "app.py").read_text()

    client = pytest.importorskip("gradio_client", reason="the plugin 'demo' is not installed")
    moved = Path(shutil.move(space, "elsewhere"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with subprocess.Popen(
        [sys.executable, "-u", "app.py"], cwd=moved, env=own, stdout=subprocess.PIPE, text=True
    ) as app:
        assert app.stdout is not None
        assert any("127.0.0.1" in line for line in iter(app.stdout.readline, "")), "it did not start"
        said = client.Client(f"http://127.0.0.1:{port}", verbose=False).predict(TEXTS[0], api_name="/predict")
        app.terminate()
    found = {each["label"]: each["confidence"] for each in said["confidences"]}
    assert found == pytest.approx(bars(load_run(run, accelerator="cpu").predict([TEXTS[0]])), abs=1e-4)


def test_what_makes_no_space_is_refused_before_anything_is_done(tiny_base: Path, tmp_path: Path, capsys) -> None:
    run = fit_tiny(tmp_path, tiny_base, epochs=1)
    for words, said in (
        (["--formats", "adapter"], "--space: it holds the merged model; add merged to --formats"),
        (["--push_to_hub", "name", "--base_model_id", "a/b"], "--space: a Space is another repository"),
    ):
        capsys.readouterr()
        assert main(["export", "--run", str(run), "--space", "true", *words]) == 2
        assert said in capsys.readouterr().err and not (run / "export").exists()
