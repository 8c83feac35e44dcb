"""What the compiled code gives against torch's operations in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora.models.attention import TorchAttention, exact_attention
from lightning_lora.models.speedups import Speedups, cast_frozen
from lightning_lora.training.module import TextClassifier
from lightning_lora_amx import kernels
from lightning_lora_amx.attention import choose
from lightning_lora_amx.encoder_layer import FusedEncoderLayer
from lightning_lora_amx.fused_linear import SharedInput, Weights, shared_input
from lightning_lora_amx.kernels import Then

needs_kernels = pytest.mark.skipif(kernels.LIBRARY is None, reason=kernels.MISSING)
#: bfloat16 has 8 bits: a rounding is off by 2^-9 at most, by its norm by less; a result has one or a few of them.
ROUNDINGS = 5e-3


def apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The distance of two tensors by the norm of the second."""
    assert found.shape == truth.shape and found.dtype == torch.bfloat16
    return float((found.double() - truth).detach().norm() / truth.detach().norm())


def heads(length: int, width: int, batch: int = 2, count: int = 3) -> list[torch.Tensor]:
    """q, k, v of (B, H, T, D) as they lie in the results of linear layers, and the gradient of what comes out."""
    torch.manual_seed(length)
    states = [torch.randn(batch, length, count, width).bfloat16() for _ in range(4)]
    return [x.transpose(1, 2) for x in states[:3]] + states[3:]


def attention(*states: torch.Tensor) -> torch.Tensor:
    """In double precision, (B, T, H, D)."""
    return F.scaled_dot_product_attention(*(x.double() for x in states), scale=1.0).transpose(1, 2)


@needs_kernels
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "width"), [(2, 32), (16, 64), (17, 32), (33, 96), (48, 32), (64, 128), (130, 64)])
def test_attention_and_its_gradients_are_those_of_the_function(length: int, width: int, masked: bool) -> None:
    q, k, v, grad = heads(length, width)
    mask = torch.zeros(2, 1, 1, length)
    mask[1, ..., length // 2 :] = torch.finfo(torch.float32).min
    mask[0] = 3.0  # the same for all keys is none
    truths = [x.double().requires_grad_() for x in (q, k, v)]
    added = mask.double() if masked else None
    expected = F.scaled_dot_product_attention(*truths, attn_mask=added, scale=0.2).transpose(1, 2)
    gradients = torch.autograd.grad(expected, truths, grad.double())
    assert kernels.CompiledAttention.computes(q, k, mask)
    out, kept = kernels.CompiledAttention.forward(q, k, v, mask if masked else None, 0.2)
    assert apart(out, expected) < ROUNDINGS
    found = kernels.CompiledAttention.backward(grad, kept, 0.2)
    for got, value in zip(found, gradients, strict=True):
        assert apart(got, value) < ROUNDINGS


@needs_kernels
@pytest.mark.parametrize(("asking", "length", "width"), [(1, 40, 32), (12, 7, 384), (50, 20, 64)])
def test_there_may_be_more_or_fewer_queries_than_keys(asking: int, length: int, width: int) -> None:
    q, _, _, grad = heads(asking, width)
    _, k, v, _ = heads(length, width)
    mask = torch.zeros(2, 1, 1, length)
    mask[1, ..., 4:] = torch.finfo(torch.float32).min
    truths = [x.double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*truths, attn_mask=mask.double(), scale=0.1).transpose(1, 2)
    gradients = torch.autograd.grad(expected, truths, grad.double())
    out, kept = kernels.CompiledAttention.forward(q, k, v, mask, 0.1)
    assert apart(out, expected) < ROUNDINGS
    for got, value in zip(kernels.CompiledAttention.backward(grad, kept, 0.1), gradients, strict=True):
        assert apart(got, value) < ROUNDINGS


@needs_kernels
@pytest.mark.parametrize("length", [1, 7])
def test_keys_that_are_none_have_no_part_in_very_low_scores(length: int) -> None:
    q, _, v, grad = heads(length, 32)
    out, kept = kernels.CompiledAttention.forward(q, -9 * q, v, None, 1.0)
    assert out.isfinite().all()
    assert all(found.isfinite().all() for found in kernels.CompiledAttention.backward(grad, kept, 1.0))


@needs_kernels
def test_sums_are_float32_whatever_the_default_is() -> None:
    q, k, v, _ = heads(20, 32)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does
    try:
        _, kept = kernels.CompiledAttention.forward(q, k, v, None, 1.0)
        _, (stats,) = kernels.norm_forward(torch.ones(4, 32), nn.LayerNorm(32))
        products = kernels.row_products(torch.ones(4, 32), torch.ones(4, 32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {kept[4].dtype, stats.dtype, products.dtype} == {torch.float32}


@needs_kernels
def test_attention_takes_any_layout_and_large_scores() -> None:
    q, k, v, _ = heads(40, 32)
    large = (30 * q).contiguous()
    out, _ = kernels.CompiledAttention.forward(large, k, v.contiguous(), None, 1.0)
    assert apart(out, attention(large, k, v)) < ROUNDINGS
    nothing = torch.full((2, 1, 1, 40), torch.finfo(torch.bfloat16).min)  # a text of padding alone sees all of it
    out, _ = kernels.CompiledAttention.forward(q, k, v, nothing, 1.0)
    assert apart(out, attention(q, k, v)) < ROUNDINGS


@needs_kernels
def test_what_it_cannot_compute_is_left_to_torch() -> None:
    q, k, _, _ = heads(8, 32)
    can = kernels.CompiledAttention.computes
    assert can(q, k, None)
    assert not can(q.float(), k.float(), None)  # another number format
    assert not can(q, k[:, :1], None)  # keys that several heads share
    assert not can(q[..., :24], k[..., :24], None)  # heads of another width
    assert not can(q, k, torch.zeros(2, 1, 8, 8))  # a mask of each query


@needs_kernels
def test_the_same_numbers_come_out_with_any_number_of_threads() -> None:
    q, k, v, grad = heads(50, 32)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, kept = kernels.CompiledAttention.forward(q, k, v, None, 0.2)
        found.append([out, *kernels.CompiledAttention.backward(grad, kept, 0.2)])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def product(rows: int, depth: int, width: int, across: bool) -> tuple[torch.Tensor, ...]:
    """x (N, depth), W, b, y (N, 32) and L, of which W and L are as they are given, and W and L as they multiply."""
    torch.manual_seed(rows)
    x, bias, y = torch.randn(rows, depth).bfloat16(), torch.randn(width).bfloat16(), torch.randn(rows, 32).bfloat16()
    weight, low = torch.randn(depth, width).bfloat16() / 20, torch.randn(32, width).bfloat16() / 20
    given = [t.t().contiguous() if across else t for t in (weight, low)]
    return x, given[0], bias, y, given[1], weight.double(), low.double()


@needs_kernels
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 32, 32), (33, 64, 80), (64, 384, 8), (50, 800, 96)])
def test_a_linear_layer_is_the_product(rows: int, depth: int, width: int, across: bool) -> None:
    x, weight, bias, y, low, as_weight, as_low = product(rows, depth, width, across)
    form = kernels.pack(weight, across)
    truth = x.double() @ as_weight
    assert apart(kernels.linear(x, form, width, across), truth) < ROUNDINGS
    truth = truth + bias.double() + y.double() @ as_low
    assert apart(kernels.linear(x, form, width, across, bias, (y, low)), truth) < ROUNDINGS
    other = torch.randn(rows, width).bfloat16()
    for then, expected in ((Then.ADDED, truth + other), (Then.MULTIPLIED, truth * other)):
        assert apart(kernels.linear(x, form, width, across, bias, (y, low), then, other), expected) < ROUNDINGS
        into = other.clone()
        assert kernels.linear(x, form, width, across, bias, (y, low), then, into, into) is into
        assert apart(into, expected) < ROUNDINGS


@needs_kernels
def test_gelu_comes_with_its_derivative() -> None:
    """Of all that bfloat16 holds between -9 and 9, by a product with the unit matrix."""
    x = torch.linspace(-9, 9, 64 * 1000).bfloat16().view(1000, 64)
    truth = x.double().requires_grad_()
    expected = F.gelu(truth)
    (slope,) = torch.autograd.grad(expected.sum(), truth)
    form, found = kernels.pack(torch.eye(64).bfloat16(), True), torch.empty_like(x)
    out = kernels.linear(x, form, 64, True, None, None, Then.GELU, found)
    torch.testing.assert_close(out.double(), expected.detach(), atol=1e-4, rtol=2**-8)
    torch.testing.assert_close(found.double(), slope, atol=1e-4, rtol=2**-8)
    assert torch.equal(kernels.linear(x, form, 64, True, None, None, Then.GELU_ALONE), out)


@needs_kernels
@pytest.mark.parametrize(("rows", "rank", "width"), [(1, 32, 8), (100, 64, 400)])
def test_products_of_rows_are_in_float32(rows: int, rank: int, width: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(rows, rank).bfloat16(), torch.randn(rows, width).bfloat16()
    found = kernels.row_products(left, right)
    torch.testing.assert_close(found.double(), left.double().t() @ right.double(), atol=1e-4, rtol=1e-5)


@needs_kernels
def test_a_packed_weight_is_made_anew_when_the_weight_changes() -> None:
    weight = nn.Parameter(torch.randn(32, 32).bfloat16(), requires_grad=False)
    form = kernels.packed(weight, True)
    assert kernels.packed(weight, True) is form and kernels.packed(weight, False) is not form
    for change in ("in place", "another"):
        before = kernels.packed(weight, True)
        if change == "in place":
            weight.mul_(2)
        else:
            weight.data = torch.randn(32, 32).bfloat16()
        assert kernels.packed(weight, True) is not before
        assert torch.equal(kernels.packed(weight, True), kernels.pack(weight, True))
    of = id(weight)
    assert {key for key in kernels._packed if key[0] == of} == {(of, True), (of, False)}
    del weight
    assert not any(key[0] == of for key in kernels._packed)


@needs_kernels
@pytest.mark.parametrize("ranks", [(None, None, None), (4, None, 8), (None, 40, None), (8, 8, 20)])
def test_compiled_linear_layers_are_those_of_torch(ranks: tuple[int | None, ...]) -> None:
    """Of one input, with and without adapters: results, and all gradients."""
    torch.manual_seed(0)
    layers = []
    for rank in ranks:
        adapter = () if rank is None else (torch.randn(rank, 64) / 8, torch.randn(96, rank) / 8, 0.5)
        layers.append(Weights(torch.randn(96, 64).bfloat16() / 8, torch.randn(96).bfloat16(), *adapter))
    wide = [
        Weights(*(None if t is None else t.double() for t in (w.weight, w.bias, w.a, w.b)), w.scaling) for w in layers
    ]
    rows, added, into = (torch.randn(37, n).bfloat16() for n in (64, 96, 64))
    grads = [torch.randn(37, 96).bfloat16() for _ in layers]
    truth, ours = SharedInput(wide, torch.double), shared_input(layers, torch.bfloat16, True)
    expected, inner = truth.forward(rows.double(), added.double())
    below, adapters = truth.backward([g.double() for g in grads], rows.double(), inner, True, into.double())
    found, our_inner = ours.forward(rows, added)
    our_below, our_adapters = ours.backward(grads, rows, our_inner, True, into.clone())
    for got, value in zip([*found, our_below], [*expected, below], strict=True):
        assert apart(got, value) < ROUNDINGS
    assert len(our_adapters) == len(adapters)
    for got, value in zip(our_adapters, adapters, strict=True):
        assert got.dtype == torch.float32
        assert (got - value).norm() < ROUNDINGS * value.norm()


@needs_kernels
@pytest.mark.parametrize("width", [16, 400])
def test_a_norm_and_its_gradient_are_those_of_the_function(width: int) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width).bfloat16()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    rows, grad = (torch.randn(7, width) * 3 + 5).bfloat16(), torch.randn(7, width).bfloat16()
    truth = rows.double().requires_grad_()
    expected = F.layer_norm(truth, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    (gradient,) = torch.autograd.grad(expected, truth, grad.double())
    out, (stats,) = kernels.norm_forward(rows, norm)
    assert apart(out, expected) < ROUNDINGS
    assert apart(kernels.norm_backward(grad, rows, stats, norm), gradient) < ROUNDINGS


def outcome(base: str, compiled: bool, low: bool) -> dict[str, torch.Tensor]:
    """Logits and gradients of a padded batch, and how often the compiled attention computed."""
    model = TextClassifier(base, ["a", "b"], speedups=Speedups(kernels=compiled)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if low:
        cast_frozen(model.model, torch.bfloat16)
    ids = torch.randint(5, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logits = model(ids, mask)
        F.cross_entropy(logits, torch.tensor([0, 1, 1])).backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@needs_kernels
def test_what_lies_in_one_number_or_across_is_read_as_the_tensor_it_is() -> None:
    """A sum hands down one number as the gradient of all; a weight may be a transposed one."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(64).bfloat16()
    nn.init.normal_(norm.weight)
    rows, one = torch.randn(7, 64).bfloat16(), torch.ones(1, 1).bfloat16().expand(7, 64)
    _, (stats,) = kernels.norm_forward(rows, norm)
    assert torch.equal(
        kernels.norm_backward(one, rows, stats, norm), kernels.norm_backward(one.clone(), rows, stats, norm)
    )
    weight = torch.randn(64, 96).bfloat16()
    assert torch.equal(kernels.pack(weight.t(), True), kernels.pack(weight, False))
    q, k, v, grad = heads(20, 32)
    _, kept = kernels.CompiledAttention.forward(q, k, v, None, 0.2)
    wide = grad[:, :, :1].expand_as(grad)
    for a, b in zip(*(kernels.CompiledAttention.backward(g, kept, 0.2) for g in (wide, wide.clone())), strict=True):
        assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert", "modernbert"])
def test_a_model_learns_what_it_would_without(make_base, monkeypatch, model_type: str) -> None:
    """In bfloat16, within two percent of float32 by norm; in a fused layer, and in those that are not."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    if model_type == "distilbert":
        sizes = {"dim": 64, "n_heads": 2, "hidden_dim": 96}
    base, calls = str(make_base(model_type, **sizes)), []
    forward = kernels.CompiledAttention.forward
    monkeypatch.setattr(kernels.CompiledAttention, "forward", lambda *x: calls.append(x) or forward(*x))
    truth = outcome(base, False, False)
    assert not calls
    found = outcome(base, True, True)
    assert calls
    together = [torch.cat([outcome[n].flatten().float() for n in found]) for outcome in (found, truth)]
    assert (together[0] - together[1]).norm() < 0.02 * together[1].norm()


@needs_kernels
def test_it_is_said_which_layers_are_compiled(make_base) -> None:
    for wide, said in ((96, "2 encoder layers fused, 2 of them by"), (48, "2 encoder layers fused, 0 of them by")):
        base = str(make_base("bert", hidden_size=64, num_attention_heads=2, intermediate_size=wide))
        assert f"{said} AMX kernels" in TextClassifier(base, ["a", "b"]).speed_choices("bf16-mixed")
        off = TextClassifier(base, ["a", "b"], speedups=Speedups(kernels=False))
        assert not any("fused" in choice for choice in off.speed_choices("bf16-mixed"))


def test_without_them_torch_computes(tiny_base, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", None)
    q, k, v, _ = heads(8, 32)
    assert not kernels.CompiledAttention.computes(q, k, None)
    model = TextClassifier(str(tiny_base), ["a", "b"]).train()
    assert model.attention_for(True) == "exact"
    assert any(isinstance(module, FusedEncoderLayer) for module in model.modules())
    out, _ = exact_attention(nn.Module(), q, k, v, None, 0.2, choose=choose)
    torch.testing.assert_close(out, TorchAttention.forward(q, k, v, None, 0.2)[0])


def test_why_there_are_none_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert kernels._load() == (None, "this processor has no AMX")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(kernels, "COMPILED", tmp_path / "none.so")
    assert "needs a C compiler" in kernels._load()[1]
    kernels.COMPILED.write_text("no library")
    assert "cannot be loaded" in kernels._load()[1]


@needs_kernels
def test_code_of_another_version_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "VERSION", kernels.VERSION + 1)
    assert kernels._load() == (None, "the compiled code is of another version; install again")
