"""Fused layers against the plain path: the same outputs and the same gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.attention import EXACT
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import AdapterOptions, tune
from lightning_lora.models.speedups import Speedups, cast_frozen, install
from lightning_lora_amx.encoder_layer import LAYERS, FusedEncoderLayer
from lightning_lora_amx.fused_linear import add_product, fuse_bias, fuse_lora, one_pass
from tests.conftest import slow_but
from tests.models.test_speedups import (  # noqa: F401  # run again, with the plugin
    BF16,
    FLOAT32,
    test_a_model_with_all_speedups_learns_what_it_would_without,
    test_an_evaluation_with_all_speedups_is_one_without,
    test_an_evaluation_with_merged_adapters_is_that_of_the_adapters,
    test_in_bfloat16_logits_and_gradients_are_within_its_rounding_of_float32,
)


def lora_pair(bias: bool, frozen: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer and the fused one around the same weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 16, bias=bias)))
    nn.init.normal_(theirs[0].lora_B["default"].weight)
    if frozen != torch.float32:
        cast_frozen(theirs, frozen)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours) == 1
    return theirs, ours


def outcome(module: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient for a random direction."""
    inputs = inputs.detach().requires_grad_()
    out = module(inputs)
    out.float().mul(torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "inputs": inputs.grad, **grads}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["float32", "autocast", "lowered"])
def test_a_fused_lora_layer_is_pefts(bias: bool, mode: str) -> None:
    theirs, ours = lora_pair(bias, torch.bfloat16 if mode == "lowered" else torch.float32)
    inputs = torch.randn(3, 5, 24, dtype=torch.bfloat16 if mode == "lowered" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode != "float32"):
        expected, got = outcome(theirs, inputs), outcome(ours, inputs)
    assert got.keys() == expected.keys()
    assert {"0.lora_A.default.weight", "0.lora_B.default.weight"} < got.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        scale = value.abs().max() if mode != "float32" else 1
        torch.testing.assert_close(got[name] / scale, value / scale, **(FLOAT32 if mode == "float32" else BF16))


def test_the_fused_gradients_are_those_of_the_function() -> None:
    ours = lora_pair(True)[1]
    ours.double()
    inputs = torch.randn(2, 3, 24, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(lambda x, a, b: ours(x), (inputs, *(p for p in ours.parameters() if p.requires_grad)))


def test_a_fused_layer_stays_pefts_when_merged_disabled_or_dropped_out() -> None:
    theirs, ours = lora_pair(True)
    inputs = torch.randn(3, 24)
    for change in ("merge", "disable"):
        for layer in (theirs[0], ours[0]):
            layer.merge() if change == "merge" else layer.enable_adapters(False)
        torch.testing.assert_close(ours(inputs), theirs(inputs), **FLOAT32)
        for layer in (theirs[0], ours[0]):
            layer.unmerge() if change == "merge" else layer.enable_adapters(True)
    ours[0].lora_dropout["default"] = nn.Dropout(0.5)
    assert not torch.equal(ours(inputs), ours(inputs))


@pytest.mark.parametrize("targets", slow_but(["all_linear"], ["all_linear", "query_value", ["output.dense"]]))
@pytest.mark.parametrize("model_type", list(LAYERS))
def test_an_encoder_layer_in_one_step_has_the_gradients_of_its_function(make_base, model_type: str, targets) -> None:
    """Of padded states in double precision, for a layer and for the last one, which goes on with the first token."""
    if targets == ["output.dense"]:  # the feed-forward block's second alone
        targets = [ARCHITECTURES[model_type].feed_forward_out]
    base = load_base(str(make_base(model_type)), ["a", "b"], 0)
    tune(base, "lora", AdapterOptions(rank=2, target_modules=targets), 0, False)
    install(base, Speedups())
    base.model.double().set_attn_implementation(EXACT)
    layers = [module for module in base.model.modules() if isinstance(module, FusedEncoderLayer)]
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.double)
    mask[1, ..., 3:] = torch.finfo(torch.double).min
    torch.manual_seed(0)
    for layer in (layers[0], layers[-1]):
        states = torch.randn(2, 5, layer.parts.norms[0].normalized_shape[0], dtype=torch.double, requires_grad=True)
        adapters = [p for p in layer.parameters() if p.requires_grad]
        for adapter in adapters:
            nn.init.normal_(adapter, std=0.3)
        assert layer.weights(states) is not None  # it is computed in one step
        torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x, mask), (states, *adapters), atol=1e-4)


def test_a_layer_that_has_more_to_do_computes_as_ever(tiny_base) -> None:
    """Active dropout, another attention, and numbers of another format are for the layer's own modules."""
    base = load_base(str(tiny_base), ["a", "b"], 0)
    tune(base, "lora", AdapterOptions(), 0, False)
    install(base, Speedups())
    base.model.set_attn_implementation(EXACT)
    layer = next(module for module in base.model.modules() if isinstance(module, FusedEncoderLayer)).train()
    states = torch.randn(2, 5, 32)
    assert layer.weights(states) is not None
    layer.parts.dropouts[0].p = 0.1
    assert layer.weights(states) is None
    assert layer.eval().weights(states) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weights(states) is None
    base.model.set_attn_implementation("eager")
    assert layer.weights(states) is None
    assert layer(states).shape == states.shape


@pytest.mark.parametrize("rows", [700, 900, 1100])
def test_a_product_in_pieces_is_the_product(rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1536).bfloat16(), torch.randn(384, 1536).bfloat16()
    bias, added = torch.randn(384).bfloat16(), torch.randn(rows, 384).bfloat16()
    truth = x.double() @ weight.double().t() + bias.double() + added.double()
    found = one_pass(x, weight, bias, added).double()
    assert (found - truth).norm() < 0.01 * truth.norm()
    into = added.clone()
    assert add_product(into, x, weight.t()) is into
    assert (into.double() - (truth - bias.double())).norm() < 0.01 * truth.norm()


def test_a_frozen_layer_with_its_bias_in_one_pass_is_the_layer() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)
    cast_frozen(theirs, torch.bfloat16)
    ours = copy.deepcopy(theirs)
    assert fuse_bias(ours) == 1
    for dtype in (torch.bfloat16, torch.float32):  # autocast lowers the second
        inputs = torch.randn(3, 5, 24, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = outcome(theirs, inputs), outcome(ours, inputs)
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            torch.testing.assert_close(got[name], value, **BF16)
    # In another format, or once it is trained, it is torch's own.
    ours.float()
    torch.testing.assert_close(ours(inputs), theirs.float()(inputs), rtol=0, atol=0)
    ours.requires_grad_()
    assert "0.weight" in outcome(ours, inputs)
