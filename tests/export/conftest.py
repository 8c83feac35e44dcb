"""Runs that the tests export, and what other software and ``predict`` say of the same texts."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder
from tests.conftest import make_rows, write_csv
from tests.forked import run_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "load_anywhere.py"
#: The software that exports are for.
OTHERS = ("transformers.pipelines", "peft", "onnxruntime", "transformers.models.auto.modeling_auto")
LABELS = ("mixed", "neg", "pos")  # as the data gives them: sorted
#: Short ones, and some that are longer than any ``max_length`` here.
TEXTS = [text for text, _ in make_rows(50, LABELS, seed=5)]
TEXTS += [" ".join(TEXTS[i : i + 4]) for i in range(10)]


@pytest.fixture(scope="session")
def base(make_base) -> Path:
    return make_base("bert", hidden_size=64, intermediate_size=128, num_hidden_layers=1)


def fit(place: Path, base: Path, *words: str, **model: object) -> RunFolder:
    if not (place / "rows.csv").exists():
        write_csv(place / "rows.csv", make_rows(240, LABELS))
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3, **model},
        "data": {"source": str(place / "rows.csv"), "max_length": 24, "cache_dir": str(place / "cache")},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    given = ["--config", str(place / "run.yaml"), "--name", "run", "--logs_dir", str(place / "logs")]
    assert main(["fit", *given, *words]) == 0
    return RunFolder.open(place / "logs" / "run")


def export(run: RunFolder, *words: str) -> dict:
    """The certificate of an export by ``main.py export``."""
    assert main(["export", "--run", str(run.path), *words]) == 0
    return json.loads((run.path / "export" / "certificate.json").read_text())


def outside(export: Path, texts: list[str], place: Path) -> dict:
    """What other software says of the texts, in a process that imports nothing of this project."""
    (place / "texts.txt").write_text("\n".join(texts) + "\n")
    words = [str(each) for each in (SCRIPT, export, place / "texts.txt", place / "out.json")]
    status, printed = run_script(words, place, OTHERS)
    assert status == 0, printed
    return json.loads((place / "out.json").read_text())


def predicted(run: Path, texts: list[str]) -> np.ndarray:
    """Probabilities (texts, classes) of ``predict``."""
    Path("texts.txt").write_text("\n".join(texts) + "\n")
    assert main(["predict", "--run", str(run), "--input", "texts.txt", "--output", "p.parquet"]) == 0
    ours = pq.read_table("p.parquet").to_pydict()
    Path("p.parquet").unlink()
    return np.array([ours[f"p({label})"] for label in LABELS]).T


def check_probabilities(said: dict, expected: np.ndarray) -> None:
    for name in set(said) - {"onnx-int8"}:
        got = torch.tensor(said[name]["logits"]).softmax(-1).numpy()
        np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=name)
