"""Packed texts against padded ones, over all architectures: the same logits and gradients."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AttentionInterface, AutoModel, AutoModelForSequenceClassification

from lightning_lora.data.batching import LengthBatchSampler, TokenDataset
from lightning_lora.data.datamodule import make_loader
from lightning_lora.data.tokens import InputFormat, TokenRows
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.head import scale_output
from lightning_lora.models.packed import PACKED, packed_attention, padded_attention
from lightning_lora.models.speedups import Speedups
from lightning_lora.training.module import TextClassifier

PACKS = [name for name, architecture in ARCHITECTURES.items() if architecture.packs]


def rows(keep: str = "head", count: int = 9, longest: int = 40, top: int = 60) -> TokenDataset:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, top, count)
    ids = draw.integers(5, 30, lengths.sum()).astype(np.int32)
    input_format = InputFormat((2,), (3,), 0, longest, keep, 4 if keep == "windows" else 0)  # type: ignore[arg-type]
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)))
    tokens = TokenRows(pa.chunked_array([pa.ListArray.from_arrays(offsets, ids)]))
    return TokenDataset(tokens, input_format, draw.integers(0, 3, count), pad_to_max=False)


def both(data: TokenDataset) -> list[dict]:
    order = list(range(len(data)))
    plain = data.__getitems__(order)
    # Room for more tokens and windows than there are.
    data.pack_like([[*order, 0]])
    return [plain, data.__getitems__(order)]


@pytest.mark.parametrize("keep", ["head", "windows"])
@pytest.mark.parametrize("first_token_only", [True, False])
@pytest.mark.parametrize("model_type", PACKS)
def test_packed_texts_give_the_logits_and_gradients_of_padded_ones(
    make_base: Callable[..., Path], model_type: str, first_token_only: bool, keep: str
) -> None:
    # Sliding windows of attention shorter than the texts; positions that count.
    changes = {"local_attention": 8, "global_attn_every_n_layers": 2} if model_type == "modernbert" else {}
    base = make_base(model_type, **changes)
    speedups = Speedups(first_token_only=first_token_only, kernels=False)
    model = TextClassifier(str(base), ["a", "b", "c"], "full", speedups=speedups)
    assert model.packed_batches.cannot is None
    assert_packed_as_padded(model.eval(), rows(keep))


def test_every_length_of_attention_is_checked(make_base: Callable[..., Path]) -> None:
    """Short texts may have kernels of their own, which a first batch of long ones does not use."""
    model = TextClassifier(str(make_base()), ["a", "b", "c"], speedups=Speedups(kernels=False)).eval()

    def wrong(module: Any, query: Any, key: Any, value: Any, *args: Any, **more: Any) -> Any:
        out = packed_attention(module, query, key, value, *args, **more)[0]
        return (out * 0 if more["max_length_q"] <= 16 else out), None

    AttentionInterface.register(PACKED, wrong)
    try:
        for longest, used in ((40, {}), (12, {"packing not used"})):
            with torch.no_grad():
                logits = [model.document_logits(batch) for batch in both(rows(longest=longest, top=longest))]
            assert set(model.packed_batches.not_used) == set(used)
            torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def test_numbers_far_from_0_do_not_hide_a_difference(make_base: Callable[..., Path]) -> None:
    base = make_base()
    model = TextClassifier(str(base), ["label"], task="regression", speedups=Speedups(kernels=False)).eval()
    scale_output(model.model, 1e4, 30.0)

    def wrong(module: Any, query: Any, *args: Any, **more: Any) -> Any:
        return packed_attention(module, query, *args, **more)[0] * 0, None

    AttentionInterface.register(PACKED, wrong)
    try:
        with torch.no_grad():
            model.document_logits(both(rows())[1])
        assert set(model.packed_batches.not_used) == {"packing not used"}
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def assert_packed_as_padded(model: TextClassifier, data: TokenDataset) -> None:
    found = []
    for batch in both(data):
        logits = model.document_logits(batch)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append((logits, dict(zip(parameters, gradients, strict=True))))
    assert model.packed_batches.rejected is None
    (plain, expected), (packed, gradients) = found
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        if gradient is not None:  # an unused pooler has none
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("model_type", PACKS)
def test_packed_hidden_states_are_those_that_transformers_gives_each_text_alone(
    make_base: Callable[..., Path], model_type: str
) -> None:
    folder = make_base(model_type)
    model = AutoModel.from_pretrained(folder).eval()
    texts = [torch.randint(5, 30, (n,)) for n in (7, 1, 20)]
    alone = torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in texts])
    offsets = torch.tensor([0, 7, 8, 28], dtype=torch.int32)
    first = 1 if model_type in ("roberta", "xlm-roberta", "camembert") else 0  # behind the padding token's number, 0
    positions = torch.cat([torch.arange(len(text)) for text in texts]) + first
    model.set_attn_implementation(PACKED)
    packed = model(
        input_ids=torch.cat(texts)[None], position_ids=positions[None], cu_seq_lens_q=offsets, max_length_q=20
    ).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_architectures_outside_the_table_and_of_other_attention_say_why_they_are_padded(
    make_base: Callable[..., Path],
) -> None:
    assert "code of its own" in str(TextClassifier(str(make_base("deberta-v2")), ["a", "b"]).packed_batches.cannot)
    mean = make_base("modernbert", classifier_pooling="mean")
    assert "mean of all tokens" in str(TextClassifier(str(mean), ["a", "b"]).packed_batches.cannot)


def test_tokens_that_belong_to_no_text_get_no_gradient_and_no_nan() -> None:
    q, k, v = (torch.randn(12, 2, 4, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 5, 8, 8, 8, 12], dtype=torch.int32)  # two texts, two that are not there, and the rest
    out = padded_attention(q, k, v, offsets, 5, 0.5, 0.0, None)
    assert out.isfinite().all()
    out[:8].sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and not tensor.grad[8:].any()


def test_a_model_that_reads_packed_texts_otherwise_is_given_padded_ones(
    make_base: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def across_texts(module: object, query: torch.Tensor, *args: object, **kwargs: object) -> object:
        one = torch.tensor([0, query.shape[2]], dtype=torch.int32)
        return packed_attention(module, query, *args, **kwargs | {"cu_seq_lens_q": one, "max_length_q": query.shape[2]})  # type: ignore[arg-type]

    AttentionInterface.register(PACKED, across_texts)
    try:
        model = TextClassifier(str(make_base()), ["a", "b", "c"]).eval()
        plain, packed = both(rows())
        expected = model.document_logits(plain)
        torch.testing.assert_close(model.document_logits(packed), expected, rtol=1e-5, atol=1e-5)
    finally:
        AttentionInterface.register(PACKED, packed_attention)
    assert "packing not used: packed and padded batches differ by" in capsys.readouterr().err


def test_the_plain_model_of_transformers_is_the_truth(make_base: Callable[..., Path]) -> None:
    model = TextClassifier(str(make_base()), ["a", "b", "c"], "head").eval()
    plain, packed = both(rows())
    truth = AutoModelForSequenceClassification.from_pretrained(make_base(), num_labels=3).eval()
    truth.load_state_dict(model.model.state_dict())
    expected = truth(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"]).logits
    torch.testing.assert_close(model.document_logits(packed), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_compared_too_also_after_an_evaluation_and_nan_is_a_difference(
    make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SpoilsGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, out: torch.Tensor) -> torch.Tensor:
            return out.view_as(out)

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * torch.nan

    def right_forward_only(*args: object, **kwargs: object) -> object:
        return SpoilsGradients.apply(packed_attention(*args, **kwargs)[0]), None  # type: ignore[arg-type]

    AttentionInterface.register(PACKED, right_forward_only)
    try:
        model = TextClassifier(str(make_base()), ["a", "b", "c"], "full").eval()
        _, packed = both(rows())
        with torch.no_grad():
            model.document_logits(packed)
        assert model.packed_batches.rejected is None
        model.document_logits(packed)
        assert "differ by nan" in str(model.packed_batches.rejected)
        assert copy.deepcopy(model).packed_batches.rejected == model.packed_batches.rejected
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def test_a_loader_without_packing_after_one_with_it_pads(make_base: Callable[..., Path]) -> None:
    data, sampler = rows(), LengthBatchSampler(rows().lengths, 4, 0)
    assert "packed" in next(iter(make_loader(data, sampler, True)))
    assert "input_ids" in next(iter(make_loader(data, sampler)))
