"""Products of whole numbers against double precision, and a model that is evaluated with them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora.errors import UserError
from lightning_lora.models.speedups import Speedups, begin_evaluation, cast_frozen, end_evaluation
from lightning_lora.training.module import TextClassifier
from lightning_lora_amx import kernels
from lightning_lora_amx.encoder_layer import FusedEncoderLayer
from lightning_lora_amx.kernels import Int8Weight, Then, quantize

needs_kernels = pytest.mark.skipif(kernels.LIBRARY is None, reason=kernels.MISSING)
#: Rounding to bfloat16, by norm.
ROUNDINGS = 3e-3
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}


def apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The distance of two tensors by the norm of the second."""
    assert found.shape == truth.shape
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@needs_kernels
@pytest.mark.parametrize(("count", "width"), [(1, 32), (7, 64), (33, 100), (40, 17)])
def test_rows_count_in_units_of_their_largest(count: int, width: int) -> None:
    torch.manual_seed(count)
    rows = (torch.randn(count, width) * torch.logspace(-9, 3, count)[:, None]).bfloat16()
    found = quantize(rows)
    largest = rows.double().abs().amax(1)
    torch.testing.assert_close(found.units.double(), largest / 127, rtol=1e-6, atol=0)
    exact = rows.double() * (127 / largest)[:, None]
    assert found.rows.shape[1] % 64 == 0 and not found.rows[:, width:].any()
    assert (found.rows[:, :width] - exact).abs().max() <= 0.5 + 1e-4
    assert (found.rows.abs().amax(1) == 127).all()


@needs_kernels
def test_rows_of_nothing_are_nothing_and_what_is_not_finite_stays_so() -> None:
    rows = torch.ones(4, 64).bfloat16()
    rows[0], rows[1, 3], rows[2, 3] = 0, torch.nan, -torch.inf
    rows[3] = 1e-38
    weight = Int8Weight(torch.eye(64), None)
    found = weight.times(quantize(rows))
    assert not found[0].any() and not found[3].any()
    assert not found[1].isfinite().any() and not found[2].isfinite().all()


@needs_kernels
@pytest.mark.parametrize(
    ("count", "depth", "width"),
    [(1, 32, 17), (33, 64, 32), (50, 96, 100), (64, 800, 64), (70, 1600, 960), (200, 2048, 1024)],
)
def test_products_are_those_of_the_numbers(count: int, depth: int, width: int) -> None:
    """Each result is rounded once; columns in panels and depths in parts are among the sizes."""
    torch.manual_seed(depth)
    rows, other = torch.randn(count, depth).bfloat16(), torch.randn(count, width).bfloat16()
    matrix, bias = torch.randn(width, depth) / depth**0.5, torch.randn(width).bfloat16()
    units = matrix.double().abs().amax(1) / 127
    numbers = (matrix.double() / units[:, None]).round()
    weight, x = Int8Weight(matrix, bias), quantize(rows)
    exact = x.rows[:, :depth].double() @ numbers.T * x.units.double()[:, None] * units + bias.double()
    assert apart(weight.times(x), exact) < ROUNDINGS
    assert apart(weight.times(x, Then.ADDED, other), exact + other.double()) < ROUNDINGS
    activated = weight.times(x, Then.GELU_ALONE)
    assert apart(activated, F.gelu(exact)) < ROUNDINGS
    again, expected = weight.times_quantized(x, Then.GELU_ALONE), quantize(activated)
    assert torch.equal(again.rows, expected.rows) and torch.equal(again.units, expected.units)
    assert apart(weight.times(x), rows.double() @ matrix.double().T + bias.double()) < 0.02  # it is what it stands for


@needs_kernels
def test_gelu_is_that_of_the_function() -> None:
    """Of a product that is 0, the bias goes through it: from far below nought to far above."""
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64).bfloat16()
    weight = Int8Weight(torch.zeros(len(x), 64), x)
    found = weight.times(quantize(torch.ones(1, 64).bfloat16()), Then.GELU_ALONE)[0]
    exact = F.gelu(x.double())
    assert (found.double() - exact).abs().sub(exact.abs() * 2**-8).max() < 2e-5


@needs_kernels
def test_the_same_numbers_come_out_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    weight, rows = Int8Weight(torch.randn(2048, 1024), None), torch.randn(100, 1024).bfloat16()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(weight.times_quantized(quantize(rows), Then.GELU_ALONE))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].rows, other.rows) and torch.equal(found[0].units, other.units)


def classifier(base: str, method: str = "lora", **settings: object) -> TextClassifier:
    """A model in evaluation mode in bfloat16 whose adapters do something."""
    model = TextClassifier(base, ["a", "b"], method=method, **settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "classifier" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    cast_frozen(model.model, torch.bfloat16)
    return model.eval()


def logits(model: TextClassifier, int8: bool, low: bool = True) -> torch.Tensor:
    """Of a padded batch."""
    ids = torch.randint(5, 30, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    dtype, engine = torch.bfloat16 if low else None, "int8" if int8 else None
    begin_evaluation(model.model, dtype, model.speedups, engine)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = model(ids, mask)
    end_evaluation(model.model)
    return found


@needs_kernels
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_a_model_says_nearly_the_same_in_int8(make_base, model_type: str) -> None:
    sizes = {"dim": 64, "n_heads": 2, "hidden_dim": 96} if model_type == "distilbert" else SIZES
    base = str(make_base(model_type, **sizes))
    model = classifier(base)
    exact = classifier(base, speedups=Speedups(frozen_weights="float32", kernels=False)).float()
    exact.model.set_attn_implementation("eager")
    truth = logits(exact, False, low=False)
    before, found = logits(model, False), logits(model, True)
    assert apart(before, truth) < 0.02
    assert apart(found, before) > 0  # it was in int8
    assert apart(found, truth) < 0.04
    assert torch.equal(logits(model, False), before)  # and is no more


@needs_kernels
def test_adapters_are_part_of_the_numbers(make_base) -> None:
    model = classifier(str(make_base("bert", **SIZES)))
    before = logits(model, True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layer.0" in n and "lora_B" in n).mul_(-3)
    found = logits(model, True)
    assert apart(found, before) > 0.05
    assert apart(found, logits(model, False)) < 0.04


@needs_kernels
def test_all_layers_but_the_last_are_in_int8(make_base) -> None:
    model = classifier(str(make_base("bert", num_hidden_layers=3, **SIZES)))
    begin_evaluation(model.model, torch.bfloat16, Speedups(merged_evaluation=False), "int8")
    layers = [m for m in model.modules() if isinstance(m, FusedEncoderLayer)]
    assert [layer.int8_layer is not None for layer in layers] == [True, True, False]
    end_evaluation(model.model)
    assert not any(layer.int8_layer for layer in layers)


@needs_kernels
def test_a_run_that_cannot_is_refused(make_base) -> None:
    base, small = str(make_base("bert", **SIZES)), str(make_base("bert"))
    classifier(base).check_int8("bf16-mixed")
    for model, precision, said in (
        (classifier(base), "32-true", "trainer.precision bf16-mixed"),
        (classifier(base, attention="sdpa"), "bf16-mixed", "model.attention"),
        (classifier(base, "full"), "bf16-mixed", "leaves the encoder frozen"),
        (classifier(base, "dora"), "bf16-mixed", "at most LoRA"),
        (classifier(small), "bf16-mixed", "multiples of 32"),
    ):
        with pytest.raises(UserError, match=f"--int8: .*{said}.* main.py export"):
            model.check_int8(precision)


@needs_kernels
def test_a_layer_that_cannot_after_all_stops_the_evaluation(make_base) -> None:
    model = classifier(str(make_base("bert", **SIZES)))
    model.float()
    with pytest.raises(UserError, match="number format"):
        begin_evaluation(model.model, None, Speedups(), "int8")


@needs_kernels
@pytest.mark.parametrize("method", ["none", "head", "rslora"])
def test_methods_that_leave_layers_frozen_can(make_base, method: str) -> None:
    model = classifier(str(make_base("bert", num_hidden_layers=3, **SIZES)), method)
    assert model.check_int8("bf16-mixed") == 2
    assert 0 < apart(logits(model, True), logits(model, False)) < 0.04


@needs_kernels
def test_what_was_broken_off_is_undone_by_the_next(make_base) -> None:
    model = classifier(str(make_base("bert", **SIZES)))
    before = logits(model, False)
    begin_evaluation(model.model, torch.bfloat16, Speedups(), "int8")  # and no end
    assert torch.equal(logits(model, False), before)


@needs_kernels
def test_gradients_are_never_those_of_whole_numbers(make_base) -> None:
    model = classifier(str(make_base("bert", **SIZES)))
    begin_evaluation(model.model, torch.bfloat16, Speedups(), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        states = torch.randn(2, 8, 64).bfloat16().requires_grad_()
        layer = next(m for m in model.modules() if isinstance(m, FusedEncoderLayer))
        layer(states).sum().backward()
    assert states.grad is not None


def test_without_compiled_code_it_is_refused(tiny_base, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", None)
    monkeypatch.setattr(kernels, "MISSING", "this processor has no AMX")
    with pytest.raises(UserError, match="--int8: this processor has no AMX"):
        TextClassifier(str(tiny_base), ["a", "b"]).check_int8("bf16-mixed")
