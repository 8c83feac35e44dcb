"""Exports of language models: tokenizer and config name one padding token, so that others say what ``predict`` says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

from tests.export.conftest import LABELS, TEXTS, export, fit, predicted
from tests.models.test_language_models import END, byte_base


@pytest.mark.parametrize(
    ("model_type", "cut", "formats"),
    [
        ("gpt2", "tail", "[adapter, merged, onnx]"),
        ("qwen3", "head", "[adapter, merged]"),
        pytest.param("gemma2", "windows", "[onnx]", marks=pytest.mark.slow),
    ],
)
def test_other_software_says_what_predict_says(tmp_path: Path, model_type: str, cut: str, formats: str) -> None:
    base = byte_base(tmp_path / "base", model_type)  # without a padding token in config and tokenizer
    run = fit(tmp_path, base, "--trainer.max_epochs", "1", "--data.truncation", cut)
    certificate, folder = export(run, "--formats", formats), run.path / "export"
    for name, row in certificate.items():
        if not name.endswith("encode.py"):  # by the card's code, in batches and one by one
            assert row["max_logit_difference"] < 1e-4 and row["labels_flipped"] == row["labels_flipped_single"] == 0
    for name in set(certificate) & {"adapter", "merged", "onnx"}:
        assert AutoTokenizer.from_pretrained(folder / name).pad_token == END
    if cut == "windows":  # which no pipeline reads
        return
    texts = [*TEXTS[:20], *TEXTS[-5:], f"the film was fine{END}"]
    expected = predicted(run.path, texts)
    assert json.loads((folder / "merged" / "config.json").read_text())["pad_token_id"] == 0
    for size in (1, 7):
        classify = pipeline("text-classification", model=str(folder / "merged"), dtype=torch.float32)
        said = classify(texts, truncation=True, top_k=None, batch_size=size)
        got = [[next(e["score"] for e in row if e["label"] == name) for name in LABELS] for row in said]
        np.testing.assert_allclose(got, expected, atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        folder / "adapter", num_labels=3, pad_token_id=tokenizer.pad_token_id, dtype="float32"
    ).eval()
    with torch.no_grad():
        together = plain(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits.softmax(-1)
        alone = [plain(**tokenizer(text, truncation=True, return_tensors="pt")).logits.softmax(-1) for text in texts]
    np.testing.assert_allclose(together, expected, atol=2e-5)
    np.testing.assert_allclose(torch.cat(alone), expected, atol=2e-5)
