"""Exports of models whose head reads the mean of a text's states: the same logits in other software, or an error."""

import json
import logging
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from lightning_lora.cli import main
from lightning_lora.models.methods import METHODS
from lightning_lora.runs.folder import RunFolder
from tests.conftest import slow_but
from tests.export.conftest import LABELS, TEXTS, check_probabilities, export, fit, outside, predicted
from tests.models.test_pooling import MEANS

#: Activations behind the dense layers, where they are not those of RoBERTa's head.
ACTIVATIONS = {
    "bert": ["Identity"],
    "albert": ["Identity"],
    "electra": ["GELU", "Identity"],
    "distilbert": ["ReLU", "Identity"],
    "deberta-v2": ["GELU", "Identity"],
}


def fit_mean(place: Path, base: Path, *words: str, **model: object) -> RunFolder:
    return fit(place, base, *words, pooling="mean", **model)


def check_sentence_transformer(folder: Path, expected) -> None:
    """What sentence-transformers gives for an embedding are the logits."""
    package = pytest.importorskip("sentence_transformers")
    model = package.SentenceTransformer(str(folder), device="cpu")
    check_probabilities({"sentence-transformers": {"logits": model.encode(TEXTS).tolist()}}, expected)


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats of a run; nothing in it is changed."""
    run = fit_mean(tmp_path_factory.mktemp("exported"), base, "--trainer.max_epochs", "6")
    export(run)
    return run.path / "export"


ALL_FORMATS = ["adapter", "merged", "onnx", "onnx-int8"]


@pytest.mark.parametrize("formats", [ALL_FORMATS[:2], pytest.param(ALL_FORMATS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", slow_but(["roberta", "distilbert"], MEANS))
def test_every_architecture_says_the_same_in_every_format(make_base, tmp_path, model_type: str, formats) -> None:
    run = fit_mean(tmp_path, make_base(model_type))
    certificate = export(run, "--formats", f"[{', '.join(formats)}]")
    assert list(certificate) == ["trained", *formats]
    for name in formats[:3]:
        assert certificate[name]["max_logit_difference"] < 1e-4 and certificate[name]["labels_flipped"] == 0
    assert "missing" not in certificate.get("onnx-int8", {})
    merged = run.path / "export" / "merged"
    dense = [json.loads(path.read_text()) for path in sorted(merged.glob("*_Dense/config.json"))]
    activations = [each["activation_function"].rpartition(".")[2] for each in dense]
    assert activations == ACTIVATIONS.get(model_type, ["Tanh", "Identity"])
    check_sentence_transformer(merged, predicted(run.path, TEXTS))


def test_other_software_says_what_the_trained_model_says(exported: Path, tmp_path: Path) -> None:
    said = outside(exported, TEXTS, tmp_path)
    assert list(said) == ["merged", "adapter", "onnx", "onnx-int8"]
    assert all(each["labels"] == list(LABELS) for each in said.values())
    expected = predicted(exported.parent, TEXTS)
    check_probabilities(said, expected)
    assert len(set(expected.argmax(1))) > 1  # the model says something


@pytest.mark.parametrize("name", ["adapter", "merged", "onnx", "onnx-int8"])
def test_no_folder_is_silently_loaded_as_if_its_head_read_the_first_token(exported: Path, caplog, name: str) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    folder = str(exported / name)
    if name.startswith("onnx"):
        with pytest.raises(OSError, match="no file named"):
            AutoModelForSequenceClassification.from_pretrained(folder)
        return
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        AutoModelForSequenceClassification.from_pretrained(folder)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert re.search(r"classifier.weight *\| MISSING", caplog.text) and "newly initialized" in caplog.text
    if name == "adapter":
        with pytest.raises(ValueError, match="PeftModelForFeatureExtraction"):
            AutoPeftModelForSequenceClassification.from_pretrained(folder)


def test_the_bare_encoder_is_loaded_whole(exported: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    _, info = AutoModel.from_pretrained(exported / "merged", output_loading_info=True, add_pooling_layer=False)
    assert not any(info.values())
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), exported / "adapter")
    saved = load_file(exported / "adapter" / "adapter_model.safetensors")
    assert {key for key in encoder.state_dict() if ".lora_" in key} == {
        key.replace(".weight", ".default.weight") for key in saved
    }


def test_the_cards_say_how_to_load_it_and_their_code_runs(exported: Path, monkeypatch, capsys) -> None:
    from huggingface_hub import ModelCard

    for place, library in (("", "peft"), ("adapter", "peft"), ("merged", "sentence-transformers"), ("onnx", "onnx")):
        card = ModelCard.load(exported / place / "README.md")
        assert card.data.library_name == library and "- head: reads the mean" in card.text
        assert ("SentenceTransformer(path)" in card.text) == (place in ("", "merged"))
        blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
        assert len(blocks) == (4 if not place else 1)
        monkeypatch.chdir(exported / place)
        for block in blocks:
            exec(compile(block, f"{place}/README.md", "exec"), {})
            said = capsys.readouterr().out
            assert any(label in said for label in LABELS)


@pytest.mark.parametrize("method", slow_but(["lora", "bitfit"], METHODS))
def test_every_method_exports_what_it_learnt(base: Path, tmp_path: Path, capsys, method: str) -> None:
    run = fit_mean(tmp_path, base, method=method)
    has_adapter = method not in ("bitfit", "full", "head", "none")
    certificate = export(run, "--formats", "[adapter, merged]" if has_adapter else "[merged]")
    for name in set(certificate) - {"trained"}:
        assert certificate[name]["max_logit_difference"] < 1e-4, (method, name)
    if has_adapter:
        check_read_back(run, capsys, method)


def check_read_back(run: RunFolder, capsys, method: str = "lora") -> None:
    """The adapter's folder is taken for a checkpoint and says the same; PiSSA's is plain LoRA, for other software."""
    texts = ["predict", "--run", str(run.path), "a fine film", "a dull dog"]
    assert main([*texts, "--output", "a.parquet"]) == 0
    status = main([*texts, "--output", "b.parquet", "--checkpoint", str(run.path / "export" / "adapter")])
    if method == "pissa":
        assert status == 2 and "exported as plain LoRA" in capsys.readouterr().err
    else:
        assert status == 0 and pq.read_table("a.parquet").to_pydict() == pq.read_table("b.parquet").to_pydict()


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_biases_and_further_modules_are_in_the_adapter(make_base, tmp_path: Path, capsys, pooling: str) -> None:
    adapter = {"bias": "all", "modules_to_save": ["embeddings.LayerNorm"]}
    run = fit(tmp_path, make_base("roberta"), adapter=adapter, pooling=pooling)
    certificate = export(run, "--formats", "[adapter, merged]")
    assert certificate["adapter"]["max_logit_difference"] < 1e-4
    keys = set(load_file(run.path / "export" / "adapter" / "adapter_model.safetensors"))
    encoder = "base_model.model." + ("roberta." if pooling == "first" else "")
    assert f"{encoder}embeddings.LayerNorm.weight" in keys
    assert any("classifier" in key for key in keys) == (pooling == "first")
    check_read_back(run, capsys)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_run_is_exported(base: Path, tmp_path: Path, capsys, bits: int) -> None:
    run = fit_mean(tmp_path, base, quantization={"bits": bits})
    certificate = export(run, "--formats", "[adapter, merged]")
    difference = certificate["merged"]["max_logit_difference"]
    assert 1e-6 < difference < 0.2
    assert difference == pytest.approx(certificate["adapter"]["max_logit_difference"], abs=1e-4)
    check_read_back(run, capsys)


@pytest.mark.parametrize("truncation", slow_but(["windows"], ["tail", "both", "windows"]))
def test_texts_are_truncated_as_in_training(base: Path, tmp_path: Path, truncation: str) -> None:
    run = fit_mean(tmp_path, base, "--data.truncation", truncation, "--data.max_length", "10")
    certificate = export(run, "--formats", "[adapter, merged, onnx]")
    expected = predicted(run.path, TEXTS)
    check_probabilities(outside(run.path / "export", TEXTS, tmp_path), expected)
    merged = run.path / "export" / "merged"
    card = (merged / "README.md").read_text()
    if truncation == "tail":
        check_sentence_transformer(merged, expected)
    else:
        assert (merged / "encode.py").is_file() and "merged without encode.py" in certificate
        assert "longer ones it truncates otherwise" in card


@pytest.mark.parametrize("change", ["no head", "another head", "first"])
def test_an_adapter_of_something_else_is_refused_with_the_reason(exported, tmp_path, capsys, change: str) -> None:
    adapter = Path(shutil.copytree(exported / "adapter", tmp_path / "adapter"))
    words = []
    if change == "no head":
        (adapter / "head.safetensors").unlink()
        said = "no head.safetensors in it"
    elif change == "another head":
        head = load_file(adapter / "head.safetensors")
        save_file({f"1{name}": value for name, value in head.items()}, adapter / "head.safetensors")
        said = "the adapter does not fit"
    else:
        words = ["--model.pooling", "first"]
        said = "trained with pooling mean, not first"
    assert main(["test", "--run", str(exported.parent), "--checkpoint", str(adapter), "--before", "false", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_head_that_sentence_transformers_cannot_hold_is_exported_as_onnx(make_base, tmp_path, capsys) -> None:
    run = fit_mean(tmp_path, make_base("deberta-v2", pooler_hidden_act="gelu_new"))
    certificate = export(run)
    assert certificate["onnx"]["max_logit_difference"] < 1e-4
    for name in ("adapter", "merged"):
        assert "no class for the head's activation 'gelu_new'; use onnx" in certificate[name]["missing"]
