"""The file that exports bring for truncations that no tokenizer does: the same token ids as in training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.tokens import InputFormat, load_tokenizer, tokenize
from lightning_lora.evaluation.documents import pooled
from lightning_lora.export.encode import Encoder
from lightning_lora.export.formats import write_identity, write_tokenizer
from lightning_lora.runs.checkpoints import CheckpointIdentity
from tests.conftest import make_rows


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("truncation", ["head", "tail", "both", "windows"])
def test_texts_are_encoded_as_in_training(tiny_base: Path, tmp_path: Path, truncation, padding: str) -> None:
    tokenizer = load_tokenizer(str(tiny_base), "model.base_model")
    input_format = InputFormat.of(tokenizer, 11, truncation)
    write_tokenizer(tmp_path, str(tiny_base), input_format, padding)
    write_identity(tmp_path, CheckpointIdentity("base", "0", ["a", "b"], "lora"), input_format, padding)
    texts = [text for text, _ in make_rows(40)]
    batch = TokenDataset(tokenize(texts, tokenizer), input_format, None, padding == "max_length").__getitems__(
        range(40)
    )
    seen: dict[str, list[np.ndarray]] = {"input_ids": [], "attention_mask": []}

    def run(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        seen["input_ids"].append(input_ids)
        seen["attention_mask"].append(attention_mask)
        return np.stack([(input_ids * attention_mask).sum(1), attention_mask.sum(1)], axis=1).astype(np.float32) / 10

    logits = Encoder(tmp_path, batch_size=7).logits(texts, run)
    assert max(map(len, seen["input_ids"])) == 7 and seen["input_ids"][0].shape[1] == 11
    given = {name: np.concatenate(parts) for name, parts in seen.items()}
    for name, ids in given.items():
        np.testing.assert_array_equal(ids, batch[name].numpy())
    expected = torch.from_numpy(run(**given))
    if "documents" in batch:
        assert len(batch["documents"]) > 40
        expected = pooled(expected, batch["documents"], 40)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert json.loads((tmp_path / "lightning_lora.json").read_text())["truncation"] == truncation
    assert (tmp_path / "encode.py").exists() == (truncation in ("both", "windows"))
