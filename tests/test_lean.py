"""What is left out of imports is left out, and whatever needs it still gets it."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    start = "import sys; from lightning_lora import lean; lean.install(); lean.install(); "
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + code], text=True, capture_output=True, check=True
    ).stdout


def test_training_loads_neither_the_compiler_nor_scipys_signals() -> None:
    heavy = ["torch._inductor.compile_fx", "scipy.signal"]
    code = f"import lightning_lora.commands.fit; print([name for name in {heavy} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_scipys_signals_can_be_had_afterwards() -> None:
    code = "import torchmetrics, scipy.signal; print(scipy.signal.windows.hamming(3).sum())"
    assert float(run(code)) == pytest.approx(0.08 + 1 + 0.08)


def test_torch_compiles_as_ever_and_what_was_put_off_compiles_when_called() -> None:
    code = (
        "import torch; real = torch.compile\n"
        "with lean.compiling_later():\n"
        "    late = torch.compile(lambda x: x + 1, backend='eager')\n"
        "    @torch.compile(backend='eager')\n"
        "    def later(x): return x + 2\n"
        "import bitsandbytes\n"
        "one = torch.ones(1)\n"
        "print(torch.compile is real, late(one).item(), later(one).item(), bitsandbytes.__file__ != '')"
    )
    assert run(code).split() == ["True", "2.0", "3.0", "True"]
