"""The mean of a text's states, against plain transformers; chosen as sentence-transformers says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from lightning_lora.errors import UserError
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.pooling import pools_mean
from lightning_lora.training.module import TextClassifier
from tests.conftest import LANGUAGE_MODELS
from tests.models.test_packed import assert_packed_as_padded, rows

MEANS = sorted({*ARCHITECTURES} - {*LANGUAGE_MODELS, "modernbert"})  # which has a setting of its own


def made_for_mean(base: Path, tmp_path: Path, content: dict | str | None = None) -> Path:
    """A copy of a base that says it was made for means."""
    copy = Path(shutil.copytree(base, tmp_path / "made-for-mean"))
    (copy / "1_Pooling").mkdir()
    content = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True} if content is None else content
    text = content if isinstance(content, str) else json.dumps(content)
    (copy / "1_Pooling" / "config.json").write_text(text)
    return copy


@pytest.mark.parametrize("model_type", MEANS)
def test_the_head_reads_the_mean_of_what_transformers_gives_each_text_alone(
    make_base: Callable[..., Path], model_type: str
) -> None:
    base = make_base(model_type)
    model = TextClassifier(str(base), ["a", "b"], pooling="mean", attention="eager").eval()
    plain = AutoModel.from_pretrained(base, attn_implementation="eager").eval()
    inner = model.model.base_model.model
    texts = [[2, 7, 9, 3], [2, 8, 3], [2, 5, 6, 7, 8, 9, 10, 3]]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    if model_type not in ("bert", "distilbert", "electra", "deberta-v2", "albert"):
        ids += inner.config.pad_token_id
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
    with torch.no_grad():
        found = model(ids, mask)
        for i, text in enumerate(texts):
            given = torch.tensor([text])
            states = plain(given, attention_mask=torch.ones_like(given))[0]
            state = states.mean(1)
            if model_type in ("bert", "albert"):
                logits = inner.classifier(state)
            elif model_type == "distilbert":
                logits = inner.classifier(torch.relu(inner.pre_classifier(state)))
            elif model_type == "deberta-v2":
                logits = inner.classifier(inner.pooler(state[:, None]))
            else:
                logits = inner.classifier(state[:, None])
            torch.testing.assert_close(found[i : i + 1], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", ["head", "windows"])
@pytest.mark.parametrize("model_type", [name for name in MEANS if ARCHITECTURES[name].packs])
def test_packed_texts_give_the_logits_and_gradients_of_padded_ones(make_base, model_type: str, keep: str) -> None:
    model = TextClassifier(str(make_base(model_type)), ["a", "b", "c"], "full", pooling="mean").eval()
    assert model.packed_batches.cannot is None
    assert_packed_as_padded(model, rows(keep))


@pytest.mark.parametrize(
    ("content", "mean"),
    [
        (None, True),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, True),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, False),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, False),
        ("no json", False),
    ],
)
def test_auto_is_what_the_base_was_made_for(tiny_base: Path, tmp_path: Path, content, mean: bool) -> None:
    base = made_for_mean(tiny_base, tmp_path, content)
    assert pools_mean(base / "1_Pooling" / "config.json") is mean
    model = TextClassifier(str(base), ["a", "b"])
    assert model.pooling == ("mean" if mean else "first")
    assert ("mean" in model.head_origin) is mean
    assert TextClassifier(str(base), ["a", "b"], pooling="first").pooling == "first"
    assert TextClassifier(str(tiny_base), ["a", "b"]).pooling == "first"


def test_a_head_that_was_trained_on_the_first_token_keeps_it(make_base, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(make_base("bert"), num_labels=2)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    shutil.copytree(make_base("bert"), tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    base = made_for_mean(tmp_path / "tuned", tmp_path)
    assert TextClassifier(str(base), ["a", "b"]).pooling == "first"
    for others in (["a", "b", "c"], ["c", "d"]):  # a new head, of another size and of the same
        assert TextClassifier(str(base), others).pooling == "mean"


@pytest.mark.parametrize("model_type", ["modernbert", "mpnet"])
def test_where_the_mean_cannot_be_read_that_is_said(make_base, model_type: str) -> None:
    with pytest.raises(UserError, match=r"model\.pooling: .*give first"):
        TextClassifier(str(make_base(model_type)), ["a", "b"], pooling="mean")


def test_an_unused_pooler_is_neither_trained_nor_saved(make_base) -> None:
    model = TextClassifier(str(make_base("bert")), ["a", "b"], pooling="mean")
    assert model.head_modules == ["classifier"] and not [n for n, _ in model.named_parameters() if "pooler" in n]


def test_a_checkpoint_of_the_other_pooling_is_refused(make_base, tmp_path: Path) -> None:
    base = str(make_base("bert"))
    model = TextClassifier(base, ["a", "b"], pooling="mean")
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="trained with pooling mean, not first"):
        TextClassifier(base, ["a", "b"], pooling="first").on_load_checkpoint(checkpoint)
