import errno
import shutil
from pathlib import Path
from typing import IO

import pytest
import torch

from lightning_lora.errors import UserError
from lightning_lora.models.methods import METHODS, AdapterOptions
from lightning_lora.runs.checkpoints import (
    AtomicCheckpointIO,
    CheckpointIdentity,
    load_checkpoint,
    read_checkpoint,
)
from lightning_lora.training.module import TextClassifier

WRITER = AtomicCheckpointIO()


def module(base: Path, labels: tuple[str, ...] = ("neg", "pos"), **settings) -> TextClassifier:
    return TextClassifier(str(base), list(labels), **settings)


def save(model: TextClassifier, path: Path) -> Path:
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    WRITER.save_checkpoint(checkpoint, path)
    return path


def shake(model: TextClassifier) -> TextClassifier:
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_brings_back_the_model_and_holds_what_is_trained(tiny_base: Path, tmp_path, method: str) -> None:
    trained = shake(module(tiny_base, method=method))
    path = save(trained, tmp_path / "a.ckpt")
    fresh = module(tiny_base, method=method)
    load_checkpoint(fresh, path)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)
    held = set(read_checkpoint(path)["state_dict"])
    kept = {n for n, p in trained.named_parameters() if p.requires_grad}
    if method == "none":  # nothing is trained, but the head is this run's own
        kept = {"model.classifier.weight", "model.classifier.bias", "model.bert.pooler.dense.weight"}
        kept &= held
    if method == "vera":  # with the random matrices that its vectors belong to
        kept |= {n for n, _ in trained.named_buffers(remove_duplicate=False) if "vera_" in n}
    kept |= {"temperature"} if method != "none" else set()
    assert held == kept and held


def test_an_adapter_checkpoint_is_small(make_base, tmp_path: Path) -> None:
    base = make_base("bert", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    size = save(module(base, adapter=AdapterOptions(target_modules="query_value")), tmp_path / "a.ckpt").stat().st_size
    assert size < (base / "model.safetensors").stat().st_size / 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ("pos", "neg")}, "trained with label_names .'neg', 'pos'., not .'pos', 'neg'."),
        ({"labels": ("neg", "pos", "mixed")}, "names and order must be the same"),
        ({"method": "head"}, "trained with method 'lora', not 'head'"),
        ({"adapter": AdapterOptions(rank=4)}, "has shape .* such as adapter.rank"),
        ({"adapter": AdapterOptions(target_modules="query_value")}, "holds .*, which is not trained here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tiny_base: Path, tmp_path: Path, change: dict, said: str) -> None:
    path = save(module(tiny_base), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=said) as raised:
        load_checkpoint(module(tiny_base, **change), path)
    assert str(path) in str(raised.value)


def test_another_base_model_of_the_same_shape_is_refused(make_base, tmp_path: Path) -> None:
    path = save(module(make_base("bert")), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="other weights"):
        load_checkpoint(module(make_base("bert", seed=1)), path)


def test_the_same_base_model_in_another_folder_is_accepted(tiny_base: Path, tmp_path: Path) -> None:
    path = save(module(tiny_base), tmp_path / "a.ckpt")
    load_checkpoint(module(Path(shutil.copytree(tiny_base, tmp_path / "moved"))), path)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "weight lost"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(tiny_base: Path, tmp_path: Path, damage: str) -> None:
    model = module(tiny_base)
    path = save(model, tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(path)
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        checkpoint["state_dict"].popitem()
        torch.save(checkpoint, path)
    with pytest.raises(UserError) as raised:
        load_checkpoint(model, path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, tiny_base: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path = tmp_path / "a.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_a_failed_write_is_raised_and_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    WRITER.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)

    def fail(checkpoint: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        WRITER.save_checkpoint({"state_dict": {}}, path)
    torch.testing.assert_close(read_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_load_from_checkpoint_of_lightning_works_too(tiny_base: Path, tmp_path: Path, reviews: Path) -> None:
    from lightning import Trainer

    model = shake(module(tiny_base, adapter=AdapterOptions(rank=4)))
    trainer = Trainer(logger=False, enable_checkpointing=False, plugins=[WRITER], max_epochs=0, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_a_checkpoint_of_an_own_trainer_resumes_within_an_epoch(tiny_base: Path, tmp_path: Path, reviews: Path) -> None:
    from lightning import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_lora import TextDataModule

    class Rows(Callback):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.seen.append(batch["rows"].tolist())

    def fit(*callbacks: Callback, path: Path | None = None) -> tuple[list[list[int]], dict]:
        data = TextDataModule(str(reviews), str(tiny_base), max_length=32, batch_size=8)
        model = TextClassifier(str(tiny_base), data.label_names, learning_rate=5e-3)
        rows = Rows()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=2, callbacks=[rows, *callbacks], enable_checkpointing=bool(callbacks), **quiet)
        trainer.fit(model, data, ckpt_path=path)
        return rows.seen, {name: value.clone() for name, value in model.state_dict().items()}

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    rows, weights = fit(keep)
    for step in (6, 24):  # of the first epoch, and of the second
        left, resumed = fit(path=tmp_path / f"step={step}.ckpt")
        assert left == rows[step:]
        for name, value in weights.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_a_checkpoint_of_another_format_is_refused_with_both_numbers(version: object) -> None:
    identity = CheckpointIdentity("base", "abc", ["neg", "pos"], "lora")
    checkpoint: dict = {}
    identity.write_to(checkpoint)
    identity.check(checkpoint)
    checkpoint["lightning_lora"]["format"] = version
    with pytest.raises(UserError, match=f"has format {version}; this version reads 1"):
        identity.check(checkpoint)
