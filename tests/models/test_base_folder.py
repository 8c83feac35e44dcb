"""Folders that are no base model, and what the message says to give instead, followed."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lightning_lora.errors import UserError
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import AdapterOptions, merged, tune
from tests.models.tiny_bases import save_tiny_base

LABELS = ["neg", "pos", "mixed"]


def refusal(path: Path) -> str:
    with pytest.raises(UserError, match=r"^model\.base_model: ") as raised:
        load_base(str(path), LABELS, 0)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def named(message: str) -> str:
    """The base model that a message says to set."""
    return re.search(r"set model\.base_model: (\S+)$", message)[1]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An adapter and the merged model side by side, as ``export`` writes them."""
    base = save_tiny_base(tmp_path / "base", "bert")
    tuned = tune(load_base(str(base), LABELS, 0), "lora", AdapterOptions(), 0, False)
    for name, parameter in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.model.save_pretrained(tmp_path / "export" / "adapter")
    merged(tuned).save_pretrained(tmp_path / "export" / "merged")
    for form in ("adapter", "merged"):
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "export" / form)
    return tmp_path / "export"


def test_an_adapter_names_its_base_and_the_merged_model_beside_it(export: Path) -> None:
    message = refusal(export / "adapter")
    assert "PEFT adapter for the base model" in message and str(export.parent / "base") in message
    assert Path(named(message)) == export / "merged"
    assert load_base(named(message), LABELS, 0).head == "its own head"


def test_an_adapter_alone_is_to_be_merged(export: Path) -> None:
    shutil.rmtree(export / "merged")
    assert "merge_and_unload" in refusal(export / "adapter")


def test_an_adapter_beside_weights_is_still_an_adapter(export: Path) -> None:
    shutil.copy(export / "adapter" / "adapter_config.json", export / "merged")  # of which transformers loads the base
    assert "PEFT adapter" in refusal(export / "merged")


def test_an_export_of_several_forms_names_the_merged_one(export: Path) -> None:
    assert Path(named(refusal(export))) == export / "merged"


def test_a_run_and_its_checkpoint_say_how_to_export(export: Path, tmp_path: Path) -> None:
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").write_bytes(b"x")
    for path in (run, run / "checkpoints" / "best.ckpt"):
        assert f"export it with python main.py export --run {run} and set" in refusal(path)
    export.rename(run / "export")
    for path in (run, run / "checkpoints" / "best.ckpt"):
        load_base(named(refusal(path)), LABELS, 0)


def test_a_file_and_folders_without_a_model_are_one_line(export: Path, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "bert")
    assert "is a file" in refusal(base / "model.safetensors")
    (export / "onnx").mkdir()
    (export / "onnx" / "model.onnx").write_bytes(b"x")
    shutil.copy(export / "merged" / "config.json", export / "onnx")
    assert "cannot load" in refusal(export / "onnx")
    (base / "model.safetensors").unlink()
    assert "cannot load" in refusal(base)
    (base / "config.json").unlink()
    assert "no usable model" in refusal(base)


def test_a_sentence_transformers_model_is_its_encoder(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "bert")
    (base / "modules.json").write_text("[]")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    expected = load_base(str(base), LABELS, 0)
    old = tmp_path / "old"  # where the encoder lies in a folder of its own
    shutil.copytree(base, old / "0_Transformer")
    shutil.copytree(base / "1_Pooling", old / "1_Pooling")
    (old / "modules.json").write_text("[]")
    assert Path(named(refusal(old))) == old / "0_Transformer"
    assert load_base(named(refusal(old)), LABELS, 0).fingerprint == expected.fingerprint


def test_weights_of_torch_are_read_as_safetensors_are(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "bert")
    expected = load_base(str(base), LABELS, 0).model.state_dict()
    from safetensors.torch import load_file

    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    for name, value in load_base(str(base), LABELS, 0).model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
