"""Several labels a text, and numbers, through all commands, against plain transformers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from scipy.special import expit
from sklearn.metrics import f1_score, mean_squared_error

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.evaluation.metric_table import METRICS
from lightning_lora.training.module import TextClassifier
from tests.conftest import WORDS, cells_in_process, make_sets, write_csv, write_kind

TASKS = ("multi_label", "regression")
LABELS = sorted(WORDS)


def write_config(place: Path, base: Path, task: str, rows: int = 150) -> Path:
    """A config that trains on made-up rows."""
    config = {
        "model": {"base_model": str(base), "learning_rate": 1e-2},
        "data": {**write_kind(place / "rows.csv", task, rows), "max_length": 24, "cache_dir": str(place / "cache")},
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    return place / "config.yaml"


@pytest.fixture(scope="module", params=TASKS)
def run(request: pytest.FixtureRequest, make_base: Callable[..., Path], tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    words = ["--config", str(write_config(place, make_base("bert"), request.param)), "--logs_dir", str(place)]
    words += ["--model.threshold", "per_label"] if request.param == "multi_label" else []
    assert main(["fit", *words, "--name", "run"]) == 0
    assert main(["test", "--run", str(place / "run"), "--baselines", "true"]) == 0
    assert main(["export", "--run", str(place / "run"), "--formats", "[adapter,merged]"]) == 0
    return place / "run"


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_the_metrics_are_those_of_the_predictions(run: Path) -> None:
    record = record_of(run)
    table = pq.read_table(run / "predictions" / "test.parquet").to_pydict()
    after, before = record["evaluations"]["test"]["after"], record["evaluations"]["test"]["before"]
    if record["data"]["task"] == "regression":
        assert after["mse"] == pytest.approx(mean_squared_error(table["label"], table["prediction"]), rel=1e-4)
        assert after["mse"] < before["mse"] < 10 * np.var(table["label"])  # both in the units of the data
        assert record["best"]["monitor"] == "val/mse" and "p(label)" not in table
        return
    truth, predicted = (
        np.array([[name in each for name in LABELS] for each in table[column]]) for column in ("label", "prediction")
    )
    scores = np.column_stack([table[f"p({name})"] for name in LABELS])
    thresholds = record["evaluations"]["test"]["thresholds"]
    stored = torch.load(run / "checkpoints" / "best.ckpt")["state_dict"]["thresholds"]
    assert list(thresholds) == LABELS and stored.tolist() == pytest.approx([*thresholds.values()], abs=1e-4)
    assert (predicted == (scores >= stored.numpy())).all()
    assert after["f1_macro"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0), abs=1e-6)
    assert record["best"]["monitor"] == "val/f1_macro" and record["best"]["value"] > 0


def test_baselines_beside_it_are_of_the_same_task(run: Path) -> None:
    found = record_of(run)["evaluations"]["test"]["baselines"]
    metric = {"multi_label": "f1_samples", "regression": "mse"}[record_of(run)["data"]["task"]]
    for values in found.values():
        assert values["compared_by"] == metric and values["interval"][0] <= values["ours_better_by"]
    summary = (run / "test.md").read_text()
    for name, values in found.items():
        better, sign = values["ours_better_by"], METRICS[metric].higher_is_better * 2 - 1
        assert better == pytest.approx(
            sign * (record_of(run)["evaluations"]["test"]["after"][metric] - values[metric]), rel=1e-4
        )
        sure = values["interval"][0] > 0 or values["interval"][1] < 0
        told = f"{'better' if better >= 0 else 'worse'} than {name} by | {abs(better):.4f} "
        told = told if sure else f"better than {name} by | {better:+.4f} "
        (line,) = (each for each in summary.splitlines() if told in each)
        assert line.endswith(": inconclusive |") != sure
    assert found["tfidf"][metric] > 0.9 if metric == "f1_samples" else found["tfidf"][metric] < 200


def test_exports_say_the_same_by_plain_transformers(run: Path, capsys) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [text for text, _ in make_sets(40)]
    folder, ours = run / "export" / "merged", load_run(run).predict(texts)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert np.allclose(logits.numpy(), ours.logits, rtol=1e-5, atol=1e-4)
    task = record_of(run)["data"]["task"]
    facts = json.loads((folder / "lightning_lora.json").read_text())
    card = (run / "export" / "README.md").read_text()
    assert facts["task"] == task and model.config.problem_type == {
        "multi_label": "multi_label_classification",
        "regression": "regression",
    }.get(task)
    if task == "multi_label":
        assert list(model.config.id2label.values()) == LABELS == list(model.config.label2id)
        predicted = expit(logits.numpy().astype(float)) >= facts["thresholds"]
        assert ours.names == [[name for name, has in zip(LABELS, row, strict=True) if has] for row in predicted]
        assert f"neg {facts['thresholds'][1]:.2f}" in card
    else:
        assert ours.names == pytest.approx(logits[:, 0].tolist(), rel=1e-5)
        assert "- a number: label\n" in card and "logit difference" not in card and "labels flipped" not in card
    # The adapter is read back, with its thresholds or its units.
    again = load_run(run, str(run / "export" / "adapter")).predict(texts)
    assert again.names == (ours.names if task == "multi_label" else pytest.approx(ours.names, rel=1e-5))
    # The code of the card runs as it stands.
    from lightning_lora.export.parity import run_code

    code = card.split("```python\n")[2].split("```")[0].replace('path = "merged"', f"path = {str(folder)!r}")
    assert np.allclose(run_code(code)(texts), ours.logits, rtol=1e-5, atol=1e-4)


def test_predict_writes_lists_or_numbers(run: Path, tmp_path: Path, capsys) -> None:
    several = record_of(run)["data"]["task"] == "multi_label"
    texts = [text for text, _ in make_sets(40)]
    write_csv(tmp_path / "in.csv", make_sets(40), ("text", "other"))
    for ending in ("parquet", "jsonl", "csv"):
        output = tmp_path / f"out.{ending}"
        assert main(["predict", "--run", str(run), "--input", "in.csv", "--output", str(output)]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    expected = load_run(run).predict(texts)
    assert table["prediction"].to_pylist() == expected.names
    assert [
        json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ] == expected.names
    # Each is read back as labels: CSV with the separator of the run's own labels.
    own = {"task": "multi_label" if several else "regression"}
    for ending, more in (("parquet", {}), ("jsonl", {}), ("csv", {"label_separator": "|"} if several else {})):
        again = prepare(SourceOptions(str(tmp_path / f"out.{ending}"), label_column="prediction", **own, **more))
        found = {text: rows.labels[i] for rows in again.splits.values() for i, text in enumerate(rows.texts)}
        labels = [found[text] for text in texts]
        named = [[again.label_names[i] for i in np.flatnonzero(each)] for each in labels] if several else labels
        assert named == (expected.names if several else pytest.approx(expected.names))
    if several:
        with (tmp_path / "out.csv").open(newline="") as file:
            assert [row["prediction"] for row in csv.DictReader(file)] == ["|".join(each) for each in expected.names]
    new = [f"p({name})" for name in LABELS] if several else []
    assert table.column_names == ["text", "prediction", *new, "other"]
    (tmp_path / "many").mkdir()
    pq.write_table(table.select(["text"]), tmp_path / "many" / "many.parquet")
    words = ["--input", str(tmp_path / "many"), "--output", str(tmp_path / "folder")]
    assert main(["predict", "--run", str(run), *words]) == 0
    assert pq.read_table(tmp_path / "folder" / "many.parquet")["prediction"].to_pylist() == expected.names
    capsys.readouterr()
    assert main(["predict", "--run", str(run), "a fine and deep film"]) == 0
    assert main(["sample", "--run", str(run), "--n", "2"]) == 0
    said = capsys.readouterr().out
    assert ("mean absolute error" in said) != several and ("hit" in said or "miss" in said) == several


def test_runs_are_compared_by_row(run: Path, capsys) -> None:
    task = record_of(run)["data"]["task"]
    words = ["--config", str(run.parent / "config.yaml"), "--logs_dir", str(run.parent)]
    assert main(["fit", *words, "--name", "head", "--model.method", "head", "--trainer.max_epochs", "1"]) == 0
    assert main(["test", "--run", str(run.parent / "head")]) == 0
    # One number for every row has no correlation.
    assert main(["fit", *words, "--name", "majority", "--model.method", "majority"]) == 0
    assert main(["test", "--run", str(run.parent / "majority")]) == 0
    assert main(["report", str(run), str(run.parent / "majority"), "--output", str(run.parent / "constant")]) == 0
    assert main(["report", str(run), str(run.parent / "head")]) == 0
    report = next(run.parent.glob("report-*/report.md")).read_text()
    if task == "regression":
        assert "test mse" in report and "fixed / broken" not in report and ", lower is better." in report
        page = next(run.parent.glob("report-*/report.html")).read_text()
        assert "<dt>number</dt><dd>label, 1000.1 to " in page and "<dt>labels</dt>" not in page
        assert "(0.01 of the variance of the test labels)" in page
        return
    assert "test f1_samples" in report
    answers = [pq.read_table(each / "predictions" / "test.parquet").to_pydict() for each in (run, run.parent / "head")]
    right = [[("neg" in a) == ("neg" in b) for a, b in zip(t["label"], t["prediction"], strict=True)] for t in answers]
    fixed = sum(b and not a for a, b in zip(*right, strict=True))
    broken = sum(a and not b for a, b in zip(*right, strict=True))
    assert "Labels of texts fixed and broken against the baseline, by class" in report
    assert f" {fixed:.1f} / {broken:.1f} |" in report or f" {broken:.1f} / {fixed:.1f} |" in report


@pytest.mark.parametrize("task", TASKS)
def test_a_run_resumes_bit_for_bit(task: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "--config", str(write_config(tmp_path, tiny_base, task, 100))]
    words += ["--model.calibrate", "true"] if task == "multi_label" else []
    step = TextClassifier.training_step

    def interrupt(self, batch, batch_idx):
        if self.trainer.global_step == 8:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    assert main([*words, "--name", "long"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(TextClassifier, "training_step", interrupt)
        patch.setattr("lightning_lora.training.saving.SHARE", 1e9)
        assert main([*words, "--name", "run"]) == 130
    assert main(["fit", "--resume", "logs/run"]) == 0
    long, resumed = (torch.load(f"logs/{name}/checkpoints/last.ckpt")["state_dict"] for name in ("long", "run"))
    assert long.keys() == resumed.keys() and all(torch.equal(long[key], resumed[key]) for key in long)
    assert record_of(Path("logs/run"))["metrics"] == record_of(Path("logs/long"))["metrics"]


@pytest.mark.parametrize("task", TASKS)
def test_packed_batches_learn_the_same(task: str, tiny_base: Path, tmp_path: Path) -> None:
    words = ["fit", "--config", str(write_config(tmp_path, tiny_base, task, 100)), "--trainer.max_epochs", "1"]
    for packing in ("true", "false"):
        assert main([*words, "--model.speedups.packing", packing, "--name", packing]) == 0
    one, other = (record_of(Path("logs") / name)["metrics"] for name in ("true", "false"))
    assert one["val/loss"] == pytest.approx(other["val/loss"], rel=1e-4)
    assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["majority", "tfidf", "probe"])
@pytest.mark.filterwarnings("error::scipy.stats.DegenerateDataWarning")
def test_baselines_are_runs(task: str, method: str, tiny_base: Path, tmp_path: Path, capsys) -> None:
    words = ["fit", "--config", str(write_config(tmp_path, tiny_base, task)), "--model.method", method]
    assert main([*words, "--name", "run"]) == 0 and main(["test", "--run", "logs/run"]) == 0
    found = record_of(Path("logs/run"))["evaluations"]["test"]["after"]
    said = capsys.readouterr()
    assert "nan" not in said.out and not said.err  # also where one number for all rows has no correlation
    if method == "tfidf":
        assert found["f1_macro"] > 0.9 if task == "multi_label" else found["pearson"] > 0.8
    assert main(["predict", "--run", "logs/run", "a fine and deep film"]) == 0


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("regression", ["--model.class_weights", "balanced"], "model.class_weights: numbers (task regression)"),
        ("regression", ["--model.label_smoothing", "0.1"], "model.label_smoothing: numbers (task regression)"),
        ("regression", ["--model.threshold", "0.3"], "model.threshold: only labels of which a text may have several"),
        ("regression", ["--model.calibrate", "true"], "model.calibrate: numbers (task regression) are no"),
        (
            "multi_label",
            ["--model.calibrate", "true", "--model.threshold", "0.3"],
            "model.threshold: 0.3, but calibration would change the labels",
        ),
        ("multi_label", ["--model.calibrate", "true", "--model.method", "none"], "model.calibrate: method 'none'"),
        (
            "multi_label",
            ["--model.calibrate", "true", "--data.truncation", "windows"],
            "model.calibrate: exports scale the logits of each window",
        ),
        ("multi_label", ["--model.threshold", "1.5"], "model.threshold: a number from 0 up to 1"),
        ("multi_label", ["--model.class_weights", "[1, 2]"], "model.class_weights: 2 weights for 3 classes"),
        ("regression", ["--data.task", "auto"], "a measure, not classes; set data.task=regression"),
        (
            "multi_label",
            ["--data.task", "regression"],
            "data.label_separator: it makes lists of labels, but data.task is regression; leave one out",
        ),
        ("multi_label", ["--model.task", "regression"], "model.task"),
    ],
)
def test_what_a_task_does_not_have_is_refused_in_a_line(
    task: str, words: list[str], said: str, tiny_base: Path, tmp_path: Path, capsys
) -> None:
    config = write_config(tmp_path, tiny_base, task, 60)
    assert main(["fit", "--config", str(config), *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and said in error[0], error
    assert not Path("logs").exists() or not [*Path("logs").iterdir()]


@pytest.mark.parametrize("task", TASKS)
def test_the_training_loss_is_transformers(task: str, tiny_base: Path) -> None:
    """Also with weights by label, which transformers has none of: torch's ``pos_weight``."""
    names = LABELS if task == "multi_label" else ["score"]
    module = TextClassifier(str(tiny_base), names, method="full", task=task).eval()  # type: ignore[arg-type]
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (6, 9))
    labels = torch.randint(0, 2, (6, 3)).float() if task == "multi_label" else torch.randn(6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "step_weight": 0.0}
    loss = module.shared_step(batch, "train")["loss"]
    theirs = module.model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels)
    assert theirs.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    if task == "multi_label":
        from lightning_lora.training.loss import make_class_weights

        module.label_smoothing = 0.1
        labels = labels * 0.9 + 0.05

        weights = make_class_weights("balanced", [5, 20, 50], 100)
        assert weights.tolist() == pytest.approx([95 / 5, 80 / 20, 1.0])
        module.loss_weights = weights
        expected = torch.nn.functional.binary_cross_entropy_with_logits(theirs.logits, labels, pos_weight=weights)
        assert module.shared_step(batch, "train")["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_arms_are_compared_by_a_metric_of_the_task(
    task: str, tiny_base: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells_in_process(monkeypatch)
    config = write_config(tmp_path, tiny_base, task, 80)
    plan = {"question": "?", "base": config.name, "axes": {"rate": {"model.learning_rate": [1e-3, 1e-2]}}, "seeds": [1]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "metric": "accuracy"}))
    assert main(["ablate", "--config", "plan.yaml", "--name", "a"]) == 2
    assert "metric: 'accuracy' is none that the data has; it has" in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "small": {"seeds": [1]}}))
    assert main(["ablate", "--config", "plan.yaml", "--name", "a", "--trainer.max_epochs", "1"]) == 0
    metric = {"multi_label": "f1_samples", "regression": "mse"}[task]
    assert f"test {metric}" in (tmp_path / "logs" / "a" / "report.md").read_text()


def test_numbers_of_a_head_without_a_bias_are_in_their_units(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Numbers near 1,000, by a language model: the scale is in the weights of exports, which have no bias."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = ["--config", str(write_config(tmp_path, make_base("qwen2"), "regression")), "--logs_dir", str(tmp_path)]
    assert main(["fit", *words, "--name", "run"]) == 0 and main(["test", "--run", str(tmp_path / "run")]) == 0
    table = pq.read_table(tmp_path / "run" / "predictions" / "test.parquet").to_pydict()
    found = record_of(tmp_path / "run")["evaluations"]["test"]["after"]["mse"]
    assert found == pytest.approx(mean_squared_error(table["label"], table["prediction"]), rel=1e-4)
    assert found < 4 * np.var(table["label"])  # a thousandth of what zeros give
    assert main(["export", "--run", str(tmp_path / "run"), "--formats", "[adapter,merged]"]) == 0
    folder, texts = tmp_path / "run" / "export" / "merged", [text for text, _ in make_sets(20)]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        said = model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert model.score.bias is None and load_run(tmp_path / "run").predict(texts).names == pytest.approx(said, rel=1e-4)
    again = load_run(tmp_path / "run", str(tmp_path / "run" / "export" / "adapter")).predict(texts)
    assert again.names == pytest.approx(said, rel=1e-4)


def test_explain_says_what_words_add_to_each_label_or_to_the_number(run: Path, capsys: pytest.CaptureFixture) -> None:
    text = "the awful film was brilliant and long"
    loaded = load_run(run, accelerator="cpu")
    whole, shorter = loaded.predict([text, text.replace("awful ", "")]).logits.astype(float)
    found = loaded.explain([text])
    if loaded.model.task == "regression":
        assert [each.score for each in found] == [pytest.approx(whole[0])]
    else:
        labels = loaded.predict([text]).names[0] or [LABELS[int(whole.argmax())]]
        assert [each.label for each in found] == labels
    for each in found:
        label = loaded.label_names.index(each.label)
        assert each.effects[each.words.index("awful")] == pytest.approx(
            whole[label] - shorter[label], rel=1e-3, abs=1e-3
        )
    capsys.readouterr()
    assert main(["explain", "--run", str(run), "--rows", "4"]) == 0
    what = "numbers" if loaded.model.task == "regression" else "labels"
    assert "4 of " in (out := capsys.readouterr().out) and f"{what} are to be checked" in out
