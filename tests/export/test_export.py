"""``export`` of one run: what it writes, the card, the certificate, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lightning_lora.cli import main
from lightning_lora.commands.export import package_of
from lightning_lora.export.card import card_metrics
from lightning_lora.runs.folder import RunFolder
from tests.export.conftest import LABELS, ROOT, TEXTS, check_probabilities, export, fit, outside, predicted
from tests.hub_stand_in import stand_in


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats of a run; nothing in it is changed."""
    run = fit(tmp_path_factory.mktemp("exported"), base, "--trainer.max_epochs", "6")
    assert main(["test", "--run", str(run.path), "--before", "false"]) == 0
    export(run)
    return run.path / "export"


def test_other_software_says_what_the_trained_model_says(exported: Path, tmp_path: Path) -> None:
    said = outside(exported, TEXTS, tmp_path)
    assert list(said) == ["merged", "adapter", "onnx", "onnx-int8"]
    assert all(each["labels"] == list(LABELS) for each in said.values())
    expected = predicted(exported.parent, TEXTS)
    check_probabilities(said, expected)
    assert len(set(expected.argmax(1))) > 1  # the model says something


def test_each_folder_brings_what_it_needs(exported: Path, base: Path) -> None:
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
    tokenizers = [json.loads((each / "tokenizer.json").read_text()) for each in (exported / "adapter", base)]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]
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
    assert all(
        row["latency_p95_ms"] >= row["latency_ms"] > 0 and row["texts_per_s"] > 0 for row in certificate.values()
    )
    for row in certificate.values():  # 48 test rows, and joined ones where too few of them are long
        assert row["rows"] - row["made_up"] == 48 and row["long_rows"] >= 20
        assert row["single_rows"] == min(row["rows"], 100)


def test_few_texts_have_no_latency_and_the_card_says_what_is_unknown(exported: Path, base: Path, capsys) -> None:
    words = ["--run", str(exported.parent), "--formats", "[adapter]", "--output", "few", "--rows", "5"]
    assert main(["export", *words]) == 0
    said = capsys.readouterr().out
    assert f"where it lies here ({base})" in said and "--base_model_id OWNER/NAME" in said
    card = Path("few/README.md").read_text()
    assert "terms: not known here; ask who made the data" in card and "percentile of a text alone" not in card
    assert str(base) not in card  # nor any other path of this machine
    assert all(
        line.endswith("| - |") for line in card.splitlines() if line.startswith(("| the trained", "| `adapter`"))
    )
    machine = RunFolder(exported.parent).read()["machine"]
    assert f"({machine['processor']}, {machine['cores']} cores" in (exported / "README.md").read_text()


def test_a_base_model_in_a_package_is_installed_by_the_name_of_its_distribution() -> None:
    assert package_of("package:_pytest/mark") == f"pytest=={metadata.version('pytest')}"
    assert package_of("owner/name") is package_of("package:missing/model") is None


def test_the_card_s_metadata_is_what_the_hub_reads(exported: Path) -> None:
    from huggingface_hub import ModelCard

    for place, library in (("", "peft"), ("adapter", "peft"), ("merged", "transformers"), ("onnx", "onnx")):
        card = ModelCard.load(exported / place / "README.md")
        assert card.data.library_name == library and card.data.pipeline_tag == "text-classification"
        assert card.data.license == "unknown"
        assert card.data.metrics == ["accuracy", "f1", "precision", "recall", "matthews_correlation"]
        result = next(each for each in card.data.eval_results if each.metric_type == "accuracy")
        after = RunFolder(exported.parent).read()["evaluations"]["test"]["after"]
        assert result.metric_value == pytest.approx(after["accuracy"], abs=1e-6)
        assert "48 test rows and" in card.text and "| `merged` |" in card.text


def test_a_metric_that_is_not_defined_is_not_in_the_card() -> None:
    """One number for all rows has no correlation: null in the record, NaN where it is computed."""
    given = {"mse": 2.0, "mae": 0.0, "pearson": None, "spearman": float("nan")}
    assert [(name, value) for name, _, value in card_metrics(given)] == [("mse", 2.0), ("mae", 0.0)]


def test_the_card_s_code_runs_as_it_stands(exported: Path, monkeypatch, capsys) -> None:
    for place in ("", "adapter", "merged", "onnx"):
        blocks = re.findall(r"```python\n(.*?)```", (exported / place / "README.md").read_text(), flags=re.DOTALL)
        assert len(blocks) == (4 if not place else 1)
        monkeypatch.chdir(exported / place)
        for block in blocks:
            exec(compile(block, f"{place}/README.md", "exec"), {})
            said = capsys.readouterr().out
            assert any(label in said for label in LABELS)


def test_the_card_of_another_checkpoint_has_that_one_s_metrics(exported: Path) -> None:
    from huggingface_hub import ModelCard

    words = ["--checkpoint", "last", "--formats", "[adapter]", "--output", "last"]
    assert main(["export", "--run", str(exported.parent), *words]) == 0
    certificate = json.loads(Path("last/certificate.json").read_text())
    results = ModelCard.load(Path("last/README.md")).data.eval_results
    accuracy = next(each.metric_value for each in results if each.metric_type == "accuracy")
    assert accuracy == pytest.approx(certificate["trained"]["accuracy"], abs=1e-6)
    assert not (exported.parent / "test-2.md").exists()


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


def test_a_checkpoint_with_another_alpha_is_refused_too(exported: Path, capsys) -> None:
    assert main(["test", "--run", str(exported.parent), "--model.adapter.alpha", "64", "--before", "false"]) == 2
    assert "adapter.alpha 16.0, not 64.0" in capsys.readouterr().err


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


def test_a_pipeline_is_compared_on_the_cpu_like_the_other_formats() -> None:
    """On a machine with a GPU it would take that, and the card would say so of the processor."""
    from lightning_lora.export.parity import run_code

    code = """
from unittest.mock import Mock
classify = Mock(device="cuda:0")
classify.model.cpu.return_value.device = "cpu"
classify.model.config.label2id = {"a": 0}
classify.side_effect = lambda *args, **kwargs: [[{"label": "a", "score": 2.0 if classify.device == "cpu" else 0.0}]]
"""
    assert run_code(code)(["x"]).tolist() == [[2.0]]


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_format_that_is_not_the_trained_model_is_left_out(exported, monkeypatch, capsys, difference) -> None:
    from lightning_lora.export import parity

    right = parity.run_code

    def wrong(code: str):
        given = right(code)
        return lambda texts: given(texts) + (difference if "/merged'" in code else 0)

    monkeypatch.setattr(parity, "run_code", wrong)
    run = ["export", "--run", str(exported.parent)]
    assert main([*run, "--formats", "[merged]", "--output", "out"]) == 2
    assert "merged (differs from the trained model" in capsys.readouterr().err
    assert not Path("out").exists() and not list(Path().glob(".*out*"))
    assert main([*run, "--formats", "[adapter, merged]", "--output", "out"]) == 2  # merged was asked for
    assert "out holds adapter" in capsys.readouterr().err
    assert (Path("out") / "adapter" / "README.md").is_file() and not (Path("out") / "merged").exists()


def test_a_format_that_cannot_be_made_is_named_and_the_others_are_written(exported, monkeypatch, capsys) -> None:
    from lightning_lora.export import formats

    def refuse(*args: object) -> None:
        raise RuntimeError("\x1b[31mno such operator | aten::x\x1b[0m\nsecond line")

    monkeypatch.setattr(formats, "write_onnx", refuse)
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
    from lightning_lora.export import formats

    monkeypatch.setattr(formats, "_ONNX_PACKAGES", ("onnxfoo",))
    assert main(["export", "--run", str(exported.parent), "--output", "out"]) == 0
    assert "onnx needs the package 'onnxfoo': pip install" in capsys.readouterr().out
    assert main(["export", "--run", str(exported.parent), "--output", "asked", "--formats", "[onnx]"]) == 2
    assert "onnx needs the package 'onnxfoo': pip install" in capsys.readouterr().err
    assert not Path("asked").exists()


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
