"""The formats of runs of every kind, each loaded by the software it is for."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from lightning_lora.cli import main
from lightning_lora.models.methods import METHODS
from tests.conftest import make_rows, slow_but, write_csv
from tests.export.conftest import LABELS, TEXTS, check_probabilities, export, fit, outside, predicted


@pytest.mark.parametrize("method", slow_but(["dora", "pissa", "ia3", "full", "none"], METHODS))
def test_every_method_exports_what_it_learnt(base: Path, tmp_path: Path, capsys, method: str) -> None:
    run = fit(tmp_path, base, method=method)
    has_adapter = method not in ("bitfit", "full", "head", "none")
    certificate = export(run, "--formats", "[adapter, merged]" if has_adapter else "[merged]")
    for name in set(certificate) - {"trained"}:
        assert certificate[name]["max_logit_difference"] < 1e-4, (method, name)
        assert certificate[name]["labels_flipped"] == 0
    if not has_adapter:
        assert main(["export", "--run", str(run.path), "--formats", "[adapter]"]) == 2
        assert f"method '{method}' has no adapter; use merged" in capsys.readouterr().err
        return
    # The adapter's folder is taken for a checkpoint and says the same; PiSSA's is plain LoRA, for other software.
    adapter = run.path / "export" / "adapter"
    texts = ["predict", "--run", str(run.path), "a fine film", "a dull dog"]
    assert main([*texts, "--output", "a.parquet"]) == 0
    status = main([*texts, "--output", "b.parquet", "--checkpoint", str(adapter)])
    if method == "pissa":
        assert status == 2 and "exported as plain LoRA" in capsys.readouterr().err
    else:
        assert status == 0 and pq.read_table("a.parquet").to_pydict() == pq.read_table("b.parquet").to_pydict()


@pytest.mark.parametrize("method", ["ia3", "vera"])
@pytest.mark.parametrize("kind", slow_but(["roberta"], ["roberta", "electra", "deberta-v2", "modernbert"]))
def test_a_head_of_several_layers_is_merged(make_base, tmp_path: Path, method: str, kind: str) -> None:
    """PEFT takes it for one layer, which has a weight."""
    certificate = export(fit(tmp_path, make_base(kind), method=method), "--formats", "[adapter, merged]")
    assert certificate["merged"]["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_run_merges_into_the_full_base_and_says_what_that_changes(
    base, tmp_path, capsys, bits: int
) -> None:
    run = fit(tmp_path, base, quantization={"bits": bits})
    export(run, "--formats", "[adapter, merged]")
    warned = "warning: adapter, merged differ from the trained model" in capsys.readouterr().out
    config = json.loads((run.path / "export" / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(run.path / "export" / "merged" / "model.safetensors", "pt") as merged:
        name = "bert.encoder.layer.0.attention.self.query.weight"
        with safe_open(base / "model.safetensors", "pt") as original:
            start = original.get_tensor(name.removeprefix("bert."))
        checkpoint = torch.load(run.checkpoints / "best.ckpt", weights_only=True)["state_dict"]
        a, b = (
            checkpoint[f"model.base_model.model.{name.removesuffix('weight')}lora_{x}.default.weight"] for x in "AB"
        )
        # W + alpha / rank * B A, on the weights in full precision
        torch.testing.assert_close(merged.get_tensor(name), start + 16 / 8 * b @ a)
    certificate = json.loads((run.path / "export" / "certificate.json").read_text())
    difference = certificate["merged"]["max_logit_difference"]
    assert difference > 1e-6 and warned == (difference > 1e-4)  # 8 bits of so small a model change almost nothing
    assert difference == pytest.approx(certificate["adapter"]["max_logit_difference"], abs=1e-4)
    assert warned or bits == 8


@pytest.mark.parametrize("gone", ["source", "labels", "record"])
def test_a_run_is_exported_without_its_data_or_record(base: Path, tmp_path: Path, capsys, gone: str) -> None:
    run = fit(tmp_path, base)
    if gone == "source":
        (tmp_path / "rows.csv").unlink()
    elif gone == "labels":
        write_csv(tmp_path / "rows.csv", make_rows(100, ("neg", "pos")))
    else:
        run.record.unlink()
    export(run, "--formats", "[adapter, merged]")
    warned = "warning: the run's test rows were not used (" in capsys.readouterr().out
    certificate = json.loads((run.path / "export" / "certificate.json").read_text())
    card = (run.path / "export" / "merged" / "README.md").read_text()
    assert certificate["merged"]["max_logit_difference"] < 1e-4
    if gone == "record":
        assert not warned and certificate["merged"]["accuracy"] is not None
        return
    row = certificate["merged"]
    assert warned and row["accuracy"] is None and row["rows"] == row["made_up"] >= 150
    assert row["long_rows"] > 20 and row["rows"] - row["long_rows"] > 20
    assert "made-up texts" in card and "warning: the run's test rows were not used" in card and "Not tested." in card
    # A source that is typed is meant.
    assert main(["export", "--run", str(run.path), "--data.source", "typo.csv", "--output", "out"]) == 2
    assert "typo.csv" in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize("truncation", slow_but(["windows"], ["both", "windows"]))
def test_what_a_tokenizer_cannot_cut_is_cut_by_the_card_s_code(base, tmp_path, capsys, truncation: str) -> None:
    words = ["--data.truncation", truncation, "--data.max_length", "10", "--trainer.max_epochs", "6"]
    run = fit(tmp_path, base, *words)
    export(run, "--formats", "[adapter, merged, onnx]")
    out = capsys.readouterr().out
    expected = predicted(run.path, TEXTS)
    check_probabilities(outside(run.path / "export", TEXTS, tmp_path), expected)
    certificate = json.loads((run.path / "export" / "certificate.json").read_text())
    row = certificate["merged without encode.py"]  # what a pipeline alone gives
    from transformers import pipeline

    alone = pipeline("text-classification", model=str(run.path / "export" / "merged"), truncation=True)(TEXTS)
    flipped = sum(each["label"] != LABELS[i] for each, i in zip(alone, expected.argmax(1), strict=True))
    assert flipped > 0 and row["labels_flipped"] > 0 and row["labels_flipped_long"] == row["labels_flipped"]
    warning = f"{row['labels_flipped']} of {row['rows']} labels differ, {row['labels_flipped_long']} of the "
    assert "warning: a pipeline or tokenizer alone, without encode.py, truncates otherwise" in out and warning in out
    for name in ("", "adapter", "merged", "onnx"):
        assert warning in (run.path / "export" / name / "README.md").read_text()


@pytest.mark.parametrize("truncation", slow_but(["tail"], ["head", "tail"]))
def test_a_bare_pipeline_says_what_predict_says(base: Path, tmp_path: Path, truncation: str) -> None:
    from transformers import pipeline

    run = fit(tmp_path, base, "--data.truncation", truncation, "--data.max_length", "10")
    export(run, "--formats", "[merged, onnx]")
    expected = predicted(run.path, TEXTS)
    folder = str(run.path / "export" / "merged")
    for size in (1, 7):
        said = pipeline("text-classification", model=folder)(TEXTS, truncation=True, top_k=None, batch_size=size)
        got = [[next(e["score"] for e in row if e["label"] == name) for name in LABELS] for row in said]
        np.testing.assert_allclose(got, expected, atol=2e-5)
    assert not (run.path / "export" / "merged" / "encode.py").exists()
    check_probabilities(outside(run.path / "export", TEXTS, tmp_path), expected)
    saved = json.loads((run.path / "export" / "onnx" / "tokenizer.json").read_text())
    assert saved["truncation"]["direction"] == ("Left" if truncation == "tail" else "Right")


def change_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", slow_but(["left", "types"], ["padding", "left", "types", "bfloat16", "to_max"]))
def test_what_a_base_brings_does_not_change_what_is_said(make_base, tmp_path, case: str) -> None:
    """Padding that config and tokenizer disagree on, or on the left; token types; weights of 16 bits."""
    size = {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3} if case == "padding" else {}
    base = Path(shutil.copytree(make_base("llama" if case == "padding" else "bert", **size), tmp_path / "base"))
    words = []
    if case == "padding":
        change_tokenizer(base, pad_token="[MASK]")  # number 4; the config says 0
    elif case == "left":
        change_tokenizer(base, padding_side="left")
    elif case == "types":
        from tokenizers import Tokenizer, processors

        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer.save(str(base / "tokenizer.json"))
        change_tokenizer(base, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    elif case == "bfloat16":
        from transformers import AutoModel

        AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    else:
        words = ["--data.padding", "max_length"]
    run = fit(tmp_path, base, "--trainer.max_epochs", "1", *words)
    export(run, "--formats", "[adapter, merged]" if case == "to_max" else "[adapter, merged, onnx]")
    check_probabilities(outside(run.path / "export", TEXTS, tmp_path), predicted(run.path, TEXTS))  # and one by one
    if case == "padding":
        assert json.loads((run.path / "export" / "merged" / "config.json").read_text())["pad_token_id"] == 4


def test_the_card_of_a_run_with_several_text_columns_says_how_they_are_joined(
    base: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    lines = [f"{text.replace(' ', ',', 1)},{label}" for text, label in make_rows(240, LABELS)]
    (tmp_path / "rows.csv").write_text("\n".join(["title,the body,label", *lines]))
    words = ["--data.text_column", "[title, the body]", "--data.truncation", "head"]
    run = fit(tmp_path, base, *words, "--trainer.max_epochs", "1")
    export(run, "--formats", "[adapter, merged, onnx]")
    capsys.readouterr()
    for place in ("adapter", "merged", "onnx"):
        monkeypatch.chdir(run.path / "export" / place)
        card = Path("README.md").read_text()
        assert '- input: `title + " " + the body` (without columns that are blank), at most 24 tokens' in card
        (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert '(["your title" + " " + "your the body"])' in block
        exec(compile(block, "README.md", "exec"), {})
        said = capsys.readouterr().out
        assert any(label in said for label in LABELS)
