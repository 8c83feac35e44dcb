"""Language models as the base: what plain transformers and PEFT say, padded and one by one; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from lightning_lora.config.configured_run import check_base
from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.tokens import InputFormat, Truncation, load_tokenizer, tokenize
from lightning_lora.errors import UserError
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import METHODS, AdapterOptions, merged, tune
from lightning_lora.models.quantization import Quantization
from lightning_lora.models.speedups import Speedups
from lightning_lora.training.module import TextClassifier
from tests.conftest import LANGUAGE_MODELS, make_rows
from tests.models.tiny_bases import save_tiny_base

LABELS = ["a", "b", "c"]
END = "<|endoftext|>"
TEXTS = [text for text, _ in make_rows(12, seed=3)] + ["dull", "fine film", f"the film{END}", f"a dog{END}{END}"]
#: Names as a person writes them who adapts all linear layers by PEFT.
ALL_LINEAR = {
    **{name: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] for name in LANGUAGE_MODELS},
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def bare_tokenizer(folder: Path, **tokens: str) -> Path:
    """Replaces the tokenizer by one that adds no special tokens to a text, as GPT-2's and Qwen's."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    named = {"unk_token": "[UNK]"} | tokens
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    return folder


def byte_base(folder: Path, model_type: str) -> Path:
    """A base with byte-level tokens as GPT-2's and Qwen's, an end-of-text token and none for padding (Phi-3 has)."""
    pad = {"pad_token_id": 0 if model_type == "phi3" else None}
    save_tiny_base(folder, model_type, vocab_size=300, bos_token_id=0, eos_token_id=0, **pad)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)
    return folder


def trained(base: Path, **settings: Any) -> TextClassifier:
    """A model whose adapter and head do something."""
    model = TextClassifier(str(base), LABELS, **settings)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def batch_of(texts: list[str], data: TextDataModule) -> dict[str, torch.Tensor]:
    return TokenDataset(tokenize(texts, data.tokenizer), data.input_format, None, False).__getitems__(
        list(range(len(texts)))
    )


@torch.no_grad()
def said(model: TextClassifier, texts: list[str], data: TextDataModule) -> torch.Tensor:
    """Logits as ``predict`` computes them, in one batch."""
    return model.document_logits(batch_of(texts, data))


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_it_says_what_plain_peft_says_in_a_batch_and_one_by_one(tmp_path: Path, model_type: str) -> None:
    base = byte_base(tmp_path / "base", model_type)
    data = TextDataModule("nothing.csv", str(base), max_length=60)
    model = trained(base)
    check_base(model, data, None)
    ours = said(model, TEXTS, data)
    assert ours.std(0).min() > 1e-3
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0, dtype="float32")
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, lora_alpha=16, target_modules=ALL_LINEAR[model_type],
        fan_in_fan_out=model_type == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(plain, config).eval()
    found = theirs.load_state_dict(model.model.state_dict(), strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    batch = batch_of(TEXTS, data)
    with torch.no_grad():
        together = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = [
            theirs(**data.tokenizer(text, truncation=True, max_length=60, return_tensors="pt")).logits for text in TEXTS
        ]
    torch.testing.assert_close(ours, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, torch.cat(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, torch.cat([said(model, [text], data) for text in TEXTS]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_text_that_ends_with_the_padding_token_is_read_alike_everywhere(tmp_path: Path, model_type: str) -> None:
    """Before that token, where transformers reads it: what comes behind is not seen by the state that is read."""
    base = byte_base(tmp_path / "base", model_type)
    data = TextDataModule("nothing.csv", str(base), max_length=60)
    model = trained(base)
    texts = ["the film was fine", f"the film was fine{END}", f"the film was fine{END}{END}{END}", END, TEXTS[0]]
    ours = said(model, texts, data)
    torch.testing.assert_close(ours[1:3], ours[:1].expand(2, -1), rtol=0, atol=1e-5)
    merged(model.tuned).save_pretrained(tmp_path / "saved")
    data.tokenizer.save_pretrained(tmp_path / "saved")
    classify = pipeline("text-classification", model=str(tmp_path / "saved"), device="cpu", top_k=None)
    for size in (1, 5):
        for text, row, scores in zip(texts, ours.softmax(-1), classify(texts, batch_size=size), strict=True):
            found = {each["label"]: each["score"] for each in scores}
            np.testing.assert_allclose([found[name] for name in LABELS], row, atol=1e-5, err_msg=text)


@pytest.mark.parametrize(
    ("tokens", "in_config", "chosen"),
    [
        ({"pad_token": "[PAD]", "eos_token": "[SEP]"}, 3, "[PAD]"),  # the tokenizer's
        ({"eos_token": "[SEP]"}, 0, "[PAD]"),  # the config's, a special token
        ({"eos_token": "[SEP]"}, 7, "[SEP]"),  # the config's is a word
        ({"eos_token": "[SEP]"}, None, "[SEP]"),
        ({}, None, "[UNK]"),
    ],
)
def test_the_padding_token_is_one_that_texts_hardly_hold(
    tmp_path: Path, tokens: dict[str, str], in_config: int | None, chosen: str
) -> None:
    base = bare_tokenizer(save_tiny_base(tmp_path / "base", "llama", pad_token_id=in_config), **tokens)
    tokenizer = load_tokenizer(str(base), "k")
    assert tokenizer.pad_token == chosen
    config = load_base(str(base), LABELS, 0).model.config
    assert config.pad_token_id == tokenizer.pad_token_id and config.use_cache is False


def test_a_token_that_ends_every_text_is_not_what_pads_it(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "llama", pad_token_id=None)  # its tokenizer adds [CLS] and [SEP]
    file = str(base / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, unk_token="[UNK]", eos_token="[SEP]").save_pretrained(base)
    assert load_tokenizer(str(base), "k").pad_token == "[UNK]"


@pytest.mark.parametrize("keep", ["head", "tail", "both", "windows"])
def test_the_last_token_that_is_kept_is_read_and_special_tokens_stay(tmp_path: Path, keep: Truncation) -> None:
    base = save_tiny_base(tmp_path / "base", "llama")
    tokenizer = load_tokenizer(str(base), "k")
    for input_format in (
        InputFormat.of(tokenizer, 10, keep),
        InputFormat((2,), (), 0, 10, keep, 2 * (keep == "windows")),
    ):
        parts = input_format.inputs(np.arange(5, 30))
        assert all(part[0] == 2 and len(part) <= 10 for part in parts)  # the token that begins a text
        assert all(part[-1] == 3 for part in parts) == bool(input_format.suffix)
        end = len(parts[-1]) - len(input_format.suffix) - 1
        assert parts[-1][end] == (2 + end + 2 if keep == "head" else 29)
        model = trained(base)
        ids = torch.tensor(parts[-1]).long()[None]
        for changed in (1, end, ids.shape[1] - 1):  # each of them reaches what is read
            other = ids.clone()
            other[0, changed] = 30
            with torch.no_grad():
                assert (model(ids, ids**0) - model(other, other**0)).abs().max() > 1e-4


def test_a_text_of_which_no_token_is_left_gets_a_prediction(tmp_path: Path) -> None:
    base = bare_tokenizer(save_tiny_base(tmp_path / "base", "gpt2"), pad_token="[PAD]")
    data = TextDataModule("nothing.csv", str(base), max_length=60)
    model, nothing = trained(base), "�"  # which this tokenizer drops
    assert not data.tokenizer(nothing)["input_ids"]
    assert data.input_format.input_lengths(tokenize([nothing, "fine film"], data.tokenizer)).tolist() == [1, 2]
    together, alone = said(model, [nothing, TEXTS[0]], data)[:1], said(model, [nothing], data)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "phi3"])
def test_every_method_learns_and_merges(make_base: Callable[..., Path], model_type: str, method: str) -> None:
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    base = load_base(str(make_base(model_type)), LABELS, 0)
    if method == "bitfit" and model_type == "phi3":
        with pytest.raises(UserError, match="bitfit trains biases, and 'phi3' has none"):
            tune(base, method, AdapterOptions(), 0, False)
        return
    tuned = tune(base, method, AdapterOptions(), 0, False)
    with torch.no_grad():
        start = tuned.model.eval()(**inputs).logits
    weights = [p for p in tuned.model.train().parameters() if p.requires_grad]
    if METHODS[method].trains:
        optimizer = torch.optim.SGD(weights, lr=0.5)
        nn.functional.cross_entropy(tuned.model(**inputs).logits, torch.tensor([0, 1])).backward()
        optimizer.step()
    with torch.no_grad():
        after = tuned.model.eval()(**inputs).logits
        plain = merged(tuned)
        torch.testing.assert_close(plain(**inputs).logits, after, rtol=0, atol=1e-4)
    assert bool((after - start).abs().max() > 1e-3) == METHODS[method].trains
    assert not any("lora" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(make_base: Callable[..., Path], model_type: str) -> None:
    ids, mask = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    found = []
    for checkpointing in (False, True):
        model = trained(make_base(model_type), gradient_checkpointing=checkpointing).train()
        nn.functional.cross_entropy(model(ids, mask), torch.tensor([0, 1])).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert any(gradient.any() for name, gradient in found[0].items() if "lora_A" in name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_all_linear_layers_are_adapted_on_a_quantized_base(
    make_base: Callable[..., Path], model_type: str, bits: int
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128}
    base = make_base(model_type, **({"n_inner": 128, "hidden_size": 64} if model_type == "gpt2" else wide))
    whole, stored = trained(base), trained(base, quantization=Quantization(bits=bits))
    kind = "Linear4bit" if bits == 4 else "Linear8bitLt"
    layers = [stored.model.get_submodule(f"base_model.model.{name}") for name in stored.target_modules]
    assert len(layers) == (8 if model_type == "gpt2" else 14)
    assert {type(layer.base_layer).__name__ for layer in layers} == {kind}
    assert stored.model.base_model.model.score.original_module.weight.dtype == torch.float32
    ids, mask = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with torch.no_grad():
        expected, found = whole(ids, mask), stored(ids, mask)
    assert 0 < (expected - found).norm() < 0.2 * expected.norm()
    stored.train()(ids, mask).sum().backward()
    assert all(layer.lora_A["default"].weight.grad.any() for layer in layers)


def test_what_reads_other_tokens_than_the_last_is_off_or_refused(make_base: Callable[..., Path]) -> None:
    base, encoder = str(make_base("qwen3")), str(make_base("bert"))
    model = TextClassifier(base, LABELS)
    assert model.pooling == model.identity.adapter["pooling"] == "last"
    assert model.speed_notes == ["14 LoRA layers merged in evaluation"]
    assert model.packed_batches.cannot == "the attention of architecture 'qwen3' is causal"
    assert [model.attention_for(training) for training in (True, False)] == ["eager", "sdpa"]
    old = {**model.identity.adapter, "pooling": "first"}  # what earlier versions wrote
    content = {"format": 1, **vars(model.identity), "adapter": old}
    checkpoint: dict[str, Any] = {}
    model.identity.write_to(checkpoint)
    key, stored = next(iter(checkpoint.items()))
    model.identity.check({key: {**content, "format": stored["format"]}})
    for settings, words in (
        ({"base_model": base, "pooling": "first"}, "model.pooling: first, but .* a language model, whose head reads"),
        ({"base_model": base, "pooling": "mean"}, "model.pooling: mean, but architecture 'qwen3' is a language model"),
        ({"base_model": encoder, "pooling": "last"}, "model.pooling: last, but architecture 'bert' is no language"),
        ({"base_model": base, "attention": "exact"}, "model.attention: exact attention is for encoders"),
        ({"base_model": str(make_base("gemma2")), "attention": "sdpa"}, "'gemma2' has no sdpa; leave it out"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            TextClassifier(label_names=LABELS, **settings)
        assert "\n" not in str(raised.value)
    from lightning import Trainer

    packed = TextClassifier(base, LABELS, speedups=Speedups(packing=True))
    with pytest.raises(UserError, match=r"model\.speedups\.packing: the attention .* is causal; leave it out"):
        packed.packed_batches.wanted(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
