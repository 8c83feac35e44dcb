"""The merged model of a tracked run, kept with it; in MLflow registered, with its signature."""

import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_lora.export.card import usage_code
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.trackers import tracked_before

_NEEDED = ("mlflow", "numpy", "pandas", "safetensors", "tokenizers", "torch", "transformers")


def log_model(folder: RunFolder, merged: Path, usage: Mapping[str, Any]) -> None:
    """Keep an exported model with the tracked run, where there is one.

    Args:
        folder: The run's.
        merged: The folder of the format; it is there where that was written.
        usage: How it is used, as for ``usage_code``.
    """
    record = folder.read() if folder.record.is_file() and merged.is_dir() else {}
    if (tracker := tracked_before(record)) is None:
        return
    if tracker.kind == "mlflow":
        name = tracker.known["run"]
        if tracker.attempt(lambda logger: _register(logger, name, merged, usage)):
            print(f"registered in MLflow: models:/{name}/latest (mlflow.pyfunc.load_model)")
    else:
        tracker.log_files([merged], "model")
    tracker.close()


def _register(logger: Any, name: str, merged: Path, usage: Mapping[str, Any]) -> None:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    label = Array(DataType.string) if usage["task"] == "multi_label" else DataType.string
    outputs = [] if usage["task"] == "regression" else [ColSpec(label, "label")]
    outputs += [] if usage["task"] == "multi_label" else [ColSpec(DataType.double, "score")]
    names = ["text", "text_pair"] if usage["pair"] else [None]  # without a name also a list of texts is taken
    signature = ModelSignature(Schema([ColSpec(DataType.string, each) for each in names]), Schema(outputs))
    with (
        tempfile.TemporaryDirectory() as directory,
        mlflow.start_run(run_id=logger.run_id),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # that the signature was not inferred from an example
        code = Path(directory) / "load.py"
        text = usage_code(usage, "merged", "folder", pipeline=False)
        code.write_text(f"{text}\ntask = {usage['task']!r}\n", encoding="utf-8")
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            artifacts={"merged": str(merged), "code": str(code)},
            signature=signature,
            pip_requirements=[f"{package}=={metadata.version(package).partition('+')[0]}" for package in _NEEDED],
            registered_model_name=name,
        )
