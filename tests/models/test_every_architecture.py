"""Every architecture that transformers classifies sequences with trains by the default settings or is refused."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as ARCHITECTURES

from lightning_lora.config.configured_run import check_base
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError
from lightning_lora.models.methods import merged
from lightning_lora.training.module import TextClassifier
from tests.models.tiny_bases import POSITIONS, save_tiny_base

#: In the suite; the others are slow together.
USUAL = {"bert", "roberta", "deberta-v2", "gpt2", "qwen2", "longformer", "xlnet", "data2vec-text", "phimoe", "bart"}
USUAL |= {"mpnet", "big_bird", "convbert", "funnel", "xlm-roberta-xl", "luke", "roberta-prelayernorm", "gemma3_text"}
#: What is refused by the default settings, and how the refusal begins.
REFUSED = {
    "canine": "architecture 'canine' reads the padding",
    "fnet": "architecture 'fnet' reads the padding",
    "ibert": "no plain linear layer",
    "layoutlmv2": "detectron2",
    "nystromformer": "architecture 'nystromformer' reads the padding",
    "perceiver": "perceiver.decoder",
    "reformer": "data.max_length: 80, but the base model takes at most 64",
    "squeezebert": "no plain linear layer",
    "t5gemma": "architecture 't5gemma' reads the padding",
    "t5gemma2": "architecture 't5gemma2' reads the padding",
    "xlnet": "architecture 'xlnet' reads the padding",
    "yoso": "architecture 'yoso' reads the padding",
}
#: Tokens that positions are offset by: as many are missing from the table's end.
_BY_ONE = (
    "camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm roberta roberta-prelayernorm "
    "xlm-roberta xlm-roberta-xl xmod"
)
OFFSET = dict.fromkeys(_BY_ONE.split(), 1) | {"mpnet": 2}


def parameters() -> list:
    return [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


def build(folder: Path, max_length: int, precision: str | None, **settings: object) -> TextClassifier:
    """What ``fit`` does before it trains."""
    padding = settings.pop("padding", "longest")
    model = TextClassifier(str(folder), ["a", "b", "c"], **settings)
    data = TextDataModule("nothing.csv", str(folder), max_length=max_length, padding=padding)
    check_base(model, data, precision)
    return model


@pytest.mark.parametrize("model_type", parameters())
def test_it_trains_or_is_refused_in_one_line(tmp_path: Path, model_type: str) -> None:
    if model_type == "layoutlmv2":  # whose model needs a library that is not here
        pytest.importorskip("detectron2")
    folder = save_tiny_base(tmp_path / "base", model_type)
    limit = POSITIONS - OFFSET.get(model_type, 0)
    try:
        model = build(folder, limit, "bf16-mixed")
    except UserError as error:
        assert "\n" not in str(error)
        assert REFUSED.get(model_type, "nothing") in str(error)
        return
    assert model_type not in REFUSED
    if limit < POSITIONS:
        with pytest.raises(UserError, match=f"data.max_length: {limit + 1}, .* at most {limit} tokens"):
            build(folder, limit + 1, "bf16-mixed")
    # One step as in training, with a text as long as the model takes.
    ids = torch.full((2, limit), 0)
    ids[0], ids[1, :4] = torch.arange(limit) % 12 + 5, torch.tensor([2, 7, 9, 3])
    ids[0, 0], ids[0, -1] = 2, 3
    mask = (ids != 0).long()
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(ids, mask), torch.tensor([0, 1]))
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients if g is not None)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    # In full precision, it says what plain transformers says with the same weights.
    ours = TextClassifier(str(folder), ["a", "b", "c"]).eval()
    with torch.no_grad():
        said = ours(ids, mask)
        merged(ours.tuned).save_pretrained(tmp_path / "merged")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="float32").eval()
        each = [
            plain(input_ids=i[m == 1][None], attention_mask=m[m == 1][None]).logits
            for i, m in zip(ids, mask, strict=True)
        ]
    torch.testing.assert_close(said, torch.cat(each), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "remedy"),
    [
        ("xlnet", {"padding": "max_length"}),
        ("yoso", {"padding": "max_length"}),
        ("t5gemma", {"padding": "max_length"}),
        ("squeezebert", {"method": "full"}),
        ("ibert", {"method": "head"}),
    ],
)
def test_the_remedy_of_a_refusal_is_one(tmp_path: Path, model_type: str, remedy: dict[str, str]) -> None:
    folder = save_tiny_base(tmp_path / "base", model_type)
    with pytest.raises(UserError) as raised:
        build(folder, 64, "bf16-mixed")
    assert all(value in str(raised.value) for value in remedy.values())
    build(folder, 64, "bf16-mixed", **remedy)


@pytest.mark.parametrize(
    ("model_type", "settings"), [("fnet", {"padding": "max_length"}), ("xmod", {"method": "full"})]
)
def test_what_bfloat16_cannot_is_said_with_what_can(tmp_path: Path, model_type: str, settings: dict[str, str]) -> None:
    folder = save_tiny_base(tmp_path / "base", model_type)
    with pytest.raises(UserError, match=r"cannot compute in bf16-mixed .*; set trainer\.precision: 32-true$"):
        build(folder, 64, "bf16-mixed", **settings)
    build(folder, 64, "32-true", **settings)


@pytest.mark.parametrize("limit", [17, 63])
def test_the_limit_that_is_named_is_the_tables(tmp_path: Path, limit: int) -> None:
    folder = save_tiny_base(tmp_path / "base", "roberta", max_position_embeddings=limit + 1)
    with pytest.raises(UserError, match=f"data.max_length: 64, .* set data.max_length: {limit} or less") as raised:
        build(folder, 64, None)
    assert "\n" not in str(raised.value)
    build(folder, limit, None)


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "base", "ibert")  # which counts the range of what it sees
    data = TextDataModule("nothing.csv", str(folder), max_length=64)
    model = TextClassifier(str(folder), ["a", "b"], method="full")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_base(model, data, None)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


@pytest.mark.parametrize("model_type", ["big_bird", "bigbird_pegasus"])
def test_a_long_text_gets_the_same_prediction_whatever_came_before(tmp_path: Path, model_type: str) -> None:
    """Transformers' sparse attention gives way to the full one with the first batch of less than 704 tokens."""
    base = save_tiny_base(tmp_path / "base", model_type, max_position_embeddings=832)
    fresh, model = (TextClassifier(str(base), ["a", "b"]).eval() for _ in range(2))
    ids = torch.randint(5, 30, (1, 832), generator=torch.Generator().manual_seed(0))
    ids[0, -1] = 3
    with torch.no_grad():
        model(ids[:, -20:], ids[:, -20:] ** 0)
        torch.testing.assert_close(model(ids, ids**0), fresh(ids, ids**0), rtol=0, atol=1e-7)
        merged(model.tuned).save_pretrained(tmp_path / "merged")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(ids, attention_mask=ids**0).logits, fresh(ids, ids**0), rtol=0, atol=1e-6)
