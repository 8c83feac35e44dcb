"""Pairs of texts through models, padded and packed, against plain transformers; and through training."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from lightning_lora import TextClassifier, TextDataModule
from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.tokens import InputFormat, tokenize
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.speedups import Speedups
from lightning_lora.tokenizer import load_tokenizer
from tests.conftest import PAIR_HEADER, make_pairs, save_pair_base, write_csv
from tests.models.test_packed import assert_packed_as_padded

COLUMNS = ["premise", "hypothesis"]
PAIRS = [row[:2] for row in make_pairs(20)]


def classifier(base: Path, method: str = "full", **settings) -> TextClassifier:
    return TextClassifier(str(base), ["a", "b", "c"], method, speedups=Speedups(kernels=False, **settings)).eval()


def dataset(base: Path, truncation: str = "longest_first") -> TokenDataset:
    tokenizer = load_tokenizer(str(base), "model.base_model")
    input_format = InputFormat.of(tokenizer, 26, truncation)  # type: ignore[arg-type]
    return TokenDataset(tokenize(PAIRS, tokenizer), input_format, torch.arange(20).numpy() % 3, pad_to_max=False)


@pytest.mark.parametrize("first_token_only", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_are_those_of_plain_transformers(
    make_base, tmp_path: Path, model_type: str, first_token_only: bool
) -> None:
    changes = {"roberta": {"type_vocab_size": 1}, "deberta-v2": {"type_vocab_size": 2}}.get(model_type, {})
    base = save_pair_base(make_base(model_type, initializer_range=0.3, **changes), tmp_path / "base", model_type)
    model, data = classifier(base, first_token_only=first_token_only), dataset(base)
    assert bool(data.input_format.types) == (model_type in ("bert", "albert", "electra", "deberta-v2"))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, attn_implementation="eager").eval()
    plain.load_state_dict(model.model.state_dict())
    first, second = (list(side) for side in zip(*PAIRS, strict=True))
    options = {"truncation": "longest_first", "max_length": 26, "padding": "longest", "return_tensors": "pt"}
    inputs = AutoTokenizer.from_pretrained(base)(first, second, **options)
    batch = data.__getitems__(list(range(20)))
    with torch.inference_mode():
        expected, found = plain(**inputs).logits, model.document_logits(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
        if data.input_format.types:  # they say something
            other = plain(**inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}).logits
            assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("truncation", ["longest_first", "only_second"])
@pytest.mark.parametrize("model_type", [name for name, each in ARCHITECTURES.items() if each.packs])
def test_packed_pairs_give_the_logits_and_gradients_of_padded_ones(
    make_base, tmp_path: Path, model_type: str, truncation: str
) -> None:
    base = save_pair_base(make_base(model_type, initializer_range=0.1), tmp_path / "base", model_type)
    assert_packed_as_padded(classifier(base), dataset(base, truncation))


def test_a_packed_batch_that_is_not_trusted_is_padded_with_its_types(tiny_base: Path, tmp_path: Path) -> None:
    base = save_pair_base(tiny_base, tmp_path / "base", "bert")
    model, data, order = classifier(base), dataset(base), list(range(20))
    expected = model.document_logits(data.__getitems__(order))
    data.pack_evaluation(900, 40)
    packed = data.__getitems__(order)
    torch.testing.assert_close(model.packed_batches.padded_logits(packed), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.document_logits(packed), expected, rtol=1e-5, atol=1e-5)


def test_the_probe_reads_the_states_of_pairs(make_base, tmp_path: Path) -> None:
    from lightning_lora.training.baselines import make_classifier

    base = save_pair_base(make_base("bert", initializer_range=0.3), tmp_path / "base", "bert")
    probe, batch = make_classifier(str(base), ["a", "b"], "probe").eval(), dataset(base).__getitems__([0, 1, 2])
    probe.model.gives_states = True
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        plain = AutoModel.from_pretrained(base).eval()(**{name: batch[name] for name in names}).last_hidden_state
        torch.testing.assert_close(probe.document_logits(batch)[:, :32], plain[:, 0], rtol=1e-5, atol=1e-5)


def test_training_is_the_same_packed_or_padded_in_python_or_by_fit(tiny_base: Path, tmp_path: Path) -> None:
    from lightning_lora.cli import main

    base = save_pair_base(tiny_base, tmp_path / "base", "bert")
    path = write_csv(tmp_path / "rows.csv", make_pairs(80), PAIR_HEADER)
    losses = []
    for packing in (False, True):
        data = TextDataModule(str(path), str(base), COLUMNS, max_length=40)
        model = TextClassifier(str(base), data.label_names, speedups=Speedups(packing=packing))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=1, accelerator="cpu", gradient_clip_val=1.0, **quiet)
        trainer.fit(model, data)
        assert model.packed_batches.rejected is None
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    words = ["--model.base_model", str(base), "--data.source", str(path), "--data.text_column", json.dumps(COLUMNS)]
    words += ["--config", "pairs.yaml", "--data.max_length", "40"]
    Path("pairs.yaml").write_text("trainer: {max_epochs: 1, accelerator: cpu, precision: 32-true}\n")
    assert main(["fit", "--name", "pairs", *words, "--trainer.enable_progress_bar", "false"]) == 0
    record = json.loads((Path("logs") / "pairs" / "run.json").read_text())
    assert record["data"]["truncation"] == record["config"]["data"]["truncation"] == "longest_first"
    assert record["best"]["metrics"]["val/loss"] == pytest.approx(losses[0], abs=1e-5)
