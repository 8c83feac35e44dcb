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


def test_training_loads_neither_the_compiler_nor_what_draws_and_assigns() -> None:
    heavy = ["torch._inductor.compile_fx", "scipy.signal", "scipy.optimize", "matplotlib"]
    code = f"import lightning_lora.commands.fit; print([name for name in {heavy} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_scipys_signals_can_be_had_afterwards() -> None:
    code = "import torchmetrics, scipy.signal; print(scipy.signal.windows.hamming(3).sum())"
    assert float(run(code)) == pytest.approx(0.08 + 1 + 0.08)


def test_torchmetrics_draws_as_ever() -> None:
    code = (
        "import torch, torchmetrics, matplotlib; matplotlib.use('agg')\n"
        "metric = torchmetrics.classification.MulticlassConfusionMatrix(3)\n"
        "metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]))\n"
        "figure, axes = metric.plot()\n"
        "from matplotlib.figure import Figure\n"
        "from torchmetrics.utilities import plot\n"
        "ours = plot.matplotlib.axes.Axes is matplotlib.axes.Axes\n"
        "print(isinstance(figure, Figure), plot.plt.Figure is Figure, ours)"
    )
    assert run(code).split() == ["True"] * 3


def test_a_matplotlib_that_is_there_already_stays() -> None:
    code = (
        "import matplotlib, torchmetrics; from torchmetrics.utilities import plot; print(plot.matplotlib is matplotlib)"
    )
    assert run(code).strip() == "True"


def test_losses_assign_as_ever() -> None:
    code = (
        "import transformers.loss.loss_utils, sys; print('scipy.optimize' in sys.modules)\n"
        "from transformers.loss import loss_for_object_detection as loss\n"
        "print(loss.linear_sum_assignment([[4, 1], [2, 0]])[1].tolist())\n"
        "import scipy.optimize; print(scipy.optimize.linear_sum_assignment([[4, 1], [2, 0]])[1].tolist())"
    )
    assert run(code).splitlines() == ["False", "[1, 0]", "[1, 0]"]


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
