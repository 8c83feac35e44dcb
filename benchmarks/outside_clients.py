"""One client of what runs leave, in a process that cannot import this project.

    python benchmarks/outside_clients.py NAME FOLDER

Started by ``benchmarks/outside.py``, which writes the folder. Each client compares what it reads with what ``predict``,
``test`` or ``ablate`` wrote; an AssertionError says what differs. The last line printed is its version, as JSON.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The runs by what is predicted: one label, one label of a pair, several labels.
RUNS = ("tickets", "pairs", "topics")
#: The run whose head reads the mean of a text's states.
MEAN = "mean"
TEXTS, TOLERANCE = 32, 1e-5


def said_by_predict(run: str) -> tuple[list[Any], list[str], NDArray, list[Any]]:
    """Return texts or pairs, label names, probabilities (texts, C) and predictions as ``predict`` wrote them."""
    with Path(f"{run}-predicted.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:TEXTS]
    labels = [name[2:-1] for name in rows[0] if name.startswith("p(")]
    texts = [(row["first"], row["second"]) if run == "pairs" else row["message"] for row in rows]
    predictions = [json.loads(row["prediction"]) if run == "topics" else row["prediction"] for row in rows]
    return texts, labels, np.array([[float(row[f"p({label})"]) for label in labels] for row in rows]), predictions


def exported(run: str, form: str) -> str:
    """Return the folder of a format."""
    return f"logs/{run}/export/{form}"


def tested(run: str) -> dict[str, float]:
    """Return the metrics of the test rows, as ``test`` wrote them."""
    return json.loads(Path(f"logs/{run}/run.json").read_text(encoding="utf-8"))["evaluations"]["test"]["after"]


def check(run: str, logits: Any) -> None:
    """Compare logits (texts, C) with the probabilities and labels that ``predict`` wrote."""
    _, labels, expected, predictions = said_by_predict(run)
    logits = np.asarray(logits, dtype=np.float64)
    if run == "topics":
        probabilities = 1 / (1 + np.exp(-logits))
    else:
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponents / exponents.sum(axis=1, keepdims=True)
        assert [labels[i] for i in probabilities.argmax(axis=1)] == predictions, f"{run}: other labels"
    np.testing.assert_allclose(probabilities, expected, atol=TOLERANCE, err_msg=run)


def encode(run: str, form: str) -> dict[str, NDArray]:
    """Return the padded inputs of the texts, by the tokenizer of a format, without transformers."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(f"{exported(run, form)}/tokenizer.json").encode_batch(said_by_predict(run)[0])
    parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(each, part) for each in encoded], dtype=np.int64) for name, part in parts.items()}


def peft() -> None:
    """The adapter on its base, by PEFT and transformers."""
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    for run in RUNS:
        texts, labels, _, _ = said_by_predict(run)
        folder = exported(run, "adapter")
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels)).eval()
        parts = zip(*texts, strict=True) if run == "pairs" else [texts]
        inputs = AutoTokenizer.from_pretrained(folder)(*map(list, parts), padding=True, truncation=True)
        with torch.no_grad():
            check(run, model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits)


def transformers_pipeline() -> None:
    """The merged model, by a pipeline."""
    from transformers import pipeline

    for run in RUNS:
        texts, labels, expected, predictions = said_by_predict(run)
        classify = pipeline("text-classification", model=exported(run, "merged"))
        given = [{"text": a, "text_pair": b} for a, b in texts] if run == "pairs" else texts
        found = [{each["label"]: each["score"] for each in row} for row in classify(given, top_k=None, batch_size=8)]
        np.testing.assert_allclose([[row[name] for name in labels] for row in found], expected, atol=TOLERANCE)
        if run != "topics":
            assert [each["label"] for each in classify(given)] == predictions, f"{run}: other labels"


def sentence_transformers() -> None:
    """The merged model of a head that reads the mean of a text's states: its embeddings are the logits."""
    from sentence_transformers import SentenceTransformer

    check(MEAN, SentenceTransformer(exported(MEAN, "merged"), device="cpu").encode(said_by_predict(MEAN)[0]))


def onnxruntime() -> None:
    """The ONNX file, without torch."""
    from onnxruntime import InferenceSession

    for run in RUNS:
        session = InferenceSession(f"{exported(run, 'onnx')}/model.onnx", providers=["CPUExecutionProvider"])
        inputs = encode(run, "onnx")
        check(run, session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})[0])


def openvino() -> None:
    """The ONNX file, compiled for this processor."""
    from openvino import Core

    for run in RUNS:
        config = {"INFERENCE_PRECISION_HINT": "f32"}  # by itself it takes bfloat16 where the processor has it
        model = Core().compile_model(f"{exported(run, 'onnx')}/model.onnx", "CPU", config)
        inputs = encode(run, "onnx")
        check(run, model({each.any_name: inputs[each.any_name] for each in model.inputs})[0])


def safetensors() -> None:
    """The files of weights: merged is base + alpha / rank * B A, weight by weight."""
    from safetensors import safe_open

    for run in RUNS:
        adapter = json.loads(Path(exported(run, "adapter"), "adapter_config.json").read_text(encoding="utf-8"))
        scale, compared = adapter["lora_alpha"] / adapter["r"], 0
        base_file = Path(adapter["base_model_name_or_path"], "model.safetensors")
        with (
            safe_open(base_file, "np") as base,
            safe_open(f"{exported(run, 'adapter')}/adapter_model.safetensors", "np") as lora,
            safe_open(f"{exported(run, 'merged')}/model.safetensors", "np") as merged,
        ):
            held = {*merged.keys()}
            for name in base.keys():  # noqa: SIM118
                first = f"base_model.model.bert.{name.removesuffix('weight')}lora_A.weight"
                target = f"bert.{name}"
                if target not in held:
                    continue
                expected = base.get_tensor(name)
                if first in lora.keys():  # noqa: SIM118
                    second = first.replace("lora_A", "lora_B")
                    expected = expected + scale * lora.get_tensor(second) @ lora.get_tensor(first)
                    compared += 1
                np.testing.assert_allclose(merged.get_tensor(target), expected, atol=TOLERANCE, err_msg=name)
            assert 2 * compared == sum("lora_" in name for name in lora.keys()), f"{run}: weights of LoRA are left over"  # noqa: SIM118


@contextmanager
def web_server(words: Sequence[str]) -> Iterator[str]:
    """The address of a server that answers, until the end of the block; ``--port`` is added to its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*words, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(address, timeout=5).read()
                    break
                except OSError:
                    assert process.poll() is None, process.stderr and process.stderr.read().decode()[-300:]
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def asked(address: str, path: str) -> Any:
    """Return what a server answers, read as JSON."""
    with urllib.request.urlopen(address + path, timeout=60) as answer:
        return json.load(answer)


def check_figures(found: Mapping[str, float], run: str, where: str) -> None:
    """Compare metrics of the test rows with those that ``test`` wrote."""
    expected = tested(run)
    missing = expected.keys() - found.keys()
    assert not missing, f"{where}, {run}: without {', '.join(sorted(missing))}"
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=f"{where}, {run}: {name}")


def tensorboard() -> None:
    """The metrics of the test rows, by TensorBoard's HTTP interface."""
    with web_server([sys.executable, "-m", "tensorboard.main", "--logdir", "logs", "--host", "127.0.0.1"]) as address:
        tags: dict[str, Any] = {}
        for _ in range(50):  # it reads the runs after it has started to answer
            tags = asked(address, "/data/plugin/scalars/tags")
            if all(any(tag.startswith("test/") for tag in tags.get(run, [])) for run in RUNS):
                break
            time.sleep(0.3)
        for run in RUNS:
            found = {}
            for tag in (tag for tag in tags[run] if tag.startswith("test/")):
                query = urllib.parse.urlencode({"run": run, "tag": tag})
                ((_, _, found[tag.removeprefix("test/")]),) = asked(address, f"/data/plugin/scalars/scalars?{query}")
            check_figures(found, run, "TensorBoard")


def mlflow() -> None:
    """Metrics of the tracked runs; and the registered models, which classify the texts."""
    import mlflow as client
    import pandas as pd

    client.set_tracking_uri("sqlite:///mlflow.db")
    runs = {each.info.run_name: each for each in client.search_runs(search_all_experiments=True, output_format="list")}
    for run in RUNS:
        metrics = runs[run].data.metrics.items()
        check_figures({name.removeprefix("test/"): value for name, value in metrics if "test/" in name}, run, "MLflow")
        texts, labels, probabilities, predictions = said_by_predict(run)
        given = pd.DataFrame(texts, columns=["text", "text_pair"]) if run == "pairs" else texts
        found = client.pyfunc.load_model(f"models:/{run}/latest").predict(given)
        assert [*map(list if run == "topics" else str, found["label"])] == predictions, f"{run}: other labels"
        if run != "topics":
            np.testing.assert_allclose(found["score"], probabilities.max(axis=1), atol=TOLERANCE, err_msg=labels)


def optuna_dashboard() -> None:
    """The studies of a search: the trials, by the dashboard's HTTP interface, beside the cells that they trained."""
    program = Path(sys.executable).with_name("optuna-dashboard")
    with web_server([str(program), "logs/sweep/optuna.log", "--host", "127.0.0.1"]) as address:
        studies = asked(address, "/api/studies")["study_summaries"]
        found = {}
        for study in studies:
            for trial in asked(address, f"/api/studies/{study['study_id']}")["trials"]:
                (rate,) = (each["param_external_value"] for each in trial["params"])
                found[float(rate)] = trial["values"][0]
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in Path("logs/sweep/cells").glob("*/run.json")]
    expected = {cell["config"]["model"]["learning_rate"]: cell["best"]["metrics"]["val/accuracy"] for cell in cells}
    assert len(found) == 4, f"{len(found)} trials"
    for rate, value in found.items():
        np.testing.assert_allclose(value, expected[rate], rtol=1e-6, err_msg=str(rate))


def scikit_learn() -> None:
    """Metrics of the rows that ``test`` wrote, with their labels, computed again."""
    import pandas as pd
    from sklearn import metrics
    from sklearn.preprocessing import MultiLabelBinarizer

    for run in RUNS:
        rows, expected = pd.read_parquet(f"logs/{run}/predictions/test.parquet"), tested(run)
        labels = [name[2:-1] for name in rows if name.startswith("p(")]
        truth, predictions, found = rows["label"], rows["prediction"], {}
        if run == "topics":
            truth, predictions = map(MultiLabelBinarizer(classes=labels).fit_transform, (truth, predictions))
            found["hamming_loss"] = metrics.hamming_loss(truth, predictions)
            found["subset_accuracy"] = metrics.accuracy_score(truth, predictions)
            found["f1_micro"] = metrics.f1_score(truth, predictions, average="micro")
        else:
            found["accuracy"] = metrics.accuracy_score(truth, predictions)
            found["loss"] = metrics.log_loss(truth, rows[[f"p({label})" for label in labels]], labels=labels)
            found["matthews_correlation"] = metrics.matthews_corrcoef(truth, predictions)
        found["f1_macro"] = metrics.f1_score(truth, predictions, average="macro")
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], atol=TOLERANCE, err_msg=f"{run}: {name}")


def polars() -> None:
    """The tables that ``predict`` wrote: Parquet and CSV say the same, row by row beside the input."""
    import polars as pl

    for run in RUNS:
        _, labels, _, predictions = said_by_predict(run)
        blank = pl.col(pl.String).fill_null("")  # no topic; in a CSV polars takes it for a missing value
        given, text = (pl.read_csv(f"{name}.csv").with_columns(blank) for name in (run, f"{run}-predicted"))
        table = pl.read_parquet(f"{run}-predicted.parquet")
        for found in (table, text):
            assert found.select(given.columns).equals(given), f"{run}: other rows than in the input"
        names = [f"p({label})" for label in labels]
        np.testing.assert_allclose(table.select(names).to_numpy(), text.select(names).to_numpy(), atol=1e-7)
        assert table["prediction"].to_list()[:TEXTS] == predictions, f"{run}: other labels"
        if run == "topics":
            assert table.schema["prediction"] == pl.List(pl.String), "several labels are no list"


def chromium() -> str:
    """The pages of a report and of a data card: their figures, no error and nothing asked of the network."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path is not None, "it is not installed (apt install chromium)"
    with Path("logs/sweep/report.csv").open(newline="", encoding="utf-8") as file:
        figures = [row["test accuracy"] for row in csv.DictReader(file)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for file_name, expected in (("logs/sweep/report.html", figures), ("card.html", ["tickets.csv", "billing"])):
            page, faults = browser.new_page(), list[str]()
            page.on("console", lambda said, to=faults: to.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error, to=faults: to.append(str(error)))
            page.on(
                "request",
                lambda made, to=faults: None if made.url.startswith(("file:", "data:")) else to.append(made.url),
            )
            page.goto(Path(file_name).resolve().as_uri())
            shown = page.inner_text("body")
            assert not faults, f"{file_name}: {faults[0]}"
            for each in expected:
                assert each in shown, f"{file_name}: without {each}"
        version = browser.version
        browser.close()
    return version


#: Each client by its name: the package whose version is told, and what it does (which may return the version).
CLIENTS: dict[str, tuple[str, Callable[[], str | None]]] = {
    "PEFT": ("peft", peft),
    "transformers pipeline": ("transformers", transformers_pipeline),
    "sentence-transformers": ("sentence-transformers", sentence_transformers),
    "ONNX Runtime": ("onnxruntime", onnxruntime),
    "OpenVINO": ("openvino", openvino),
    "safetensors": ("safetensors", safetensors),
    "TensorBoard's HTTP interface": ("tensorboard", tensorboard),
    "MLflow": ("mlflow", mlflow),
    "optuna-dashboard": ("optuna-dashboard", optuna_dashboard),
    "scikit-learn": ("scikit-learn", scikit_learn),
    "polars": ("polars", polars),
    "Chromium": ("playwright", chromium),
}


def main() -> None:
    """Run a client where its files are, and print its version."""
    for name in ("lightning_lora", "lightning", "pytorch_lightning"):
        sys.modules[name] = None  # type: ignore[assignment]  # whatever is installed: an import of it is an error
    os.chdir(sys.argv[2])
    package, client = CLIENTS[sys.argv[1]]
    print(json.dumps(client() or metadata.version(package)))


if __name__ == "__main__":
    main()
