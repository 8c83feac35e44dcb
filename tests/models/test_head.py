"""A head that the base model brings along, against what transformers' pipeline says of the base model's folder."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from lightning_lora.cli import main
from lightning_lora.models.base import Base, load_base
from lightning_lora.models.head import matching_rows
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.module import TextClassifier
from tests.conftest import make_rows, write_csv
from tests.models.tiny_bases import save_tiny_base

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 12, 14, 3]])
MASK = torch.ones_like(IDS)
#: With two, one and another kind of layer in the head, and architectures that are not in our table.
ARCHITECTURES = ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "qwen2", "bart", "mpnet", "flaubert"]


def headed(folder: Path, model_type: str, names: list[str], **more: Any) -> Path:
    """A base model with a head for these labels."""
    save_tiny_base(folder, model_type)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names), **labels, **more)
        model.save_pretrained(folder)
    return folder


def logits(base: Base | Any) -> torch.Tensor:
    model = base.model if isinstance(base, Base) else base
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [
        (["neg", "pos"], ["neg", "pos"], [0, 1]),
        (["neg", "pos"], ["pos", "neg"], [1, 0]),
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        (["NEGATIVE", "POSITIVE"], ["positive", " negative"], [1, 0]),
        (["pos", "Pos"], ["Pos", "pos"], [1, 0]),
        (["pos", "Pos"], ["pos", "POS"], None),
        (["neg", "pos"], ["reject", "approve"], None),
        (["neg", "pos"], ["neg", "pos", "mixed"], None),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], None),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
    ],
)
def test_names_decide(theirs: list[str], ours: list[str], rows: list[int] | None) -> None:
    assert matching_rows(theirs, ours) == rows


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_same_names_keep_the_head_in_any_order(tmp_path: Path, model_type: str) -> None:
    folder = headed(tmp_path / "base", model_type, ["a", "b", "c"])
    expected = logits(AutoModelForSequenceClassification.from_pretrained(folder))
    kept = load_base(str(folder), ["a", "b", "c"], 0)
    assert kept.head == "its own head"
    torch.testing.assert_close(logits(kept), expected, rtol=0, atol=1e-6)
    other = load_base(str(folder), ["c", "a", "b"], 0)
    assert other.head == "its own head, reordered from a, b, c"
    torch.testing.assert_close(logits(other), expected[:, [2, 0, 1]], rtol=0, atol=1e-6)
    assert other.head_modules == kept.head_modules != []


@pytest.mark.parametrize("names", [["reject", "approve", "ask"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["neg", "pos"]])
@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES} - {"modernbert"}))  # whose pooler stays pretrained
def test_other_names_get_the_head_of_a_base_model_without_one(tmp_path: Path, model_type: str, names: list) -> None:
    folder = headed(tmp_path / "base", model_type, names)
    bare = save_tiny_base(tmp_path / "bare", model_type)
    fresh, expected = (load_base(str(path), ["neg", "pos", "mixed"], 5) for path in (folder, bare))
    assert fresh.head == f"a fresh head (its own is for {', '.join(names)})" and expected.head == "a fresh head"
    assert fresh.head_modules == expected.head_modules
    for (name, value), (_, wanted) in zip(
        fresh.model.named_parameters(), expected.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, msg=name)
    fresh.model.save_pretrained(tmp_path / "saved")  # under the names that transformers looks for
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(fresh), rtol=0, atol=0)


def test_an_output_layer_as_wide_as_the_model_is_told_from_the_others(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(32)]  # as many as the hidden size
    folder = headed(tmp_path / "base", "roberta", names)
    expected = logits(AutoModelForSequenceClassification.from_pretrained(folder))
    found = logits(load_base(str(folder), names[::-1], 0))
    torch.testing.assert_close(found, expected.flip(1), rtol=0, atol=1e-6)


def test_a_kept_head_is_trained_and_saved_with_the_adapter(tmp_path: Path) -> None:
    folder = headed(tmp_path / "base", "mpnet", ["neg", "pos"])  # none of our table
    model = TextClassifier(str(folder), ["neg", "pos"])
    assert model.head_modules == ["classifier"]
    assert any("classifier" in name for name in model.checkpoint_keys())


def test_a_head_for_several_labels_at_once_becomes_one_for_one(tmp_path: Path) -> None:
    folder = headed(tmp_path / "base", "bert", ["neg", "pos"], problem_type="multi_label_classification")
    load_base(str(folder), ["neg", "pos"], 0).model.save_pretrained(tmp_path / "saved")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").config
    assert config.problem_type == "single_label_classification"


@pytest.mark.parametrize(("ours", "head"), [(("neg", "pos"), "own"), (("pos", "neg"), "reordered"), (None, "fresh")])
def test_before_is_what_pipeline_says_of_the_base_and_what_was_done_is_said(
    tmp_path: Path, ours: tuple[str, str] | None, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From plain rows to the record, as in a case where other names had been given the old head's meaning."""
    folder = headed(tmp_path / "base", "bert", ["neg", "pos"])
    rows = make_rows(80)
    if ours is None:  # the same labels under other names
        rows = [(text, {"neg": "approve", "pos": "reject"}[label]) for text, label in rows]
    source = write_csv(tmp_path / "rows.csv", rows)
    words = ["--model.base_model", str(folder), "--data.source", str(source), "--data.max_length", "64"]
    words += ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    words += ["--data.train_rows", "null", "--data.test_rows", "null", "--data.val_size", "20"]
    words += ["--data.test_size", "20", "--data.cache_dir", str(tmp_path / "cache")]
    if ours is not None:
        words += ["--data.label_names", f"[{', '.join(ours)}]"]
    assert main(["fit", *words, "--name", "run"]) == 0
    said = {"own": "with its own head", "reordered": "with its own head, reordered from neg, pos"}
    expected = said.get(head, "with a fresh head (its own is for neg, pos)")
    assert expected in capsys.readouterr().out
    run = RunFolder.open(Path("logs/run"))
    assert run.read()["model"]["head"] == expected.removeprefix("with ")
    assert main(["test", "--run", str(run.path)]) == 0
    assert f"before fine-tuning (base model {expected})" in capsys.readouterr().out
    if head == "fresh":
        return
    import pyarrow.parquet as pq

    tested = pq.read_table(run.path / "predictions" / "test.parquet").to_pylist()
    lines = source.read_text().splitlines()
    texts, truth = zip(*(lines[row["row"] - 1].split(",") for row in tested), strict=True)
    plain = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    said = [{row["label"]: row["score"] for row in rows} for rows in plain(list(texts))]
    before = run.read()["evaluations"]["test"]["before"]
    right = [max(scores, key=scores.__getitem__) == label for scores, label in zip(said, truth, strict=True)]
    assert before["accuracy"] == pytest.approx(sum(right) / len(right))
    losses = [-math.log(scores[label]) for scores, label in zip(said, truth, strict=True)]
    assert before["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
