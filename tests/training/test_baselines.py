"""Baselines against scikit-learn's own pipelines and plain transformers; as runs, from fit to predict."""

import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError
from lightning_lora.models.baselines import (
    MOST_NGRAMS,
    NGRAMS,
    PROBE_C,
    TFIDF_C,
    Majority,
    Tfidf,
    choose_regression,
    pool,
)
from lightning_lora.models.methods import BASELINES
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.baselines import TextBaseline
from lightning_lora.training.module import TextClassifier
from tests.conftest import make_rows, write_csv

LABELS = ("neg", "pos", "mixed")


def noisy_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Rows that no model gets all right: every fifth label is another's."""
    rows = make_rows(count, LABELS, seed)
    return [(text, LABELS[(i + 1) % 3] if i % 5 == 0 else label) for i, (text, label) in enumerate(rows)]


@pytest.fixture
def fit(tiny_base: Path, tmp_path: Path):
    def run(method: str, *more: str) -> Path:
        write_csv(tmp_path / "rows.csv", noisy_rows(150))
        config = {
            "model": {"base_model": str(tiny_base)},
            "data": {"source": "rows.csv", "max_length": 32, "cache_dir": "cache", "val_size": 30, "test_size": 30},
            "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
        }
        Path("c.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", "c.yaml", "--name", method, "--model.method", method, *more]) == 0
        return Path("logs") / method

    return run


def data_of(run: Path) -> TextDataModule:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    data = TextDataModule(**{k: v for k, v in settings["data"].items() if k != "augmentation"}, base_model=base_of(run))
    data.setup("fit")
    return data


def base_of(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["model"]["base_model"]


def sklearn_choice(kinds, train, val, labels, val_labels, cs):
    """The best by macro F1, then by log-loss, of plain scikit-learn: its probabilities of the validation rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, log_loss
    from sklearn.pipeline import make_pipeline

    found = []
    for name, features in kinds.items():
        for c in cs:
            pipe = make_pipeline(features(), LogisticRegression(C=c, max_iter=5000)).fit(train[name], labels)
            probabilities = pipe.predict_proba(val[name])
            f1 = f1_score(val_labels, probabilities.argmax(1), average="macro")
            found.append((f1, -log_loss(val_labels, probabilities), name, c, probabilities))
    return max(found, key=lambda each: each[:2])


def test_labels_that_come_back_from_a_gpu_are_waited_for() -> None:
    """A baseline computes on the CPU, whatever the trainer's device: without waiting, anything may be read."""
    labels = Mock()
    labels.to.return_value = torch.tensor([1, 0])
    model = TextBaseline(["neg", "pos"], "majority")
    model.validation_step({"labels": labels, "texts": ["a", "b"], "step_weight": 1.0}, 0)
    labels.to.assert_called_once_with(torch.device("cpu"), non_blocking=False)


def test_a_baseline_gives_its_logits_on_the_cpu_where_the_trainer_has_a_gpu() -> None:
    """Lightning sets the device of a module before it moves it; "meta" stands for a GPU."""
    model = TextBaseline(["neg", "pos"], "majority")
    model._device = torch.device("meta")
    model.to("meta")
    assert model.document_logits({"texts": ["a", "b"]}).device == model.device == torch.device("cpu")


def test_tfidf_is_scikit_learns_pipeline(fit, capsys) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    run = fit("tfidf")
    data = data_of(run)
    train, val = data.rows("train"), data.rows("val")

    def words():
        return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)

    def both():
        return make_union(words(), TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True))

    kinds = {"words": words, "words and characters": both}
    f1, _, name, c, probabilities = sklearn_choice(
        kinds, dict.fromkeys(kinds, train.texts), dict.fromkeys(kinds, val.texts), train.labels, val.labels, TFIDF_C
    )
    record = RunFolder(run).read()
    assert (record["model"]["chosen"]["features"], record["model"]["chosen"]["C"]) == (name, c)
    assert record["metrics"]["val/f1_macro"] == pytest.approx(f1)
    found = load_run(run).predict(val.texts)
    np.testing.assert_allclose(found.probabilities, probabilities, atol=2e-3)
    assert record["costs"]["trainable_params"] > 3 * 100 and "train_tokens_per_s" not in record["costs"]
    assert f"the best of {2 * len(TFIDF_C)} by validation F1" in capsys.readouterr().out


def test_probe_is_logistic_regression_on_pooled_states_of_plain_transformers(fit) -> None:
    from sklearn.preprocessing import StandardScaler
    from transformers import AutoModel, AutoTokenizer

    run = fit("probe")
    data = data_of(run)
    tokenizer, model = (kind.from_pretrained(base_of(run)) for kind in (AutoTokenizer, AutoModel))
    model.eval()

    def states(texts: list[str]) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {"first": [], "mean": [], "last": []}
        for text in texts:  # one by one: nothing is padded
            with torch.no_grad():
                given = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
                hidden = model(given["input_ids"], given["attention_mask"])[0][0].numpy()
            found["first"].append(hidden[0])
            found["mean"].append(hidden.mean(0))
            found["last"].append(hidden[-1])
        return {name: np.array(each) for name, each in found.items()}

    train, val = data.rows("train"), data.rows("val")
    kinds = dict.fromkeys(("first", "mean", "last"), StandardScaler)
    f1, _, name, c, probabilities = sklearn_choice(
        kinds, states(train.texts), states(val.texts), train.labels, val.labels, PROBE_C
    )
    record = RunFolder(run).read()
    assert (record["model"]["chosen"]["features"], record["model"]["chosen"]["C"]) == (name, c)
    assert record["metrics"]["val/f1_macro"] == pytest.approx(f1)
    np.testing.assert_allclose(load_run(run).predict(val.texts).probabilities, probabilities, atol=5e-3)


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_is_a_run_like_any(fit, method: str, capsys) -> None:
    run = fit(method)
    assert main(["validate", str(run)]) == 0
    assert main(["test", str(run)]) == 0
    record = RunFolder(run).read()
    assert record["status"] == "finished" and "before" not in record["evaluations"]["test"]
    texts = [text for text, _ in make_rows(20, LABELS, seed=9)]
    Path("in.csv").write_text("text\n" + "\n".join(texts) + "\n")
    assert main(["predict", "--run", str(run), "--input", "in.csv", "--output", "out.csv"]) == 0
    loaded = load_run(run)
    assert list(pd.read_csv("out.csv")["prediction"]) == loaded.predict(texts).names
    tested = pd.read_parquet(run / "predictions" / "test.parquet")
    rows = data_of(run).rows("test")
    np.testing.assert_allclose(loaded.predict(rows.texts).logits, tested.filter(like="logit(").to_numpy(), atol=1e-4)
    capsys.readouterr()
    assert main(["export", "--run", str(run)]) == 2
    assert f"method '{method}' is a baseline" in capsys.readouterr().err
    assert main(["fit", "--resume", str(run)]) == 0 and "has finished already" in capsys.readouterr().out


def test_majority_gives_the_shares_of_the_training_rows() -> None:
    model = Majority(3)
    model.fit(["a"] * 4, np.array([0, 2, 2, 2]))
    np.testing.assert_allclose(model(["x", "y"]).softmax(1), [[0.25, 0, 0.75]] * 2, atol=1e-6)


def test_a_class_without_training_rows_is_never_predicted_and_costs_a_finite_loss() -> None:
    model = Tfidf(3)
    texts = ["good film", "bad film", "fine film", "dull film"]
    model.fit(texts, np.array([0, 2, 0, 2]), ["good", "bad"], np.array([0, 1]))
    logits = model(["good", "bad"])
    assert logits.argmax(1).tolist() == [0, 2] and logits.isfinite().all()


def test_of_equally_right_ones_the_one_with_the_lower_loss_is_kept() -> None:
    from lightning_lora.models.baselines import Features

    train, labels = np.array([[-1.0], [1.0]]), np.array([0, 1])
    found = choose_regression(iter([Features("x", train, train)]), labels, labels, 2, (0.01, 1.0, 100.0))
    assert found.chosen["C"] == 100.0 and set(found.chosen["val_f1_macro"].values()) == {1.0}


def test_pooling_sees_no_padding_on_either_side() -> None:
    states = torch.arange(8.0).reshape(1, 4, 2)
    for mask, first, last in (([1, 1, 0, 0], [0, 1], [2, 3]), ([0, 0, 1, 1], [4, 5], [6, 7])):
        given = torch.tensor([mask])
        assert pool(states, given, "first").tolist() == [first]
        assert pool(states, given, "last").tolist() == [last]
        assert pool(states, given, "mean").tolist() == [[(a + b) / 2 for a, b in zip(first, last, strict=True)]]


def test_a_probe_of_windows_learns_from_the_mean_of_their_states(fit) -> None:
    run = fit("probe", "--data.truncation", "windows", "--data.max_length", "8")
    assert main(["test", str(run)]) == 0
    tested = pd.read_parquet(run / "predictions" / "test.parquet")
    found = load_run(run).predict(data_of(run).rows("test").texts)
    np.testing.assert_allclose(found.logits, tested.filter(like="logit(").to_numpy(), atol=1e-4)
    # What it was fitted and chosen as is what is evaluated.
    record = RunFolder(run).read()
    chosen = record["model"]["chosen"]
    best = chosen["val_f1_macro"][f"{chosen['features']}, C {chosen['C']:g}"]
    assert record["best"]["metrics"]["val/f1_macro"] == pytest.approx(best, abs=1e-6)
    # Plain pooling of each window by itself, their mean, and the linear layer.
    data, probe = data_of(run), load_run(run).model.model
    data.setup("test")
    for batch in data.test_dataloader():
        with torch.inference_mode():
            states = probe.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            pooled = pool(states, batch["attention_mask"], chosen["features"])
            own = [pooled[batch["documents"] == i].mean(0) for i in range(len(batch["rows"]))]
            expected = probe.classifier(torch.stack(own))
        np.testing.assert_allclose(found.logits[batch["rows"]], expected, atol=1e-4)


def test_a_probe_beside_a_model_that_packs_is_that_of_its_own_run(fit, capsys) -> None:
    """Batches are packed by default with a GPU."""
    windows = ("--data.truncation", "windows", "--data.max_length", "8")
    run = fit("head", "--trainer.max_epochs", "1", "--model.speedups.packing", "true", *windows)
    assert main(["test", str(run), "--baselines", "true"]) == 0
    assert "packing not used" not in capsys.readouterr().err
    found = RunFolder(run).read()["evaluations"]["test"]["baselines"]["probe"]
    other = fit("probe", *windows)
    assert main(["test", str(other)]) == 0
    theirs = RunFolder(other).read()["evaluations"]["test"]["after"]
    assert {name: found[name] for name in ("loss", "accuracy")} == pytest.approx(
        {name: theirs[name] for name in ("loss", "accuracy")}, abs=1e-4
    )


def test_class_weights_are_those_of_scikit_learn(fit) -> None:
    plain = fit("tfidf")
    before = load_run(plain).predict(data_of(plain).rows("test").texts).probabilities
    weights = [1.0, 5.0, 2.0]
    plain.rename("logs/plain")
    weighed = fit("tfidf", "--model.class_weights", str(weights))
    data, chosen = data_of(weighed), RunFolder(weighed).read()["model"]["chosen"]
    train, test = data.rows("train"), data.rows("test")
    counts = np.bincount(train.labels)
    scale = counts.sum() / (weights * counts).sum()  # a row weighs 1 on average, and C is of the sum over rows
    texts, features = [*train.texts], []
    for kind in chosen["features"].split(" and "):
        vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=MOST_NGRAMS, dtype=np.float32, **NGRAMS[kind])
        features.append((vectorizer.fit_transform(texts).toarray(), vectorizer.transform(test.texts).toarray()))
    own = {i: weight * scale for i, weight in enumerate(weights)}
    model = LogisticRegression(C=chosen["C"], max_iter=1000, class_weight=own)
    model.fit(np.hstack([each[0] for each in features]), train.labels)
    expected = model.predict_proba(np.hstack([each[1] for each in features]))
    found = load_run(weighed).predict(test.texts)
    np.testing.assert_allclose(found.probabilities, expected, atol=0.02)  # fitted from where a smaller C has ended
    assert np.abs(before - expected).max() > 0.1


def test_what_a_baseline_does_not_use_is_said(fit, capsys) -> None:
    fit("majority", "--model.class_weights", "balanced", "--model.label_smoothing", "0.2")
    told = capsys.readouterr().err
    assert "model.label_smoothing: method majority is fitted without it" in told
    assert "model.class_weights: method majority does not use them" in told


def test_several_devices_are_refused_in_one_line(fit, capsys) -> None:
    with pytest.raises(AssertionError):
        fit("tfidf", "--trainer.devices", "2")
    assert "is fitted by one process" in capsys.readouterr().err


def test_an_evaluation_in_int8_is_refused(fit, capsys) -> None:
    run = fit("majority")
    assert main(["test", str(run), "--int8", "true"]) == 2
    assert "has no layers" in capsys.readouterr().err


def test_a_checkpoint_of_another_method_is_refused(fit) -> None:
    run, other = fit("majority"), fit("tfidf")
    with pytest.raises(UserError, match="trained with method"):
        load_run(run, checkpoint=str(other / "checkpoints" / "best.ckpt"))


def test_baselines_are_arms(fit, capsys) -> None:
    fit("majority")
    words = ["compare", "--config", "c.yaml", "--arms", "majority", "tfidf", "head", "--name", "arms"]
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    assert "confounder" not in capsys.readouterr().out
    table = pd.read_csv("logs/arms/report.csv")
    assert list(table["arm"]) == ["majority (baseline)", "tfidf", "head"]
    assert float(table["test accuracy"][1]) > float(table["test accuracy"][0])


def test_a_test_beside_baselines_pairs_them_on_the_same_rows(fit, capsys) -> None:
    """The numbers are those of the baselines' own runs."""
    run = fit("head", "--trainer.max_epochs", "1")
    assert main(["test", str(run), "--baselines", "true"]) == 0
    shown = capsys.readouterr().out
    found = RunFolder(run).read()["evaluations"]["test"]
    for name in ("majority", "tfidf", "probe"):
        other = fit(name)
        assert main(["test", str(other)]) == 0
        theirs = RunFolder(other).read()["evaluations"]["test"]["after"]
        assert found["baselines"][name]["accuracy"] == pytest.approx(theirs["accuracy"])
        assert found["baselines"][name]["ours_better_by"] == pytest.approx(
            found["after"]["accuracy"] - theirs["accuracy"], abs=1e-6
        )
        low, high = found["baselines"][name]["interval"]
        assert low <= found["baselines"][name]["ours_better_by"] <= high
        better = found["baselines"][name]["ours_better_by"]
        sure = low > 0 or high < 0
        shown_by = re.search(rf"{'worse' if sure and better < 0 else 'better'} than {name} by +(\S+) accuracy", shown)
        assert shown_by is not None and float(shown_by[1]) == pytest.approx(abs(better) if sure else better, abs=1e-4)
    table = shown.rpartition("test: 30 rows")[2].partition("base model")[0].splitlines()
    assert "majority   tfidf   probe  before   after      95% interval" in "\n".join(table)
    assert len([line for line in table if "0." in line]) == 7 and max(map(len, table)) <= 80


@pytest.mark.parametrize("method", BASELINES)
def test_a_text_classifier_is_no_baseline_in_silence(tiny_base: Path, method: str) -> None:
    with pytest.raises(UserError, match=f"'{method}' is a baseline.*main.py fit"):
        TextClassifier(str(tiny_base), ["a", "b"], method)


def test_baselines_beside_a_test_on_several_devices_are_refused(fit, capsys) -> None:
    run = fit("majority")
    capsys.readouterr()
    words = ["test", str(run), "--baselines", "true", "--trainer.devices", "2"]
    assert main(words) == 2 and "--baselines" in capsys.readouterr().err
