"""Each replacement against the plain path: the same outputs and the same gradients."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, eager_mask

from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.attention import EXACT, ExactAttention, exact_attention
from lightning_lora.models.base import load_base
from lightning_lora.models.encoder_layer import FusedEncoderLayer
from lightning_lora.models.fused_linear import FrozenLinear, FusedLora, add_product, one_pass
from lightning_lora.models.methods import AdapterOptions, tune
from lightning_lora.models.speedups import (
    Speedups,
    begin_evaluation,
    end_evaluation,
    fuse_bias,
    fuse_lora,
    install,
    lower_frozen,
)
from lightning_lora.training.module import AUTOCAST, TextClassifier

PLAIN = Speedups("float32", False, False, False, False, False, False)
#: bfloat16 has 8 bits: one rounding is off by up to 2^-9, and outputs are sums of roundings.
BF16 = {"rtol": 4e-2, "atol": 4e-2}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def lora_pair(bias: bool, frozen: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer and the fused one around the same weights."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 16, bias=bias)))
    nn.init.normal_(theirs[0].lora_B["default"].weight)
    if frozen != torch.float32:
        lower_frozen(theirs, frozen)
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


@pytest.mark.parametrize("mask", ["none", "padding", "full"])
@pytest.mark.parametrize("queries", [7, 1])
def test_exact_attention_is_attention_and_so_are_its_gradients(mask: str, queries: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.double, requires_grad=True) for n in (queries, 7, 7))
    added = None
    if mask != "none":
        added = torch.zeros(2, 1, 1 if mask == "padding" else queries, 7, dtype=torch.double)
        added[1, ..., 4:] = torch.finfo(torch.double).min
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ExactAttention.apply(q, k, v, added, 0.3, False), expected)
    torch.autograd.gradcheck(lambda *x: ExactAttention.apply(*x, added, 0.3, False), (q, k, v))


@pytest.mark.parametrize("width", [24, 32, 104])
def test_exact_attention_in_bfloat16_is_attention(width: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, width, 8, requires_grad=True) for _ in range(3))
    added = torch.zeros(2, 1, width, width)
    added[1, ..., 4:] = torch.finfo(torch.float32).min
    added[1, :, 5] = torch.finfo(torch.float32).min  # padding that sees no other token, as in windows of attention
    weights = torch.randn(2, width, 3, 8)
    expected = ((q @ k.mT * 8**-0.5 + added).softmax(-1) @ v).transpose(1, 2)
    truth = [expected, *torch.autograd.grad((expected * weights).sum(), (q, k, v))]
    with torch.autocast("cpu", torch.bfloat16):
        found = ExactAttention.apply(q, k, v, added, 8**-0.5, False)
    assert found.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # torch's own, for an even width
        evaluated, _ = exact_attention(nn.Module(), q, k, v, added)
    torch.testing.assert_close(evaluated.float() / expected.abs().max(), expected / expected.abs().max(), **BF16)
    for got, value in zip([found, *torch.autograd.grad((found * weights).sum(), (q, k, v))], truth, strict=True):
        torch.testing.assert_close(got.float() / value.abs().max(), value / value.abs().max(), **BF16)


def test_the_mask_is_that_of_transformers() -> None:
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    sizes = {"batch_size": 2, "q_length": 4, "kv_length": 4, "dtype": torch.float32}
    make = AttentionMaskInterface()[EXACT]
    ours = make(**sizes, mask_function=bidirectional_mask_function, attention_mask=present)
    theirs = eager_mask(**sizes, mask_function=bidirectional_mask_function, attention_mask=present)
    assert ours.shape == (2, 1, 1, 4)
    torch.testing.assert_close(ours.expand_as(theirs), theirs)
    assert make(**sizes, mask_function=bidirectional_mask_function, attention_mask=present | True) is None

    def window(batch: object, head: object, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (q - kv).abs() <= 1

    sliding = make(**sizes, mask_function=window, attention_mask=present)
    torch.testing.assert_close(sliding, eager_mask(**sizes, mask_function=window, attention_mask=present))


def padded(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of three texts, one of them padded, and their mask."""
    ids = torch.randint(5, 30, (3, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, width, dtype=torch.long)
    mask[1, 5:] = 0
    return ids, mask


def prepared(base: str, speedups: Speedups, attention: str, low: bool) -> TextClassifier:
    """A model without dropout whose adapters do something, as a run in float32 or bf16-mixed has it."""
    model = TextClassifier(base, ["a", "b", "c"], speedups=speedups, attention=attention, frozen_dropout=False)
    for module in model.modules():  # also the head's, so that all see the same
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if low and model.lowers_frozen("bf16-mixed"):
        lower_frozen(model.model, torch.bfloat16)
    return model.train()


def learnt(base: str, speedups: Speedups, attention: str, low: bool) -> dict[str, torch.Tensor]:
    """Logits and gradients of one padded batch."""
    model = prepared(base, speedups, attention, low)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logits = model(*padded(12))
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_model_with_all_speedups_learns_what_it_would_without(make_base, model_type: str) -> None:
    """Logits and gradients of every architecture, padded batch, float32."""
    base = str(make_base(model_type))
    plain, fast = learnt(base, PLAIN, "eager", False), learnt(base, Speedups(), "auto", False)
    # Behind the last attention only the first token counts; a fused layer may hand out no gradient instead of zeros.
    assert {name for name, value in plain.items() if value.any()} <= fast.keys()
    for name, value in fast.items():
        torch.testing.assert_close(value, plain[name], **FLOAT32)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_in_bfloat16_logits_and_gradients_are_within_two_percent_of_float32(make_base, model_type: str) -> None:
    """By their norm; autocast alone, which keeps weights and sums of layers in float32, has up to 1.2 percent.

    The weights are such that no ReLU of a head is so near to 0 that rounding decides whether its gradient counts.
    """
    base = str(make_base(model_type, seed=1))
    truth = learnt(base, PLAIN, "eager", False)
    plain, fast = learnt(base, PLAIN, "eager", True), learnt(base, Speedups(), "auto", True)

    def distance(found: dict[str, torch.Tensor], names: list[str]) -> float:
        apart = [found[name].float() - truth[name] if name in found else truth[name] for name in names]
        whole = torch.cat([truth[name].flatten() for name in names])
        return float(torch.cat([a.flatten() for a in apart]).norm() / whole.norm())

    for names in (["logits"], [name for name in truth if name != "logits"]):
        assert distance(plain, names) < 0.015
        assert distance(fast, names) < 0.02


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_evaluation_with_all_speedups_is_one_without(make_base, model_type: str) -> None:
    """Float32, and bfloat16 within two percent of it by norm; 12 tokens are what torch's softmax is slow at."""
    base = str(make_base(model_type))
    plain = prepared(base, PLAIN, "eager", False).eval()
    for low in (False, True):
        fast = prepared(base, Speedups(), "auto", low).eval()
        begin_evaluation(fast.model, torch.bfloat16 if low else None)
        for width in (12, 32):
            with torch.inference_mode():
                truth = plain(*padded(width))
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    found = fast(*padded(width))
            if low:
                assert (found - truth).norm() < 0.02 * truth.norm()
            else:
                torch.testing.assert_close(found, truth, **FLOAT32)


def test_what_is_done_is_said_and_can_be_switched_off(tiny_base) -> None:
    base = load_base(str(tiny_base), ["a", "b"], 0)
    tuned = tune(base, "lora", AdapterOptions(), 0, False)
    assert install(base, PLAIN) == []
    done = ["last layer for the first token only", "12 LoRA layers fused, merged in evaluation"]
    done += ["2 encoder layers in one step each"]
    assert install(base, Speedups()) == done
    assert sum(isinstance(m, FusedLora) for m in tuned.model.modules()) == 12
    states = []
    base.model.bert.encoder.layer[-1].register_forward_hook(lambda m, i, out: states.append(out.shape))
    tuned.model(input_ids=torch.full((2, 9), 6))
    assert states == [(2, 1, 32)]


@pytest.mark.parametrize("targets", ["all_linear", "query_value", ["output.dense"]])
@pytest.mark.parametrize("model_type", [name for name, entry in ARCHITECTURES.items() if entry.layer])
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


@pytest.mark.parametrize("method", ["lora", "bitfit", "head", "full"])
def test_only_frozen_weights_are_lowered(tiny_base, method: str) -> None:
    model = TextClassifier(str(tiny_base), ["a", "b"], method=method)
    lower_frozen(model.model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lowered = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert bool(lowered) == (method != "full")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.full((2, 9), 6), torch.ones(2, 9)).sum().backward()
    assert model.lowers_frozen("bf16-mixed") == (method != "full")
    assert not model.lowers_frozen("32-true")


# In a process of its own, as the heap is what other tests left; it grows by a few blocks before it has room for all.
_FAULTS = """
import resource, sys, torch
from lightning_lora.devices import keep_freed_memory
if not keep_freed_memory():
    sys.exit(77)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):  # 32 MiB each: 8,192 pages
    torch.ones(8 * 2**20).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == 77:
        pytest.skip("another C library")
    assert int(done.stdout) < 60 * 8192 / 4, done.stderr  # without it 60 * 8192


def test_a_frozen_layer_with_its_bias_in_one_pass_is_the_layer() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)
    lower_frozen(theirs, torch.bfloat16)
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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_evaluation_with_merged_adapters_is_that_of_the_adapters(tiny_base, precision: str) -> None:
    dtype = AUTOCAST.get(precision)
    model = TextClassifier(str(tiny_base), ["a", "b"]).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "classifier" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def logits() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            return model(ids, mask)

    apart = logits()
    begin_evaluation(model.model, dtype)
    layer = next(m for m in model.modules() if isinstance(m, FusedLora))
    expected = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    torch.testing.assert_close(layer.evaluated_weight, expected.detach().to(dtype or torch.float32))
    scale = apart.abs().max()
    torch.testing.assert_close(logits() / scale, apart / scale, **(BF16 if dtype else FLOAT32))
    merged = logits()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(logits(), merged)  # what is merged is not looked at again, until it is taken apart
    end_evaluation(model.model)
    assert (logits() - apart).abs().max() > 0.1
    for name, value in model.state_dict().items():
        assert name in before and (torch.equal(value, before[name]) or "lora_B" in name)


def test_training_goes_on_as_it_was_after_a_validation(tiny_base, reviews) -> None:
    from lightning import Callback, Trainer

    from lightning_lora.data.datamodule import TextDataModule

    used: set[tuple[str, str]] = set()

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            used.add(("train", pl_module.model.config._attn_implementation))

        def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
            used.add(("validate", pl_module.model.config._attn_implementation))

    ends = []
    for merged, validate in ((True, True), (False, True), (True, False)):
        data = TextDataModule(str(reviews), str(tiny_base), max_length=32)
        model = TextClassifier(str(tiny_base), data.label_names, speedups=Speedups(merged_evaluation=merged))
        model.known_architecture = False  # of those that are, attention is the same in both modes
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [Watch()]}
        when = {"val_check_interval": 1} if validate else {"limit_val_batches": 0}
        Trainer(max_epochs=2, accelerator="cpu", precision="32-true", **when, **quiet).fit(model, data)
        assert all(m.evaluated_weight is None for m in model.modules() if isinstance(m, FusedLora))
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in ends[2].items():  # of the run that never stopped to validate
        assert torch.equal(value, ends[0][name]) and torch.equal(value, ends[1][name]), name
    assert used == {("train", model.attention_for(True)), ("validate", model.attention_for(False))}
    assert torch.cuda.is_available() or used == {("train", "eager"), ("validate", "sdpa")}


def test_biases_are_said_to_be_taken_along_where_they_are(tiny_base) -> None:
    model = TextClassifier(str(tiny_base), ["a", "b"], adapter=AdapterOptions(target_modules="query_value"))
    layers = sum(isinstance(module, FrozenLinear) for module in model.modules())
    said = f"{layers} linear layers with their bias in one pass"
    assert (said in model.speed_choices("bf16-mixed")) == bool(layers)
    assert not any("bias" in choice for choice in model.speed_choices("32-true"))
