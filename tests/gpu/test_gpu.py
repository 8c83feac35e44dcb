"""What only a GPU can show: packed texts in its kernels, captured steps, and the whole path from fit to predict on it.

Run by ``make test-gpu``.
"""

import json
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_lora import children, load_run
from lightning_lora.cli import main
from lightning_lora.models import packed
from lightning_lora.training.module import TextClassifier
from tests.conftest import make_rows, write_csv, write_kind
from tests.models.test_packed import PACKS, both, rows
from tests.training.test_graphs import fit, stopped_by_a_rate, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
ON_GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", make_rows(300))


@pytest.mark.parametrize("longest", [40, 160])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", PACKS)
def test_packed_texts_give_the_logits_and_gradients_of_padded_ones(
    make_base: Callable[..., Path], model_type: str, precision: torch.dtype, longest: int
) -> None:
    """By the kernels for short texts, by FlashAttention for longer ones, and by padded copies in float32."""
    base = make_base(model_type, hidden_size=64, max_position_embeddings=200)
    model = TextClassifier(str(base), ["a", "b", "c"], "full").eval().cuda()
    found = []
    for batch in both(rows(count=12, longest=longest, top=200)):
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            logits = model.document_logits(batch.to("cuda"))
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"].cuda())
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append((logits, torch.autograd.grad(loss, parameters, allow_unused=True)))
    assert model.packed_batches.rejected is None
    (plain, expected), (logits, gradients) = found
    tolerance = 1e-4 if precision == torch.float32 else 0.05
    torch.testing.assert_close(logits, plain, rtol=tolerance, atol=tolerance)
    pairs = [(a, b) for a, b in zip(gradients, expected, strict=True) if b is not None]
    apart = torch.stack([(a - b).norm() for a, b in pairs]).norm() / torch.stack([b.norm() for _, b in pairs]).norm()
    assert apart < tolerance


def test_short_texts_are_attended_to_by_triton_and_long_ones_by_flash_attention() -> None:
    assert packed.short_attention() is not None
    q, k, v = (torch.randn(200, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 90, 90, 200], dtype=torch.int32, device="cuda")
    expected = packed.padded_attention(q, k, v, offsets, 128, 0.2, 0.0, None)
    for way in (packed.short_attention().ShortAttention.apply, packed.flash_attention):
        out = way(q, k, v, offsets, 128, 0.2, None)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
        weights = torch.randn_like(expected)
        wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v), retain_graph=True)
        for got, value in zip(torch.autograd.grad((out * weights).sum(), (q, k, v)), wanted, strict=True):
            torch.testing.assert_close(got, value, rtol=0.05, atol=0.05)


def test_kernels_that_are_compiled_ahead_are_those_that_a_step_uses() -> None:
    from lightning_lora.models import triton_kernels as kernels

    device = torch.device("cuda", 0)
    futures.wait(kernels.compile_kernels([64, 128], 3, 32, torch.float16, device))
    made = [len(kernel.device_caches[0][0]) for kernel in (kernels._forward, kernels._backward)]
    for longest in (64, 128):
        shape = (200, 9 * 32)
        q, k, v = (torch.randn(shape, device=device).half()[:, :96].view(200, 3, 32).requires_grad_() for _ in range(3))
        offsets = torch.tensor([0, longest, 200 - longest, 200], dtype=torch.int32, device=device)
        kernels.ShortAttention.apply(q, k, v, offsets, longest, 0.2, None).sum().backward()
    assert [len(kernel.device_caches[0][0]) for kernel in (kernels._forward, kernels._backward)] == made


def test_a_cell_of_an_ablation_can_use_the_gpu(tmp_path: Path) -> None:
    """Forked from a process that has imported what does not start the GPU's driver: else each imports all again."""
    assert children.child_context().get_start_method() == "forkserver"
    started = [children.start_child(children._use_gpu, tmp_path / f"{i}.txt") for i in range(2)]
    assert children.join_children(started) == [0, 0]


@pytest.mark.parametrize("width", [32, 384, 768])
def test_a_sum_is_normalized_by_triton_as_by_torch(width: int) -> None:
    from lightning_lora.models.triton_kernels import add_norm_works  # which imports Triton

    assert add_norm_works(width, torch.device("cuda", 0))


def test_the_gradient_of_long_texts_is_summed_in_a_fixed_order() -> None:
    q, k, v = (torch.randn(4000, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 1000, 2000, 3000, 4000], dtype=torch.int32, device="cuda")
    weights = torch.randn(4000, 12, 64, device="cuda", dtype=torch.bfloat16)

    def gradients() -> tuple[torch.Tensor, ...]:
        out = packed.flash_attention(q, k, v, offsets, 1000, 0.125, None)
        return torch.autograd.grad((out * weights).sum(), (q, k, v))

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("trainer", "model"),
    [
        ({"precision": "32-true"}, {}),
        ({"precision": "bf16-mixed"}, {"method": "full"}),
        ({"precision": "bf16-mixed", "accumulate_grad_batches": 3}, {"method": "dora"}),
        ({"precision": "bf16-mixed", "gradient_clip_val": None}, {"frozen_dropout": True}),
    ],
)
def test_captured_steps_learn_bit_for_bit_what_plain_ones_learn(
    tiny_base: Path, reviews: Path, trainer: dict[str, Any], model: dict[str, Any]
) -> None:
    """The learning rate is constant: a captured step has it in float32, a plain one in float64."""
    constant = {"schedule": "constant", "warmup_ratio": 0, **model}
    plain = fit(tiny_base, reviews, False, trainer | ON_GPU, **constant)
    found = fit(tiny_base, reviews, True, trainer | ON_GPU, **constant)
    again = fit(tiny_base, reviews, True, trainer | ON_GPU, **constant)
    assert found.not_captured is None and found.packed_batches.rejected is None
    for name, value in trained(plain).items():
        assert torch.equal(trained(found)[name], trained(again)[name]), name
        torch.testing.assert_close(trained(found)[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("precision", "pooling"), [("32-true", "first"), ("bf16-mixed", "mean")])
@pytest.mark.parametrize(
    ("kind", "labels", "model"),
    [
        (
            "multi_label",
            ("mixed", "neg", "pos"),
            {"task": "multi_label", "class_weights": "balanced", "threshold": "per_label", "calibrate": True},
        ),
        ("regression", ("label",), {"task": "regression"}),
        ("pairs", ("other", "same"), {"calibrate": True, "label_smoothing": 0.1}),
    ],
)
def test_other_kinds_of_labels_and_texts_are_learnt_alike_padded_packed_and_captured(
    make_base: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    labels: tuple[str, ...],
    model: dict[str, Any],
    precision: str,
    pooling: str,
) -> None:
    base = make_base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data, rows = write_kind(tmp_path / "rows.csv", kind, 150), tmp_path / "rows.csv"
    settings = {"schedule": "constant", "warmup_ratio": 0, "pooling": pooling, **model}
    padded, plain, found, again = (
        fit(
            base, rows, graphs, {"precision": precision} | ON_GPU, packing=packing, data=data, labels=labels, **settings
        )
        for packing, graphs in ((False, False), (True, False), (True, True), (True, True))
    )
    assert found.not_captured is None and found.packed_batches.not_used == {}
    for name, value in trained(plain).items():
        assert torch.equal(trained(found)[name], trained(again)[name]), name
        torch.testing.assert_close(trained(found)[name], value, rtol=1e-4, atol=1e-5)
    for name in ("train/loss", "val/loss"):
        expected = float(padded.trainer.callback_metrics[name])
        assert float(found.trainer.callback_metrics[name]) == pytest.approx(expected, rel=0.05, abs=0.01), name


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_language_model_is_trained_on_padded_batches(
    make_base: Callable[..., Path], reviews: Path, model_type: str
) -> None:
    model = fit(make_base(model_type), reviews, "auto", {"precision": "bf16-mixed"} | ON_GPU, packing="auto")  # type: ignore[arg-type]
    assert "padded" in str(model.not_captured)
    assert float(model.trainer.callback_metrics["val/accuracy"]) > 0.6


@pytest.mark.parametrize("truncation", ["head", "windows"])
def test_baselines_are_those_that_a_cpu_gives(tiny_base: Path, reviews: Path, tmp_path: Path, truncation: str) -> None:
    """Those that read texts compute on the CPU; the probe follows a model whose batches are packed."""
    config = {
        "model": {"base_model": str(tiny_base), "method": "head"},
        "data": {"source": str(reviews), "max_length": 12, "truncation": truncation, "cache_dir": str(tmp_path / "c")},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "precision": "32-true"},
    }
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(config))
    found = []
    for name in ("gpu", "cpu"):
        common = ["--logs_dir", str(tmp_path), "--name", name, "--trainer.accelerator", name]
        assert main(["fit", "--config", str(tmp_path / "gpu.yaml"), *common]) == 0
        assert main(["test", "--run", str(tmp_path / name), "--baselines", "true"]) == 0
        record = json.loads((tmp_path / name / "run.json").read_text())
        found.append(record["evaluations"]["test"]["baselines"])
    for name, expected in found[1].items():
        assert found[0][name]["loss"] == pytest.approx(expected["loss"], rel=0.01), name


def test_a_step_that_is_not_finite_stops_the_run_with_the_weights_before_it(tiny_base: Path, reviews: Path) -> None:
    stopped = [stopped_by_a_rate(tiny_base, reviews, graphs, ON_GPU) for graphs in (False, True)]
    (plain, (module, error)) = stopped
    assert error.step == plain[1].step and error.rows == plain[1].rows
    for name, value in trained(plain[0]).items():
        torch.testing.assert_close(trained(module)[name], value)


def test_a_loss_that_cannot_be_captured_is_trained_plainly(tiny_base: Path, reviews: Path) -> None:
    class Asks(TextClassifier):
        """A loss that asks the device for a number."""

        def configure_losses(self) -> None:
            self.criterion = lambda logits, labels: (
                self.weighted_cross_entropy(logits, labels) * (logits.sum().item() > -1e9)
            )

    found = [fit(tiny_base, reviews, graphs, ON_GPU, Asks) for graphs in (True, False)]
    assert "capturing" in str(found[0].not_captured)
    for name, value in trained(found[0]).items():
        assert torch.equal(trained(found[1])[name], value), name
    assert fit(tiny_base, reviews, True, ON_GPU).not_captured is None  # what failed has left nothing behind


def fit_words(place: Path, base: Path, source: Path) -> list[str]:
    """The command that trains a run in a folder, but for its name."""
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3, "schedule": "constant", "warmup_ratio": 0},
        "data": {"source": str(source), "max_length": 32, "cache_dir": str(place / "cache")},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False},
    }
    (place / "gpu.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(place / "gpu.yaml"), "--logs_dir", str(place)]


def test_the_whole_path_on_a_gpu(tiny_base: Path, reviews: Path, tmp_path: Path) -> None:
    """fit, its resumption, test, predict and export; what was resumed is what was never stopped, bit for bit."""
    common = fit_words(tmp_path, tiny_base, reviews)
    assert main([*common, "--name", "whole"]) == 0
    assert main([*common, "--name", "parts", "--trainer.max_epochs", "1"]) == 0
    assert main(["fit", "--resume", str(tmp_path / "parts"), "--trainer.max_epochs", "2"]) == 0
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["speed"]["steps"] == "captured as CUDA graphs" and "texts packed" in record["speed"]["choices"]
    weights = [torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=False) for n in ("whole", "parts")]
    for name, value in weights[0]["state_dict"].items():
        assert torch.equal(weights[1]["state_dict"][name], value), name
    assert main(["test", "--run", str(tmp_path / "whole")]) == 0
    evaluated = json.loads((tmp_path / "whole" / "run.json").read_text())["evaluations"]["test"]["after"]
    assert evaluated["accuracy"] > 0.8
    texts = [text for text, _ in make_rows(40, seed=5)]
    on_gpu, on_cpu = (load_run(tmp_path / "whole", accelerator=a).predict(texts) for a in ("gpu", "cpu"))
    assert (on_gpu.predicted == on_cpu.predicted).mean() > 0.95
    loaded = load_run(tmp_path / "whole", accelerator="gpu")
    for start in range(0, 40, 5):  # the later ones by a captured pass, which other texts had captured
        part = loaded.predict(texts[start : start + 5])
        np.testing.assert_allclose(part.logits, on_gpu.logits[start : start + 5], rtol=0.05, atol=0.05)
    assert loaded.model.packed_batches._captured and loaded.model.device.type == "cuda"
    assert loaded.model.packed_batches.not_used == {}
    assert main(["export", "--run", str(tmp_path / "whole"), "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_run_is_tested_and_exported(
    make_base: Callable[..., Path], reviews: Path, tmp_path: Path, bits: int
) -> None:
    """Its base is made on the GPU, and compared on the CPU."""
    base = make_base("bert", hidden_size=64, intermediate_size=128)
    words = [*fit_words(tmp_path, base, reviews), "--model.quantization.bits", str(bits)]
    assert main([*words, "--name", "run"]) == 0
    assert main(["test", "--run", str(tmp_path / "run"), "--baselines", "true"]) == 0
    assert main(["export", "--run", str(tmp_path / "run"), "--formats", "[adapter, merged]"]) == 0


def test_served_runs_answer_as_predict_does(tiny_base: Path, reviews: Path, tmp_path: Path) -> None:
    """Two runs that share a base, the later batches by captured passes."""
    pytest.importorskip("fastapi", reason="needs the plugin 'serve'")
    from lightning_lora_serve.served_run import ServedRun, SharedWeights

    words = fit_words(tmp_path, tiny_base, reviews)
    for seed, name in enumerate(("one", "two")):
        assert main([*words, "--name", name, "--seed_everything", str(seed)]) == 0
    shared, texts = SharedWeights(), [text for text, _ in make_rows(40, seed=5)]
    runs = [ServedRun(tmp_path / name, "best", shared, merged=False) for name in ("one", "two")]
    assert runs[1].shared_bytes > 0 and not runs[0].concurrent
    for run in runs:
        expected, tokens = load_run(tmp_path / run.name).predict(texts), run.loaded.dataset(texts).tokens
        with torch.inference_mode():
            for start in range(0, 40, 5):
                part = slice(start, start + 5)
                found = run.logits([tokens[i] for i in range(*part.indices(40))], texts[part])
                np.testing.assert_allclose(found, expected.logits[part], rtol=0.05, atol=0.05)
        assert run.model.packed_batches._captured and run.model.packed_batches.not_used == {}
