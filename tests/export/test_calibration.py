"""Runs with a temperature: trained as without, and the same probabilities in ``test``, ``predict`` and exports."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import expit, softmax

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.export.formats import fold_temperature
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.module import TextClassifier
from tests.commands.test_tasks import LABELS, record_of, write_config
from tests.conftest import make_sets
from tests.evaluation.test_tasks import calibration_error
from tests.export.conftest import TEXTS, check_probabilities, export, fit, outside
from tests.models.test_head import ARCHITECTURES, IDS, MASK
from tests.models.tiny_bases import save_tiny_base


def pair_of_runs(place: Path, base: Path, *words: str, **model: object) -> tuple[Path, Path, float]:
    """A run without a temperature and one with, and the temperature."""
    plain, calibrated = (
        fit(place / name, base, "--trainer.max_epochs", "1", *words, calibrate=name == "calibrated", **model).path
        for name in ("plain", "calibrated")
        if not (place / name).mkdir()
    )
    one, other = (torch.load(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (plain, calibrated))
    temperature = other.pop("temperature")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)  # trained alike
    best = torch.load(calibrated / "checkpoints" / "best.ckpt")["state_dict"]["temperature"].item()
    assert best == temperature.item() != 1
    return plain, calibrated, best


@pytest.mark.parametrize("pooling", [pytest.param("first", marks=pytest.mark.slow), "mean"])
def test_every_format_gives_the_probabilities(base: Path, tmp_path: Path, capsys, pooling: str) -> None:
    plain, calibrated, temperature = pair_of_runs(tmp_path, base, pooling=pooling)
    assert f"temperature: {temperature:.3f}" in capsys.readouterr().out
    logits, ours = load_run(plain).predict(TEXTS).logits, load_run(calibrated).predict(TEXTS)
    expected = softmax(logits.astype(float) / temperature, axis=1)
    np.testing.assert_allclose(ours.probabilities, expected, atol=1e-6)
    assert ours.names == load_run(plain).predict(TEXTS).names
    certificate = export(RunFolder.open(calibrated), "--formats", "[adapter, merged, onnx]")
    assert all(row["max_logit_difference"] < 1e-4 and not row["labels_flipped"] for row in certificate.values())
    check_probabilities(outside(calibrated / "export", TEXTS, tmp_path), expected)
    again = load_run(calibrated, str(calibrated / "export" / "adapter")).predict(TEXTS)
    np.testing.assert_allclose(again.probabilities, expected, atol=1e-5)
    if pooling == "first":
        from transformers import pipeline

        classify = pipeline("text-classification", model=str(calibrated / "export" / "merged"), dtype=torch.float32)
        said = [{each["label"]: each["score"] for each in row} for row in classify(TEXTS, top_k=None, truncation=True)]
        np.testing.assert_allclose([[row[n] for n in ours.label_names] for row in said], expected, atol=2e-5)


def test_test_shows_both_and_changes_no_label(base: Path, tmp_path: Path, capsys) -> None:
    plain, calibrated, temperature = pair_of_runs(tmp_path, base)
    capsys.readouterr()
    for command in ("test", "validate"):
        more = ["--baselines", "true"] if command == "test" else []  # which have a temperature of their own
        assert main([command, "--run", str(plain)]) == 0 and main([command, "--run", str(calibrated), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [each for each in lines if each.lstrip().startswith("temperature")]
    assert len(said) == 2 and all("without it loss" in each and len(each) <= 80 for each in said)
    for split in ("test", "val"):
        before, found = (record_of(each)["evaluations"][split] for each in (plain, calibrated))
        assert found["temperature"] == pytest.approx(temperature)
        for name, value in before["after"].items():
            if name in ("loss", "calibration_error"):
                assert found["uncalibrated"][name] == pytest.approx(value, rel=1e-4)
            else:
                assert found["after"][name] == value, name
    assert found["after"]["loss"] < found["uncalibrated"]["loss"]  # of validation rows never higher


def test_several_labels_are_predicted_as_before(base: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, base, "multi_label")
    words = ["fit", "--config", str(config), "--logs_dir", str(tmp_path), "--model.threshold", "per_label"]
    assert main([*words, "--name", "plain"]) == 0
    assert main([*words, "--name", "run", "--model.calibrate", "true"]) == 0
    run, texts = tmp_path / "run", [text for text, _ in make_sets(150)]
    plain, ours = load_run(tmp_path / "plain").predict(texts), load_run(run).predict(texts)
    temperature = record_of(run)["best"]["temperature"]
    assert temperature != 1 and ours.names == plain.names
    np.testing.assert_allclose(ours.probabilities, expit(plain.logits / temperature), atol=1e-6)
    assert main(["export", "--run", str(run), "--formats", "[adapter, merged]"]) == 0
    assert load_run(run, str(run / "export" / "adapter")).predict(texts).names == plain.names
    facts = json.loads((run / "export" / "merged" / "lightning_lora.json").read_text())
    assert ((ours.probabilities >= facts["thresholds"]) == plain.predicted).all()
    assert main(["test", "--run", str(run)]) == 0 and main(["test", "--run", str(tmp_path / "plain")]) == 0
    before, after = (record_of(each)["evaluations"]["test"] for each in (tmp_path / "plain", run))
    assert after["after"]["f1_macro"] == before["after"]["f1_macro"]
    for name in ("loss", "calibration_error"):
        assert after["uncalibrated"][name] == pytest.approx(before["after"][name], rel=1e-4)
    table = pq.read_table(run / "predictions" / "test.parquet").to_pydict()
    truth = np.array([[name in each for name in LABELS] for each in table["label"]])
    scores = np.column_stack([table[f"p({name})"] for name in LABELS])
    assert after["after"]["calibration_error"] == pytest.approx(
        calibration_error(truth.ravel(), scores.ravel()), abs=1e-5
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_head_holds_it(tmp_path: Path, model_type: str, method: str) -> None:
    """Also where adapters have as many outputs as there are labels."""
    base = str(save_tiny_base(tmp_path / "base", model_type))
    options = {"rank": 3} if method == "lora" else {}
    names = ["a", "b", "c"]
    model = TextClassifier(base, names, method, adapter=options, calibrate=True).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert model.temperature is not None
        model.temperature.fill_(1.7)
        expected = model(IDS, MASK) / 1.7
        fold_temperature(model)
        torch.testing.assert_close(model(IDS, MASK), expected)
    assert model.temperature == 1
