"""Each replacement against the plain path: the same outputs and the same gradients."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, eager_mask

from lightning_lora.models import speedups
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.attention import EXACT, ExactAttention, exact_attention, torch_only
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import AdapterOptions, tune
from lightning_lora.models.speedups import (
    Speedups,
    begin_evaluation,
    cast_frozen,
    end_evaluation,
    install,
    lora_in_product,
)
from lightning_lora.training.module import AUTOCAST, TextClassifier
from tests.conftest import LANGUAGE_MODELS

#: What bfloat16 may change by norm; autocast alone changes 1.5 percent, of tiny language models 4.9.
SHARE = {**dict.fromkeys(ARCHITECTURES, 0.02), **dict.fromkeys(LANGUAGE_MODELS, 0.05)}
PLAIN = Speedups("float32", False, False, False, False, False)
#: bfloat16 has 8 bits: one rounding is off by up to 2^-9, and outputs are sums of roundings.
BF16 = {"rtol": 4e-2, "atol": 4e-2}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


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
    torch.testing.assert_close(ExactAttention.apply(q, k, v, added, 0.3, torch_only), expected)
    torch.autograd.gradcheck(lambda *x: ExactAttention.apply(*x, added, 0.3, torch_only), (q, k, v))


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
        found = ExactAttention.apply(q, k, v, added, 8**-0.5, torch_only)
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
    mask[1, 5:] = ids[1, 5:] = 0  # by the padding token's number language models find the last token
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
        cast_frozen(model.model, torch.bfloat16)
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
def test_in_bfloat16_logits_and_gradients_are_within_its_rounding_of_float32(make_base, model_type: str) -> None:
    """By their norm, beside autocast alone, which keeps weights and sums of layers in float32.

    The weights are such that no ReLU of a head is so near to 0 that rounding decides whether its gradient counts.
    """
    base = str(make_base(model_type, seed=1))
    truth = learnt(base, PLAIN, "eager", False)
    fast = learnt(base, Speedups(), "auto", True)

    def distance(found: dict[str, torch.Tensor], names: list[str]) -> float:
        apart = [found[name].float() - truth[name] if name in found else truth[name] for name in names]
        whole = torch.cat([truth[name].flatten() for name in names])
        return float(torch.cat([a.flatten() for a in apart]).norm() / whole.norm())

    for names in (["logits"], [name for name in truth if name != "logits"]):
        assert distance(fast, names) < SHARE[model_type]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_evaluation_with_all_speedups_is_one_without(make_base, model_type: str) -> None:
    """Float32, and bfloat16 within its rounding of it by norm; 12 tokens are what torch's softmax is slow at."""
    base = str(make_base(model_type))
    plain = prepared(base, PLAIN, "eager", False).eval()
    for low in (False, True):
        fast = prepared(base, Speedups(), "auto", low).eval()
        begin_evaluation(fast.model, torch.bfloat16 if low else None, Speedups())
        for width in (12, 32):
            with torch.inference_mode():
                truth = plain(*padded(width))
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    found = fast(*padded(width))
            if low:
                assert (found - truth).norm() < SHARE[model_type] * truth.norm()
            else:
                torch.testing.assert_close(found, truth, **FLOAT32)


def test_what_is_done_is_said_and_can_be_switched_off(tiny_base) -> None:
    base = load_base(str(tiny_base), ["a", "b"], 0)
    tuned = tune(base, "lora", AdapterOptions(), 0, False)
    assert install(base, PLAIN) == []
    done = ["last layer for the first token only", "12 LoRA layers merged in evaluation"]
    assert install(base, Speedups(kernels=False)) == done
    states = []
    base.model.bert.encoder.layer[-1].register_forward_hook(lambda m, i, out: states.append(out.shape))
    tuned.model(input_ids=torch.full((2, 9), 6))
    assert states == [(2, 1, 32)]


class AddNorm:
    """In place of the kernel."""

    used = 0

    def add_norm_works(self, width: int, device: torch.device) -> bool:
        return width == 32

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        self.used += 1
        states = x.float() + residual.float()
        return F.layer_norm(states, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).bfloat16()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kernel", [None, AddNorm])
@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES} - {*LANGUAGE_MODELS} | {"gpt2", "phi"}))
def test_states_in_bfloat16_between_layers_give_the_logits_of_float32(
    make_base, monkeypatch: pytest.MonkeyPatch, model_type: str, kernel: type[AddNorm] | None, method: str
) -> None:
    """As a GPU evaluates; by norm within three percent (autocast: 1.5). Afterwards norms are as before."""
    add_norm = kernel and kernel()
    monkeypatch.setattr(speedups, "on_gpu", lambda model: True)
    monkeypatch.setattr(speedups, "triton_kernels", lambda: add_norm)
    base = str(make_base(model_type))
    truth, model = (TextClassifier(base, ["a", "b", "c"], method=method).eval() for _ in range(2))
    norms, seen = [m for m in model.modules() if type(m) is nn.LayerNorm], list[torch.dtype]()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        begin_evaluation(model.model, torch.bfloat16, Speedups())
        for norm in norms:
            norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        found = model(*padded(32))
        end_evaluation(model.model)
        after = norms[0](torch.randn(2, norms[0].normalized_shape[0]))
    expected = truth(*padded(32))
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert set(seen[:-1]) == {torch.bfloat16} and after.dtype == torch.float32
    if add_norm is not None:
        fused = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2")
        assert (add_norm.used > 0) == (model_type in fused)


@pytest.mark.parametrize(("method", "fused"), [("lora", 2), ("full", 2), ("dora", 0)])
def test_gelu_is_computed_within_the_product_before_it(
    make_base, monkeypatch: pytest.MonkeyPatch, method: str, fused: int
) -> None:
    """Of layers whose adapter is merged; as torch's exact GELU up to what bfloat16 rounds to."""
    monkeypatch.setattr(speedups, "on_gpu", lambda model: True)
    model = TextClassifier(str(make_base("bert")), ["a", "b"], method=method).eval()
    layers = [m for name, m in model.model.named_modules() if name.endswith("intermediate")]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    x, calls = torch.randn(3, 5, 32), list[int]()
    plain = speedups.gelu_of_product
    monkeypatch.setattr(speedups, "gelu_of_product", lambda *given: calls.append(1) or plain(*given))
    with torch.inference_mode():
        wanted = [layer(x) for layer in layers]
        begin_evaluation(model.model, torch.bfloat16, Speedups())
        found = [layer(x) for layer in layers]
        end_evaluation(model.model)
        assert len(calls) == fused
        for layer, got, value in zip(layers, found, wanted, strict=True):
            assert (got.float() - value).norm() < 0.01 * value.norm()
            assert torch.equal(layer(x), value)
    assert len(calls) == fused


@pytest.mark.parametrize("method", ["lora", "bitfit", "head", "full"])
def test_only_frozen_weights_are_lowered(tiny_base, method: str) -> None:
    model = TextClassifier(str(tiny_base), ["a", "b"], method=method)
    cast_frozen(model.model, torch.bfloat16)
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
    layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (layer.base_layer.weight + layer.scaling["default"] * product).detach()
    begin_evaluation(model.model, dtype, Speedups())
    torch.testing.assert_close(layer.base_layer.weight, expected.to(dtype or torch.float32), check_dtype=True)
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
        assert not any(m.merged for m in model.modules() if isinstance(m, lora.Linear))
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in ends[2].items():  # of the run that never stopped to validate
        assert torch.equal(value, ends[0][name]) and torch.equal(value, ends[1][name]), name
    assert used == {("train", model.attention_for(True)), ("validate", model.attention_for(False))}
    assert torch.cuda.is_available() or used == {("train", "eager"), ("validate", "sdpa")}


@pytest.mark.parametrize("changes", [{}, {"alpha": 5}, {"dropout": 0.5}])
def test_what_lora_adds_in_a_product_is_what_peft_adds(tiny_base: Path, changes: dict[str, float]) -> None:
    base = load_base(str(tiny_base), ["neg", "pos"], 1)
    tuned = tune(base, "lora", AdapterOptions(**changes), 1, False)  # type: ignore[arg-type]
    layer = next(m for m in tuned.model.modules() if isinstance(m, lora.Linear))
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = []
    for forward in (layer.forward, partial(lora_in_product, layer, "default")):
        torch.manual_seed(0)
        out = forward(x)
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), [x, *trained])])
    for got, value in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
