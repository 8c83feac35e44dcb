"""Exports of tiny runs, loaded again by the software they are for."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lightning_lora.cli import main
from lightning_lora.models.methods import METHODS
from lightning_lora.runs.folder import RunFolder
from tests.conftest import make_rows, save_tokenizer, write_csv
from tests.hub_stand_in import stand_in

ROOT = Path(__file__).parents[2]
LABELS = ("mixed", "neg", "pos")  # as the data gives them: sorted
#: Short ones, and some that are longer than any ``max_length`` here.
TEXTS = [text for text, _ in make_rows(50, LABELS, seed=5)]
TEXTS += [" ".join(TEXTS[i : i + 4]) for i in range(10)]


def fit(place: Path, base: Path, name: str, *words: str, **model: object) -> RunFolder:
    if not (place / "rows.csv").exists():
        write_csv(place / "rows.csv", make_rows(240, LABELS))
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3, **model},
        "data": {"source": str(place / "rows.csv"), "max_length": 24, "cache_dir": str(place / "cache")},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    path = place / "logs" / name
    assert (
        main(["fit", "--config", str(place / f"{name}.yaml"), "--name", name, "--logs_dir", str(path.parent), *words])
        == 0
    )
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    return make_base("bert", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    run = fit(place, base, "run", "--trainer.max_epochs", "6")
    assert main(["test", "--run", str(run.path), "--before", "false"]) == 0
    assert main(["export", "--run", str(run.path)]) == 0
    return run.path / "export"


def outside(export: Path, texts: list[str], place: Path) -> dict:
    """What other software says of the texts, in a process that imports nothing of this project."""
    (place / "texts.txt").write_text("\n".join(texts) + "\n")
    words = [
        sys.executable,
        str(ROOT / "examples" / "load_anywhere.py"),
        export,
        place / "texts.txt",
        place / "out.json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((place / "out.json").read_text())


def predicted(run: Path, texts: list[str]) -> np.ndarray:
    """Probabilities (texts, classes) of ``predict``."""
    Path("texts.txt").write_text("\n".join(texts) + "\n")
    assert main(["predict", "--run", str(run), "--input", "texts.txt", "--output", "p.parquet"]) == 0
    ours = pq.read_table("p.parquet").to_pydict()
    Path("p.parquet").unlink()
    return np.array([ours[f"p({label})"] for label in LABELS]).T


def check_probabilities(said: dict, expected: np.ndarray) -> None:
    for name in set(said) - {"onnx-int8"}:
        got = torch.tensor(said[name]["logits"]).softmax(-1).numpy()
        np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=name)


def test_other_software_says_what_the_trained_model_says(exported: Path, tmp_path: Path) -> None:
    said = outside(exported, TEXTS, tmp_path)
    assert list(said) == ["merged", "adapter", "onnx", "onnx-int8"]
    assert all(each["labels"] == list(LABELS) for each in said.values())
    expected = predicted(exported.parent, TEXTS)
    check_probabilities(said, expected)
    assert len(set(expected.argmax(1))) > 1  # the model says something


def test_each_folder_brings_what_it_needs(exported: Path) -> None:
    held = {p.name for p in (exported / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
        "lightning_lora.json",
    } <= held
    assert "config.json" not in held  # beside an adapter it would break its loading
    identity = json.loads((exported / "adapter" / "lightning_lora.json").read_text())
    assert identity["label_names"] == list(LABELS) and len(identity["base_fingerprint"]) == 64
    assert identity["max_length"] == 24
    for name in ("adapter", "merged", "onnx", "onnx-int8"):
        assert json.loads((exported / name / "tokenizer_config.json").read_text())["model_max_length"] == 24
    merged = json.loads((exported / "merged" / "config.json").read_text())
    assert merged["id2label"] == {"0": "mixed", "1": "neg", "2": "pos"} and "quantization_config" not in merged
    assert (exported / "onnx-int8" / "model.onnx.data").stat().st_size < (
        exported / "onnx" / "model.onnx.data"
    ).stat().st_size
    for path in exported.rglob("*"):  # readable by others, as any file a person makes
        assert path.stat().st_mode & 0o044 == 0o044 or os.umask(os.umask(0)) & 0o044, path


def test_the_certificate_says_what_was_measured(exported: Path) -> None:
    certificate = json.loads((exported / "certificate.json").read_text())
    assert list(certificate) == ["trained", "adapter", "merged", "onnx", "onnx-int8"]
    accuracy = RunFolder(exported.parent).read()["evaluations"]["test"]["after"]["accuracy"]
    assert certificate["trained"]["accuracy"] == pytest.approx(accuracy)
    for name in ("adapter", "merged", "onnx"):
        assert certificate[name]["max_logit_difference"] < 1e-4 and certificate[name]["labels_flipped"] == 0
    assert certificate["onnx-int8"]["max_logit_difference"] > 1e-5  # it was indeed quantized
    assert all(row["latency_ms"] > 0 and row["texts_per_s"] > 0 for row in certificate.values())
    for row in certificate.values():  # 48 test rows, and joined ones where too few of them are long
        assert row["rows"] - row["made_up"] == 48 and row["long_rows"] >= 20
        assert row["single_rows"] == min(row["rows"], 100)


def test_the_card_s_metadata_is_what_the_hub_reads(exported: Path) -> None:
    from huggingface_hub import ModelCard

    for place, library in (("", "peft"), ("adapter", "peft"), ("merged", "transformers"), ("onnx", "onnx")):
        card = ModelCard.load(exported / place / "README.md")
        assert card.data.library_name == library and card.data.pipeline_tag == "text-classification"
        assert card.data.license == "unknown" and card.data.metrics == ["accuracy", "f1", "precision", "recall"]
        result = next(each for each in card.data.eval_results if each.metric_type == "accuracy")
        after = RunFolder(exported.parent).read()["evaluations"]["test"]["after"]
        assert result.metric_value == pytest.approx(after["accuracy"], abs=1e-6)
        assert "48 test rows and" in card.text and "| `merged` |" in card.text


def test_the_card_s_code_runs_as_it_stands(exported: Path, monkeypatch, capsys) -> None:
    for place in ("", "adapter", "merged", "onnx"):
        blocks = re.findall(r"```python\n(.*?)```", (exported / place / "README.md").read_text(), flags=re.DOTALL)
        assert len(blocks) == (4 if not place else 1)
        monkeypatch.chdir(exported / place)
        for block in blocks:
            exec(compile(block, f"{place}/README.md", "exec"), {})
            said = capsys.readouterr().out
            assert any(label in said for label in LABELS)


def test_the_card_of_a_run_with_several_text_columns_says_how_they_are_joined(
    base: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    lines = [f"{text.replace(' ', ',', 1)},{label}" for text, label in make_rows(240, LABELS)]
    (tmp_path / "rows.csv").write_text("\n".join(["title,the body,label", *lines]))
    run = fit(tmp_path, base, "run", "--data.text_column", "[title, the body]", "--trainer.max_epochs", "1")
    assert main(["export", "--run", str(run.path)]) == 0
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


def test_an_export_is_not_overwritten(exported: Path, capsys) -> None:
    before = (exported / "certificate.json").read_bytes()
    assert main(["export", "--run", str(exported.parent), "--output", str(exported)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["export", "--run", str(exported.parent), "--formats", "[merged]"]) == 0
    assert f"to {exported}-2: merged" in capsys.readouterr().out
    assert (exported.with_name("export-2") / "merged" / "model.safetensors").is_file()
    assert (exported / "certificate.json").read_bytes() == before
    shutil.rmtree(exported.with_name("export-2"))


@pytest.mark.parametrize("change", ["base", "labels", "order", "format", "alpha", "weights", "identity"])
def test_an_adapter_of_something_else_is_refused_with_the_reason(exported, make_base, tmp_path, capsys, change) -> None:
    adapter = Path(shutil.copytree(exported / "adapter", tmp_path / "adapter"))
    identity = json.loads((adapter / "lightning_lora.json").read_text())
    words = []
    if change == "base":  # the same shape, other weights
        words = ["--model.base_model", str(make_base("bert", seed=1, hidden_size=64, intermediate_size=128))]
        said = "other weights"
    elif change == "labels":
        identity["label_names"] = ["a", "b", "c"]
        said = "label_names ['a', 'b', 'c']"
    elif change == "order":
        identity["label_names"] = ["pos", "neg", "mixed"]
        said = "names and order must be the same"
    elif change == "format":
        identity["format"] = 99
        said = "format 99"
    elif change == "alpha":
        words = ["--model.adapter.alpha", "64"]
        said = "adapter.alpha 16.0, not 64.0"
    elif change == "weights":
        (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 100)
        said = "does not fit"
    (adapter / "lightning_lora.json").write_text(json.dumps(identity))
    if change == "identity":
        (adapter / "lightning_lora.json").unlink()
        said = "nobody knows which base model"
    assert main(["test", "--run", str(exported.parent), "--checkpoint", str(adapter), "--before", "false", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("method", METHODS)
def test_every_method_exports_what_it_learnt(base: Path, tmp_path: Path, capsys, method: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run", method=method)
    formats = "[merged]" if method in ("bitfit", "full", "head", "none") else "[adapter, merged]"
    assert main(["export", "--run", str(run.path), "--formats", formats]) == 0
    certificate = json.loads((run.path / "export" / "certificate.json").read_text())
    for name in set(certificate) - {"trained"}:
        assert certificate[name]["max_logit_difference"] < 1e-4, (method, name)
        assert certificate[name]["labels_flipped"] == 0
    if "adapter" not in formats:
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_run_merges_into_the_full_base_and_says_what_that_changes(
    base, tmp_path, capsys, bits: int
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run", quantization={"bits": bits})
    assert main(["export", "--run", str(run.path), "--formats", "[adapter, merged]"]) == 0
    warned = "warning: adapter, merged differ from the trained model" in capsys.readouterr().out
    config = json.loads((run.path / "export" / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    from safetensors import safe_open

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--formats", "[gguf]"], "no format 'gguf'"),
        (["--rows", "0"], "--rows: a number of at least 1"),
        (["--push_to_hub", "../x"], "no name on the Hub"),
        (["--push_to_hub", "me/x"], "give its name on the Hub with --base_model_id"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    exported: Path, capsys, words: list[str], said: str
) -> None:
    assert main(["export", "--run", str(exported.parent), "--output", "other", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("other").exists()


def test_a_checkpoint_with_another_alpha_is_refused_too(exported: Path, capsys) -> None:
    assert main(["test", "--run", str(exported.parent), "--model.adapter.alpha", "64", "--before", "false"]) == 2
    assert "adapter.alpha 16.0, not 64.0" in capsys.readouterr().err


def test_the_card_of_another_checkpoint_has_that_one_s_metrics(exported: Path) -> None:
    from huggingface_hub import ModelCard

    words = ["--checkpoint", "last", "--formats", "[adapter]", "--output", "last"]
    assert main(["export", "--run", str(exported.parent), *words]) == 0
    certificate = json.loads(Path("last/certificate.json").read_text())
    results = ModelCard.load(Path("last/README.md")).data.eval_results
    accuracy = next(each.metric_value for each in results if each.metric_type == "accuracy")
    assert accuracy == pytest.approx(certificate["trained"]["accuracy"], abs=1e-6)
    assert not (exported.parent / "test-2.md").exists()


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_format_that_is_not_the_trained_model_is_left_out(exported, monkeypatch, capsys, difference) -> None:
    from lightning_lora.export import parity_check as parity

    right = parity.client

    def wrong(code: str):
        given = right(code)
        return lambda texts: given(texts) + (difference if "/merged'" in code else 0)

    monkeypatch.setattr(parity, "client", wrong)
    run = ["export", "--run", str(exported.parent)]
    assert main([*run, "--formats", "[merged]", "--output", "out"]) == 2
    assert "merged (differs from the trained model" in capsys.readouterr().err
    assert not Path("out").exists() and not list(Path().glob(".*out*"))
    assert main([*run, "--formats", "[adapter, merged]", "--output", "out"]) == 2  # merged was asked for
    assert "out holds adapter" in capsys.readouterr().err
    assert (Path("out") / "adapter" / "README.md").is_file() and not (Path("out") / "merged").exists()


def test_a_format_that_cannot_be_made_is_named_and_the_others_are_written(exported, monkeypatch, capsys) -> None:
    from lightning_lora.export import writer as format_writer

    def refuse(*args: object) -> None:
        raise RuntimeError("\x1b[31mno such operator | aten::x\x1b[0m\nsecond line")

    monkeypatch.setattr(format_writer, "write_onnx", refuse)
    assert main(["export", "--run", str(exported.parent), "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert "warning: not written: onnx (RuntimeError: no such operator / aten::x); onnx-int8 (" in out
    assert sorted(p.name for p in Path("out").iterdir() if p.is_dir()) == ["adapter", "merged"]
    certificate = json.loads(Path("out/certificate.json").read_text())
    assert certificate["onnx"] == {"missing": "RuntimeError: no such operator / aten::x"}
    assert "missing: RuntimeError" in Path("out/README.md").read_text()
    assert main(["export", "--run", str(exported.parent), "--output", "asked", "--formats", "[merged, onnx]"]) == 2
    assert "--formats: not written: onnx (RuntimeError" in capsys.readouterr().err
    assert Path("asked/merged/model.safetensors").is_file()


def test_without_the_package_for_onnx_the_others_are_written(exported, monkeypatch, capsys) -> None:
    from lightning_lora.export import writer as format_writer

    monkeypatch.setattr(format_writer, "_ONNX_PACKAGES", ("onnxfoo",))
    assert main(["export", "--run", str(exported.parent), "--output", "out"]) == 0
    assert "onnx needs the package 'onnxfoo': pip install" in capsys.readouterr().out
    assert main(["export", "--run", str(exported.parent), "--output", "asked", "--formats", "[onnx]"]) == 2
    assert "onnx needs the package 'onnxfoo': pip install" in capsys.readouterr().err
    assert not Path("asked").exists()


@pytest.mark.parametrize("gone", ["source", "labels", "record"])
def test_a_run_is_exported_without_its_data_or_record(base: Path, tmp_path: Path, capsys, gone: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run")
    if gone == "source":
        (place / "rows.csv").unlink()
    elif gone == "labels":
        write_csv(place / "rows.csv", make_rows(100, ("neg", "pos")))
    else:
        run.record.unlink()
    assert main(["export", "--run", str(run.path), "--formats", "[adapter, merged]"]) == 0
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


@pytest.mark.parametrize("truncation", ["both", "windows"])
def test_what_a_tokenizer_cannot_cut_is_cut_by_the_card_s_code(base, tmp_path, capsys, truncation: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    words = ["--data.truncation", truncation, "--data.max_length", "10", "--trainer.max_epochs", "6"]
    run = fit(place, base, "run", *words)
    assert main(["export", "--run", str(run.path), "--formats", "[adapter, merged, onnx]"]) == 0
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
    assert "warning: a pipeline or tokenizer alone, without encode.py, cuts otherwise" in out and warning in out
    for name in ("", "adapter", "merged", "onnx"):
        assert warning in (run.path / "export" / name / "README.md").read_text()


@pytest.mark.parametrize("truncation", ["head", "tail"])
def test_a_bare_pipeline_says_what_predict_says(base: Path, tmp_path: Path, truncation: str) -> None:
    from transformers import pipeline

    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run", "--data.truncation", truncation, "--data.max_length", "10")
    assert main(["export", "--run", str(run.path), "--formats", "[merged]"]) == 0
    expected = predicted(run.path, TEXTS)
    folder = str(run.path / "export" / "merged")
    for size in (1, 7):
        said = pipeline("text-classification", model=folder)(TEXTS, truncation=True, top_k=None, batch_size=size)
        got = [[next(e["score"] for e in row if e["label"] == name) for name in LABELS] for row in said]
        np.testing.assert_allclose(got, expected, atol=2e-5)
    assert not (run.path / "export" / "merged" / "encode.py").exists()


def change_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", ["padding", "left", "types", "bfloat16", "to_max"])
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
    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run", "--trainer.max_epochs", "1", *words)
    assert main(["export", "--run", str(run.path), "--formats", "[adapter, merged, onnx]"]) == 0
    check_probabilities(outside(run.path / "export", TEXTS, tmp_path), predicted(run.path, TEXTS))  # and one by one
    if case == "padding":
        assert json.loads((run.path / "export" / "merged" / "config.json").read_text())["pad_token_id"] == 4


def test_the_graph_of_a_run_that_reads_the_tail_is_given_the_tail(
    base: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run", "--data.truncation", "tail", "--data.max_length", "8")
    assert main(["export", "--run", str(run.path), "--formats", "[merged, onnx]"]) == 0
    text = "the film was a story of two people in town and their dog with some music dull awful"
    said = outside(run.path / "export", [text], tmp_path)
    assert main(["predict", "--run", str(run.path), text, "--output", "p.parquet"]) == 0
    ours = pq.read_table("p.parquet").to_pydict()
    for name in ("merged", "onnx"):
        got = torch.tensor(said[name]["logits"][0]).softmax(-1).numpy()
        np.testing.assert_allclose(got, [ours[f"p({label})"][0] for label in LABELS], atol=2e-5)
    saved = json.loads((run.path / "export" / "onnx" / "tokenizer.json").read_text())
    assert saved["truncation"]["direction"] == "Left"


def test_a_method_without_adapter_says_so(base: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = fit(place, base, "run", method="head")
    assert main(["export", "--run", str(run.path), "--formats", "[adapter]"]) == 2
    assert "method 'head' has no adapter; use merged" in capsys.readouterr().err


def push(run: Path, url: str, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    words = ("export", "--run", str(run), "--formats", "[adapter, merged]", "--output", str(place / "out"), *words)
    code = "import sys; from lightning_lora.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )


def test_the_folder_is_uploaded_whole_and_names_the_base_as_the_hub_does(exported: Path, tmp_path: Path) -> None:
    with stand_in() as (url, hub):
        done = push(exported.parent, url, tmp_path, "--push_to_hub", "me/reviews", "--base_model_id", "owner/base")
    assert done.returncode == 0, done.stderr
    assert hub.repos == {"me/reviews": "private"} and hub.tokens == {"Bearer hf_test"}
    files = hub.files["me/reviews"]
    written = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert files == written
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert b"base_model: owner/base" in files["README.md"]
    for name, content in files.items():  # no path of this machine leaves it
        assert str(tmp_path).encode() not in content and b"/tmp/" not in content, name


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(exported: Path, capsys) -> None:
    words = ["--formats", "[adapter]", "--output", "out", "--push_to_hub", "me/x", "--base_model_id", "o/b"]
    assert main(["export", "--run", str(exported.parent), *words]) == 2  # the tests are offline
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("error: --push_to_hub: 'me/x' was not uploaded")
    assert "hf upload me/x out" in error and Path("out/adapter/adapter_config.json").is_file()


def test_the_tokenizer_is_the_base_s(exported: Path, base: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "own")
    ours = json.loads((exported / "adapter" / "tokenizer.json").read_text())
    assert ours["model"] == json.loads((base / "tokenizer.json").read_text())["model"]
