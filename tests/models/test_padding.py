"""What is trained, what is predicted and what ``pipeline`` says of the saved folder agree on the padding."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lightning_lora.config.configured_run import check_base
from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.tokens import load_tokenizer, tokenize
from lightning_lora.errors import UserError
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import merged
from lightning_lora.training.module import TextClassifier
from tests.conftest import VOCABULARY, make_rows, slow_but
from tests.models.tiny_bases import save_tiny_base

TEXTS = [text for text, _ in make_rows(40, seed=3)] + ["dull", "fine !", "? the film"]
MODELS = ["qwen2", "llama", "gpt2", "bert", "roberta"]
TOKENIZERS: dict[str, dict[str, Any]] = {
    "as the config": {},
    "another padding token": {"pad_token": "[SEP]"},
    "no padding token": {"pad_token": None, "eos_token": "[SEP]"},
    "only an unknown token": {"pad_token": None},
    "padding on the left": {"padding_side": "left"},
}


def change_tokenizer(folder: Path, **changes: Any) -> None:
    """Writes the tokenizer of a folder again with other settings."""
    from transformers import PreTrainedTokenizerFast

    settings = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | changes
    file = str(folder / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, **settings).save_pretrained(folder)


def predicted(model: TextClassifier, data: TextDataModule) -> np.ndarray:
    """Probabilities as ``predict`` makes them, all texts in one batch."""
    batch = TokenDataset(tokenize(TEXTS, data.tokenizer), data.input_format, None, False).__getitems__(
        list(range(len(TEXTS)))
    )
    with torch.no_grad():
        return model.eval().document_logits(batch).softmax(-1).numpy()


@pytest.mark.parametrize("tokenizer", slow_but(["as the config", "no padding token"], TOKENIZERS))
@pytest.mark.parametrize("pad_in_config", [0, 7, None])  # None: the architecture's own, or none
@pytest.mark.parametrize("model_type", MODELS)
def test_pipeline_says_of_the_saved_folder_what_the_model_says(
    tmp_path: Path, model_type: str, pad_in_config: int | None, tokenizer: str
) -> None:
    base = save_tiny_base(tmp_path / "base", model_type, pad_token_id=pad_in_config)
    change_tokenizer(base, **TOKENIZERS[tokenizer])
    torch.manual_seed(0)
    data = TextDataModule("nothing.csv", str(base), max_length=60)
    model = TextClassifier(str(base), ["neg", "pos"])
    for parameter in model.parameters():
        if parameter.requires_grad:  # an adapter and a head that do something
            torch.nn.init.normal_(parameter, std=0.1)
    check_base(model, data, None)
    ours = predicted(model, data)
    assert ours[:, 0].std() > 1e-4
    merged(model.tuned).save_pretrained(tmp_path / "saved")
    data.tokenizer.save_pretrained(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    plain = pipeline("text-classification", model=saved, device="cpu", dtype=torch.float32, top_k=None)
    for batch_size in (1, 8):
        said = [{row["label"]: row["score"] for row in rows} for rows in plain(TEXTS, batch_size=batch_size)]
        np.testing.assert_allclose([[row["neg"], row["pos"]] for row in said], ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama", "deberta-v2"])
@pytest.mark.parametrize("added", ["tokens", "special tokens", "padding"])
def test_tokens_without_an_embedding_are_refused_with_what_gives_them_one(
    tmp_path: Path, model_type: str, added: str
) -> None:
    base = save_tiny_base(tmp_path / "base", model_type)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if added == "tokens":
        tokenizer.add_tokens(["covid", "vaccine"])
    elif added == "special tokens":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    rows = len(VOCABULARY)
    with pytest.raises(UserError, match=f"beyond the {rows} that the model has an embedding for") as raised:
        load_base(str(base), ["a", "b"], 0)
    assert "\n" not in str(raised.value)
    follow(str(raised.value))  # in the test's own folder
    model = load_base("resized", ["a", "b"], 0).model
    assert len(model.get_input_embeddings().weight) > rows
    old = load_base(str(save_tiny_base(tmp_path / "again", model_type)), ["a", "b"], 0).model
    torch.testing.assert_close(model.get_input_embeddings().weight[:rows], old.get_input_embeddings().weight)


def follow(message: str) -> None:
    """Does what a message says between "with: " and " and set", in this process."""
    python, option, code = shlex.split(re.search(r"with: (.*) and set model\.base_model", message)[1])
    assert (python, option) == ("python", "-c")
    exec(code, {})


def test_special_tokens_that_a_class_of_tokenizers_adds_are_no_reason_to_refuse(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "qwen2")
    assert len(load_tokenizer(str(base), "k")) > len(VOCABULARY)  # its own end-of-text token
    load_base(str(base), ["a", "b"], 0)


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "bert")
    settings = dict.fromkeys(("pad_token", "unk_token"))
    change_tokenizer(base, **settings)
    config = (base / "tokenizer_config.json").read_text()
    (base / "tokenizer_config.json").write_text(
        config.replace("{", '{"tokenizer_class": "PreTrainedTokenizerFast",', 1)
    )
    try:
        tokenizer = load_tokenizer(str(base), "model.base_model")
    except UserError as error:
        assert "set pad_token in its tokenizer_config.json" in str(error) and "\n" not in str(error)
    else:  # the class of the architecture brings one of its own
        assert tokenizer.pad_token_id < len(VOCABULARY)


@pytest.mark.parametrize("pad_in_config", [0, 7])
def test_positions_of_roberta_are_counted_as_they_were_pretrained(tmp_path: Path, pad_in_config: int) -> None:
    """Against the base model as plain transformers reads it, with the tokenizer's padding."""
    base = save_tiny_base(tmp_path / "base", "roberta", pad_token_id=pad_in_config)
    change_tokenizer(base, pad_token="[SEP]", sep_token="[MASK]")
    model = load_base(str(base), ["a", "b"], 0).model.eval()
    assert model.config.pad_token_id == pad_in_config
    ids = torch.tensor([[2, 7, 9, 11, 4], [2, 8, 4, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    plain = AutoModelForSequenceClassification.from_pretrained(base).roberta.eval()
    with torch.no_grad():
        ours = model.roberta(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        theirs = plain(input_ids=ids[1:, :3], attention_mask=mask[1:, :3]).last_hidden_state[:, 0]
    torch.testing.assert_close(ours[1:], theirs, rtol=0, atol=1e-6)
