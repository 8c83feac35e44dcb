from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora.errors import UserError
from lightning_lora.evaluation.costs import parameter_counts
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import METHODS, AdapterOptions
from lightning_lora.models.quantization import Quantization
from lightning_lora.runs.checkpoints import load_checkpoint
from lightning_lora.training.module import TextClassifier
from tests.models.test_methods import INPUTS, LABELS, logits, step
from tests.runs.test_checkpoints import save

KINDS = {
    "int8": Quantization(bits=8),
    "nf4": Quantization(bits=4),
    "nf4-single": Quantization(bits=4, double_quant=False),
    "fp4": Quantization(bits=4, quant_type="fp4"),
}
#: bitsandbytes quantizes in blocks of 64, so that layers have to be at least that large.
SIZE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def base_path(make_base) -> Path:
    return make_base("bert", **SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_quantized_the_head_is_not_and_starts_like_any_other(base_path: Path, kind: str) -> None:
    import bitsandbytes as bnb

    assert KINDS[kind].label == kind
    model = load_base(str(base_path), LABELS, 0, KINDS[kind]).model
    plain = load_base(str(base_path), LABELS, 0).model
    wanted = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder.layer" in n]
    assert len(layers) == 12 and all(isinstance(layer, wanted) for layer in layers)
    for name in ("classifier", "bert.pooler.dense"):
        head = model.get_submodule(name)
        assert type(head) is nn.Linear and head.weight.dtype == torch.float32
    torch.testing.assert_close(model.classifier.weight, plain.classifier.weight, rtol=0, atol=0)
    # Close to the full model, and not equal to it: the weights were indeed rounded.
    difference = (logits(model) - logits(plain)).abs().max().item()
    assert 1e-6 < difference < 0.2


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.bits])
def test_every_method_trains_saves_and_loads_on_a_quantized_base(
    base_path: Path, tmp_path: Path, method: str, kind: str
) -> None:
    if KINDS[kind].bits not in METHODS[method].cpu_bits:
        with pytest.raises(UserError, match=f"'{method}' on 8 bits works on a GPU only; here it takes 4"):
            TextClassifier(str(base_path), LABELS, method, quantization=KINDS[kind])
        return

    def make() -> TextClassifier:
        return TextClassifier(str(base_path), LABELS, method, quantization=KINDS[kind])

    model = make()
    before = logits(model.model)
    if METHODS[method].trains:
        step(model.model)
        assert (logits(model.model) - before).abs().max() > 1e-3
    path = save(model, tmp_path / "a.ckpt")
    assert not any("absmax" in name or "SCB" in name for name in model.checkpoint_keys())
    again = make()
    load_checkpoint(again, path)
    torch.testing.assert_close(logits(again.model), logits(model.model))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_goes_on_after_an_evaluation(base_path: Path, kind: str) -> None:
    """Layers repacked for inference would pass no gradient to the adapters below them."""
    model = TextClassifier(str(base_path), LABELS, quantization=KINDS[kind])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model.train().model(**INPUTS).logits, torch.tensor([0, 1]))
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = gradients()
    logits(model.model)  # an evaluation
    after = gradients()
    assert before.keys() == after.keys() and any("layer.0" in name and "lora_B" in name for name in before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


@pytest.mark.parametrize("passes", [0, 1])
def test_layers_in_8_bits_multiply_by_their_weights_wherever_these_are(base_path: Path, passes: int) -> None:
    """Moved to another device or shared with another model, where a weight gets other data."""
    models = [load_base(str(base_path), LABELS, 0, KINDS["int8"]).model.eval() for _ in range(2)]
    expected = [logits(model) for model in models[: 2 * passes]]
    layers = [[m for m in model.modules() if type(m).__name__ == "Linear8bitLt"] for model in models]
    for one, other in zip(*layers, strict=True):
        other.weight.data = one.weight.data
    wanted = logits(models[0])
    torch.testing.assert_close(logits(models[1]), wanted, rtol=0, atol=0)
    assert all(torch.equal(each, wanted) for each in expected)
    for one, other in zip(*layers, strict=True):
        assert one.state.CB.data_ptr() == other.state.CB.data_ptr() == other.weight.data_ptr() == one.weight.data_ptr()


def test_a_checkpoint_of_a_quantized_base_is_refused_on_another(base_path: Path, tmp_path: Path) -> None:
    path = save(TextClassifier(str(base_path), LABELS, quantization=KINDS["nf4"]), tmp_path / "a.ckpt")
    for other, name in ((Quantization(), "none"), (KINDS["int8"], "int8")):
        with pytest.raises(UserError, match=f"trained with quantization 'nf4', not '{name}'"):
            load_checkpoint(TextClassifier(str(base_path), LABELS, quantization=other), path)


@pytest.mark.parametrize("method", ["full", "pissa", "bitfit"])
def test_a_method_that_changes_the_base_is_refused(base_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=f"method '{method}' changes the base model's weights"):
        TextClassifier(str(base_path), LABELS, method, quantization=KINDS["nf4"])


@pytest.mark.parametrize("options", [Quantization(bits=8, quant_type="fp4"), Quantization(double_quant=False)])
def test_an_option_that_would_be_ignored_is_refused(base_path: Path, options: Quantization) -> None:
    with pytest.raises(UserError, match="only bits: 4 uses it"):
        TextClassifier(str(base_path), LABELS, quantization=options)


def test_a_machine_that_cannot_quantize_says_so_in_one_line(base_path: Path, monkeypatch) -> None:
    from bitsandbytes import functional

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(functional, "quantize_4bit", fail)
    with pytest.raises(UserError, match=r"cannot quantize .* to 4 bits on this machine's cpu") as raised:
        TextClassifier(str(base_path), LABELS, quantization=KINDS["nf4"])
    assert "\n" not in str(raised.value)


def test_an_architecture_whose_head_is_not_known_is_not_quantized(make_base) -> None:
    with pytest.raises(UserError, match="head of architecture 'mpnet' is not known"):
        load_base(str(make_base("mpnet")), LABELS, 0, KINDS["int8"])


def test_the_compute_dtype_is_what_was_asked_for(base_path: Path) -> None:
    options = Quantization(bits=4, compute_dtype="bfloat16")
    model = load_base(str(base_path), LABELS, 0, options).model
    assert model.bert.encoder.layer[0].attention.self.query.compute_dtype == torch.bfloat16
    assert model(**INPUTS).logits.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_as_what_they_stand_for(base_path: Path, kind: str) -> None:
    counts = [parameter_counts(load_base(str(base_path), LABELS, 0, stored).model) for stored in (None, KINDS[kind])]
    assert counts[0]["total_params"] == counts[1]["total_params"]


def test_adapter_options_stay_what_they_are_on_a_quantized_base(base_path: Path) -> None:
    model = TextClassifier(str(base_path), LABELS, adapter=AdapterOptions(rank=2), quantization=KINDS["nf4"])
    weights = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert len(weights) == 12 and all(p.shape[0] == 2 and p.dtype == torch.float32 for p in weights)
