"""Runs of every kind on one tiny base, and the application that serves them, in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from serve_answers import LIMITS, inputs

from lightning_lora import load_run
from lightning_lora.cli import main
from tests.commands.test_tasks import write_config
from tests.conftest import PAIR_HEADER, fit_tiny, make_base, make_pairs, own_folders, tiny_base, write_csv  # noqa: F401


@pytest.fixture(scope="session")
def run_folders(
    tiny_base: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Two LoRA runs with other labels, one of several labels (calibrated), of pairs, in windows, packed, a baseline."""
    place = tmp_path_factory.mktemp("served")
    config: dict[str, Any] = {
        "model": {"base_model": str(tiny_base), "learning_rate": 5e-3},
        "data": {"source": str(place / "pairs.csv"), "text_column": list(PAIR_HEADER[:2]), "max_length": 40},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    write_csv(place / "pairs.csv", make_pairs(60), PAIR_HEADER)
    (place / "pairs.yaml").write_text(yaml.safe_dump(config))
    for name in ("sets", "three"):
        (place / name).mkdir()
    fit_tiny(place, tiny_base, rows=60)
    fit_tiny(place / "three", tiny_base, 60, 1, labels=("neg", "pos", "mixed")).rename(place / "three-labels")
    own = ["--config", str(place / "tiny.yaml")]
    more = {
        "several": [
            "--config",
            str(write_config(place / "sets", tiny_base, "multi_label", 60)),
            "--model.calibrate",
            "true",
        ],
        "windows": [*own, "--data.truncation", "windows", "--data.max_length", "12", "--trainer.max_epochs", "1"],
        "packed": [*own, "--model.speedups.packing", "true", "--trainer.max_epochs", "1"],
        "words": [*own, "--model.method", "tfidf"],
        "pairs": ["--config", str(place / "pairs.yaml")],
    }
    for name, words in more.items():
        assert main(["fit", *words, "--name", name, "--logs_dir", str(place)]) == 0
    return {name: place / name for name in ("run", "three-labels", *more)}


@pytest.fixture(scope="session")
def served(run_folders: dict[str, Path]) -> dict[str, Any]:
    """The runs, loaded once, with small batches; merged and not."""
    from lightning_lora_serve.served_run import ServedRun, SharedWeights

    shared = SharedWeights()
    return {
        path.name: ServedRun(path, "best", shared, batch_tokens=200, merged=path.name == "run")
        for path in run_folders.values()
    }


@pytest.fixture(scope="session")
def expected(run_folders: dict[str, Path]) -> dict[str, Any]:
    """What ``LoadedRun.predict`` gives for all texts, by run."""
    return {path.name: load_run(path).predict(inputs(path.name)) for path in run_folders.values()}


@pytest.fixture
def middleware(served: dict[str, Any]) -> Iterator[Any]:
    """The application in front of the runs, without a key."""
    from lightning_lora_serve.application import make_app
    from lightning_lora_serve.batcher import Batcher
    from lightning_lora_serve.schemas import Limits
    from lightning_lora_serve.server import AccessMiddleware, ServingMetrics

    limits, metrics = Limits(**LIMITS), ServingMetrics()
    batcher = Batcher(limits.waiting_texts, metrics)
    batcher.start()
    yield AccessMiddleware(make_app(served, batcher, limits), None, limits.body_mb, metrics)
    batcher.close()


@pytest.fixture
def client(middleware: Any) -> Any:
    from starlette.testclient import TestClient

    return TestClient(middleware)
