"""Exports of a run on pairs of texts, loaded by their own cards."""

import re
from pathlib import Path

import numpy as np
import pytest

from lightning_lora import load_run
from tests.conftest import PAIR_HEADER, make_pairs, save_pair_base, write_csv
from tests.export.conftest import export, fit, outside

COLUMNS = ("--data.text_column", "[premise, hypothesis]")
PAIRS = [row[:2] for row in make_pairs(30, seed=3)]


@pytest.mark.parametrize(
    ("model_type", "truncation", "padding", "formats"),
    [
        ("bert", "longest_first", "longest", ["adapter", "merged", "onnx"]),
        pytest.param("roberta", "only_second", "longest", ["merged", "onnx"], marks=pytest.mark.slow),
        ("bert", "only_first", "max_length", ["adapter", "merged"]),
    ],
)
def test_other_software_says_of_pairs_what_the_trained_model_says(
    make_base, tmp_path: Path, model_type: str, truncation: str, padding: str, formats: list[str]
) -> None:
    changes = {"type_vocab_size": 1} if model_type == "roberta" else {}
    base = save_pair_base(make_base(model_type, initializer_range=0.3, **changes), tmp_path / "base", model_type)
    write_csv(tmp_path / "rows.csv", make_pairs(120), PAIR_HEADER)
    words = ("--data.max_length", "34", "--data.truncation", truncation, "--data.padding", padding)
    run = fit(tmp_path, base, *COLUMNS, *words)
    certificate = export(run, "--formats", f"[{', '.join(formats)}]")
    for name in ("trained", *formats):
        row = certificate[name]
        assert row["max_logit_difference"] < 1e-4 and row["labels_flipped"] == 0, name
        assert row["long_rows"] >= 20 and row["rows"] - row["made_up"] > 20, name
    said = outside(run.path / "export", ["\t".join(pair) for pair in PAIRS], tmp_path)
    expected = load_run(run.path, accelerator="cpu").predict(PAIRS).logits
    for name in formats:
        np.testing.assert_allclose(said[name]["logits"], expected, atol=1e-4, err_msg=name)
    card = (run.path / "export" / "merged" / "README.md").read_text()
    assert "- input: pairs of `premise` and `hypothesis`, at most 34 tokens; of longer pairs" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert f'truncation="{truncation}"' in code
    assert '{"text": "your premise", "text_pair": "your hypothesis"}' in code


def test_a_mean_pooled_export_takes_pairs(tiny_base: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = save_pair_base(tiny_base, tmp_path / "base", "bert")
    write_csv(tmp_path / "rows.csv", make_pairs(120), PAIR_HEADER)
    run = fit(tmp_path, base, *COLUMNS, "--data.max_length", "34", "--model.pooling", "mean")
    certificate = export(run, "--formats", "[adapter, merged, onnx]")
    assert {name for name, row in certificate.items() if row.get("max_logit_difference", 1) < 1e-4} == set(certificate)
    expected = load_run(run.path, accelerator="cpu").predict(PAIRS).logits
    encoder = SentenceTransformer(str(run.path / "export" / "merged"), device="cpu")
    np.testing.assert_allclose(encoder.encode(PAIRS), expected, atol=1e-4)
